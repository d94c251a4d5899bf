"""Samples by position of the stream: latents with text states, or pictures, as batches."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.decode import cover, decode_bgr, decode_square
from trainer.data.index import PICTURES
from trainer.data.npy import HEADER_BYTES
from trainer.data.quarantine import Quarantine
from trainer.data.reader import Place, Reader
from trainer.data.stream import Law, Slots
from trainer.errors import BadData, BadInput
from trainer.place import NUM_REQUESTS, is_local

# Shape suffixes: B samples, C latent channels, H W rows and columns, L text tokens, D text width.

_CPU = torch.device("cpu")
MAX_REDRAWS = 100


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


@dataclass(frozen=True, slots=True)
class CaptionedBatch:
    """Pictures and captions of one micro-batch, for encoders that run while training."""

    ids_B: Tensor
    """int64 sample ids."""
    visits_B: Tensor
    """int64, how often each sample was seen before."""
    pictures_BHWC: Tensor
    """uint8 RGB."""
    captions: tuple[str, ...]
    """B of them."""
    names: tuple[str, ...]
    """Of the B pictures, for messages."""
    weights_B: Tensor | None = None
    """fp32 weights of the losses; None: all are 1."""


Batch = LatentBatch | PictureBatch | CaptionedBatch


class Source(Protocol):
    """What a stream reads from."""

    samples: "Samples"

    def load(self, slots: Slots) -> Batch:
        """Read the samples of some slots of one step."""


class Samples:
    """The datasets of a stream, and what becomes of samples that cannot be read."""

    def __init__(
        self,
        law: Law,
        readers: Sequence[Reader],
        quarantine: Quarantine,
        *,
        excluded: Collection[int] = (),
    ) -> None:
        """Take a reader for each member of the law, and where bad samples are counted.

        Samples whose ids are `excluded` are replaced like those that were removed.
        """
        self.law, self.readers, self._quarantine = law, tuple(readers), quarantine
        self._excluded = frozenset(excluded)
        # Remote and not cached, all the time goes into waiting for answers.
        waits = any(r.cache is None and not is_local(r.entries[0].tar(r.folder)) for r in readers)
        self._threads = ThreadPoolExecutor(NUM_REQUESTS) if waits else None

    def read(self, slots: Slots, read: Callable[[int, Place], None]) -> list[Place]:
        """Read every sample of some slots, or one in its place if it is bad or was removed.

        Args:
            slots: Of one step.
            read: Takes a slot's number and a place; BadData is how it says that it cannot.

        Returns:
            The places that were read.
        """
        self._quarantine.saw(len(slots.positions))
        first: dict[int, tuple[int, Place | BadData]] = {}
        for member, reader in enumerate(self.readers):
            mine = np.flatnonzero(slots.members == member)
            if len(mine):
                rows, _ = self.law.orders[member][slots.bucket].at(slots.positions[mine])
                found = zip(rows.tolist(), reader.find(slots.bucket, rows), strict=True)
                first |= zip(mine.tolist(), found, strict=True)

        def settle(number: int) -> Place:
            return self._settle(slots, number, *first[number], read)

        return list((self._threads.map if self._threads else map)(settle, range(len(first))))

    def exclude(self, ids: Collection[int]) -> None:
        """Replace these samples, too, from now on."""
        self._excluded |= frozenset(ids)

    def visits(self, slots: Slots) -> Tensor:
        """Say how often each sample was seen before: (B,) int64."""
        visits = np.empty_like(slots.positions)
        for member, orders in enumerate(self.law.orders):
            mine = slots.members == member
            if mine.any():
                visits[mine] = slots.positions[mine] // orders[slots.bucket].num_rows
        return torch.from_numpy(visits)

    def weights(self, places: Sequence[Place]) -> Tensor | None:
        """Give the weights of a batch; None if those of all datasets are 1."""
        if not any(reader.weighted for reader in self.readers):
            return None
        return torch.tensor([float(place.shard.weights[place.row]) for place in places])

    def close(self) -> None:
        """Close all files."""
        for reader in self.readers:
            reader.close()
        if self._threads:
            self._threads.shutdown()

    def _settle(
        self,
        slots: Slots,
        number: int,
        row: int,
        place: Place | BadData,
        read: Callable[[int, Place], None],
    ) -> Place:
        member = int(slots.members[number])
        for attempt in range(1, MAX_REDRAWS + 1):
            try:
                if isinstance(place, BadData):
                    raise place
                if int(place.shard.ids[place.row]) in self._excluded:
                    self._quarantine.exclude(**self._name(member, slots.bucket, row, place))
                elif not place.shard.gone[place.row]:
                    read(number, place)
                    return place
            except BadData as error:
                self._record(member, slots.bucket, row, place, error)
            self._quarantine.saw(1)
            order = self.law.orders[member][slots.bucket]
            rows = order.redrawn(slots.positions[number : number + 1], attempt)
            row, place = int(rows[0]), self.readers[member].find(slots.bucket, rows)[0]
        raise BadInput(
            f"{MAX_REDRAWS} samples in a row of {self.law.members[member].name} were bad or "
            "removed: nothing is left in this window to put in their place. Begin another run= "
            "on what is left, or repair the dataset (`kiln verify` finds what is damaged)."
        )

    def _record(
        self, member: int, bucket: str, row: int, place: Place | BadData, error: BadData
    ) -> None:
        self._quarantine.add(**self._name(member, bucket, row, place), why=str(error))

    def _name(self, member: int, bucket: str, row: int, place: Place | BadData) -> dict[str, str]:
        return {
            "dataset": self.law.members[member].name,
            "shard": self.readers[member].shard_name(bucket, row),
            "key": place.shard.key(place.row) if isinstance(place, Place) else f"number {row}",
        }


class LatentSource:
    """Reads `KEY.latent.npy` and `KEY.text.npy` of encodings."""

    def __init__(self, samples: Samples, *, device: torch.device = _CPU) -> None:
        """Read from the encodings of datasets, batches to `device`."""
        self.samples, self._device = samples, device
        # What was met so far, for the next batch is read into its place: bucket -> shape of its
        # latents; the longest text and the width of its states.
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tokens = self._width = 0

    def load(self, slots: Slots) -> LatentBatch:
        """Read latents and text states; shorter captions are padded to the batch's longest."""
        size, shape = len(slots.positions), self._shapes.get(slots.bucket)
        latents = _Rows(size, shape) if shape else _Rows(size, (2, 0, 0, 0))
        texts = _Rows(size, (self._tokens, self._width))

        def read(number: int, place: Place) -> None:
            row, shard = place.row, place.shard
            latent = shard.read_array(row, "latent.npy", latents.place(number, shape))
            _check(place, "latent.npy", latent, shape or (2, None, None, None))
            num_numbers, rest = divmod(shard.size_bytes(row, "text.npy") - HEADER_BYTES, 2)
            tokens, more = divmod(num_numbers, self._width or 1)
            whole = None if rest or more else (tokens, self._width)
            text = shard.read_array(row, "text.npy", texts.place(number, whole))
            _check(place, "text.npy", text, (None, self._width or None))
            latents.keep(number, latent)
            texts.keep(number, text)

        places = self.samples.read(slots, read)
        moments_B2CHW = torch.from_numpy(latents.stacked()).to(self._device).float()
        text_BLD = torch.from_numpy(texts.stacked()).to(self._device).float()
        mask_BL = torch.arange(text_BLD.shape[1])[None] < torch.from_numpy(texts.lengths)[:, None]
        self._shapes[slots.bucket] = tuple(latents.array.shape[1:])
        self._tokens, self._width = max(self._tokens, text_BLD.shape[1]), text_BLD.shape[2]
        return LatentBatch(
            ids_B=_ids(places).to(self._device),
            visits_B=self.samples.visits(slots).to(self._device),
            mean_BCHW=moments_B2CHW[:, 0],
            logvar_BCHW=moments_B2CHW[:, 1],
            text_BLD=text_BLD,
            text_mask_BL=mask_BL.to(self._device),
            weights_B=_to(self.samples.weights(places), self._device),
        )


