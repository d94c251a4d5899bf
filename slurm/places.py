"""Where jobs stand in the queue, by Slurm's priorities."""

from collections.abc import Sequence
from dataclasses import dataclass

from slurm import client

_FORMAT = "\x1f".join(("%F", "%P", "%Q", "%r"))
_NOT_YET = {
    "BeginTime",
    "Dependency",
    "DependencyNeverSatisfied",
    "JobHeldAdmin",
    "JobHeldUser",
}
"""What waits for these is not in line for nodes."""


@dataclass(frozen=True)
class Place:
    """Of a job that waits for nodes."""

    position: int
    """From 1."""
    of: int
    """How many wait there, as far as Slurm shows other people's jobs."""
    partition: str
    """Where it stands first."""


def waits_for_nodes(state: str, reason: str) -> bool:
    """Whether a job is in line for nodes."""
    return state == "PENDING" and reason not in _NOT_YET


def ask_places() -> dict[str, Place]:
    """Ask for all jobs of all people that wait; return the places by job, arrays as one."""
    told = client.run("squeue", "--noheader", "--states=PENDING", "--format", _FORMAT)
    return places([line.split("\x1f") for line in told.splitlines()])


def places(rows: Sequence[Sequence[str]]) -> dict[str, Place]:
    """Return where each job stands first.

    Args:
        rows: Number (that of the whole array), partitions, priority and reason of each.
    """
    lines: dict[str, dict[str, None]] = {}
    for number, partitions, _, reason in sorted(rows, key=lambda row: (-int(row[2]), int(row[0]))):
        for partition in partitions.split(","):
            if waits_for_nodes("PENDING", reason):
                lines.setdefault(partition, {})[number] = None
    found: dict[str, Place] = {}
    for partition, line in lines.items():
        for position, number in enumerate(line, start=1):
            if number not in found or position < found[number].position:
                found[number] = Place(position, len(line), partition)
    return found
