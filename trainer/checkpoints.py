"""List a run's checkpoints, re-hash their files, and say from which one training would go on."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from trainer.command import run_command
from trainer.errors import BadInput
from trainer.frozen import config
from trainer.place import storage
from trainer.runtime.checkpoint import KINDS, Record, read_record, verify
from trainer.runtime.rundir import checkpoint_root, complete, step_of

_DAMAGED = 1


@config
class CheckpointsConfig:
    """`kiln checkpoints`."""

    run: str
    """Run directory."""


def main(argv: Sequence[str]) -> int:
    """`kiln checkpoints RUN_DIR`."""
    return run_command(check, CheckpointsConfig, "checkpoints", argv, positional="run")


def check(cfg: CheckpointsConfig) -> int:
    """Print the table; return 1 if a checkpoint is damaged.

    Raises:
        BadInput: The run has no checkpoint.
    """
    root = checkpoint_root(Path(cfg.run))
    console = Console()
    with storage(root):
        there = complete(root)
        if not there:
            raise BadInput(
                f"{root} holds no complete checkpoint. Give the folder of a run that has saved one "
                "(checkpoint.every_images says when)."
            )
        found = {
            folder: _look(folder)
            for folder in track(there, "hashing", console=Console(stderr=True), transient=True)
        }
    whole = [folder for folder, (record, problem) in found.items() if record and not problem]
    resumable = [folder for folder in whole if _kinds(found[folder][0]) >= set(KINDS)]
    table = Table("step", "images", "attempt", "MB", "holds", "state", box=None, pad_edge=False)
    for folder, (record, problem) in found.items():
        state = problem or ("training goes on from here" if folder in resumable[-1:] else "whole")
        table.add_row(str(step_of(folder)), *_told(record), state)
    console.print(table)
    return 0 if len(whole) == len(there) else _DAMAGED


def _look(folder: Path) -> tuple[Record | None, str | None]:
    """Read a record, and hash what it says is kept."""
    try:
        record = read_record(folder)
    except BadInput as error:
        return None, str(error)
    return record, verify(folder, record.kinds)


def _kinds(record: Record | None) -> set[str]:
    return set(record.kinds) if record else set()


def _told(record: Record | None) -> tuple[str, str, str, str]:
    if record is None:
        return "", "", "", ""
    size_mb = sum(file.bytes for file in record.files) / 1e6
    return (
        f"{record.state.images_seen:,}",
        str(record.attempt),
        f"{size_mb:,.1f}",
        ", ".join(sorted(record.kinds)),
    )
