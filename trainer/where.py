"""Say which steps of a run saw a sample, by its key; the inverse of `kiln order`.

Steps count from 0: step 0 is the first, whose loss metrics.jsonl has in the row of step 1. The
indexes of all shards are searched for the key, and the steps follow from the inverse of the order:
a moment per epoch. Streams with several aspect buckets, or with data.ending=drop or pad, are gone
through step by step instead, about 0.1 ms a step. A sample that stood in for one that could not be
read, or that was removed, is not found at that step: no inverse knows it, and the quarantine of the
run names the bad one, not the one in its place.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.command import run_command
from trainer.data import mixture
from trainer.data.order import Order
from trainer.data.reader import Reader
from trainer.data.shards import read_index
from trainer.data.stream import Law, advance, next_bucket, step_slots
from trainer.errors import BadInput
from trainer.frozen import config
from trainer.observe.countdown import Countdown
from trainer.place import NUM_REQUESTS
from trainer.replay import History, Stretch, history, quarantined


@config
class WhereConfig:
    """`kiln where`."""

    run: str
    """Run directory, as `kiln train` wrote it."""
    key: str
    """Of the sample, as `kiln order` prints it."""
    dataset: str | None
    """Look in this dataset of a mix alone; null: in all."""


class Home(NamedTuple):
    """Where a sample lies."""

    member: int
    """Number of its dataset."""
    shard: int
    row: int
    """In the shard's tar."""


def main(argv: Sequence[str]) -> int:
    """`kiln where run=RUN key=KEY`."""
    return run_command(run, WhereConfig, "where", [_quoted(word) for word in argv])


def run(cfg: WhereConfig) -> int:
    """Print the steps that saw the sample."""
    folder = Path(cfg.run)
    with history(folder) as past:
        bad = quarantined(folder)
        homes = list(find(past, _members(past.law, cfg.dataset), cfg.key))
        if not homes:
            raise BadInput(
                f"no sample of this run has the key {cfg.key}: looked in "
                f"{cfg.dataset or ', '.join(member.name for member in past.law.members)}. "
                "`kiln order` prints keys as they are written; a key that was never in the dataset "
                "may be in its quarantine."
            )
        for home in homes:
            for line in story(past, home, bad.get((past.law.members[home.member].name, cfg.key))):
                sys.stdout.write(f"{line}\n")
    return 0


def find(past: History, members: Sequence[int], key: str) -> Iterator[Home]:
    """Look for a key in the indexes of datasets' shards."""
    places = [(m, n) for m in members for n in range(len(past.readers[m].entries))]
    with (
        ThreadPoolExecutor(NUM_REQUESTS) as threads,
        Countdown("searching", len(places), unit="shards") as progress,
    ):
        rows = threads.map(lambda at: _row(past.readers[at[0]], at[1], key), places)
        for (member, shard), row in zip(places, rows, strict=True):
            progress.advance(1)
            if row >= 0:
                yield Home(member, shard, row)


def story(past: History, home: Home, bad: str | None) -> Iterator[str]:
    """Tell what became of a sample, line by line.

    Args:
        past: Of the run.
        home: Of the sample.
        bad: Why the run could not read it, if it could not.
    """
    member, reader = past.law.members[home.member], past.readers[home.member]
    shard = reader.opened(home.shard)
    version = -int(min(shard.weights[home.row], 0))
    yield f"{shard.key(home.row)}: row {home.row} of {shard.path}"
    placed = _placed(past.law, reader, home)
    if placed is None:
        yield f"  removed at version {version} of {member.name}, before the run began: never seen"
        return
    if bad is not None:
        yield f"  the run could not read it, and took others in its place: {bad}"
    if version:
        yield (
            f"  removed at version {version} of {member.name}: attempts from then on took others "
            "in its place"
        )
    bucket, row = placed
    seen = list(visits(past, home.member, bucket, row))
    yield (
        f"  due {len(seen)} times in the {past.reached} steps so far ({past.reached_by})"
        + ("" if bucket == "" else f", in bucket {bucket}")
        + (":" if seen else "")
    )
    for step, epoch in seen:
        yield f"  step {step}, epoch {epoch}"


def visits(past: History, member: int, bucket: str, row: int) -> Iterator[tuple[int, int]]:
    """Yield (step, epoch) at which the order has a row of a bucket, in the steps so far."""
    law, order = past.law, past.law.orders[member][bucket]
    direct = len(law.buckets) == 1 and law.ending == "roll"
    for stretch in past.stretches:
        stop = past.reached if stretch.stop is None else min(stretch.stop, past.reached)
        if stop <= stretch.first:
            continue
        if direct:
            yield from _by_inverse(law, stretch, stop, member, order, row)
        else:
            yield from _by_search(law, stretch, stop, member, bucket, row)


def _by_inverse(
    law: Law, stretch: Stretch, stop: int, member: int, order: Order, row: int
) -> Iterator[tuple[int, int]]:
    (tally,), images = stretch.state.tallies, stretch.global_batch_images
    shares = law.bucket_shares(law.buckets[0], stretch.state.shares)
    before = tally.before[member]
    end = tally.since + images * (stop - stretch.first)
    low, high = (before + mixture.taken(at, shares)[member] for at in (tally.since, end))
    for epoch in range(low // order.num_rows, -(-high // order.num_rows)):
        position = order.positions(np.array([row]), epoch)
        if low <= position[0] < high:
            place = int(mixture.positions_of(member, position - before, shares)[0])
            yield stretch.first + (place - tally.since) // images, epoch


def _by_search(
    law: Law, stretch: Stretch, stop: int, member: int, bucket: str, row: int
) -> Iterator[tuple[int, int]]:
    order, wanted = law.orders[member][bucket], law.buckets.index(bucket)
    state, images = stretch.state, stretch.global_batch_images
    due: dict[int, int] = {}
    for step in range(stretch.first, stop):
        if next_bucket(law, state, images) == wanted:
            slots = step_slots(law, state, images)
            positions = slots.positions[slots.members == member]
            for epoch in np.unique(positions // order.num_rows).tolist():
                if epoch not in due:
                    due[epoch] = int(order.positions(np.array([row]), epoch)[0])
                for _ in range(np.count_nonzero(positions == due[epoch])):
                    yield step, epoch
        state = advance(law, state, images)


def _quoted(word: str) -> str:
    """Keep a key of digits from being taken for a number."""
    name, _, key = word.partition("=")
    return f"key='{key}'" if name == "key" and not {"'", '"'} & set(key) else word


def _members(law: Law, dataset: str | None) -> list[int]:
    names = [member.name for member in law.members]
    if dataset is not None and dataset not in names:
        raise BadInput(
            f"dataset={dataset} is none of this run. Give one of: {', '.join(names)}; or null."
        )
    return [number for number, name in enumerate(names) if dataset in {None, name}]


def _row(reader: Reader, number: int, key: str) -> int:
    entry = reader.entries[number]
    keys = read_index(entry.index(reader.folder), columns=["key"])["key"]
    row: int = pc.index(keys, pa.scalar(key, keys.type)).as_py()
    return row


def _placed(law: Law, reader: Reader, home: Home) -> tuple[str, int] | None:
    """Give bucket and row number by which the order knows a sample; None: it does not."""
    shard = reader.opened(home.shard)
    for bucket, order in law.orders[home.member].items():
        if not order.counts[home.shard]:
            continue
        rows = shard.rows_of(bucket)
        inside = int(np.searchsorted(rows, home.row))
        if inside < len(rows) and rows[inside] == home.row:
            return bucket, int(order.ends[home.shard] - order.counts[home.shard]) + inside
    return None
