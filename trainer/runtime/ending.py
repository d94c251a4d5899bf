"""Why an attempt ended: files in its folder, for those who cannot have seen it."""

import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

STUCK = "stuck.json"
"""Written when training is stuck; the script of a Slurm job looks for it too."""


@dataclass(frozen=True)
class Failure:
    """The error that ended a rank."""

    rank: int
    node: str
    unix_s: float
    error: str
    """The last line of its traceback, or a message for the user."""
    is_echo: bool
    """It came from another rank's end: a collective lost its peer."""
    code: int = 1
    """What the rank ended with."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node} failed first: {self.error}"


def clear(folder: Path, rank: int) -> None:
    """Make the folder, without what a rank of an earlier job wrote there."""
    folder.mkdir(parents=True, exist_ok=True)
    _failed(folder, rank).unlink(missing_ok=True)
    if rank == 0:
        (folder / STUCK).unlink(missing_ok=True)


def write_failure(folder: Path, rank: int, error: str, *, is_echo: bool, code: int = 1) -> None:
    """Leave this rank's error to the others; a full disk does not add an error of its own."""
    failure = Failure(rank, node_name(), time.time(), error, is_echo, code)
    _write(_failed(folder, rank), asdict(failure))


def read_failures(folder: Path) -> dict[int, Failure]:
    """Read the errors that ended ranks, by rank."""
    found = {}
    for path in folder.glob("failed_*.json"):
        with suppress(OSError, ValueError, TypeError):
            failure = Failure(**json.loads(path.read_bytes()))
            found[failure.rank] = failure
    return found


def cause(failures: Iterable[Failure]) -> Failure | None:
    """Find the failure that the others came from: the first one that is no echo."""
    return min(failures, key=lambda each: (each.is_echo, each.unix_s), default=None)


def write_stuck(folder: Path, message: str, ranks: Sequence[int] = ()) -> None:
    """Say that the attempt is ended because training is stuck; whoever says it last, counts."""
    _write(folder / STUCK, {"message": message, "ranks": list(ranks), "unix_s": time.time()})


def read_stuck(folder: Path) -> str | None:
    """Read who held up training; None when it was not stuck."""
    with suppress(OSError, ValueError):
        return str(json.loads((folder / STUCK).read_bytes())["message"])
    return None


def stuck_ranks(folder: Path) -> list[int]:
    """Read which ranks held up the others; empty when none did, or none was stuck."""
    with suppress(OSError, ValueError):
        return list(json.loads((folder / STUCK).read_bytes())["ranks"])
    return []


def node_name() -> str:
    """Name this machine as Slurm does, where it runs this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _failed(folder: Path, rank: int) -> Path:
    return folder / f"failed_{rank:05d}.json"


def _write(path: Path, content: dict[str, object]) -> None:
    with suppress(OSError):
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)
