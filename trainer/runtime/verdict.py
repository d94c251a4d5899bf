"""Whom everybody waits for when training is stuck: pure arithmetic on heartbeats."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainer.runtime.beats import Beat

_NAMED = 8
"""So many ranks are named one by one."""


@dataclass(frozen=True)
class Verdict:
    """Why an attempt is ended."""

    ranks: tuple[int, ...]
    """Those that hold up the others; empty when none does."""
    message: str


def judge(beats: Mapping[int, Beat | None], silent_s: Mapping[int, float]) -> Verdict | None:
    """Find the ranks that hold up the others; None while it is too early to say.

    In this order: ranks whose heart stopped; ranks that are late and in no collective, though not
    while one that is in none still has time (it may be saving); ranks that have begun fewer
    collectives than others.

    Args:
        beats: The last of each rank, None of one that was never heard of.
        silent_s: Ranks without a new beat, and for how long at least.
    """
    if silent_s:
        return _verdict(beats, silent_s, silent_s)
    heard = {rank: beat for rank, beat in beats.items() if beat is not None}
    free = {rank: beat for rank, beat in heard.items() if beat.waits_in is None}
    late = [rank for rank, beat in free.items() if beat.is_late]
    if late or free:
        return _verdict(beats, late, silent_s) if late else None
    most = max(beat.begun for beat in heard.values())
    return _verdict(beats, [rank for rank, beat in heard.items() if beat.begun < most], silent_s)


def _verdict(
    beats: Mapping[int, Beat | None], ranks: Iterable[int], silent_s: Mapping[int, float]
) -> Verdict:
    guilty = tuple(sorted(ranks))
    named = [_rank(rank, beats[rank], silent_s.get(rank)) for rank in guilty[:_NAMED]]
    if len(guilty) > _NAMED:
        named.append(f"and {len(guilty) - _NAMED} more")
    who = "; ".join(named) or "no rank alone: the network, or a GPU that hangs"
    waits = Counter(
        f"{beat.waits_in} ({beat.phase} of step {beat.step})"
        for rank, beat in beats.items()
        if beat is not None and beat.waits_in is not None and rank not in guilty
    )
    others = "; ".join(
        f"{number} rank{'s' * (number > 1)} in {where}" for where, number in waits.most_common(3)
    )
    waiting = f" Waiting: {others}." if others else ""
    return Verdict(guilty, f"training is stuck, held up by {who}.{waiting}")


def _rank(rank: int, beat: Beat | None, silent_s: float | None) -> str:
    if beat is None:
        return f"rank {rank}, which was never heard of"
    doing = f"{beat.phase} of step {beat.step}"
    if silent_s is not None:
        return (
            f"rank {rank} on {beat.node}, which gave no sign of life for {silent_s:.0f} s or more "
            f"(last in {doing})"
        )
    if beat.waits_in is not None:
        doing = f"{beat.waits_in}, {doing}"
    return f"rank {rank} on {beat.node}, in {doing}, for {beat.elapsed_s:.0f} s"
