"""Samples of a dataset, spread evenly over all of it: pictures with captions, and latents."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.data.manifest import Encoding, Manifest, encoding_folder, load_manifest
from trainer.data.npy import read_npy
from trainer.data.shards import Shard, read_index
from trainer.data.tombstones import live_rows, read_row_weights
from trainer.errors import BadInput
from trainer.gallery import read_picture
from trainer.sampler import Pixels


def spread_rows(dataset: Path, manifest: Manifest, count: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (number of a shard, rows in it): up to `count` live samples, evenly spaced."""
    live = manifest.live_counts_at(manifest.removal_version)
    total = sum(live)
    chosen = np.linspace(0, total - 1, min(count, total)).astype(int)
    ends = np.cumsum(live)
    for number, entry in enumerate(manifest.shards):
        first = ends[number] - live[number]
        mine = chosen[(chosen >= first) & (chosen < ends[number])] - first
        if not len(mine):
            continue
        if entry.number in manifest.weights:
            weights = read_row_weights(dataset, entry, manifest.weights[entry.number])
            mine = live_rows(weights, manifest.removal_version)[mine]
        yield number, mine.tolist()


def captioned_pictures(
    dataset: Path, count: int, *, side_px: int, as_encoded: bool = False
) -> Iterator[tuple[str, Pixels]]:
    """Yield (caption, ``(side_px, side_px, 3)`` picture) of up to `count` samples.

    Args:
        dataset: Folder or URL.
        count: Samples.
        side_px: Of the squares.
        as_encoded: Give the pixels that `kiln encode` encodes; see `decode_square`.
    """
    manifest = load_manifest(dataset)
    for number, rows in spread_rows(dataset, manifest, count):
        entry = manifest.shards[number]
        with Shard(entry.tar(dataset), read_index(entry.index(dataset))) as shard:
            for row in rows:
                yield shard.caption(row), read_picture(shard, row, side_px, as_encoded=as_encoded)


def picture_batches(
    dataset: Path, count: int, *, side_px: int, batch_images: int
) -> Iterator[Pixels]:
    """Yield the pictures of `captioned_pictures` as ``(B, side_px, side_px, 3)``."""
    batch: list[Pixels] = []
    for _, picture in captioned_pictures(dataset, count, side_px=side_px):
        batch.append(picture)
        if len(batch) == batch_images:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def encoded_pairs(
    dataset: Path, encoding: Encoding, count: int, *, shape: tuple[int, int, int]
) -> tuple[Tensor, list[Tensor]]:
    """Read latents and text states of up to `count` samples.

    Args:
        dataset: Folder or URL.
        encoding: One of its encodings.
        count: Samples to look at; of another shape than `shape` they are left out.
        shape: ``(C, H, W)`` of the latents.

    Returns:
        ``(N, 2, C, H, W)`` float32 means and log-variances, not normalised, and N text states
        ``(L_i, D)`` float32.

    Raises:
        BadInput: No latent has that shape.
    """
    folder = encoding_folder(dataset, encoding.fingerprint)
    moments, texts = [], []
    for number, rows in spread_rows(dataset, load_manifest(dataset), count):
        entry = encoding.shards[number]
        with Shard(entry.tar(folder), read_index(entry.index(folder))) as shard:
            for row in rows:
                found = read_npy(shard.read(row, "latent.npy"))
                if found.shape[1:] == shape:
                    moments.append(torch.from_numpy(found.astype(np.float32)))
                    text = read_npy(shard.read(row, "text.npy"))
                    texts.append(torch.from_numpy(text.astype(np.float32)))
    if not moments:
        raise BadInput(
            f"{count} latents of {dataset} were looked at, and none has the shape {list(shape)}, "
            "which this run's evaluation needs. Give validation= a dataset of square pictures."
        )
    return torch.stack(moments), texts
