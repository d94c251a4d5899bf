"""Encode the pictures and captions of one shard into its sidecar tar."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from trainer.data.manifest import ShardEntry, publish_shard
from trainer.data.publish import file_sha256, publish_json
from trainer.data.shards import Sample, Shard, read_index
from trainer.data.sources import decode_square
from trainer.errors import BadInput
from trainer.models.autoencoders import Autoencoder
from trainer.models.parallel import one_core_workers
from trainer.models.text_encoders import TextEncoder
from trainer.place import read_bytes, sizes_bytes

# Shape suffixes: B pictures, C latent channels, H W rows and columns, L text tokens, D text width.

WINDOW_IMAGES = 1024  # captions are deduplicated and sorted within so many, to bound the memory
MAX_FLOAT16 = 65504.0
_PICTURES = ("jpg", "png", "webp")


@dataclass(frozen=True, slots=True)
class Encoders:
    """The models, ready to run."""

    autoencoder: Autoencoder
    text: TextEncoder
    image_side_px: int
    batch_images: int
    device: torch.device
    threads: int
    """Batches at the same time, one core each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums over latents, from which means and standard deviations over a dataset follow."""

    num_values: int
    """Latent numbers per channel."""
    first_C: tuple[float, ...]
    """Per channel: sum of the means."""
    second_C: tuple[float, ...]
    """Per channel: sum of mean^2 + variance, the expected square of a drawn latent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarRecord:
    """Says that a shard is encoded, and from what: `units/00000.json` in an encoding."""

    source_sha256: str
    """Hash of the dataset's tar."""
    shard: ShardEntry
    """What was published."""
    sums: Sums
    """Of its latents."""
    latent_shape: tuple[int, int, int]
    """Channels, rows, columns."""


def record_path(folder: Path, number: str) -> Path:
    """Where the record of a shard lies in an encoding's folder."""
    return folder / "units" / f"{number}.json"


def finished_record(folder: Path, source: ShardEntry, *, hashes: bool) -> SidecarRecord | None:
    """Return the record of a shard whose sidecar is there, whole and up to date.

    Args:
        folder: The encoding's.
        source: The dataset's shard.
        hashes: Judge the files by their content rather than by their size.
    """
    try:
        content = read_bytes(record_path(folder, source.number))
        record = TypeAdapter(SidecarRecord).validate_json(content)
    except (FileNotFoundError, ValidationError):
        return None
    if record.source_sha256 != source.sha256:
        return None
    tar, index = record.shard.tar(folder), record.shard.index(folder)
    if sizes_bytes([tar, index]) != [record.shard.bytes, record.shard.index_bytes]:
        return None
    if hashes and (file_sha256(tar), file_sha256(index)) != (
        record.shard.sha256,
        record.shard.index_sha256,
    ):
        return None
    return record


def encode_shard(
    dataset: Path,
    source: ShardEntry,
    folder: Path,
    encoders: Encoders,
    *,
    on_images: Callable[[int], None],
) -> SidecarRecord:
    """Encode one shard of a dataset and publish its sidecar, its index and then its record.

    Args:
        dataset: The dataset's folder.
        source: The shard.
        folder: The encoding's folder.
        encoders: The models.
        on_images: Told how many more pictures are done.
    """
    tally = _Tally()
    index = read_index(source.index(dataset))
    with Shard(source.tar(dataset), index, whole=True) as shard:
        samples = _samples(shard, encoders, tally, on_images)
        entry = publish_shard(folder, f"{source.number}.tar", samples)
    assert entry is not None, "a dataset has no empty shards"
    record = SidecarRecord(
        source_sha256=source.sha256,
        shard=entry,
        sums=tally.sums(),
        latent_shape=tally.latent_shape,
    )
    publish_json(record_path(folder, source.number), asdict(record))
    return record


