"""Go back to the last good state and on without the samples that led away from it."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.errors import BadWorld
from trainer.observe.jsonl import JsonLines, read_rows
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.comm import Comm
from trainer.runtime.snapshot import Snapshot

log = logging.getLogger(__name__)

ROLLBACKS = "rollbacks.jsonl"


class Rollback:
    """Rolls one rank back, in step with all others."""

    def __init__(
        self, run: Path, snapshot: Snapshot, comm: Comm, *, max_tries: int, attempt: int
    ) -> None:
        """Take what is restored.

        Args:
            run: Run directory; rank 0 writes `rollbacks.jsonl` there.
            snapshot: The last good state.
            comm: Of all ranks.
            max_tries: Rollbacks to one state before the run ends.
            attempt: Number of the attempt.
        """
        self._run, self._snapshot, self._comm = run, snapshot, comm
        self._max_tries, self._attempt = max_tries, attempt
        self._tries: tuple[int, int] = (0, -1)

    def __call__(
        self,
        *,
        step: int,
        fault: str,
        ids: Tensor,
        losses: Tensor,
        exclude: Callable[[list[int]], None] | None,
    ) -> TrainState:
        """Restore the last good state; return where it stands.

        Args:
            step: The one that went wrong.
            fault: What was wrong with it.
            ids: ``(N,)`` int64, this rank's samples of the step.
            losses: ``(N,)``, theirs.
            exclude: Leaves samples out from now on; None where the stream cannot.

        Raises:
            BadWorld: There were too many of them, or the stream cannot leave samples out.
        """
        state = self._snapshot.state
        assert state is not None
        before, since = self._tries
        tries = before + 1 if since == state.step else 1
        if exclude is None or tries > self._max_tries:
            raise BadWorld(self._end(step, fault, tries - 1, can_exclude=exclude is not None))
        self._tries = (tries, state.step)
        guilty = self._guilty(ids, losses)
        exclude(guilty)
        self._snapshot.put_back()
        if self._comm.rank == 0:
            self._write_down(step, fault, state, guilty)
        return state

    def _end(self, step: int, fault: str, tries: int, *, can_exclude: bool) -> str:
        tried = f"It was rolled back {tries} times (rollback.max_tries) since the last checkpoint."
        if not can_exclude:
            tried = "data.reader=webdataset cannot leave samples out, so it is not rolled back."
        return (
            f"{fault} at step {step}. {tried} What was saved stands. A lower "
            "optim.learning_rate or a smaller optim.clip_grad_norm may help."
        )

    def _guilty(self, ids: Tensor, losses: Tensor) -> list[int]:
        """Name the samples whose own loss is not finite, of all ranks; without any, all."""
        bad = ~losses.isfinite()
        mine = torch.stack([ids.cpu(), bad.long().cpu()], dim=1).numpy().astype("<i8")
        told = b"".join(self._comm.gather_bytes(mine.tobytes()))
        every = np.frombuffer(told, "<i8").reshape(-1, 2)
        chosen = every[every[:, 1] == 1] if every[:, 1].any() else every
        return sorted(chosen[:, 0].tolist())

    def _write_down(self, step: int, fault: str, state: TrainState, guilty: list[int]) -> None:
        row = {
            "attempt": self._attempt,
            "step": step,
            "fault": fault,
            "back_to_step": state.step,
            "excluded_ids": guilty,
        }
        record = JsonLines(self._run / ROLLBACKS)
        record.append([row])
        record.close()
        log.warning(
            "step %d: %s. Back to step %d, and on without %d samples, which %s names.",
            step,
            fault,
            state.step,
            len(guilty),
            self._run / ROLLBACKS,
        )


def excluded_ids(run: Path) -> set[int]:
    """Read which samples the rollbacks of a run left out."""
    path = run / ROLLBACKS
    rows = read_rows(path) if path.exists() else []
    return {number for row in rows for number in row["excluded_ids"]}
