"""How far from a true uniform shuffle is the order of an epoch?"""

import os
import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray
from webdataset.filters import shuffle as buffer_shuffle

from benchmarks.harness import (
    Case,
    Claim,
    Row,
    claim_at_least,
    claim_at_most,
    measure,
    write_result,
)
from trainer.data import order as kiln_order

Int64s = NDArray[np.int64]
Order = Callable[[int], Int64s]
"""Epoch -> the row numbers of all its positions."""

ROWS = int(os.environ.get("KILN_BENCH_ROWS", "1000000"))
SHARD_ROWS = 1000
BUFFER_ROWS = 5000
ROUNDS = 3
UNIFORM, WEBDATASET, KILN = "uniform permutation", "webdataset's buffer", "kiln"


def kiln(epoch: int) -> Int64s:
    """Give Kiln's order of shards and windows, as training has it by default."""
    counts = np.full(ROWS // SHARD_ROWS, SHARD_ROWS)
    order = kiln_order.Order(counts, key="0", streams=64, window_rows=4 * SHARD_ROWS)
    return order.at(np.arange(epoch * ROWS, (epoch + 1) * ROWS))[0]


def uniform(epoch: int) -> Int64s:
    """Give a true uniform shuffle."""
    return np.random.default_rng((0, epoch)).permutation(ROWS)


def webdataset(epoch: int) -> Int64s:
    """Shuffle shards, then rows in a buffer: the pipeline that webdataset's pages recommend."""
    dice = random.Random(epoch)
    shards = list(range(ROWS // SHARD_ROWS))
    dice.shuffle(shards)
    rows = (row for shard in shards for row in range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS))
    shuffled = buffer_shuffle(BUFFER_ROWS, rng=dice)(rows)
    return np.fromiter(shuffled, np.int64, ROWS)


def row_distance(order: Order, epoch: int) -> float:
    """Mean distance of the rows of two neighbours, as a share of all rows; uniform: 1/3."""
    return float(np.abs(np.diff(order(epoch))).mean() / ROWS)


def shard_distance(order: Order, epoch: int) -> float:
    """Mean distance of the shards of two neighbours, as a share of all shards; uniform: 1/3."""
    return float(np.abs(np.diff(order(epoch) // SHARD_ROWS)).mean() / (ROWS // SHARD_ROWS))


def same_shard(order: Order, epoch: int) -> float:
    """Share of neighbours of the same shard."""
    return float((np.diff(order(epoch) // SHARD_ROWS) == 0).mean())


def same_shard_in_batch(order: Order, epoch: int, *, batch: int = 256) -> float:
    """Share of a batch's pairs that are of the same shard: how alike the samples of a batch are."""
    batches = order(epoch)[: ROWS // batch * batch].reshape(-1, batch) // SHARD_ROWS
    ordered = np.sort(batches, axis=1)
    pairs = 0.0
    for shard_ids in ordered:
        counts = np.unique(shard_ids, return_counts=True)[1]
        pairs += float((counts * (counts - 1)).sum())
    return pairs / (len(batches) * batch * (batch - 1))


def repeated_pairs(order: Order, epoch: int) -> float:
    """Count the pairs that are neighbours in an epoch, and again in the next; uniform: 2."""
    return float(len(np.intersect1d(_pairs(order(epoch)), _pairs(order(epoch + 1)))))


def _pairs(rows: Int64s) -> Int64s:
    low, high = np.minimum(rows[:-1], rows[1:]), np.maximum(rows[:-1], rows[1:])
    return low * ROWS + high


MEASURES: dict[str, tuple[str, Callable[[Order, int], float]]] = {
    "distance of neighbours, rows": ("frac", row_distance),
    "distance of neighbours, shards": ("frac", shard_distance),
    "neighbours of the same shard": ("frac", same_shard),
    "pairs in a batch of 256 of the same shard": ("frac", same_shard_in_batch),
    "neighbours that are again in the next epoch": ("pairs", repeated_pairs),
}
ORDERS: dict[str, Order] = {UNIFORM: uniform, WEBDATASET: webdataset, KILN: kiln}


def cases() -> list[Case]:
    """Measure every order; each round looks at the next epoch."""
    what = f"{ROWS:,} rows in shards of {SHARD_ROWS:,}"
    found = []
    for metric, (unit, statistic) in MEASURES.items():
        for system, order in ORDERS.items():
            run = partial(_next, statistic, order, iter(range(ROUNDS)))
            packages = {KILN: ("numpy",), WEBDATASET: ("webdataset",), UNIFORM: ("numpy",)}[system]
            case = partial(Case, case=what, system=system, packages=packages)
            found.append(case(metric=metric, unit=unit, run=run))
    return found


def claims(rows: list[Row]) -> list[Claim]:
    """Compare Kiln's order with the uniform one."""
    value = {(row.metric, row.system): row.median for row in rows}
    ratios = {metric: value[metric, KILN] / value[metric, UNIFORM] for metric in list(MEASURES)[:4]}
    rows_metric, shards_metric, same, in_batch = ratios
    repeated = list(MEASURES)[4]
    return [
        claim_at_least(
            f"{rows_metric}: Kiln's over uniform", measured=ratios[rows_metric], target=0.9
        ),
        claim_at_least(
            f"{shards_metric}: Kiln's over uniform", measured=ratios[shards_metric], target=0.9
        ),
        claim_at_most(
            f"{same}: Kiln's over webdataset's",
            measured=value[same, KILN] / value[same, WEBDATASET],
            target=1.0,
        ),
        claim_at_most(
            f"{in_batch}: Kiln's over webdataset's",
            measured=value[in_batch, KILN] / value[in_batch, WEBDATASET],
            target=1.0,
        ),
        claim_at_most(f"{repeated}", measured=value[repeated, KILN], target=10),
    ]


def _next(statistic: Callable[[Order, int], float], order: Order, epochs: Iterator[int]) -> float:
    return statistic(order, next(epochs))


def main() -> None:
    """Measure and write the result."""
    rows = measure(cases(), repetitions=ROUNDS, warmups=0)
    write_result("shuffle", question=str(__doc__), rows=rows, claims=claims(rows))


if __name__ == "__main__":
    main()
