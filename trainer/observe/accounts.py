"""Sum ledgers: seconds and joules by stage and bucket, rolled-back work moved to lost work."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.observe.energy import Provenance
from trainer.observe.ledger import Bucket
from trainer.observe.merging import writer_of


@dataclass
class Total:
    """Seconds, and joules by provenance, of one bucket."""

    seconds: float = 0.0
    joules_by: dict[Provenance, float] = field(default_factory=dict)

    @property
    def joules(self) -> float:
        """Joules of every provenance together."""
        return sum(self.joules_by.values())

    @property
    def known_by(self) -> dict[str, float]:
        """Share of the joules by provenance; empty of no joules."""
        joules = self.joules
        return {p: j / joules for p, j in self.joules_by.items() if j > 0}

    def add(self, seconds: float, joules: float, provenance: Provenance) -> None:
        """Add one row, or a share of one."""
        self.seconds += seconds
        self.joules_by[provenance] = self.joules_by.get(provenance, 0.0) + joules


@dataclass(frozen=True)
class Closure:
    """Whether the rows of one attempt fill the wall time between its first and its last."""

    stage: str
    rank: int
    attempt: int
    wall_s: float
    """By the stamps of the wall clock, up to the start of the last period."""
    counted_s: float
    """Sum of the rows' seconds over the same time."""

    def holds(self, *, tolerance_frac: float = 0.01, slack_s: float = 0.01) -> bool:
        """Say whether seconds and wall time agree."""
        return abs(self.counted_s - self.wall_s) <= tolerance_frac * self.wall_s + slack_s


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, Bucket], Total]:
    """Sum rows by (stage, bucket).

    Productive time is shared out evenly over the steps of its row. The share of steps that were
    done again later, because a resume or a rollback went back before them, is `lost_work`. Seconds
    are of nodes: two nodes for an hour are two hours.

    Args:
        rows: Of one or several ledgers, each in the order it was written.
    """
    sums: defaultdict[tuple[str, Bucket], Total] = defaultdict(Total)
    for row, bucket, seconds, joules in attributed(rows):
        sums[row["stage"], bucket].add(seconds, joules, row["provenance"])
    order = list(Bucket)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    keys = sorted(sums, key=lambda key: (stages.index(key[0]), order.index(key[1])))
    return {key: sums[key] for key in keys}


def lost_work(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, int], Total]:
    """Sum what was done in vain by (stage, attempt, rank); of every one, also if that is nothing.

    Args:
        rows: As in `totals`.
    """
    lost: defaultdict[tuple[str, int, int], Total] = defaultdict(Total)
    for row, bucket, seconds, joules in attributed(rows):
        own = lost[row["stage"], row["attempt"], row["rank"]]
        if bucket is Bucket.LOST_WORK:
            own.add(seconds, joules, row["provenance"])
    return dict(lost)


def attributed(
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[Mapping[str, Any], Bucket, float, float]]:
    """Yield (row, bucket, seconds, joules): what of a row belongs where in the end."""
    lost_fracs = _lost_fracs(rows)
    for row in rows:
        bucket = Bucket(row["bucket"])
        lost_frac = lost_fracs[_interval(row)] if bucket is Bucket.PRODUCTIVE else 0.0
        for target, frac in ((bucket, 1 - lost_frac), (Bucket.LOST_WORK, lost_frac)):
            if frac > 0:
                yield row, target, row["seconds"] * frac, row["joules"] * frac


def combined(parts: Iterable[Total]) -> Total:
    """Add totals up."""
    whole = Total()
    for part in parts:
        whole.seconds += part.seconds
        for provenance, joules in part.joules_by.items():
            whole.add(0.0, joules, provenance)
    return whole


def close_check(rows: Sequence[Mapping[str, Any]]) -> list[Closure]:
    """Compare, for each attempt, the seconds in its rows with the wall clock's stamps."""
    periods: defaultdict[Any, defaultdict[float, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        periods[writer_of(row)][row["start_unix_s"]] += row["seconds"]
    return [
        Closure(
            stage=stage,
            rank=rank,
            attempt=attempt,
            wall_s=max(seconds_at) - min(seconds_at),
            counted_s=sum(s for start, s in seconds_at.items() if start < max(seconds_at)),
        )
        for (stage, rank, attempt), seconds_at in periods.items()
    ]


def _interval(row: Mapping[str, Any]) -> tuple[Any, ...]:
    # Rows of one interval differ in provenance only.
    keys = ("stage", "rank", "attempt", "start_unix_s", "first_step", "last_step")
    return tuple(row[key] for key in keys)


def _lost_fracs(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], float]:
    """Return, for each productive interval, the share of it that was done again later.

    In a later attempt by any node, for that may have fewer of them; in the same one by the same.
    """
    productive = {_interval(row): row for row in rows if row["bucket"] == Bucket.PRODUCTIVE}
    latest_first = sorted(productive.items(), key=lambda item: item[1]["attempt"])[::-1]
    in_later_attempts: dict[str, int] = {}
    in_this: dict[tuple[str, int, int], int] = {}
    fracs = {}
    for interval, row in latest_first:
        stage, first_step = row["stage"], row["first_step"]
        for other in [key for key in in_this if key[0] == stage and key[2] > row["attempt"]]:
            step = in_this.pop(other)
            in_later_attempts[stage] = min(step, in_later_attempts.get(stage, step))
        known = (in_later_attempts.get(stage), in_this.get(writer_of(row)))
        fracs[interval] = _lost_frac(row, min((s for s in known if s is not None), default=None))
        in_this[writer_of(row)] = min(first_step, in_this.get(writer_of(row), first_step))
    return fracs


def _lost_frac(row: Mapping[str, Any], redone_from: int | None) -> float:
    first, last = row["first_step"], row["last_step"]
    if redone_from is None or redone_from >= last:
        return 0.0
    if last == first:  # time on the way to a step; it survives unless that step was redone
        return 1.0 if redone_from < first else 0.0
    return float((last - max(first, redone_from)) / (last - first))
