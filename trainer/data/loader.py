"""Micro-batches of one rank, read ahead by threads; nothing of it is part of the state."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from trainer.data.ahead import Scout
from trainer.data.sources import Batch, Source
from trainer.data.stream import Slots, State, advance, rank_slots, step_slots


@dataclass(frozen=True, slots=True)
class Pace:
    """How a rank goes through the stream; all of it may change between steps."""

    rank: int
    world: int
    global_batch_images: int
    """Samples of one step, over all ranks."""
    micro_batch_images: int
    """Samples of one batch on one rank."""
    threads: int
    """Batches that are read at the same time."""
    prefetch_batches: int
    """Batches that are ready or being read while one is in use."""


def micro_batches(source: Source, state: State, pace: Pace) -> Generator[Batch]:
    """Yield this rank's micro-batches from `state` on, without end.

    The samples of a step are equal for all paces; a resumed run passes the state behind the last
    step it has trained on, whatever was read ahead.
    """
    with ExitStack() as stack:
        scout = Scout(source.samples, rank=pace.rank, world=pace.world)
        stack.callback(scout.close)
        threads = stack.enter_context(ThreadPoolExecutor(pace.threads, "stream"))
        ahead: deque[Future[Batch]] = deque()
        stack.callback(lambda: [waiting.cancel() for waiting in ahead])
        for slots in micro_slots(source, state, pace, scout):
            ahead.append(threads.submit(source.load, slots))
            if len(ahead) > pace.prefetch_batches:
                yield ahead.popleft().result()


def micro_slots(source: Source, state: State, pace: Pace, scout: Scout) -> Iterator[Slots]:
    """Yield the slots of this rank's micro-batches."""
    law = source.samples.law
    while True:
        slots = step_slots(law, state, pace.global_batch_images)
        mine = rank_slots(law, slots, rank=pace.rank, world=pace.world)
        scout.note(mine)
        num_parts = len(mine.positions) // pace.micro_batch_images
        for part in np.split(np.arange(len(mine.positions)), num_parts):
            yield Slots(mine.bucket, mine.members[part], mine.positions[part])
        state = advance(law, state, pace.global_batch_images)
