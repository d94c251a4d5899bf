"""Heartbeats: one small file per rank in the attempt's folder, overwritten in place."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

_SIZE_BYTES = 512


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself."""

    count: int
    """Goes up with every beat: clocks of other nodes need not be trusted."""
    node: str
    step: int
    phase: str
    elapsed_s: float
    """Since the step, or a phase that belongs to none, began."""
    limit_s: float
    """How long it may take."""
    waits_in: str | None
    """The collective it waits in; told only when it is late."""
    begun: int
    """How many collectives it has begun; likewise."""

    @property
    def is_late(self) -> bool:
        """Whether the limit is over."""
        return self.elapsed_s > self.limit_s


def beat_path(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat lies in the attempt's folder."""
    return folder / "beats" / f"rank_{rank:05d}.json"


def write_beat(path: Path, beat: Beat) -> None:
    """Overwrite a beat.

    In place, and of one size: a file system of a cluster then asks its server again whenever the
    file is opened, whereas it may go on showing an old file for a minute after a rename.
    """
    content = json.dumps(asdict(beat)).encode().ljust(_SIZE_BYTES)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(content)


def read_beat(path: Path) -> Beat | None:
    """Read a beat; None when there is none, or only half of one."""
    try:
        return Beat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
