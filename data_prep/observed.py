"""Observe a data command: seconds and joules in the ledger, numbers in metrics.jsonl and W&B."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from data_prep.config import EncodeConfig, PrepareConfig
from trainer.frozen import thaw
from trainer.observe.ledger import Ledger, accounted
from trainer.observe.sinks import Sinks
from trainer.place import is_local, local_folder, put_bytes

LOG_EVERY_S = 5.0


class RateLog:
    """Logs how much is done, at most every few seconds."""

    def __init__(self, sinks: Sinks, ledger: Ledger, *, every_s: float = LOG_EVERY_S) -> None:
        """Start the clock."""
        self._sinks, self._ledger, self._every_s = sinks, ledger, every_s
        self._started_s = self._logged_s = time.monotonic()
        self._row: dict[str, float] = {}

    def update(self, done: int, kept: int) -> None:
        """Take totals since the start; log them when it is due.

        Args:
            done: Rows, or pictures.
            kept: Those of them that became samples.
        """
        now_s = time.monotonic()
        if done == 0:  # workers are starting; their seconds say nothing about the rate
            self._started_s = now_s
        self._row = {
            "step": done,
            "images_seen": kept,
            "rows_per_s": done / max(now_s - self._started_s, 1e-9),
            "kept_frac": kept / max(done, 1),
        }
        if now_s - self._logged_s >= self._every_s:
            self._logged_s = now_s
            self._sinks.log(self._row)

    def finish(self, more: Mapping[str, float]) -> None:
        """Log the last totals, `more`, and the seconds and joules of the stages so far."""
        if self._row:
            self._sinks.log({**self._row, **more, **self._ledger.spent()})


@contextmanager
def observed(cfg: PrepareConfig | EncodeConfig, *, stage: str) -> Iterator[RateLog]:
    """Account for what happens inside, in the dataset: `ledger.jsonl` and `observe/STAGE/`.

    Parts of an array have files of their own: `ledger/STAGE-0003.jsonl`, `observe/STAGE-0003/`.

    Args:
        cfg: Names the dataset, the part and the W&B project.
        stage: prepare or encode.
    """
    part = cfg.part if cfg.parts > 1 else None
    own = Path("observe") / (stage if part is None else f"{stage}-{part:04d}")
    folder = (cfg.dataset if is_local(cfg.dataset) else local_folder(cfg.dataset)) / own
    folder.mkdir(parents=True, exist_ok=True)
    with accounted(
        cfg.dataset, stage=stage, part=part, tdp_w_per_core=cfg.tdp_w_per_core
    ) as ledger:
        try:
            with Sinks.open(
                folder,
                attempt=ledger.attempt,
                total_steps=0,
                config=thaw(cfg),
                wandb=cfg.wandb,
                project=cfg.wandb_project,
                progress="quiet",
            ) as sinks:
                yield RateLog(sinks, ledger)
        finally:
            if not is_local(cfg.dataset):
                rows = (folder / "metrics.jsonl").read_bytes()
                put_bytes(cfg.dataset / own / "metrics.jsonl", rows)
