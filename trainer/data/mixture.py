"""How positions of a mixed sequence are dealt to its members by weight, exactly and for ever.

The n-th sample of a member with share s comes at time (2n + 1) / s, and members take turns in the
order of these times (Webster's method of apportionment, also named after Sainte-Laguë): every
member is within about one sample of its quota after any number of positions, and who has which
position depends on nothing but the shares.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
WHOLE = 1 << 20
"""About what shares add up to."""


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Turn weights >= 0 into whole numbers of about the same ratios."""
    total = sum(weights)
    return tuple(max(1, round(weight / total * WHOLE)) if weight else 0 for weight in weights)


def taken(position: int, shares: Sequence[int]) -> list[int]:
    """Count how many of the first `position` positions each member has."""
    if not position:
        return [0] * len(shares)
    total = sum(shares)
    counts = [(2 * share * position + total) // (2 * total) for share in shares]
    members = [member for member, share in enumerate(shares) if share]

    def later(one: int, two: int, *, past: int) -> bool:
        """Whether the next (past=0) or last (past=1) turn of `one` comes after that of `two`."""
        first = (2 * counts[one] + 1 - 2 * past) * shares[two]
        second = (2 * counts[two] + 1 - 2 * past) * shares[one]
        return (first, one) > (second, two)

    while (missing := position - sum(counts)) != 0:
        past = 0 if missing > 0 else 1
        chosen = members[0]
        for member in members[1:]:
            if later(member, chosen, past=past) == bool(past):
                chosen = member
        counts[chosen] += 1 - 2 * past
    return counts


def positions_of(member: int, samples: Int64s, shares: Sequence[int]) -> Int64s:
    """Say at which positions a member's samples come: the inverse of the deal."""
    own = shares[member]
    out = np.zeros_like(samples)
    for other, share in enumerate(shares):
        if share:
            # Turns of the other before this one; at equal times the lower number goes first.
            time = (2 * samples + 1) * share
            out += (time + own - (other >= member)) // (2 * own)
    return out


def deal(first: int, count: int, shares: Sequence[int]) -> tuple[Int64s, Int64s]:
    """Say who has the positions [first, first + count): members and their sample numbers."""
    if sum(map(bool, shares)) == 1:
        only = next(member for member, share in enumerate(shares) if share)
        return np.full(count, only), np.arange(first, first + count)
    members, samples = np.empty(count, np.int64), np.empty(count, np.int64)
    before, after = taken(first, shares), taken(first + count, shares)
    for member, (start, stop) in enumerate(zip(before, after, strict=True)):
        mine = np.arange(start, stop)
        if len(mine):
            where = positions_of(member, mine, shares) - first
            members[where], samples[where] = member, mine
    return members, samples
