"""Fetches the shards of a rank's streams into the node's cache, one window ahead of their use."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from trainer.data.sources import Samples
from trainer.data.stream import Slots

FETCHERS = 4
"""Files that a rank downloads at the same time; each in several pieces at once."""


class Scout:
    """Looks after the caches of a rank; without caches it does nothing."""

    def __init__(self, samples: Samples, *, rank: int, world: int) -> None:
        """Fetch for the streams that `rank_slots` gives a rank."""
        self._samples, self._rank, self._world = samples, rank, world
        self._windows: dict[tuple[int, str], tuple[int, int]] = {}
        self._threads = ThreadPoolExecutor(FETCHERS, "scout")
        self._fetching: list[Future[None]] = []

    def note(self, slots: Slots) -> None:
        """Hear of a step that is about to be read; fetch its window and the one behind.

        Raises:
            BadWorld: The storage could not be reached.
        """
        for member in np.unique(slots.members).tolist():
            if self._samples.readers[member].cache is None:
                continue
            order = self._samples.law.orders[member][slots.bucket]
            last = int(slots.positions[slots.members == member].max())
            window = order.window(last)
            if self._windows.get((member, slots.bucket)) != window:
                self._windows[member, slots.bucket] = window
                self._fetch(member, slots.bucket, window)
                self._fetch(member, slots.bucket, order.window_after(window))
        for done in [future for future in self._fetching if future.done()]:
            self._fetching.remove(done)
            done.result()

    def _fetch(self, member: int, bucket: str, window: tuple[int, int]) -> None:
        law, reader = self._samples.law, self._samples.readers[member]
        first = self._rank * law.streams // self._world
        stop = -(-(self._rank + 1) * law.streams // self._world)
        for number in law.orders[member][bucket].shards_in(window, np.arange(first, stop)).tolist():
            entry = reader.entries[number]
            self._fetching.append(self._threads.submit(reader.fetch, entry))

    def close(self) -> None:
        """Wait for the downloads that have begun, and begin no more."""
        self._threads.shutdown(wait=True, cancel_futures=True)