class _Tally:
    """Adds up latents."""

    def __init__(self) -> None:
        self._num_values = 0
        self._first_C: NDArray[np.float64] = np.zeros(1)
        self._second_C: NDArray[np.float64] = np.zeros(1)
        self.latent_shape: tuple[int, int, int] = (0, 0, 0)

    def add(self, moments_B2CHW: NDArray[np.float16]) -> None:
        mean, logvar = moments_B2CHW.astype(np.float64).swapaxes(0, 1)
        self._num_values += mean.size // mean.shape[1]
        self._first_C = self._first_C + mean.sum((0, 2, 3))
        self._second_C = self._second_C + (mean**2 + np.exp(logvar)).sum((0, 2, 3))
        self.latent_shape = mean.shape[1:]

    def sums(self) -> Sums:
        return Sums(
            num_values=self._num_values,
            first_C=tuple(self._first_C.tolist()),
            second_C=tuple(self._second_C.tolist()),
        )


def _samples(
    shard: Shard, encoders: Encoders, tally: _Tally, on_images: Callable[[int], None]
) -> Iterator[Sample]:
    size = encoders.batch_images

    def moments_of(rows: Sequence[int]) -> NDArray[np.float16]:
        pictures_BCHW = _pictures(shard, rows, encoders.image_side_px)
        return _moments(pictures_BCHW, [shard.keys[row] for row in rows], encoders)

    with one_core_workers(encoders.threads) as workers:
        for first in range(0, len(shard.keys), WINDOW_IMAGES):
            window = range(first, min(first + WINDOW_IMAGES, len(shard.keys)))
            batches = [window[at : at + size] for at in range(0, len(window), size)]
            texts = _texts(shard, window, encoders.text, workers)
            for rows, moments_B2CHW in zip(batches, workers.map(moments_of, batches), strict=True):
                tally.add(moments_B2CHW)
                for row, moments in zip(rows, moments_B2CHW, strict=True):
                    members = {"latent.npy": to_npy(moments), "text.npy": texts[row]}
                    yield Sample(shard.keys[row], members)
                on_images(len(rows))


def _texts(
    shard: Shard, rows: Sequence[int], text: TextEncoder, workers: Executor
) -> dict[int, bytes]:
    """Return row -> `text.npy`."""
    captions = {row: shard.read(row, "txt").decode() for row in rows}
    states = {
        caption: to_npy(state_LD.numpy().astype(np.float16))
        for caption, state_LD in text.encode_each(list(captions.values()), workers)
    }
    return {row: states[caption] for row, caption in captions.items()}


def _pictures(shard: Shard, rows: Sequence[int], side_px: int) -> torch.Tensor:
    """Return float32 RGB in [-1, 1]."""
    squares = []
    for row in rows:
        extension = next(ext for ext in shard.extensions(row) if ext in _PICTURES)
        name = f"{shard.path}: {shard.keys[row]}.{extension}"
        squares.append(decode_square(shard.read(row, extension), side_px, name=name))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _moments(
    pictures_BCHW: torch.Tensor, keys: Sequence[str], encoders: Encoders
) -> NDArray[np.float16]:
    moments = encoders.autoencoder.moments(pictures_BCHW.to(encoders.device))
    stacked_B2CHW = torch.stack(moments, dim=1)
    good_B = stacked_B2CHW.isfinite().flatten(1).all(1)
    if not good_B.all():
        key = keys[int(good_B.long().argmin())]
        raise BadInput(
            f"the autoencoder gives latents that are not finite for {key}. Check its weights "
            "(encoders.autoencoder.path) and encoders.image_side_px."
        )
    fitting = stacked_B2CHW.clamp(-MAX_FLOAT16, MAX_FLOAT16).half().cpu()
    array: NDArray[np.float16] = fitting.numpy()
    return array


def to_npy(array: NDArray[Any]) -> bytes:
    """Return the bytes of a .npy file."""
    file = BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0))
    return file.getvalue()
