"""A small published dataset with an encoding, made without downloads or encoders."""

import hashlib
import io
from pathlib import Path

import cv2
import numpy as np

from trainer.data.manifest import (
    Encoding,
    Manifest,
    describe_shard,
    encoding_folder,
    save_encoding,
    save_manifest,
)
from trainer.data.shards import Sample, write_shard

CHANNELS, SIDE, TEXT_WIDTH = 4, 4, 16
BUCKET = f"{8 * SIDE}x{8 * SIDE}"


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


def make_dataset(
    root: Path,
    *,
    shard_counts: tuple[int, ...] = (7, 5, 8),
    buckets: tuple[str, ...] = (BUCKET,),
    salt: str = "row",
    fingerprint: str = "tiny",
) -> Path:
    """Publish a dataset of noise pictures; keys are hashes, so shards interleave them.

    Rows take turns among the buckets; another salt gives other keys. The fingerprint is that of the
    encoders that are said to have made the latents.
    """
    dataset = root / "dataset"
    rng = np.random.default_rng(0)
    keys = sorted(
        hashlib.blake2b(f"{salt} {n}".encode(), digest_size=8).hexdigest()
        for n in range(sum(shard_counts))
    )
    entries, encoded, first = [], [], 0
    bucket_counts = {name: [0] * len(shard_counts) for name in buckets}
    for number, count in enumerate(shard_counts):
        mine = keys[first : first + count]
        first += count
        pictures, latents = [], []
        for row, key in enumerate(mine):
            bucket = buckets[row % len(buckets)]
            bucket_counts[bucket][number] += 1
            width, height = (int(px) // 8 for px in bucket.split("x"))
            picture = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            jpg = cv2.imencode(".jpg", picture)[1].tobytes()
            pictures.append(Sample(key, {"jpg": jpg, "txt": b"noise", "json": b"{}"}))
            moments = rng.normal(size=(2, CHANNELS, height, width)).astype(np.float16)
            text = rng.normal(size=(int(rng.integers(2, 6)), TEXT_WIDTH)).astype(np.float16)
            members = {"latent.npy": npy(moments), "text.npy": npy(text)}
            latents.append(Sample(key, members, {"bucket": bucket}))
        name = f"{number:05d}"
        write_shard(dataset / f"shards/{name}.tar", dataset / f"index/{name}.parquet", pictures)
        entries.append(describe_shard(dataset, f"shards/{name}.tar", count))
        folder = encoding_folder(dataset, fingerprint)
        write_shard(folder / f"{name}.tar", folder / f"index/{name}.parquet", latents)
        encoded.append(describe_shard(folder, f"{name}.tar", count))
    manifest = Manifest(shards=tuple(entries), rows_in=len(keys), rows_kept=len(keys), rejected={})
    save_manifest(dataset, manifest)
    facts = {
        "latent_mean": [0.0] * CHANNELS,
        "latent_std": [1.0] * CHANNELS,
        "latent_shape": [CHANNELS, SIDE, SIDE],
        "text_width": TEXT_WIDTH,
    }
    save_encoding(
        dataset,
        Encoding(
            fingerprint=fingerprint,
            dataset_fingerprint=manifest.fingerprint,
            shards=tuple(encoded),
            bucket_counts=bucket_counts,
            facts=facts,
        ),
    )
    np.save(
        encoding_folder(dataset, fingerprint) / "null_text.npy",
        np.zeros((2, TEXT_WIDTH), np.float16),
    )
    return dataset
