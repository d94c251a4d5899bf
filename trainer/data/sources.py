"""Samples by number: latents with text states from an encoding, or pictures from a dataset."""

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.manifest import (
    Encoding,
    Manifest,
    RowWeights,
    ShardEntry,
    check_files,
    encoding_folder,
    load_manifest,
)
from trainer.data.shards import Shard, read_index
from trainer.data.tombstones import read_row_weights
from trainer.errors import BadInput
from trainer.place import NUM_REQUESTS, is_local

# Shape suffixes: B samples, C latent channels, H W rows and columns, L text tokens, D text width.

_CPU = torch.device("cpu")
_PICTURES = ("jpg", "png", "webp")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """Samples of one micro-batch as the encoders left them."""

    ids_B: Tensor
    """int64 sample ids; with `visits_B` they key every random draw of a sample."""
    visits_B: Tensor
    """int64, how often each sample was seen before."""
    mean_BCHW: Tensor
    """fp32 latent means, not normalised."""
    logvar_BCHW: Tensor
    """fp32 latent log-variances."""
    text_BLD: Tensor
    """fp32 text states, zero after each caption's end."""
    text_mask_BL: Tensor
    """bool, true on real tokens."""
    weights_B: Tensor | None = None
    """fp32 weights of the losses; None: all are 1."""


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """Pictures of one micro-batch."""

    ids_B: Tensor
    """int64 sample ids."""
    visits_B: Tensor
    """int64, how often each sample was seen before."""
    pictures_BCHW: Tensor
    """fp32 RGB in [-1, 1]."""
    weights_B: Tensor | None = None
    """fp32 weights of the losses; None: all are 1."""


class Source(Protocol):
    """What a stream reads from."""

    num_samples: int

    def load(
        self, samples: NDArray[np.int64], visits: NDArray[np.int64]
    ) -> LatentBatch | PictureBatch:
        """Read the given samples."""

    def close(self) -> None:
        """Close the files."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sample lies, and what it counts."""

    shard: Shard
    row: int
    weight: float

    @property
    def key(self) -> str:
        return self.shard.keys[self.row]


@dataclass(frozen=True, slots=True)
class _OpenShard:
    shard: Shard
    weights: NDArray[np.float32]
    """Of all rows."""
    live: NDArray[np.int64]
    """Rows that were not removed."""


class _Shards:
    """All shards of one folder as one row of live samples; opened when first met."""

    def __init__(
        self,
        folder: Path,
        entries: tuple[ShardEntry, ...],
        *,
        dataset: Path,
        weights: Mapping[str, RowWeights],
    ) -> None:
        check_files(folder, entries)
        self._folder, self._entries = folder, entries
        self._dataset, self._weights = dataset, weights
        dead = {number: some.removed for number, some in weights.items()}
        self._counts = [entry.count - dead.get(entry.number, 0) for entry in entries]
        self._ends = np.cumsum(self._counts)
        self._open: dict[int, _OpenShard] = {}
        self.num_samples = sum(self._counts)
        # Remote, all the time goes into waiting for answers.
        self._threads = None if is_local(folder) else ThreadPoolExecutor(NUM_REQUESTS)
        self.weighted = any(some.weighted for some in weights.values())
        if not self.num_samples:
            if not entries:
                raise BadInput(f"{dataset} has no samples: there is nothing to train on.")
            raise BadInput(f"all samples of {dataset} were removed: nothing is left to train on.")

    def read(self, places: Sequence[_Place], read: Callable[[Shard, int], T]) -> list[T]:
        """Read something of every sample; remote ones at the same time."""
        shards, rows = [place.shard for place in places], [place.row for place in places]
        return list((self._threads.map if self._threads else map)(read, shards, rows))

    def find(self, sample: int) -> _Place:
        """Find the live sample of a number."""
        number = int(np.searchsorted(self._ends, sample, side="right"))
        if number not in self._open:
            self._open[number] = self._open_shard(self._entries[number])
        opened = self._open[number]
        row = int(opened.live[sample - self._ends[number] + self._counts[number]])
        return _Place(opened.shard, row, float(opened.weights[row]))

    def weights(self, places: list[_Place]) -> Tensor | None:
        """Give the weights of a batch; None if those of the whole dataset are 1."""
        return torch.tensor([place.weight for place in places]) if self.weighted else None

    def close(self) -> None:
        for opened in self._open.values():
            opened.shard.close()
        if self._threads:
            self._threads.shutdown()

    def _open_shard(self, entry: ShardEntry) -> _OpenShard:
        weights = read_row_weights(self._dataset, entry, self._weights.get(entry.number))
        shard = Shard(entry.tar(self._folder), read_index(entry.index(self._folder)))
        return _OpenShard(shard, weights, np.flatnonzero(weights))


