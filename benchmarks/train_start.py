"""Where the time goes from the start of `kiln train` to the first step of a run that resumes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Row, row_of

PHASES = (
    "launcher: imports, checks, hashes",
    "rank: Python and imports",
    "rank: process group",
    "rank: hash the checkpoint",
    "rank: build network and engine",
    "rank: load the checkpoint",
    "rank: copy for rollbacks, open the books",
    "rank: first step",
)
REPETITIONS = 3
_MARKS = "KILN_BENCH_MARKS"
IMAGES = 32


def start(dataset: Path, folder: Path) -> list[Row]:
    """Train one step; then resume for one more, again and again, and say what each phase took."""
    run = folder / "resumed"
    found: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "all")}
    for repetition in range(REPETITIONS + 1):
        marks = folder / f"marks-{repetition}.json"
        words = [
            f"data.dataset={dataset}",
            f"run={run}",
            f"total_images={(repetition + 1) * IMAGES}",
            "checkpoint.every_images=1000000",
            "logging.wandb=off",
            "logging.quiet=true",
        ]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.train_start", *words],
            env={**os.environ, _MARKS: str(marks)},
            check=True,
        )
        at_s = json.loads(marks.read_text(encoding="utf-8"))
        if repetition:  # the first has nothing to resume
            for phase, (began_s, ended_s) in zip(PHASES, pairwise(at_s), strict=True):
                found[phase].append(ended_s - began_s)
            found["all"].append(at_s[-1] - at_s[0])
    return [
        row_of(
            values,
            case="the demo's network, 2 ranks, from `kiln train` to the end of the first step",
            system="kiln",
            metric=phase,
            unit="s",
        )
        for phase, values in found.items()
    ]


def launcher(words: list[str]) -> int:
    """Be `kiln train`, whose ranks take marks."""
    from trainer import train  # noqa: PLC0415 - its imports are what is measured

    changed: Any = train
    run_ranks = changed.run_ranks

    def marked(_module: str, *args: Any, **kwargs: Any) -> int:
        code: int = run_ranks("benchmarks.train_start", *args, **kwargs)
        return code

    changed.run_ranks = marked
    return train.main(words)


def rank(run: str) -> None:
    """Be `trainer.worker`, and write down when each phase ended (Unix time)."""
    me = psutil.Process()
    at_s = [me.parent().create_time(), me.create_time()]
    from trainer import worker  # noqa: PLC0415

    at_s.append(time.time())

    def marking(action: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(action)
        def marked(*args: Any, **kwargs: Any) -> Any:
            found = action(*args, **kwargs)
            at_s.append(time.time())
            return found

        return marked

    changed: Any = worker
    for name in ("Comm", "find_checkpoint", "build", "restore"):
        setattr(changed, name, marking(getattr(worker, name)))
    for name in ("begin", "after_step"):
        setattr(changed.Bookkeeper, name, marking(getattr(changed.Bookkeeper, name)))
    if os.environ["RANK"] == "0":
        after_step: Callable[..., None] = changed.Bookkeeper.after_step

        def told(*args: Any, **kwargs: Any) -> None:
            after_step(*args, **kwargs)
            Path(os.environ[_MARKS]).write_text(json.dumps(at_s), encoding="utf-8")

        changed.Bookkeeper.after_step = told
    worker.main([run])


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank(sys.argv[1])
    else:
        sys.exit(launcher(sys.argv[1:]))
