"""Pack samples into full batches whatever shard they are of, and run the encoders on them.

A batch always has its full size: what is missing is filled up and thrown away. A sample's result
then depends neither on its neighbours nor on where a run began, so shards that were encoded in
one go and after an interruption have equal bytes.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.buckets import Box
from data_prep.encode_loader import Loaded
from trainer.models.autoencoders import Autoencoder
from trainer.models.encoders import (
    caption_states,
    not_finite_latents,
    not_finite_states,
    picture_moments,
)
from trainer.models.parallel import one_core_workers
from trainer.models.text_encoders import TextEncoder

# Shape suffixes: B pictures or captions, C channels, H W rows and columns, L tokens, D text width.

MAX_WAIT_IMAGES = 2048  # then a batch is run though it is not full, to bound the memory
CAPTIONS_KEPT = 1024  # captions that are not encoded again if they come again soon

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Encoders:
    """The models, ready to run."""

    autoencoder: Autoencoder
    text: TextEncoder
    boxes: tuple[Box, ...]
    """Sizes that pictures come in."""
    batch_images: int
    batch_tokens: int
    device: torch.device
    threads: int
    """Batches at the same time, one core each."""

    def captions_per_batch(self, length: int) -> int:
        """How many captions of `length` tokens make a batch."""
        return max(1, self.batch_tokens // length)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoders made of a sample."""

    key: str
    moments_2CHW: NDArray[np.float16]
    """Means and log-variances."""
    text: bytes
    """`text.npy`."""
    columns: dict[str, Any]


@dataclass(slots=True)
class Busy:
    """Adds up how long threads are inside the encoders, and how much they do there."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By kind of batch: images, captions."""
    items: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def span(self, kind: str, num_items: int) -> Iterator[None]:
        """Count what happens inside."""
        started_s = time.perf_counter()
        yield
        with self._lock:
            elapsed_s = time.perf_counter() - started_s
            self.seconds[kind] = self.seconds.get(kind, 0.0) + elapsed_s
            self.items[kind] = self.items.get(kind, 0) + num_items

    def frac(self, *, threads: int, wall_s: float) -> float:
        """Share of the threads' time that they were inside the encoders."""
        return sum(self.seconds.values()) / (threads * wall_s)


class Packer(Generic[K, V]):
    """Gathers items of equal shape until they make a full batch."""

    def __init__(self, size: Callable[[K], int]) -> None:
        """Take a function that says how many items of a shape make a batch."""
        self._size = size
        self._groups: dict[K, tuple[int, list[V]]] = {}

    def add(self, shape: K, item: V, *, now: int) -> tuple[K, list[V]] | None:
        """Add an item at the time `now`; return the batch that it fills."""
        _, items = self._groups.setdefault(shape, (now, []))
        items.append(item)
        if len(items) < self._size(shape):
            return None
        del self._groups[shape]
        return shape, items

    def flush(self, *, before: float) -> Iterator[tuple[K, list[V]]]:
        """Yield the batches, not full, whose first item came before that time."""
        for shape in [shape for shape, (since, _) in self._groups.items() if since < before]:
            yield shape, self._groups.pop(shape)[1]


@dataclass(frozen=True, slots=True)
class _Picture:
    sample: Loaded
    moments: Future[NDArray[np.float16]]