class _Rows:
    """The fp16 arrays of a batch, of which most are read into their places, padded with zeros."""

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        self.array: NDArray[np.float16] = np.empty((size, *shape), "<f2")
        self.lengths: NDArray[np.int64] = np.zeros(size, np.int64)
        self._loose: dict[int, NDArray[np.float16]] = {}

    def place(self, number: int, shape: tuple[int, ...] | None) -> NDArray[np.float16] | None:
        """Say where to read an array of a shape; None if there is no room for it."""
        if shape is None or not 0 < shape[0] <= self.array.shape[1]:
            return None
        return self.array[number, : shape[0]] if shape[1:] == self.array.shape[2:] else None

    def keep(self, number: int, array: NDArray[np.float16]) -> None:
        """Take note of what was read, wherever it was."""
        self.lengths[number] = len(array)
        if array.base is self.array:
            self._loose.pop(number, None)
        else:
            self._loose[number] = array

    def stacked(self) -> NDArray[np.float16]:
        """Give all of them in one array, as long as the longest."""
        longest = int(self.lengths.max())
        inner = next(iter(self._loose.values()), self.array[0]).shape[1:]
        if longest > self.array.shape[1] or inner != self.array.shape[2:]:
            old, self.array = self.array, np.empty((len(self.array), longest, *inner), "<f2")
            if inner == old.shape[2:]:
                self.array[:, : old.shape[1]] = old
        for number, array in self._loose.items():
            self.array[number, : len(array)] = array
        for number in np.flatnonzero(self.lengths < longest).tolist():
            self.array[number, self.lengths[number] : longest] = 0
        return self.array[:, :longest]


