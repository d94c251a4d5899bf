"""Nodes that were there when something went wrong, and how long they are held to be to blame."""

from collections.abc import Iterable
from dataclasses import dataclass

HALF_LIFE_S = 24 * 3600.0
ENOUGH = 0.75
"""A node this suspect is left out; two crashes by a signal are, one is not."""


@dataclass(frozen=True)
class Suspicion:
    """One reason to leave a node alone."""

    node: str
    unix_s: float
    weight: float
    """1: certain, it was not there or could not be worked with."""


def to_leave_out(suspicions: Iterable[Suspicion], now_unix_s: float) -> tuple[str, ...]:
    """Return the nodes that are suspect enough now, in order; a reason halves every day."""
    sums: dict[str, float] = {}
    for each in suspicions:
        age_s = max(0.0, now_unix_s - each.unix_s)
        sums[each.node] = sums.get(each.node, 0.0) + each.weight * 0.5 ** (age_s / HALF_LIFE_S)
    return tuple(sorted(node for node, weight in sums.items() if weight >= ENOUGH))
