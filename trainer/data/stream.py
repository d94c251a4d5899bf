"""The stream: which samples a rank reads for which step, and reading them ahead."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
from numpy.typing import NDArray

from trainer.data.order import samples_at
from trainer.data.sources import LatentBatch, PictureBatch, Source


def rank_positions(
    first: int, *, rank: int, world: int, global_batch_images: int
) -> NDArray[np.int64]:
    """Positions of the training sequence that one rank takes of the step that begins at `first`.

    Any split would do, since a step is a set of samples; a stride lets every rank take its own
    whatever the world size.
    """
    return np.arange(first + rank, first + global_batch_images, world, dtype=np.int64)


def micro_batches(
    source: Source,
    *,
    images_seen: int,
    seed: int,
    rank: int,
    world: int,
    global_batch_images: int,
    micro_batch_images: int,
    prefetch_batches: int,
) -> Iterator[LatentBatch | PictureBatch]:
    """Yield this rank's micro-batches from global position `images_seen` on, without end.

    Which samples make a step depends on `seed` and on positions alone. Reading ahead happens in
    one thread and is no part of the state: a resumed run passes the images it has trained on.
    """

    def positions() -> Iterator[NDArray[np.int64]]:
        for step in count():
            first = images_seen + step * global_batch_images
            mine = rank_positions(
                first, rank=rank, world=world, global_batch_images=global_batch_images
            )
            yield from np.split(mine, len(mine) // micro_batch_images)

    def read(places: NDArray[np.int64]) -> LatentBatch | PictureBatch:
        samples, visits = samples_at(places, num_samples=source.num_samples, seed=seed)
        return source.load(samples, visits)

    todo = positions()
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as reader:
        ahead: deque[Future[LatentBatch | PictureBatch]] = deque(
            reader.submit(read, next(todo)) for _ in range(prefetch_batches)
        )
        try:
            while True:
                ahead.append(reader.submit(read, next(todo)))
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()