class LatentSource:
    """Reads `KEY.latent.npy` and `KEY.text.npy` of one encoding."""

    def __init__(self, dataset: Path, encoding: Encoding, *, device: torch.device = _CPU) -> None:
        """Open the sidecar tars of `encoding` for reading by position, batches to `device`.

        Raises:
            BadInput: The encoding has latents of several sizes, or files are missing.
        """
        if encoding.facts.get("buckets"):
            raise BadInput(
                f"the encoding {encoding.fingerprint} of {dataset} has aspect buckets "
                "(encoders.buckets), and training stacks latents of one size. Give encoders.buckets"
                "=null to `kiln encode` and to this command: both encodings can lie side by side."
            )
        self._device = device
        self._shards = _Shards(
            encoding_folder(dataset, encoding.fingerprint),
            encoding.shards,
            dataset=dataset,
            weights=load_manifest(dataset).weights,
        )
        self.num_samples = self._shards.num_samples

    def load(self, samples: NDArray[np.int64], visits: NDArray[np.int64]) -> LatentBatch:
        """Read latents and text states; shorter captions are padded to the batch's longest."""
        places = [self._shards.find(int(sample)) for sample in samples]
        latents = np.stack(self._shards.read(places, _latents))
        texts = self._shards.read(places, _text)
        moments_B2CHW = torch.from_numpy(latents).float()
        text_BLD, mask_BL = pad_texts([torch.from_numpy(text) for text in texts])
        return LatentBatch(
            ids_B=_ids(places).to(self._device),
            visits_B=torch.from_numpy(visits).to(self._device),
            mean_BCHW=moments_B2CHW[:, 0].to(self._device),
            logvar_BCHW=moments_B2CHW[:, 1].to(self._device),
            text_BLD=text_BLD.to(self._device),
            text_mask_BL=mask_BL.to(self._device),
            weights_B=_to(self._shards.weights(places), self._device),
        )

    def close(self) -> None:
        """Close the tars."""
        self._shards.close()


class PictureSource:
    """Reads and decodes the pictures of a dataset."""

    def __init__(
        self, dataset: Path, manifest: Manifest, *, side_px: int, device: torch.device = _CPU
    ) -> None:
        """Open the dataset's tars; pictures are resized and centre-cropped to `side_px`."""
        self._device = device
        self._shards = _Shards(dataset, manifest.shards, dataset=dataset, weights=manifest.weights)
        self._side_px = side_px
        self.num_samples = self._shards.num_samples

    def load(self, samples: NDArray[np.int64], visits: NDArray[np.int64]) -> PictureBatch:
        """Read and decode pictures."""
        places = [self._shards.find(int(sample)) for sample in samples]
        pictures = np.stack(self._shards.read(places, self._picture))
        pictures_BHWC = torch.from_numpy(pictures).to(self._device)
        return PictureBatch(
            ids_B=_ids(places).to(self._device),
            visits_B=torch.from_numpy(visits).to(self._device),
            pictures_BCHW=pictures_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0,
            weights_B=_to(self._shards.weights(places), self._device),
        )

    def close(self) -> None:
        """Close the tars."""
        self._shards.close()

    def _picture(self, shard: Shard, row: int) -> NDArray[np.uint8]:
        extension = next(ext for ext in shard.extensions(row) if ext in _PICTURES)
        content = shard.read(row, extension)
        return decode_square(content, self._side_px, name=f"{shard.keys[row]}.{extension}")


