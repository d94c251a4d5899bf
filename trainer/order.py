"""Print which samples each step of a run took or will take: keys, datasets and epochs.

Step 0 is the first: metrics.jsonl has its loss in the row of step 1. Steps that a later attempt
took again are those of the later attempt; steps to come are those of the last one. The keys come
from the shards' indexes: no tar is read, no network is built, and any machine that sees run and
dataset will do. Samples that could not be read, or were removed from the dataset since the run
began, are listed where the order has them; the run trained on others in their place.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt

from trainer.command import run_command
from trainer.data.stream import Slots
from trainer.frozen import config
from trainer.replay import History, Sample, history, quarantined

log = logging.getLogger(__name__)

_SPAN = re.compile(r"(\d+):(\d+)")


@config
class OrderConfig:
    """`kiln order`."""

    run: str
    """Run directory, as `kiln train` wrote it."""
    steps: str | NonNegativeInt
    """FIRST:STOP prints the steps from FIRST to STOP - 1, a number that step alone."""
    format: Literal["text", "json"]
    """text: KEY@EPOCH of each sample, behind the number of its dataset where there is a mix; json:
    one object per step."""

    def __post_init__(self) -> None:
        """Refuse what is no span."""
        if isinstance(self.steps, str):
            found = _SPAN.fullmatch(self.steps)
            if not found or int(found[1]) >= int(found[2]):
                raise ValueError(
                    f"steps={self.steps} is no span of steps. Give steps=0:10 for the first ten, "
                    "or steps=7 for one."
                )


def main(argv: Sequence[str]) -> int:
    """`kiln order run=RUN steps=FIRST:STOP`."""
    return run_command(run, OrderConfig, "order", argv)


def run(cfg: OrderConfig) -> int:
    """Print one line per step."""
    first, stop = _span(cfg.steps)
    folder, num_samples, num_replaced = Path(cfg.run), 0, 0
    with history(folder) as past:
        bad = quarantined(folder)
        names = [member.name for member in past.law.members]
        if cfg.format == "text" and len(names) > 1:
            log.info("datasets: %s", ", ".join(f"{n} is {name}" for n, name in enumerate(names)))
        try:
            for step, slots, samples in past.steps(first, stop):
                line = _text if cfg.format == "text" else _json
                sys.stdout.write(f"{line(past, step, slots, samples)}\n")
                num_samples += len(samples)
                num_replaced += sum(s.removed or (names[s.member], s.key) in bad for s in samples)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if stop > past.reached:
            log.info(
                "the run has done %d steps (%s): those from %d on are what it would take",
                past.reached,
                past.reached_by,
                past.reached,
            )
    if num_replaced:
        log.info(
            "%d of these %d samples could not be read in the run (%s) or were removed from the "
            "dataset since it began: it may have trained on others in their place",
            num_replaced,
            num_samples,
            folder / "quarantine",
        )
    return 0


def _span(steps: str | int) -> tuple[int, int]:
    if isinstance(steps, int):
        return steps, steps + 1
    first, stop = steps.split(":")
    return int(first), int(stop)


def _text(past: History, step: int, slots: Slots, samples: Sequence[Sample]) -> str:
    mixed = len(past.law.members) > 1
    keys = (f"{s.member}:{s.key}@{s.epoch}" if mixed else f"{s.key}@{s.epoch}" for s in samples)
    bucket = f" {slots.bucket}" if len(past.law.buckets) > 1 else ""
    return f"{step}{bucket}: {' '.join(keys)}"


def _json(past: History, step: int, slots: Slots, samples: Sequence[Sample]) -> str:
    rows = [
        {"dataset": past.law.members[s.member].name, "key": s.key, "epoch": s.epoch}
        for s in samples
    ]
    return json.dumps({"step": step, "bucket": slots.bucket, "samples": rows})
