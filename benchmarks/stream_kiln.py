"""Kiln's side of the stream benchmark: epochs of batches."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
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


@contextmanager
def kiln(
    where: str, *, kind: str, cache: Path, batch: int, side_px: int
) -> Iterator[Callable[[int], Iterator[Batch]]]:
    """Open a dataset; gives what iterates the batches of an epoch.

    Args:
        where: Folder or URL of the dataset.
        kind: 'pictures' or 'latents'.
        cache: Folder of the node's cache; empty before the first epoch of a cold run.
        batch: Samples in a batch.
        side_px: Pictures are resized and cropped to squares of this side.
    """
    torch.set_num_threads(1)
    folder = place(where)
    manifest = load_manifest(folder)
    source: Source
    if kind == "latents":
        encoding = load_encoding(encoding_folder(folder, ENCODING))
        source = LatentSource(_samples(Dataset(folder, manifest, encoding), cache))
    else:
        source = PictureSource(_samples(Dataset(folder, manifest, None), cache), side_px=side_px)
    with closing(source.samples):
        yield lambda epoch: _epoch(source, epoch, batch)


def _samples(dataset: Dataset, cache: Path) -> Samples:
    law = make_law([dataset], Layout(seed=SEED))
    kept = None if is_local(dataset.folder) else Cache(cache, max_bytes=CACHE_BYTES)
    readers = open_readers([dataset], law, cache=kept)
    return Samples(law, readers, Quarantine(None, max_bad_frac=0.0))


def _epoch(source: Source, epoch: int, batch: int) -> Iterator[Batch]:
    (order,) = source.samples.law.orders[0].values()
    first = epoch * order.num_rows
    state = State(first, (1,), (Tally(first, (0,)),))
    batches = micro_batches(source, state, Pace(0, 1, batch, batch, THREADS, PREFETCH_BATCHES))
    with closing(batches):
        yield from islice(batches, order.num_rows // batch)
