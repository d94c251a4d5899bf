"""Read and decode the samples of shards in order, ahead of whoever takes them."""

import json
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.buckets import Box, nearest_box
from trainer.data.decode import cover, decode_bgr
from trainer.data.manifest import ShardEntry
from trainer.data.shards import Shard, read_index
from trainer.errors import BadInput

# Shape suffixes: H W rows and columns, C colours.

CHUNK_IMAGES = 16  # read by one task: enough to make its overhead small, few enough for memory
_PICTURES = ("jpg", "png", "webp")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A sample, ready for the encoders."""

    key: str
    rgb_HWC: NDArray[np.uint8]
    caption: str
    columns: dict[str, Any]
    """For the sidecar's index: its bucket, and what was there before the cut."""


def load_samples(
    dataset: Path, shards: Sequence[ShardEntry], boxes: Sequence[Box], *, threads: int
) -> Generator[list[Loaded], None, None]:
    """Yield all samples in order, in chunks, while the next chunks are being decoded.

    Args:
        dataset: The dataset's folder.
        shards: What to read.
        boxes: Each picture is cut to the one whose aspect ratio is nearest to its own.
        threads: Chunks read at the same time; at most twice as many are held.
    """
    opened: dict[str, Future[Shard]] = {}
    ahead: deque[tuple[Future[list[Loaded]], str, bool]] = deque()

    def take() -> list[Loaded]:
        chunk, number, is_last = ahead.popleft()
        samples = chunk.result()
        if is_last:
            opened.pop(number).result().close()
        return samples

    try:
        with ThreadPoolExecutor(threads, "decode") as readers:
            try:
                for shard in shards:
                    # Tasks start in order, so no chunk waits for an opening that waits for it.
                    file = opened[shard.number] = readers.submit(_open, dataset, shard)
                    for first in range(0, shard.count, CHUNK_IMAGES):
                        rows = range(first, min(first + CHUNK_IMAGES, shard.count))
                        chunk = readers.submit(_load_chunk, file, rows, boxes)
                        ahead.append((chunk, shard.number, rows.stop == shard.count))
                        if len(ahead) >= 2 * threads:
                            yield take()
                while ahead:
                    yield take()
            finally:
                readers.shutdown(cancel_futures=True)
    finally:
        for file in opened.values():
            if not file.cancelled() and file.exception() is None:
                file.result().close()


def run_ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield what `items` yields; a thread draws it, up to `depth` items ahead."""
    with closing(items), ThreadPoolExecutor(1, "ahead") as worker:
        waiting = deque(worker.submit(next, items, None) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not None:
                waiting.append(worker.submit(next, items, None))
                yield item
        finally:
            for future in waiting:
                future.cancel()


def _open(dataset: Path, entry: ShardEntry) -> Shard:
    return Shard(entry.tar(dataset), read_index(entry.index(dataset)), whole=True)


def _load_chunk(file: Future[Shard], rows: Sequence[int], boxes: Sequence[Box]) -> list[Loaded]:
    shard = file.result()
    return [_load(shard, row, boxes) for row in rows]


def _load(shard: Shard, row: int, boxes: Sequence[Box]) -> Loaded:
    key, extensions = shard.keys[row], shard.extensions(row)
    extension = next((ext for ext in extensions if ext in _PICTURES), None)
    if extension is None:
        raise BadInput(
            f"{shard.path}: {key} has {', '.join(extensions)}; need one of {', '.join(_PICTURES)}."
        )
    bgr_HWC = decode_bgr(shard.read(row, extension), name=f"{shard.path}: {key}.{extension}")
    height, width = bgr_HWC.shape[:2]
    box = nearest_box(boxes, width, height)
    covered = cover(bgr_HWC, box.width, box.height)
    original_width, original_height = _original_size(shard, row) or (width, height)
    columns = {
        "bucket": str(box),
        "original_width": original_width,
        "original_height": original_height,
        "crop_top": covered.top,
        "crop_left": covered.left,
    }
    return Loaded(key, covered.rgb_HWC, shard.caption(row), columns)


def _original_size(shard: Shard, row: int) -> tuple[int, int] | None:
    """Read what a sample's json says of its size before it was stored; foreign ones may not."""
    if "json" not in shard.extensions(row):
        return None
    try:
        about = json.loads(shard.read(row, "json"))
    except ValueError:
        return None
    names = ("original_width", "original_height")
    match [about.get(name) for name in names] if isinstance(about, dict) else None:
        case [width, height] if type(width) is type(height) is int and min(width, height) > 0:
            return width, height
    return None
