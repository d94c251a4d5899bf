"""Kiln's side of the stream benchmark: one epoch of batches, opened anew as a command opens it."""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from benchmarks.stream_data import ENCODING
from trainer.data.cache import Cache
from trainer.data.loader import Pace, micro_batches
from trainer.data.manifest import encoding_folder, load_encoding, load_manifest
from trainer.data.opening import Dataset, Layout, make_law, open_readers
from trainer.data.quarantine import Quarantine
from trainer.data.sources import Batch, LatentSource, PictureSource, Samples, Source
from trainer.data.stream import State, Tally
from trainer.place import is_local, place

SEED, THREADS, PREFETCH_BATCHES = 0, 2, 4
CACHE_BYTES = 10**10


def kiln_latents(where: str, *, cache: Path, epoch: int, batch: int) -> Iterator[Batch]:
    """Iterate the batches of an epoch of the latents of a dataset.

    Args:
        where: Folder or URL of the dataset.
        cache: Folder of the node's cache; empty before the first epoch of a cold run.
        epoch: 0 for the first.
        batch: Samples in a batch.
    """
    folder = place(where)
    encoding = load_encoding(encoding_folder(folder, ENCODING))
    source = LatentSource(_samples(Dataset(folder, load_manifest(folder), encoding), cache))
    return _epoch(source, epoch, batch)


def kiln_pictures(
    where: str, *, cache: Path, epoch: int, batch: int, side_px: int
) -> Iterator[Batch]:
    """Iterate the batches of an epoch of the pictures of a dataset, as `kiln_latents` does.

    Args:
        where: Folder or URL of the dataset.
        cache: Folder of the node's cache.
        epoch: 0 for the first.
        batch: Samples in a batch.
        side_px: Pictures are resized and cropped to squares of this side.
    """
    folder = place(where)
    samples = _samples(Dataset(folder, load_manifest(folder), None), cache)
    return _epoch(PictureSource(samples, side_px=side_px), epoch, batch)


def _samples(dataset: Dataset, cache: Path) -> Samples:
    law = make_law([dataset], Layout(seed=SEED))
    kept = None if is_local(dataset.folder) else Cache(cache, max_bytes=CACHE_BYTES)
    readers = open_readers([dataset], law, cache=kept)
    return Samples(law, readers, Quarantine(None, max_bad_frac=0.0))


def _epoch(source: Source, epoch: int, batch: int) -> Iterator[Batch]:
    torch.set_num_threads(1)
    (order,) = source.samples.law.orders[0].values()
    first = epoch * order.num_rows
    state = State(first, (1,), (Tally(first, (0,)),))
    pace = Pace(0, 1, batch, batch, THREADS, PREFETCH_BATCHES)
    with closing(source.samples), closing(micro_batches(source, state, pace)) as batches:  # type: ignore[type-var]
        yield from islice(batches, order.num_rows // batch)
