"""Print what a run's data will take: epochs, windows, cache and requests; no tar is read.

The keys are those of `kiln train`. A window is what is shuffled together; a node reads the shards
of its canonical streams of one window while it fetches those of the next, so its cache needs room
for two.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from rich.console import Console
from rich.table import Table

from trainer.command import run_command
from trainer.config import TrainConfig
from trainer.data import mixture
from trainer.data.manifest import ShardEntry
from trainer.data.needs import Need, need, node_streams
from trainer.data.opening import Dataset
from trainer.data.order import Int64s
from trainer.data.stream import Law, steps_in_epoch
from trainer.datasets import dataset_places, find_datasets, find_law, weights_of
from trainer.errors import BadInput
from trainer.place import is_local, storage
from trainer.plan import Plan, make_plan


def main(argv: Sequence[str]) -> int:
    """`kiln stream-plan [experiment=...] [key=value ...]`."""
    return run_command(show, TrainConfig, "train", argv, name="stream-plan")


def show(cfg: TrainConfig) -> int:
    """Print the plan of a run's data, and notes on what could be better.

    Raises:
        BadInput: The run cannot work as it is; says with which value it would.
    """
    if cfg.data.reader != "kiln":
        raise BadInput(
            f"data.reader={cfg.data.reader} has no plan: its order is that of the tars as they "
            "come. `kiln index` makes a dataset of them for data.reader=kiln."
        )
    with ExitStack() as stack:
        for where in dataset_places(cfg.data):
            stack.enter_context(storage(where))
        datasets = find_datasets(cfg)
        plan = StreamPlan(cfg, make_plan(cfg), datasets, find_law(cfg, datasets, None))
    table = Table(box=None, show_header=False, pad_edge=False)
    for what, how_much in plan.rows():
        table.add_row(what, how_much)
    Console().print(table)
    for note in plan.notes():
        sys.stdout.write(f"note: {note}\n")
    return 0


@dataclass(frozen=True)
class StreamPlan:
    """A run's data, in numbers."""

    cfg: TrainConfig
    plan: Plan
    datasets: Sequence[Dataset]
    law: Law

    @cached_property
    def shares(self) -> list[float]:
        """Of each dataset: its share of the samples."""
        shares = mixture.shares(weights_of(self.cfg.data))
        return [share / sum(shares) for share in shares]

    @cached_property
    def entries(self) -> list[tuple[ShardEntry, ...]]:
        """Of each dataset: the shards that are read."""
        return [(dataset.encoding or dataset.manifest).shards for dataset in self.datasets]

    @cached_property
    def sizes(self) -> list[int]:
        """Of each dataset: samples of an epoch."""
        return [sum(sizes.values()) for sizes in self.law.sizes]

    @cached_property
    def epochs(self) -> list[float]:
        """Of each dataset: epochs in the run."""
        images = self.plan.total_steps * self.plan.images_per_step
        if len(self.datasets) == 1:
            return [self.plan.total_steps / steps_in_epoch(self.law, self.plan.images_per_step)]
        return [images * share / size for share, size in zip(self.shares, self.sizes, strict=True)]

    @cached_property
    def needs(self) -> list[Need]:
        """Of each dataset, with caches."""
        return [
            need(list(orders.values()), entries, self._nodes)
            for orders, entries in zip(self.law.orders, self.entries, strict=True)
        ]

    @cached_property
    def _nodes(self) -> list[Int64s]:
        cluster = self.cfg.cluster
        return node_streams(self.law.streams, cluster.num_nodes, cluster.ranks_per_node)

    @property
    def _members(self) -> int:
        """Files that are read of a sample: its picture, with the caption, or what both became."""
        return 1 if self.cfg.model.kind == "autoencoder_kl" else 2

    @property
    def cache_bytes(self) -> int:
        """What a node's cache needs room for."""
        needs = zip(self.needs, self.shares, strict=True)
        return sum(need.two_windows_bytes for need, share in needs if share)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the plan as (what, how much) for a table.

        Raises:
            BadInput: The cache has no room for a shard.
        """
        self._check_cache()
        images, law = self.plan.images_per_step, self.law
        for number, dataset in enumerate(self.datasets):
            size, share = self.sizes[number], self.shares[number]
            yield (
                f"dataset {number}" if len(self.datasets) > 1 else "dataset",
                f"{dataset.folder}: {size:,} samples in {len(self.entries[number]):,} shards, "
                f"{_size(sum(entry.bytes for entry in self.entries[number]))} of "
                f"{'latents' if dataset.encoding else 'pictures'}",
            )
            if len(self.datasets) == 1:
                steps = f"{steps_in_epoch(law, images):,.1f} steps"
            else:
                steps = f"{size / share / images:,.1f} steps" if share else "never ends"
                steps += f"; {100 * share:.3g} % of the samples"
            yield "  epoch", f"{steps}; {self.epochs[number]:,.2f} epochs in the run"
            yield from self._bucket_rows(number)
        yield "run", f"{self.plan.total_steps:,} steps of {images:,} samples"
        yield from self._order_rows()
        yield from self._traffic_rows()

    def notes(self) -> Iterator[str]:
        """Say what works, but would work better with another value."""
        data, law, ranks = self.cfg.data, self.law, self.plan.num_ranks
        if law.mode == "shards" and law.streams % ranks:
            least = min(len(entries) for entries in self.entries)
            even = law.streams // ranks * ranks or ranks
            remedy = (
                f"data.canonical_streams={even} is even"
                if even <= least
                else f"{ranks} streams need {ranks} shards, a dataset has {least}"
            )
            yield (
                f"{law.streams} canonical streams on {ranks} ranks: some ranks share one, and "
                f"their nodes read the same shards. {remedy}; it is fixed for the run."
            )
        if data.cache and self.cache_bytes > data.cache_gb * 1e9:
            yield (
                f"data.cache_gb={data.cache_gb:g} is less than the {_size(self.cache_bytes)} of "
                "two windows: shards will be fetched more than once an epoch. Give data.cache_gb="
                f"{-(-self.cache_bytes // 10**9)} or more, or a smaller data.window_shards."
            )
        if not data.cache and not all(is_local(dataset.folder) for dataset in self.datasets):
            yield (
                "without data.cache every member of every sample is a request of its own. Give "
                "data.cache=FOLDER on the nodes' disks, with data.cache_gb="
                f"{-(-self.cache_bytes // 10**9)} or more."
            )
        for bucket in law.buckets if len(law.buckets) > 1 else []:
            size = sum(sizes.get(bucket, 0) for sizes in law.sizes)
            if size < self.plan.images_per_step:
                yield (
                    f"bucket {bucket} has {size:,} samples, less than a step of "
                    f"{self.plan.images_per_step:,}: some come twice in a step. Give "
                    "encoders.buckets fewer sizes, or a smaller batch.global_batch_images."
                )

    def _bucket_rows(self, number: int) -> Iterator[tuple[str, str]]:
        sizes, weights = self.law.sizes[number], mixture.shares(weights_of(self.cfg.data))
        for bucket, size in sizes.items() if len(self.law.buckets) > 1 else []:
            shares = self.law.bucket_shares(bucket, weights)
            steps = size * sum(shares) / max(shares[number], 1) / self.plan.images_per_step
            yield f"  bucket {bucket}", f"{size:,} samples, {steps:,.1f} steps an epoch"

    def _order_rows(self) -> Iterator[tuple[str, str]]:
        law = self.law
        if law.mode == "ranges":
            yield "order", "ranges: all samples are permuted, each node needs every shard"
            return
        per_node = max(map(len, self._nodes))
        yield (
            "canonical streams",
            f"{law.streams}: {law.streams / self.plan.num_ranks:.3g} per rank, up to {per_node} "
            f"per node; {law.window_shards} shards of each in a window",
        )
        for number, orders in enumerate(law.orders):
            window = sum(order.window_rows for order in orders.values())
            window = min(window, self.sizes[number])
            yield (
                f"window of {number}" if len(self.datasets) > 1 else "window",
                f"{window:,} samples are shuffled together, "
                f"{100 * window / self.sizes[number]:.3g} % of an epoch; a node needs up to "
                f"{self.needs[number].window_shards:,} shards for it",
            )

    def _traffic_rows(self) -> Iterator[tuple[str, str]]:
        data, nodes = self.cfg.data, self.cfg.cluster.num_nodes
        if data.cache:
            yield (
                "cache of a node",
                f"{_size(self.cache_bytes)} for two windows; data.cache_gb={data.cache_gb:g}",
            )
        for number, dataset in enumerate(self.datasets):
            entries, epochs = self.entries[number], self.epochs[number]
            total_bytes = sum(entry.bytes for entry in entries)
            if data.cache:
                requests = self.needs[number].epoch_requests
                num_bytes, how = self.needs[number].epoch_bytes, "fetched into the caches"
            else:
                live = self.sizes[number] / sum(entry.count for entry in entries)
                requests = self.sizes[number] * self._members
                num_bytes, how = total_bytes * live, "read where they lie"
            times = epochs
            if data.cache:
                # The window behind the last is fetched as well.
                windows = self.needs[number].num_windows
                times = (ceil(epochs * windows) + 1) / windows
            if data.cache and total_bytes <= data.cache_gb * 1e9 and num_bytes:
                # What a node has had it keeps.
                times = min(times, nodes * total_bytes / num_bytes)
            name = f" of {number}" if len(self.datasets) > 1 else ""
            what = "reads" if is_local(dataset.folder) and not data.cache else "requests"
            yield f"epoch{name}", f"{requests:,.0f} {what}, {_size(num_bytes)} {how}"
            yield f"whole run{name}", f"{requests * times:,.0f} {what}, {_size(num_bytes * times)}"
        yield "", "and one request for the index of each shard, on each rank that reads of it"

    def _check_cache(self) -> None:
        data = self.cfg.data
        largest = max(entry.bytes for entries in self.entries for entry in entries)
        if data.cache and largest > data.cache_gb * 1e9:
            raise BadInput(
                f"data.cache_gb={data.cache_gb:g} has no room for the largest shard, of "
                f"{_size(largest)}. Give data.cache_gb={-(-self.cache_bytes // 10**9)}, which "
                "holds two windows of a node."
            )


def _size(num_bytes: float) -> str:
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.3g} {unit}"
    return f"{num_bytes / 1e6:,.3g} MB"