def _check(place: Place, extension: str, array: NDArray[Any], shape: Sequence[int | None]) -> None:
    fits = len(array.shape) == len(shape) and array.size > 0
    if (
        array.dtype != np.float16
        or not fits
        or any(need not in {None, got} for got, need in zip(array.shape, shape, strict=True))
    ):
        needs = ", ".join("any" if need is None else str(need) for need in shape)
        raise BadData(
            f"{place.shard.name(place.row, extension)} is {array.dtype} {array.shape}, needs "
            f"float16 ({needs})."
        )


class PictureSource:
    """Reads and decodes the pictures of datasets."""

    def __init__(self, samples: Samples, *, side_px: int, device: torch.device = _CPU) -> None:
        """Read from datasets; pictures are resized and centre-cropped to `side_px`."""
        self.samples, self._side_px, self._device = samples, side_px, device

    def load(self, slots: Slots) -> PictureBatch:
        """Read and decode pictures."""
        side_px = self._side_px
        pictures_BHWC = np.empty((len(slots.positions), side_px, side_px, 3), np.uint8)

        def read(number: int, place: Place) -> None:
            content, name = read_picture(place)
            decode_square(content, side_px, name=name, out=pictures_BHWC[number])

        places = self.samples.read(slots, read)
        pictures = torch.from_numpy(pictures_BHWC).to(self._device).float().div_(127.5).sub_(1.0)
        return PictureBatch(
            ids_B=_ids(places).to(self._device),
            visits_B=self.samples.visits(slots).to(self._device),
            pictures_BCHW=pictures.permute(0, 3, 1, 2),
            weights_B=_to(self.samples.weights(places), self._device),
        )


class CaptionedSource:
    """Reads pictures and captions of datasets, just as `kiln encode` does."""

    def __init__(self, samples: Samples, *, side_px: int, device: torch.device = _CPU) -> None:
        """Read from datasets; pictures are resized and centre-cropped to `side_px`."""
        self.samples, self._side_px, self._device = samples, side_px, device

    def load(self, slots: Slots) -> CaptionedBatch:
        """Read and decode pictures; read captions."""
        size, side_px = len(slots.positions), self._side_px
        pictures_BHWC = np.empty((size, side_px, side_px, 3), np.uint8)
        captions, names = [""] * size, [""] * size

        def read(number: int, place: Place) -> None:
            captions[number] = place.shard.caption(place.row)
            content, names[number] = read_picture(place)
            bgr_HWC = decode_bgr(content, name=names[number])
            pictures_BHWC[number] = cover(bgr_HWC, side_px, side_px).rgb_HWC

        places = self.samples.read(slots, read)
        return CaptionedBatch(
            ids_B=_ids(places).to(self._device),
            visits_B=self.samples.visits(slots).to(self._device),
            pictures_BHWC=torch.from_numpy(pictures_BHWC).to(self._device),
            captions=tuple(captions),
            names=tuple(names),
            weights_B=_to(self.samples.weights(places), self._device),
        )


def read_picture(place: Place) -> tuple[bytes, str]:
    """Read the file of a sample's picture; and give its name, for messages.

    Raises:
        BadData: The sample has none, or the tar ends before it does.
    """
    row, shard = place.row, place.shard
    extension = next((ext for ext in PICTURES if shard.size_bytes(row, ext) >= 0), "jpg")
    return shard.read(row, extension), shard.name(row, extension)


def _ids(places: Sequence[Place]) -> Tensor:
    return torch.tensor([int(place.shard.ids[place.row]) for place in places], dtype=torch.int64)


def _to(weights_B: Tensor | None, device: torch.device) -> Tensor | None:
    return None if weights_B is None else weights_B.to(device)
