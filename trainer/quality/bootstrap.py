"""Confidence intervals over pictures, by the bootstrap."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.errors import BadInput
from trainer.quality.statistics import Floats

Statistic = Callable[[Floats], Floats]
"""``(S, N)`` counts -> ``(S,)`` values: in draw s, picture n stands `counts[s, n]` times."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic with its confidence interval."""

    value: float
    """Of the pictures as they are."""
    low: float
    high: float
    shift: float
    """By how much drawing the pictures anew raises the statistic on average; the interval is
    without it."""


def interval(
    statistic: Statistic,
    num_pictures: int,
    *,
    seed: int | np.random.Generator,
    draws: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Return the centred percentile interval (Efron 1979).

    Pictures are drawn with replacement `draws` times, and the interval holds the middle `level` of
    the values, moved back by their mean's distance from the value of all pictures. For means, and
    whatever else is unbiased, that is the plain percentile interval. The Frechet distance needs the
    move: it rises as pictures get fewer, a draw holds but 63 % of them, and the plain interval lies
    above the distance itself. The reverse percentile interval would be moved twice, towards the
    distance of infinitely many pictures, where no published number is. So the interval says which
    values other pictures, **as many as these**, would give, and may be compared with others of as
    many pictures. Only `num_pictures` are drawn anew; what they are compared with stays fixed.

    Args:
        statistic: What to compute.
        num_pictures: N.
        seed: Whoever gives a generator owns its state.
        draws: S.
        level: The share of repetitions whose intervals hold the truth.

    Raises:
        BadInput: There is no picture, no draw, or no such level.
    """
    if num_pictures < 1 or draws < 1 or not 0 < level < 1:
        raise BadInput(
            f"got {num_pictures} pictures, draws={draws}, level={level}; an interval needs at "
            "least one of each, and a level between 0 and 1."
        )
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num_pictures, np.full(num_pictures, 1 / num_pictures), draws)
    values = statistic(drawn.astype(np.float64))
    value = float(statistic(np.ones((1, num_pictures)))[0])
    shift = float(values.mean()) - value
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) - shift
    return Interval(value, float(low), float(high), shift)
