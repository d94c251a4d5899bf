"""Measure the encoders for a few seconds and say what a cache of latents costs and saves."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.buckets import Box
from data_prep.encode_batches import Encoders, encode_ids, encode_pictures, to_npy
from data_prep.encode_loader import CHUNK_IMAGES, load_samples
from trainer.data.headers import BLOCK_BYTES
from trainer.data.manifest import Manifest, ShardEntry
from trainer.data.shards import Shard, read_index
from trainer.models.parallel import one_core_workers

NUM_CAPTIONS = 512  # whose lengths are counted
_CPU_BATCH_IMAGES = 8  # where a larger batch is no faster, and would outlast the probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was measured on some samples of a dataset."""

    images_per_s: float
    """Through the autoencoder, at the size of the square."""
    tokens_per_s: float
    """Through the text encoder, in full batches."""
    tokens_per_caption: float
    """Mean length."""
    latent_bytes: int
    """What a sample's latent takes in a tar."""
    text_bytes: float
    """What a sample's text states take, on average."""

    @property
    def sample_s(self) -> float:
        """Seconds of the encoders per sample."""
        return 1 / self.images_per_s + self.tokens_per_caption / self.tokens_per_s

    @property
    def sample_bytes(self) -> float:
        """Bytes per sample in the sidecar tars."""
        return self.latent_bytes + self.text_bytes


def probe(
    dataset: Path, shard: ShardEntry, encoders: Encoders, *, side_px: int, probe_s: float
) -> Probe:
    """Run the encoders for about `probe_s` seconds on samples of one shard.

    Samples lie in shards by the hash of their rows, so that any shard stands for all.
    """
    first = replace(shard, count=min(shard.count, CHUNK_IMAGES))
    (loaded,) = load_samples(dataset, [first], [Box(side_px, side_px)], threads=1)
    if encoders.device.type == "cpu":
        fewer = min(encoders.batch_images, _CPU_BATCH_IMAGES)
        encoders = replace(encoders, batch_images=fewer)
    pictures = [sample.rgb_HWC for sample in loaded][: encoders.batch_images]
    lengths = [len(ids) for ids in encoders.text.tokens(_captions(dataset, shard))]
    ids = encoders.text.tokens([loaded[0].caption])[0][:1] * statistics.median_low(lengths)
    latent = encode_pictures(pictures[:1], replace(encoders, batch_images=1))[0]
    state = encode_ids([ids], replace(encoders, batch_tokens=1))[0]
    texts = [to_npy(np.zeros((length, state.shape[1]), np.float16)) for length in set(lengths)]
    size = dict(zip(set(lengths), map(_tar_bytes, texts), strict=True))

    def picture_batch() -> int:
        encode_pictures(pictures, encoders)
        return encoders.batch_images

    def caption_batch() -> int:
        encode_ids([ids], encoders)
        return encoders.captions_per_batch(len(ids)) * len(ids)

    return Probe(
        images_per_s=_per_s(picture_batch, encoders.threads, probe_s / 2),
        tokens_per_s=_per_s(caption_batch, encoders.threads, probe_s / 2),
        tokens_per_caption=statistics.mean(lengths),
        latent_bytes=_tar_bytes(to_npy(latent)),
        text_bytes=statistics.mean(size[length] for length in lengths),
    )


def print_costs(
    found: Probe,
    manifest: Manifest,
    todo: Sequence[ShardEntry],
    *,
    device: str,
    free_bytes: int | None,
) -> None:
    """Print what the cache costs and saves, each number with where it is from.

    Args:
        found: What was measured.
        manifest: The dataset's.
        todo: The shards that are not encoded yet.
        device: What the encoders run on.
        free_bytes: Room where the cache will lie, if that is known.
    """
    table = Table("what", "value", "known how", title="Cache latents, or recompute them?")
    for line in _lines(found, manifest, todo, device, free_bytes):
        table.add_row(*line)
    saved_s = found.sample_s / found.sample_bytes * 1e9
    console = Console()
    console.print(table)
    console.print(
        "Encoding once takes the time of one epoch of recomputing: the cache pays from the second "
        f"epoch on, if there is room for it. Each GB of it saves {saved_s:,.0f} s of {device} "
        "time per epoch. `kiln train` reads latents from the cache alone. Decision: "
        + (no_room(found, todo, free_bytes) or "cache."),
        highlight=False,
    )


