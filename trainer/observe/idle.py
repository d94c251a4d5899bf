"""Measure what a node draws before its ranks compute, and tell it from what the work drew."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from trainer.observe.energy import MEASURED, Meter, Provenance, read_by_provenance
from trainer.observe.merging import Row, writer_of

_SHOW_IDLE = MEASURED | {"limit_model"}
"""The model of busy cores has no joules of idle ones, so that there is nothing to take off."""
UNKNOWN_IDLE_W: Mapping[Provenance, float] = MappingProxyType({})
_WINDOW_S = 1.0
"""NVML and RAPL refresh every 20 to 100 ms."""


def measure_idle_w(
    meters: Sequence[Meter],
    *,
    wait: Callable[[float], None] = time.sleep,
    clock_s: Callable[[], float] = time.monotonic,
) -> dict[Provenance, float]:
    """Return the watts by provenance that show while nothing is done; models show none.

    Args:
        meters: Of a node.
        wait: Lets time pass; it is not called where nothing is measured.
        clock_s: Tells how much.
    """
    measured = [meter for meter in meters if meter.provenance in MEASURED]
    if not measured:
        return {}
    began_s, before_j = clock_s(), read_by_provenance(measured)
    wait(_WINDOW_S)
    after_j, passed_s = read_by_provenance(measured), clock_s() - began_s
    return {name: (joules - before_j[name]) / passed_s for name, joules in after_j.items()}


@dataclass(frozen=True)
class Idle:
    """What nodes would have drawn idle for as long as their meters were read."""

    metered_s: float
    """Of all nodes together."""
    joules_by: Mapping[str, float]
    """By how their idle power is known: a provenance, or `stated`."""

    @property
    def joules(self) -> float:
        """All together."""
        return sum(self.joules_by.values())


def idle_of(rows: Sequence[Row], *, stated_w: float | None) -> Idle | None:
    """Return it, or None where a node's idle power is not known, or in no joules.

    Args:
        rows: Of ledgers. One of an account has `idle_w`, if that was measured.
        stated_w: Of a node, in place of what was measured; None takes that.
    """
    metered_s: defaultdict[Any, float] = defaultdict(float)
    idle_w: dict[Any, Mapping[str, float]] = {}
    show_idle = {writer_of(row) for row in rows if row["provenance"] in _SHOW_IDLE}
    for row in rows:
        writer = writer_of(row)
        if writer not in show_idle:
            continue
        idle_w |= {writer: row["idle_w"]} if "idle_w" in row else {}
        if row["provenance"] != "none":
            metered_s[writer] += row["seconds"]
    joules_by: defaultdict[str, float] = defaultdict(float)
    for writer, seconds in metered_s.items():
        known_w = idle_w.get(writer) if stated_w is None else {"stated": stated_w}
        if not known_w:
            return None
        for how, watts in known_w.items():
            joules_by[how] += watts * seconds
    return Idle(sum(metered_s.values()), dict(joules_by)) if joules_by else None
