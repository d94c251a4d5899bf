"""From the folders of datasets to a law and the readers that follow it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.cache import Cache
from trainer.data.manifest import Encoding, Manifest, encoding_folder
from trainer.data.order import Int64s, Mode
from trainer.data.reader import ANY, Reader
from trainer.data.shards import read_index
from trainer.data.stream import Ending, Law, Member
from trainer.data.tombstones import live_rows, read_row_weights
from trainer.errors import BadInput

MAX_AUTO_STREAMS = 64


@dataclass(frozen=True, slots=True)
class Dataset:
    """A published dataset, and which of its encodings is read."""

    folder: Path
    manifest: Manifest
    encoding: Encoding | None
    """None: its pictures are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run goes through its datasets; see `trainer.config.DataConfig`."""

    seed: int
    mode: Mode = "shards"
    streams: int | None = None
    window_shards: int = 4
    ending: Ending = "roll"


def make_law(
    datasets: Sequence[Dataset], layout: Layout, *, removal_versions: Sequence[int] | None = None
) -> Law:
    """Fix the order of some datasets' samples.

    Args:
        datasets: Of the mix.
        layout: Of the order.
        removal_versions: Of each dataset, as its run began with; None: as they are now.

    Raises:
        BadInput: A dataset is empty, or has fewer shards than there are streams.
    """
    for dataset in datasets:
        if not dataset.manifest.rows_kept:
            raise BadInput(f"{dataset.folder} has no samples: there is nothing to train on.")
    versions = removal_versions or [dataset.manifest.removal_version for dataset in datasets]
    members = tuple(map(_member, datasets, versions))
    for dataset, member in zip(datasets, members, strict=True):
        if not any(counts.any() for counts in member.counts.values()):
            raise BadInput(
                f"all samples of {dataset.folder} were removed: nothing is left to train on."
            )
    num_shards = min(len(dataset.manifest.shards) for dataset in datasets)
    streams = layout.streams or min(num_shards, MAX_AUTO_STREAMS)
    if streams > num_shards and layout.mode == "shards":
        raise BadInput(
            f"data.canonical_streams={streams}, but a dataset has only {num_shards} shards. Give "
            f"data.canonical_streams={num_shards} or fewer, or data.order=ranges."
        )
    return Law(
        seed=layout.seed,
        members=members,
        mode=layout.mode,
        streams=streams,
        window_shards=layout.window_shards,
        ending=layout.ending,
    )


def open_readers(
    datasets: Sequence[Dataset],
    law: Law,
    *,
    cache: Cache | None = None,
    keys_only: bool = False,
) -> list[Reader]:
    """Make a reader for each dataset of a law, with options of `Reader`; reads nothing yet."""
    return [
        Reader(
            encoding_folder(dataset.folder, dataset.encoding.fingerprint)
            if dataset.encoding
            else dataset.folder,
            (dataset.encoding or dataset.manifest).shards,
            dataset=dataset.folder,
            manifest=dataset.manifest,
            removal_version=member.removal_version,
            orders=orders,
            cache=cache,
            keys_only=keys_only,
        )
        for dataset, member, orders in zip(datasets, law.members, law.orders, strict=True)
    ]


def _member(dataset: Dataset, version: int) -> Member:
    return Member(
        name=str(dataset.folder),
        fingerprint=dataset.manifest.shards_fingerprint,
        removal_version=version,
        counts=_live_counts(dataset, version),
    )


def _live_counts(dataset: Dataset, version: int) -> dict[str, Int64s]:
    manifest = dataset.manifest
    live = np.asarray(manifest.live_counts_at(version), np.int64)
    buckets = dataset.encoding.bucket_counts if dataset.encoding else {}
    if len(buckets) <= 1:
        return {next(iter(buckets), ANY): live}
    assert dataset.encoding is not None
    counts = {name: np.array(rows, np.int64) for name, rows in buckets.items()}
    folder = encoding_folder(dataset.folder, dataset.encoding.fingerprint)
    for number, entry in enumerate(dataset.encoding.shards):
        some = manifest.weights.get(entry.number)
        if some is not None and some.rows_removed_until(version):
            weights = read_row_weights(dataset.folder, entry, some)
            names = read_index(entry.index(folder), columns=["bucket"])["bucket"]
            there = np.asarray(names.to_pylist())[live_rows(weights, version)]
            for name, rows in counts.items():
                rows[number] = np.count_nonzero(there == name)
    return counts