def decode_square(content: bytes, side_px: int, *, name: str) -> NDArray[np.uint8]:
    """Decode a picture, resize its shorter side and crop the centre.

    Args:
        content: JPEG, PNG or WebP.
        side_px: Side of the result.
        name: Named in the error.

    Returns:
        ``(side_px, side_px, 3)`` RGB.

    Raises:
        BadInput: The bytes are no picture.
    """
    return cover(decode_bgr(content, name=name), side_px, side_px).rgb_HWC


def decode_bgr(content: bytes, *, name: str) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP to ``(H, W, 3)`` BGR; `name` is for the error."""
    try:
        bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # of no bytes at all, or too many pixels
        bgr = None
    if bgr is None:
        raise BadInput(f"{name} does not decode as a picture; `kiln verify` re-hashes its tar.")
    return np.asarray(bgr, np.uint8)


def read_caption(shard: Shard, row: int) -> str:
    """Read the caption of a sample; bytes that are no UTF-8 become U+FFFD.

    Raises:
        BadInput: The sample has none.
    """
    extensions = shard.extensions(row)
    if "txt" not in extensions:
        raise BadInput(
            f"{shard.path}: {shard.keys[row]} has {', '.join(extensions)}; need a caption, a txt "
            "(it may be empty)."
        )
    return shard.read(row, "txt").decode(errors="replace")


class Covered(NamedTuple):
    """A picture that was resized to cover a box, and cut to it."""

    rgb_HWC: NDArray[np.uint8]
    top: int
    """First row of the crop in the resized picture."""
    left: int
    """First column."""


def cover(bgr_HWC: NDArray[np.uint8], width_px: int, height_px: int) -> Covered:
    """Resize a picture until it just covers a box, and crop the centre."""
    height, width = bgr_HWC.shape[:2]
    scale = max(width_px / width, height_px / height)
    if scale != 1:
        size = (max(width_px, round(width * scale)), max(height_px, round(height * scale)))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        bgr_HWC = cv2.resize(bgr_HWC, size, interpolation=how)
    top, left = (bgr_HWC.shape[0] - height_px) // 2, (bgr_HWC.shape[1] - width_px) // 2
    crop = bgr_HWC[top : top + height_px, left : left + width_px, ::-1]
    return Covered(np.ascontiguousarray(crop).astype(np.uint8, copy=False), top, left)


def pad_texts(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack ``(L_i, D)`` text states to fp32 ``(B, L, D)`` and a bool mask ``(B, L)``."""
    text_BLD = torch.nn.utils.rnn.pad_sequence([t.float() for t in texts], batch_first=True)
    lengths_B = torch.tensor([len(text) for text in texts])
    return text_BLD, torch.arange(text_BLD.shape[1])[None] < lengths_B[:, None]


def _latents(shard: Shard, row: int) -> NDArray[np.float16]:
    return _npy(shard.read(row, "latent.npy"))


def _text(shard: Shard, row: int) -> NDArray[np.float16]:
    return _npy(shard.read(row, "text.npy"))


def _npy(content: bytes) -> NDArray[np.float16]:
    array: NDArray[np.float16] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    return array


def _ids(places: list[_Place]) -> Tensor:
    keys = np.array([int(place.key, 16) for place in places], dtype=np.uint64)
    return torch.from_numpy(keys.view(np.int64))


def _to(weights_B: Tensor | None, device: torch.device) -> Tensor | None:
    return None if weights_B is None else weights_B.to(device)
