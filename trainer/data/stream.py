"""Which samples make each global step: a law that never changes, and a small state of counters.

The law is a pure function of datasets, seed and layout; the state counts samples. Neither knows of
ranks, workers, micro-batches or what was read ahead, so all of these may change at any step, and so
may the global batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from trainer.data import mixture
from trainer.data.order import Int64s, Mode, Order
from trainer.errors import BadInput

SCHEMA = 1
Ending = Literal["roll", "drop", "pad"]


@dataclass(frozen=True, slots=True)
class Member:
    """One dataset of the mix, at the state of its removals that the run began with."""

    name: str
    """As the configuration names it."""
    fingerprint: str
    """Of its shards; keys its order."""
    removal_version: int
    """Samples that were removed later keep their positions, and are replaced there."""
    counts: Mapping[str, Int64s]
    """Bucket -> live rows of each shard."""


@dataclass(frozen=True)
class Law:
    """All that the sequence of samples depends on, besides weights and the global batch."""

    seed: int
    members: tuple[Member, ...]
    mode: Mode
    streams: int
    """Canonical streams."""
    window_shards: int
    """Shards of one stream in a window."""
    ending: Ending
    """Whether the batch at the end of an epoch rolls over into the next, is dropped or padded."""

    @cached_property
    def sizes(self) -> tuple[Mapping[str, int], ...]:
        """Of each member: bucket -> live rows; only buckets that have any."""
        return tuple(
            {name: num for name, counts in m.counts.items() if (num := int(counts.sum()))}
            for m in self.members
        )

    @cached_property
    def buckets(self) -> tuple[str, ...]:
        """Names of all buckets that have samples."""
        return tuple(sorted(set().union(*self.sizes)))

    @cached_property
    def orders(self) -> tuple[Mapping[str, Order], ...]:
        """Of each member: bucket -> order of its rows; all go through the shards alike."""
        return tuple(
            {name: self._order(m, m.counts[name]) for name in sizes}
            for m, sizes in zip(self.members, self.sizes, strict=True)
        )

    def _order(self, member: Member, counts: Int64s) -> Order:
        return Order(
            counts,
            key=f"{self.seed}:{member.fingerprint}",
            mode=self.mode,
            streams=self.streams,
            window_rows=max(1, -(-self.window_shards * int(counts.sum()) // len(counts))),
        )

    def bucket_shares(self, bucket: str, shares: Sequence[int]) -> tuple[int, ...]:
        """Give the members' shares of one bucket, given those of the whole mix."""
        return mixture.shares(
            [
                share * sizes.get(bucket, 0) / sum(sizes.values())
                for sizes, share in zip(self.sizes, shares, strict=True)
            ]
        )


@dataclass(frozen=True)
class Tally:
    """How far one bucket is."""

    since: int
    """Samples since the weights last changed."""
    before: tuple[int, ...]
    """Of each member: samples up to then."""


@dataclass(frozen=True)
class State:
    """Where the stream goes on; the same on all ranks, whatever their number."""

    samples: int
    """Samples given out."""
    shares: tuple[int, ...]
    """Of each member: whole numbers whose ratios are those of the weights."""
    tallies: tuple[Tally, ...]
    """Of each bucket of the law."""


class Slots(NamedTuple):
    """The samples of one global step, in an order that depends on nothing else."""

    bucket: str
    members: Int64s
    """(G,) number of each sample's dataset."""
    positions: Int64s
    """(G,) in the endless sequence of that dataset's bucket."""


def begin(law: Law, weights: Sequence[float]) -> State:
    """Stand at the first sample."""
    none = Tally(0, (0,) * len(law.members))
    return State(0, mixture.shares(weights), (none,) * len(law.buckets))


def remix(law: Law, state: State, weights: Sequence[float]) -> State:
    """Give the datasets other weights from here on; each goes on where it stands."""
    shares = mixture.shares(weights)
    if shares == state.shares:
        return state
    tallies = tuple(
        Tally(0, tuple(_reached(law, bucket, state.shares, tally)))
        for bucket, tally in zip(law.buckets, state.tallies, strict=True)
    )
    return replace(state, shares=shares, tallies=tallies)


def step_slots(law: Law, state: State, global_batch_images: int) -> Slots:
    """Say which samples the next global step takes."""
    number = next_bucket(law, state, global_batch_images)
    bucket, tally = law.buckets[number], state.tallies[number]
    first = _start(law, bucket, tally, global_batch_images)
    if law.ending == "roll":
        shares = law.bucket_shares(bucket, state.shares)
        members, samples = mixture.deal(first, global_batch_images, shares)
        return Slots(bucket, members, np.asarray(tally.before, np.int64)[members] + samples)
    num_rows = law.orders[0][bucket].num_rows
    epoch, place = divmod(first, num_rows)
    places = np.arange(place, place + global_batch_images) % num_rows
    return Slots(bucket, np.zeros_like(places), epoch * num_rows + places)


def advance(law: Law, state: State, global_batch_images: int) -> State:
    """Stand behind the next global step."""
    number = next_bucket(law, state, global_batch_images)
    bucket, tally = law.buckets[number], state.tallies[number]
    since = _start(law, bucket, tally, global_batch_images) + global_batch_images
    if law.ending == "pad":
        num_rows = law.orders[0][bucket].num_rows
        epoch_end = (since - global_batch_images) // num_rows * num_rows + num_rows
        since = min(since, epoch_end)
    tallies = list(state.tallies)
    tallies[number] = replace(tally, since=since)
    return replace(state, samples=state.samples + global_batch_images, tallies=tuple(tallies))


