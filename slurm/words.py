"""How times and nodes are written for people, and how Slurm's times are read."""

import re
import time
from collections.abc import Iterable
from datetime import datetime


def clock(unix_s: float, now_unix_s: float | None = None) -> str:
    """Write a moment: the time of today, else with the day."""
    now_unix_s = time.time() if now_unix_s is None else now_unix_s
    when = datetime.fromtimestamp(unix_s).astimezone()
    is_today = when.date() == datetime.fromtimestamp(now_unix_s).astimezone().date()
    return f"{when:%H:%M:%S}" if is_today else f"{when:%d %b %H:%M:%S}"


def from_slurm(told: str) -> float | None:
    """Read a moment as Slurm writes it, local and without zone; None for N/A and the like."""
    try:
        return datetime.fromisoformat(told).timestamp()
    except ValueError:
        return None


def short(nodes: Iterable[str]) -> str:
    """Write nodes as Slurm does: node[001-002,004]."""
    groups: dict[tuple[str, int], list[int]] = {}
    words = []
    for node in sorted(set(nodes)):
        match = re.fullmatch(r"(.*?)([0-9]+)", node)
        if match is None:
            words.append(node)
        else:
            prefix, digits = match.groups()
            groups.setdefault((prefix, len(digits)), []).append(int(digits))
    for (prefix, width), numbers in groups.items():
        told = ",".join(
            f"{first:0{width}d}" if first == last else f"{first:0{width}d}-{last:0{width}d}"
            for first, last in spans(numbers)
        )
        words.append(f"{prefix}{told}" if len(numbers) == 1 else f"{prefix}[{told}]")
    return ",".join(words)


def spans(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the spans of consecutive numbers, as first and last."""
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
