"""Kiln's side of the stream benchmark: one epoch of batches, opened anew as a command opens it."""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from benchmarks.stream_data import ENCODING
from trainer.data.manifest import encoding_folder, load_encoding, load_manifest
from trainer.data.sources import LatentBatch, LatentSource, PictureBatch, PictureSource
from trainer.data.stream import micro_batches
from trainer.place import place

SEED, PREFETCH_BATCHES = 0, 4


def kiln_latents(
    where: str, *, cache: Path, epoch: int, batch: int
) -> Iterator[LatentBatch | PictureBatch]:
    """Iterate the batches of an epoch of the latents of a dataset.

    Args:
        where: Folder or URL of the dataset.
        cache: Folder of the node's cache; empty before the first epoch of a cold run.
        epoch: 0 for the first.
        batch: Samples in a batch.
    """
    dataset = place(where)
    encoding = load_encoding(encoding_folder(dataset, ENCODING))
    return _epoch(LatentSource(dataset, encoding), epoch, batch)


def kiln_pictures(
    where: str, *, cache: Path, epoch: int, batch: int, side_px: int
) -> Iterator[LatentBatch | PictureBatch]:
    """Iterate the batches of an epoch of the pictures of a dataset, as `kiln_latents` does.

    Args:
        where: Folder or URL of the dataset.
        cache: Folder of the node's cache.
        epoch: 0 for the first.
        batch: Samples in a batch.
        side_px: Pictures are resized and cropped to squares of this side.
    """
    dataset = place(where)
    return _epoch(PictureSource(dataset, load_manifest(dataset), side_px=side_px), epoch, batch)


def _epoch(
    source: LatentSource | PictureSource, epoch: int, batch: int
) -> Iterator[LatentBatch | PictureBatch]:
    torch.set_num_threads(1)
    batches = micro_batches(
        source,
        images_seen=epoch * source.num_samples,
        seed=SEED,
        rank=0,
        world=1,
        global_batch_images=batch,
        micro_batch_images=batch,
        prefetch_batches=PREFETCH_BATCHES,
    )
    with closing(source), closing(batches):  # type: ignore[type-var]
        yield from islice(batches, source.num_samples // batch)
