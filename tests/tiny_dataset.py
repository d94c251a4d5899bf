"""A small published dataset of painted scenes, made without a download."""

import hashlib
from io import BytesIO

from data_prep.scenes import caption, draw_scene, paint
from trainer.data.manifest import Manifest, publish_shard, save_manifest
from trainer.data.shards import Sample


def sample(index, *, side_px=32, seed=0, text=None):
    scene = draw_scene(index, seed=seed)
    text = caption(scene) if text is None else text
    picture = BytesIO()
    paint(scene, side_px, side_px, jitter_seed=index).save(picture, "PNG")
    key = hashlib.blake2b(f"{index}/{seed}\0{text}".encode(), digest_size=8).hexdigest()
    return Sample(key, {"png": picture.getvalue(), "txt": text.encode(), "json": b"{}"})


def publish(dataset, shards):
    """Publish lists of samples as shards."""
    entries = []
    for number, samples in enumerate(shards):
        entries.append(publish_shard(dataset, f"shards/{number:05d}.tar", sorted(samples)))
    num_rows = sum(entry.count for entry in entries)
    manifest = Manifest(shards=tuple(entries), rows_in=num_rows, rows_kept=num_rows, rejected={})
    save_manifest(dataset, manifest)
    return dataset


def scenes_dataset(dataset, *, num_shards=2, per_shard=6, **options):
    """Publish `num_shards` shards of `per_shard` painted scenes."""
    numbers = iter(range(num_shards * per_shard))
    return publish(
        dataset,
        [[sample(next(numbers), **options) for _ in range(per_shard)] for _ in range(num_shards)],
    )
