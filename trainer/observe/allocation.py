"""Account for the time of a job's nodes that no rank saw: in the queue, before it began, after."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.observe.ledger import Bucket
from trainer.observe.merging import Row, covered_frac, period_ends, writer_of

_STAGE = "train"


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The nodes of one attempt, and for how long they were its own."""

    attempt: int
    nodes: Sequence[str]
    ranks_per_node: int
    queued_unix_s: float
    """Since when its job waited."""
    begin_unix_s: float
    end_unix_s: float | None
    """None while it goes on."""

    @property
    def node_s(self) -> float:
        """Seconds times nodes that the attempt had; 0 while it goes on."""
        return len(self.nodes) * ((self.end_unix_s or self.begin_unix_s) - self.begin_unix_s)


@dataclass
class _Seen:
    """What ranks of an attempt wrote on a node."""

    begin_s: float
    end_s: float
    is_closed: bool


def placed(rows: Sequence[Row], allocations: Sequence[Allocation]) -> list[Row]:
    """Put each row of training on a node of its attempt, within the time that Slurm lent it.

    A name that Slurm does not know (a container's, or none, as old runs have it) stands for the
    node that the rank was on. What an orphan did and drew after Slurm had taken its node away is
    not the run's: the node is another's, or down.

    Args:
        rows: Of all ledgers of the run.
        allocations: In order.
    """
    ends = period_ends(rows)
    by_attempt = {allocation.attempt: allocation for allocation in allocations}
    found: list[Row] = []
    for row in rows:
        allocation = by_attempt.get(row["attempt"]) if row["stage"] == _STAGE else None
        end_s = ends[writer_of(row), row["start_unix_s"]]
        found.append(_placed(row, end_s, allocation) if allocation else row)
    return found


def _placed(row: Row, period_end_s: float, allocation: Allocation) -> Row:
    nodes, node_idx = allocation.nodes, row["rank"] // allocation.ranks_per_node
    node = row.get("node", "")
    if node not in nodes and node_idx < len(nodes):
        node = nodes[node_idx]
    begin_s, start_s = allocation.begin_unix_s, row["start_unix_s"]
    lent_until_s = max(allocation.end_unix_s or period_end_s, begin_s)
    if period_end_s <= start_s or (begin_s <= start_s and period_end_s <= lent_until_s):
        return {**row, "node": node}
    frac = covered_frac((start_s, period_end_s), [(begin_s, lent_until_s)])
    return {
        **row,
        "node": node,
        "start_unix_s": min(max(start_s, begin_s), lent_until_s),
        "seconds": row["seconds"] * frac,
        "joules": row["joules"] * frac,
    }


def unseen(rows: Sequence[Row], allocations: Sequence[Allocation]) -> list[dict[str, Any]]:
    """Make the rows that are missing for every second of every node to be in the account.

    A node waits in the queue as long as its job does. Before a rank opened its account, checks and
    imports went on: `init`. After an account was closed the attempt drains. Where one was not, its
    process was killed, and nothing is known of the rest: `idle`. Nor is it of a node without an
    account, once another one has its own. Nobody read a meter then, so that these rows have no
    joules.

    Args:
        rows: As `placed` returns them.
        allocations: In order.
    """
    seen = _seen(rows)
    return [
        row
        for allocation in allocations
        for node in allocation.nodes
        for row in _of_node(allocation, node, seen)
    ]


def missing_frac(rows: Sequence[Row], allocations: Sequence[Allocation]) -> float:
    """Return by which share of the ended attempts' node-seconds the account is off; best is 0.

    Args:
        rows: With those of `unseen`.
        allocations: As there.
    """
    ended = {each.attempt for each in allocations if each.end_unix_s is not None}
    wanted_s = sum(each.node_s for each in allocations)
    counted_s = sum(
        row["seconds"]
        for row in rows
        if row["stage"] == _STAGE and row["attempt"] in ended and row["bucket"] != Bucket.QUEUE
    )
    return abs(counted_s - wanted_s) / wanted_s if wanted_s else 0.0


def _seen(rows: Sequence[Row]) -> dict[tuple[int, str], _Seen]:
    found: dict[tuple[int, str], _Seen] = {}
    for row in rows:
        if row["stage"] != _STAGE:
            continue
        start_s = row["start_unix_s"]
        seen = found.setdefault(
            (row["attempt"], row.get("node", "")), _Seen(start_s, start_s, False)
        )
        seen.begin_s = min(seen.begin_s, start_s)
        # Rows of a period follow each other in a ledger, all with its start.
        seen.end_s = max(seen.end_s, start_s) + row["seconds"]
        seen.is_closed |= row.get("closed", False)
    return found


def _of_node(
    allocation: Allocation, node: str, seen: Mapping[tuple[int, str], _Seen]
) -> Iterator[dict[str, Any]]:
    labels = {
        "attempt": allocation.attempt,
        "rank": allocation.nodes.index(node) * allocation.ranks_per_node,
        "stage": _STAGE,
        "node": node,
        "joules": 0.0,
        "provenance": "none",
        "step": 0,
    }
    begin_s, end_s = allocation.begin_unix_s, allocation.end_unix_s
    gaps = [(Bucket.QUEUE, allocation.queued_unix_s, begin_s)]
    own = seen.get((allocation.attempt, node))
    if own is not None:
        gaps.append((Bucket.INIT, begin_s, own.begin_s))
        tail = Bucket.DRAIN if own.is_closed else Bucket.IDLE
        gaps.append((tail, own.end_s, end_s or own.end_s))
    elif end_s is not None:
        others = [
            each.begin_s for (number, _), each in seen.items() if number == allocation.attempt
        ]
        init_until_s = min(others, default=end_s)
        gaps += [(Bucket.INIT, begin_s, init_until_s), (Bucket.IDLE, init_until_s, end_s)]
    for bucket, start_s, stop_s in gaps:
        if stop_s > start_s:
            seconds = stop_s - start_s
            yield {**labels, "bucket": bucket, "start_unix_s": start_s, "seconds": seconds}