@dataclass(frozen=True, slots=True)
class _Caption:
    text: str
    ids: list[int]
    states: Future[bytes]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A sample whose results may not be there yet; its picture is not kept."""

    key: str
    columns: dict[str, Any]
    moments: Future[NDArray[np.float16]]
    text: Future[bytes]

    @property
    def done(self) -> bool:
        return self.moments.done() and self.text.done()

    def encoded(self) -> Encoded:
        return Encoded(self.key, self.moments.result(), self.text.result(), self.columns)


def encode_samples(
    chunks: Iterable[Sequence[Loaded]], encoders: Encoders, busy: Busy
) -> Generator[Encoded, None, None]:
    """Yield every sample in the order given, encoded.

    Args:
        chunks: The samples, some at a time.
        encoders: The models.
        busy: Told what the encoders do.

    Raises:
        BadInput: An encoder gives latents or states that are not finite.
    """
    waiting: deque[_Waiting] = deque()
    with one_core_workers(encoders.threads) as workers:
        passes = _Passes(encoders, workers, busy)
        try:
            for chunk in chunks:
                waiting.extend(passes.add(chunk))
                while waiting and waiting[0].done:
                    yield waiting.popleft().encoded()
            passes.flush()
            while waiting:
                yield waiting.popleft().encoded()
        finally:
            workers.shutdown(cancel_futures=True)


class _Passes:
    """The batches being filled and those being encoded."""

    def __init__(self, encoders: Encoders, workers: Executor, busy: Busy) -> None:
        self._encoders, self._workers, self._busy = encoders, workers, busy
        self._pictures = Packer[tuple[int, ...], _Picture](lambda _: encoders.batch_images)
        self._captions = Packer[int, _Caption](encoders.captions_per_batch)
        self._texts: dict[str, Future[bytes]] = {}
        self._running: set[Future[None]] = set()
        self._num_added = 0

    def add(self, chunk: Sequence[Loaded]) -> Iterator[_Waiting]:
        """Take samples; give each with the results that it will have."""
        now = self._num_added
        self._num_added += len(chunk)
        self._add_captions(dict.fromkeys(s.caption for s in chunk), now)
        for sample in chunk:
            picture = _Picture(sample, Future())
            if batch := self._pictures.add(sample.rgb_HWC.shape, picture, now=now):
                self._run(self._encode_pictures, batch[1])
            text = self._texts[sample.caption]
            yield _Waiting(sample.key, sample.columns, picture.moments, text)
        for caption in list(self._texts)[:-CAPTIONS_KEPT]:
            del self._texts[caption]
        self.flush(before=now - MAX_WAIT_IMAGES)

    def flush(self, *, before: float = float("inf")) -> None:
        """Run the batches that were begun before a time, though they are not full."""
        for _, pictures in self._pictures.flush(before=before):
            self._run(self._encode_pictures, pictures)
        for _, captions in self._captions.flush(before=before):
            self._run(self._encode_captions, captions)

    def _add_captions(self, captions: Iterable[str], now: int) -> None:
        new = [caption for caption in captions if caption not in self._texts]
        for caption, ids in zip(new, self._encoders.text.tokens(new), strict=True):
            states = self._texts[caption] = Future()
            if batch := self._captions.add(len(ids), _Caption(caption, ids, states), now=now):
                self._run(self._encode_captions, batch[1])

    def _run(self, encode: Callable[[list[V]], None], batch: list[V]) -> None:
        # Two batches wait for a worker at most: enough to keep it busy, few enough for memory.
        if len(self._running) >= self._encoders.threads + 2:
            _, self._running = wait(self._running, return_when=FIRST_COMPLETED)
        self._running.add(self._workers.submit(encode, batch))

    def _encode_pictures(self, batch: list[_Picture]) -> None:
        with _failing(picture.moments for picture in batch):
            arrays = [picture.sample.rgb_HWC for picture in batch]
            with self._busy.span("images", len(batch)):
                moments = encode_pictures(arrays, self._encoders)
            for picture, moments_2CHW in zip(batch, moments, strict=True):
                if not np.isfinite(moments_2CHW).all():
                    raise not_finite_latents(picture.sample.key)
                picture.moments.set_result(moments_2CHW)

    def _encode_captions(self, batch: list[_Caption]) -> None:
        with _failing(caption.states for caption in batch):
            with self._busy.span("captions", len(batch)):
                states = encode_ids([caption.ids for caption in batch], self._encoders)
            for caption, states_LD in zip(batch, states, strict=True):
                require_finite_states(states_LD, caption.text)
                caption.states.set_result(to_npy(states_LD))


@contextmanager
def _failing(results: Iterable[Future[Any]]) -> Iterator[None]:
    """Give an exception to all results that are not there yet."""
    try:
        yield
    except Exception as error:
        for result in results:
            if not result.done():
                result.set_exception(error)


def encode_pictures(
    pictures: Sequence[NDArray[np.uint8]], encoders: Encoders
) -> list[NDArray[np.float16]]:
    """Encode up to batch_images pictures of one size; values too large for fp16 are clamped.

    Args:
        pictures: ``(H, W, 3)`` RGB each.
        encoders: The models.

    Returns:
        ``(2, C, h, w)`` means and log-variances of each.
    """
    full_BHWC = np.stack(filled_up(pictures, encoders.batch_images))
    pictures_BHWC = torch.from_numpy(full_BHWC).to(encoders.device)
    return _arrays(picture_moments(encoders.autoencoder, pictures_BHWC), len(pictures))


def encode_ids(ids: Sequence[list[int]], encoders: Encoders) -> list[NDArray[np.float16]]:
    """Encode up to a batch of captions of equal length; values too large for fp16 are clamped.

    Args:
        ids: Their tokens.
        encoders: The models.

    Returns:
        ``(L, D)`` states of each.
    """
    ids_BL = torch.tensor(filled_up(ids, encoders.captions_per_batch(len(ids[0]))))
    return _arrays(caption_states(encoders.text, ids_BL), len(ids))


def require_finite_states(states_LD: NDArray[np.float16], caption: str) -> None:
    """Raise BadInput, naming the caption, if its states are not finite."""
    if not np.isfinite(states_LD).all():
        raise not_finite_states(caption)


def _arrays(halves: torch.Tensor, count: int) -> list[NDArray[np.float16]]:
    """Take the first `count` to the host."""
    return list(halves[:count].cpu().numpy())


def filled_up(items: Sequence[V], size: int) -> list[V]:
    """Repeat the first item until there are `size`."""
    return [*items, *[items[0]] * (size - len(items))]


def to_npy(array: NDArray[Any]) -> bytes:
    """Return the bytes of a .npy file."""
    file = BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0))
    return file.getvalue()
