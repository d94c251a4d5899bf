"""The run directory: frozen config, attempts, checkpoints, and the lock that one may hold."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.config import TrainConfig
from trainer.errors import BadInput
from trainer.frozen import differences, read_yaml, thaw, write_yaml

RECORD = "checkpoint.json"
SAVED = "saved.json"
"""In the run's folder: step and images of the newest checkpoint; slurm/runfile.py reads it."""

# What may differ between attempts: where and how fast is computed, and from here on which samples
# make a step, but never the order of a dataset's samples.
_MAY_CHANGE = (
    "accounts.",
    "batch.",
    "checkpoint.every_images",
    "checkpoint.keep_",
    "cluster.",
    "data.cache",
    "data.max_bad_frac",
    "data.mix",  # its weights; that it has other datasets the stream refuses
    "data.prefetch_batches",
    "data.threads",
    "data.weight",
    "engine.",
    "logging.",
    "rollback.",
    "total_",
    "watchdog.",
)


@contextmanager
def locked(run: Path, name: str = ".lock", *, doing: str = "trained") -> Iterator[None]:
    """Hold the run; the kernel lets go when the process dies, so no stale lock can remain.

    Args:
        run: Its folder, or another one.
        name: Which of its locks.
        doing: What is done to it meanwhile.

    Raises:
        BadInput: Another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / name).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BadInput(
                f"{run} is being {doing} by process {file.read() or '?'} right now. Wait for it, "
                "stop it (it saves first), or choose another run=."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def config_changes(run: Path, cfg: TrainConfig) -> list[str]:
    """List what changed since the run began, among the things that may; empty for a new run.

    Raises:
        BadInput: Something changed that would make it another run.
    """
    path = run / "config.yaml"
    changed: list[str] = []
    if path.exists():
        before = thaw(read_yaml(TrainConfig, path))
        changed = [line for line in differences(before, thaw(cfg)) if not line.startswith("run:")]
        # Adapters know the weights they sit on by content, wherever these lie now.
        may_change = _MAY_CHANGE if cfg.lora is None else (*_MAY_CHANGE, "start_from")
        refused = [line for line in changed if not line.startswith(may_change)]
        if refused:
            raise BadInput(
                f"{run} was begun with another configuration:\n  " + "\n  ".join(refused) + "\n"
                "Give it the values it was begun with, or choose another run=."
            )
    return changed


def freeze_config(run: Path, cfg: TrainConfig) -> None:
    """Write RUN/config.yaml; refuses what `config_changes` refuses."""
    config_changes(run, cfg)
    write_yaml(cfg, run / "config.yaml")


def checkpoints_of(cfg: TrainConfig) -> Path:
    """Where a run's checkpoints lie."""
    return Path(cfg.run) / "checkpoints" if cfg.checkpoint.folder is None else cfg.checkpoint.folder


def checkpoint_root(run: Path) -> Path:
    """Where the checkpoints of a run directory lie, wherever that was moved to."""
    config = run / "config.yaml"
    folder = read_yaml(TrainConfig, config).checkpoint.folder if config.exists() else None
    return run / "checkpoints" if folder is None else folder


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Which step a checkpoint's folder is of."""
    return int(folder.name.removeprefix("step_"))


def complete(root: Path) -> list[Path]:
    """List published checkpoints, oldest first; a folder without its record does not count.

    Thinned ones are among them: their averages can be read, but no run can go on from them.
    """
    return sorted((path.parent for path in root.glob(f"step_*/{RECORD}")), key=step_of)


def new_attempt(run: Path) -> int:
    """Make the folder of the next attempt and return its number; slurm/attempts.py does alike."""
    attempts = run / "attempts"
    number = sum(1 for _ in attempts.glob("[0-9]*")) if attempts.exists() else 0
    (attempts / f"{number:03d}").mkdir(parents=True)
    return number


def is_superseded(run: Path, attempt: int) -> bool:
    """Whether another attempt has begun; this one is then what a dead node left behind."""
    return attempt_dir(run, attempt + 1).exists()


def attempt_dir(run: Path, attempt: int) -> Path:
    """Where an attempt's logs lie."""
    return run / "attempts" / f"{attempt:03d}"
