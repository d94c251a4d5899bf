"""The same pictures and latents for all systems: a published dataset, and plain files."""

import hashlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.prepare import PHOTOS, painted
from trainer.data.manifest import (
    Encoding,
    Manifest,
    ShardEntry,
    encoding_folder,
    publish_shard,
    save_encoding,
    save_manifest,
)
from trainer.data.shards import Sample

SHARD_SAMPLES = 128
LATENT_SHAPE = (2, 4, 32, 32)
"""Mean and log-variance of a picture of 256 px, as SD's autoencoder gives them."""
TEXT_TOKENS, TEXT_WIDTH = (16, 77), 768
ENCODING = "0" * 16


def pictures(num: int) -> Iterator[bytes]:
    """Give JPEGs of about 512 px: crops of real photographs where they are, else painted ones."""
    found = [path.read_bytes() for path in sorted(PHOTOS.rglob("*.jpg"))]
    originals = [
        cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        for content in found or map(painted, range(64))
    ]
    for number in range(num):
        picture = originals[number % len(originals)]
        assert picture is not None
        height, width = picture.shape[:2]
        cut = number // len(originals) % 16
        crop = picture[cut : height - cut // 2, cut // 2 : width - cut]
        scale = 512 / min(crop.shape[:2])
        size = (round(crop.shape[1] * scale), round(crop.shape[0] * scale))
        sized = cv2.resize(crop, size, interpolation=cv2.INTER_CUBIC)
        yield cv2.imencode(".jpg", sized, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def latents(num: int) -> Iterator[dict[str, bytes]]:
    """Give noise of the shapes that encoders write, as the members of a sidecar tar."""
    dice = np.random.default_rng(0)
    for _ in range(num):
        length = int(dice.integers(TEXT_TOKENS[0], TEXT_TOKENS[1], endpoint=True))
        yield {
            "latent.npy": npy(dice.standard_normal(LATENT_SHAPE, np.float32)),
            "text.npy": npy(dice.standard_normal((length, TEXT_WIDTH), np.float32)),
        }


def publish_pictures(dataset: Path, files: Path, num: int) -> None:
    """Publish pictures as a dataset, and write the same ones as files `KEY.jpg`."""
    samples = ({"jpg": content} for content in pictures(num))
    _save(dataset, _publish(dataset, "shards/{:05d}.tar", samples, files, num), num)


def publish_latents(dataset: Path, files: Path, num: int) -> None:
    """Publish an encoding of a dataset of as many captions, and the same as `KEY.MEMBER.npy`."""
    captions = ({"txt": b"a caption"} for _ in range(num))
    shards = _publish(dataset, "shards/{:05d}.tar", captions, None, num)
    _save(dataset, shards, num)
    folder = encoding_folder(dataset, ENCODING)
    encoded = _publish(folder, "{:05d}.tar", latents(num), files, num)
    save_encoding(
        dataset,
        Encoding(
            fingerprint=ENCODING,
            dataset_fingerprint="0" * 64,
            shards=encoded,
            bucket_counts={"256x256": [entry.count for entry in encoded]},
        ),
    )


def _publish(
    folder: Path, name: str, members: Iterator[dict[str, bytes]], files: Path | None, num: int
) -> tuple[ShardEntry, ...]:
    entries = []
    for shard in range(-(-num // SHARD_SAMPLES)):
        numbers = range(shard * SHARD_SAMPLES, min(num, (shard + 1) * SHARD_SAMPLES))
        keys = sorted(hashlib.sha256(str(number).encode()).hexdigest()[:16] for number in numbers)
        samples = [Sample(key, next(members)) for key in keys]
        entry = publish_shard(folder, name.format(shard), samples)
        assert entry is not None
        entries.append(entry)
        if files is not None:
            _write_files(files, samples)
    return tuple(entries)


def _write_files(files: Path, samples: list[Sample]) -> None:
    files.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        for extension, content in sample.members.items():
            (files / f"{sample.key}.{extension}").write_bytes(content)


def _save(dataset: Path, shards: tuple[ShardEntry, ...], num: int) -> None:
    save_manifest(dataset, Manifest(shards=shards, rows_in=num, rows_kept=num, rejected={}))


def npy(array: NDArray[Any]) -> bytes:
    """Store numbers as half floats."""
    file = BytesIO()
    np.save(file, array.astype(np.float16))
    return file.getvalue()
