"""Shares of successes with their confidence intervals."""

import math
from dataclasses import dataclass

_Z_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Share:
    """A measured number with its 95 % interval; of a share the interval is Wilson's."""

    value: float
    count: int
    low: float
    high: float


def wilson(num_right: int, count: int) -> Share:
    """Return a share and its 95 % interval (Wilson 1927), which is sensible at 0 and 1 too."""
    p, z2 = num_right / count, _Z_95**2
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z_95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    # At 0 and 1 the bound is p itself, but for rounding.
    return Share(p, count, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))