def next_bucket(law: Law, state: State, global_batch_images: int) -> int:
    """Choose the bucket whose next global batch is due first, going through all at equal pace."""
    if len(law.buckets) == 1:
        return 0

    def due(number: int) -> tuple[int, int]:
        bucket = law.buckets[number]
        share = sum(
            share * sizes.get(bucket, 0) * mixture.WHOLE // sum(sizes.values())
            for sizes, share in zip(law.sizes, state.shares, strict=True)
        )
        after = state.tallies[number].since + global_batch_images
        return (after << 64) // share if share else 1 << 200, number

    return min(map(due, range(len(law.buckets))))[1]


def rank_slots(law: Law, slots: Slots, *, rank: int, world: int) -> Slots:
    """Give one rank its equal part of a step.

    Any part would do, since a step is a set of samples. Ranks take neighbouring canonical streams,
    so that a node keeps to the same shards.
    """
    streams = np.empty_like(slots.positions)
    for member, orders in enumerate(law.orders):
        mine = slots.members == member
        if mine.any():
            streams[mine] = orders[slots.bucket].streams(slots.positions[mine])
    mine = np.argsort(streams, kind="stable").reshape(world, -1)[rank]
    return Slots(slots.bucket, slots.members[mine], slots.positions[mine])


def steps_in_epoch(law: Law, global_batch_images: int) -> float:
    """Count the steps after which a stream of one dataset has been through all of it.

    A fraction where batches roll over; buckets are counted one by one.
    """
    counts = [orders.num_rows for orders in law.orders[0].values()]
    if law.ending == "roll":
        return sum(counts) / global_batch_images
    round_up = law.ending == "pad"
    return sum((n + round_up * (global_batch_images - 1)) // global_batch_images for n in counts)


def check_step(law: Law, global_batch_images: int) -> None:
    """Refuse a layout under which steps of this size cannot be made.

    Raises:
        BadInput: `drop` would drop everything, or `drop` or `pad` were asked of a mix.
    """
    if law.ending == "roll":
        return
    if len(law.members) > 1:
        raise BadInput(
            f"data.ending={law.ending} with {len(law.members)} datasets (data.mix): their epochs "
            "end at different steps. Give data.ending=roll."
        )
    smallest = min(law.orders[0].items(), key=lambda pair: pair[1].num_rows)
    if law.ending == "drop" and smallest[1].num_rows < global_batch_images:
        raise BadInput(
            f"data.ending=drop would drop every sample of bucket {smallest[0]}: it has "
            f"{smallest[1].num_rows}, batch.global_batch_images={global_batch_images} needs as "
            "many. Give data.ending=roll, or a smaller batch."
        )


def to_json(law: Law, state: State) -> dict[str, Any]:
    """Describe state and law in less than 1 kB of JSON."""
    return {
        "schema": SCHEMA,
        "seed": law.seed,
        "order": [law.mode, law.streams, law.window_shards, law.ending],
        "datasets": [[m.fingerprint[:16], m.removal_version] for m in law.members],
        "samples": state.samples,
        "shares": list(state.shares),
        "buckets": hashlib.blake2b("\n".join(law.buckets).encode(), digest_size=8).hexdigest(),
        "tallies": [[tally.since, *tally.before] for tally in state.tallies],
    }


def removal_versions(saved: Mapping[str, Any]) -> list[int]:
    """Read the versions of the datasets that a saved state counts by."""
    return [version for _, version in saved["datasets"]]


def from_json(law: Law, saved: Mapping[str, Any]) -> State:
    """Read a state that `to_json` made under the same law.

    Raises:
        BadInput: Under another one, the order would not continue; says what differs.
    """
    expected = to_json(law, begin(law, [1.0] * len(law.members)))
    names = {
        "schema": "this version of Kiln",
        "seed": "seed",
        "order": "data.order, data.canonical_streams, data.window_shards, data.ending",
        "datasets": "the shards of data.dataset and data.mix",
        "buckets": "the aspect buckets (a hash of their names; encoders.buckets)",
    }
    for key, name in names.items():
        if saved[key] != expected[key]:
            raise BadInput(
                f"the order of the samples would not continue: {name} was {saved[key]} when the "
                f"state was saved, and is {expected[key]}. Give what the run was begun with, or "
                "another run=."
            )
    return State(
        samples=saved["samples"],
        shares=tuple(saved["shares"]),
        tallies=tuple(Tally(since, tuple(before)) for since, *before in saved["tallies"]),
    )


def _reached(law: Law, bucket: str, shares: Sequence[int], tally: Tally) -> list[int]:
    own = mixture.taken(tally.since, law.bucket_shares(bucket, shares))
    return [before + more for before, more in zip(tally.before, own, strict=True)]


def _start(law: Law, bucket: str, tally: Tally, global_batch_images: int) -> int:
    """Say where the next step begins; `drop` leaves out what is too little for one."""
    if law.ending != "drop":
        return tally.since
    num_rows = law.orders[0][bucket].num_rows
    rest = num_rows - tally.since % num_rows
    return tally.since if rest >= global_batch_images else tally.since + rest
