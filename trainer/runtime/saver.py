"""Save checkpoints while training goes on: a copy in memory, a writer in the background, a record.

All ranks call together. What a rank's writer did is told to the others at step boundaries, so
that no rank ever waits in a collective for another one's disk.
"""

import logging
import secrets
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from trainer.config_engine import CheckpointConfig
from trainer.data.publish import publish_bytes, publish_json, sync_folder
from trainer.errors import BadInput, BadWorld
from trainer.place import explain, is_local, read_bytes, remove
from trainer.runtime.checkpoint import (
    KINDS,
    LATEST,
    File,
    Record,
    TrainState,
    read_record,
    record_json,
)
from trainer.runtime.comm import Comm
from trainer.runtime.retention import fates
from trainer.runtime.rundir import RECORD, complete, step_folder
from trainer.runtime.snapshot import Snapshot
from trainer.runtime.tensors import write_tensors

log = logging.getLogger(__name__)

FENCE = "writer"
_FACTS = struct.Struct("<Q32s")
_OK, _FAILED, _SUPERSEDED = 0.0, 1.0, 1e6


class Superseded(BadWorld):
    """Another attempt of the run has begun; this one must end, and not come back."""


class Saver:
    """Writes the checkpoints of one rank's attempt."""

    def __init__(
        self,
        root: Path,
        snapshot: Snapshot,
        comm: Comm,
        policy: CheckpointConfig,
        *,
        attempt: int,
        shapes: dict[str, list[int]],
        averages: list[str],
        best: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Claim the run's checkpoints for this attempt, and sweep what others left half written.

        Args:
            root: Folder or URL of the run's checkpoints.
            snapshot: What is written; nobody else may take it meanwhile.
            comm: Of all ranks.
            policy: Which checkpoints stay.
            attempt: Number of the attempt.
            shapes: Full shape of every trained parameter.
            averages: Names of the moving averages, the first the one to sample from.
            best: Images seen at the best checkpoint so far.
        """
        self._root, self._snapshot, self._comm, self._policy = root, snapshot, comm, policy
        self._attempt, self._shapes, self._averages = attempt, shapes, averages
        self._best = best
        self.published: TrainState | None = None
        """Of the newest checkpoint of this attempt that is there as a whole."""
        token = secrets.randbits(32) if comm.rank == 0 else 0
        self._token = f"{int(comm.from_rank_0(token)):08x}"
        if comm.rank == 0:
            _make(root)
            publish_bytes(root / FENCE, self._token.encode())
            _sweep(root)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._stage: Literal["idle", "writing", "publishing"] = "idle"
        self._work: Future[list[File]] = Future()

    def save(self, state: TrainState) -> None:
        """Copy everything and begin to write; waits for the one before, if that is not done.

        Raises:
            Superseded: See there.
        """
        self.finish()
        self._snapshot.take(state)
        self._stage, self._work = "writing", self._thread.submit(self._write, state)

    def poll(self) -> None:
        """Take note of what is done; costs nothing when there is nothing to do.

        Raises:
            Superseded: See there.
        """
        if self._stage != "idle" and self._comm.sum([float(self._work.done())])[0] == (
            self._comm.world
        ):
            self._advance()

    def finish(self) -> bool:
        """Wait until nothing is to do; return whether the last checkpoint was saved.

        Raises:
            Superseded: See there.
        """
        saved = True
        while self._stage != "idle":
            self._work.exception()
            saved = self._advance()
        return saved

    def _advance(self) -> bool:
        """Agree on what the writers did, and go on; return False if it was no good."""
        problem = self._problem()
        worst = self._comm.sum([problem])[0]
        state = self._snapshot.state
        assert state is not None
        if worst >= _SUPERSEDED:
            raise Superseded(
                f"another attempt writes to {self._root} since this one began, so this one ends. "
                "What is saved stands; nothing has to be done."
            )
        if worst:
            self._stage = "idle"
            self._discard(state)
            return False
        if self._stage == "publishing":
            self._stage, self.published = "idle", state
            return True
        packed = b"".join(
            _FACTS.pack(f.bytes, bytes.fromhex(f.sha256)) for f in self._work.result()
        )
        files = [
            File(self._name(kind, rank), kind, rank, *_unpack(facts, number))
            for rank, facts in enumerate(self._comm.gather_bytes(packed))
            for number, kind in enumerate(KINDS)
        ]
        self._stage = "publishing"
        if self._comm.rank == 0:
            self._work = self._thread.submit(self._publish, state, files)
        return True

    def _problem(self) -> float:
        error = self._work.exception()
        if error is None:
            return _OK
        if isinstance(error, Superseded):
            return _SUPERSEDED
        if not _is_storage(self._root, error):
            raise error
        log.warning(
            "rank %d could not save a checkpoint: %s. Training goes on; older ones stand.",
            self._comm.rank,
            explain(self._root, cast(Exception, error)) or error,
        )
        return _FAILED

    def _name(self, kind: str, rank: int) -> str:
        # The token keeps two attempts that save the same step out of each other's files.
        return f"{kind}_{rank:05d}.{self._token}.safetensors"

    def _write(self, state: TrainState) -> list[File]:
        folder, rank = step_folder(self._root, state.step), self._comm.rank
        _make(folder)
        files = []
        for kind in KINDS:
            name = self._name(kind, rank)
            size, sha256 = write_tensors(folder / name, self._snapshot.tensors[kind])
            files.append(File(name, kind, rank, size, sha256))
        return files

    def _discard(self, state: TrainState) -> None:
        folder = step_folder(self._root, state.step)
        try:
            for kind in KINDS:
                remove(folder / self._name(kind, self._comm.rank))
        except Exception as error:
            log.warning("what was written of %s stays there: %s", folder, error)

    def _publish(self, state: TrainState, files: list[File]) -> list[File]:
        if read_bytes(self._root / FENCE) != self._token.encode():
            raise Superseded
        folder = step_folder(self._root, state.step)
        record = Record(
            state,
            self._attempt,
            dict(self._snapshot.scalars),
            self._shapes,
            self._averages,
            files,
        )
        publish_json(folder / RECORD, record_json(record))
        # It is published: what goes wrong from here on takes nothing of it back.
        try:
            if is_local(self._root):
                sync_folder(self._root)
            publish_bytes(self._root / LATEST, folder.name.encode())
            self._retire(folder)
        except Exception as error:
            if not _is_storage(self._root, error):
                raise
            log.warning("%s: old checkpoints could not be removed: %s", self._root, error)
        return files

    def _retire(self, newest: Path) -> None:
        _remove_strays(newest)
        there = {}
        for folder in complete(self._root):
            with suppress(BadInput):
                there[read_record(folder).state.images_seen] = folder
        decided = fates(sorted(there), self._policy, best=self._best())
        for images, fate in decided.items():
            if fate == "thin":
                _thin(there[images])
            elif fate == "gone":
                remove(there[images] / RECORD)
                _remove_strays(there[images])


def _is_storage(root: Path, error: BaseException) -> bool:
    return isinstance(error, OSError) or explain(root, cast(Exception, error)) is not None


def _unpack(facts: bytes, number: int) -> tuple[int, str]:
    size, sha256 = _FACTS.unpack_from(facts, number * _FACTS.size)
    return size, sha256.hex()


def _thin(folder: Path) -> None:
    record = read_record(folder)
    if record.kinds != {"ema"}:
        publish_json(folder / RECORD, record_json(replace(record, files=record.of({"ema"}))))
        _remove_strays(folder)


def _sweep(root: Path) -> None:
    """Remove what no record speaks of."""
    for folder in root.glob("step_*"):
        _remove_strays(folder)


def _remove_strays(folder: Path) -> None:
    there = {path.name: path for path in folder.glob("*")}
    listed = {RECORD}
    if RECORD in there:
        try:
            listed |= {file.name for file in read_record(folder).files}
        except BadInput:
            return  # damaged: for people to look at
    for name in there.keys() - listed:
        remove(there[name])
    if is_local(folder) and RECORD not in there:
        folder.rmdir()


def _make(folder: Path) -> None:
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