def no_room(found: Probe, todo: Sequence[ShardEntry], free_bytes: int | None) -> str | None:
    """Say by how much the cache of these shards does not fit; None if it does, or nobody knows."""
    num_todo = sum(shard.count for shard in todo)
    needed_bytes = num_todo * found.sample_bytes
    if free_bytes is None or needed_bytes <= free_bytes:
        return None
    return (
        f"no cache, for the latents of {num_todo:,} images take {_gb(needed_bytes)}, and "
        f"{_gb(free_bytes)} are free where the dataset lies. Make room, move the dataset to a "
        "larger disk, or give a smaller encoders.image_side_px; probe_s=0 goes on all the same."
    )


def _lines(
    found: Probe,
    manifest: Manifest,
    todo: Sequence[ShardEntry],
    device: str,
    free_bytes: int | None,
) -> Iterator[tuple[str, str, str]]:
    num_images, num_todo = manifest.rows_kept, sum(shard.count for shard in todo)
    source_bytes = sum(shard.bytes for shard in manifest.shards)
    yield "autoencoder", f"{found.images_per_s:,.1f} images/s", f"measured on {device}"
    yield "text encoder", f"{found.tokens_per_s:,.0f} tokens/s", f"measured on {device}"
    yield "caption", f"{found.tokens_per_caption:.1f} tokens", "counted, mean"
    size = f"{found.latent_bytes / 1e3:.1f} kB latent + {found.text_bytes / 1e3:.1f} kB text"
    yield "one sample, fp16", size, "counted"
    yield f"whole cache, {num_images:,} images", _gb(num_images * found.sample_bytes), "derived"
    yield f"still to encode, {num_todo:,} images", _gb(num_todo * found.sample_bytes), "derived"
    yield "time to encode them", _time(num_todo * found.sample_s), "derived"
    if free_bytes is not None:
        yield "free where it will lie", _gb(free_bytes), "counted"
    yield "read per epoch, cached", _gb(num_images * found.sample_bytes), "derived"
    yield "read per epoch, recomputed", _gb(source_bytes), "counted"
    yield "encoders per epoch, cached", "0 s", ""
    yield "encoders per epoch, recomputed", _time(num_images * found.sample_s), "derived"


def _captions(dataset: Path, entry: ShardEntry) -> list[str]:
    with Shard(entry.tar(dataset), read_index(entry.index(dataset))) as shard:
        return [shard.caption(row) for row in range(len(shard.keys))[:NUM_CAPTIONS]]


def _per_s(run: Callable[[], int], threads: int, seconds: float) -> float:
    """Return things per second, when threads do so many things per call side by side."""

    def repeat(_: int) -> float:
        run()  # the first call also chooses kernels and allocates
        started_s, done = time.perf_counter(), run()
        while (elapsed_s := time.perf_counter() - started_s) < seconds:
            done += run()
        return done / elapsed_s

    with one_core_workers(threads) as workers:
        return sum(workers.map(repeat, range(threads)))


def _tar_bytes(content: bytes) -> int:
    return BLOCK_BYTES + -(-len(content) // BLOCK_BYTES) * BLOCK_BYTES


def _gb(num_bytes: float) -> str:
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:,.3f} MB"
    return f"{num_bytes / 1e9:,.3f} GB" if num_bytes < 1e10 else f"{num_bytes / 1e9:,.0f} GB"


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 3600:,.2f} h"
