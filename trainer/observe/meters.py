"""Measure how fast training goes, how long it waits for data and how long it still takes."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Mark:
    at_s: float
    images: int
    data_wait_s: float
    joules: float
    flops: float


class Throughput:
    """Images, operations and joules per second, and data-wait share, over a sliding window."""

    def __init__(
        self, *, window_s: float = 30.0, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the window now, when training starts."""
        self._window_s, self._clock_s = window_s, clock_s
        self._marks = deque([_Mark(clock_s(), 0, 0.0, 0.0, 0.0)])

    def add(
        self, *, images: int, data_wait_s: float = 0.0, joules: float = 0.0, flops: float = 0.0
    ) -> None:
        """Count what a finished step took: images, seconds of waiting, joules, operations."""
        last, now_s = self._marks[-1], self._clock_s()
        self._marks.append(
            _Mark(
                now_s,
                last.images + images,
                last.data_wait_s + data_wait_s,
                last.joules + joules,
                last.flops + flops,
            )
        )
        # Two marks always stay, so that steps longer than the window still have a speed.
        while len(self._marks) > 2 and now_s - self._marks[1].at_s >= self._window_s:
            self._marks.popleft()

    @property
    def images_per_s(self) -> float:
        """Images per second over the window; 0 before the first step."""
        first, last = self._marks[0], self._marks[-1]
        return self._per_s(last.images - first.images)

    @property
    def data_wait_frac(self) -> float:
        """Share of the window spent waiting for data, 0 to 1."""
        first, last = self._marks[0], self._marks[-1]
        return self._per_s(last.data_wait_s - first.data_wait_s)

    @property
    def flops_per_s(self) -> float | None:
        """Floating point operations per second over the window; None where nobody counts them."""
        first, last = self._marks[0], self._marks[-1]
        return self._per_s(last.flops - first.flops) if last.flops else None

    @property
    def watts(self) -> float | None:
        """Mean power over the window; None where nothing is metered."""
        return self._per_s(self._joules) if self._marks[-1].joules else None

    @property
    def j_per_image(self) -> float | None:
        """Joules per image over the window; None where nothing is metered."""
        images = self._marks[-1].images - self._marks[0].images
        return self._joules / images if images and self._marks[-1].joules else None

    @property
    def _joules(self) -> float:
        return self._marks[-1].joules - self._marks[0].joules

    def _per_s(self, amount: float) -> float:
        elapsed_s = self._marks[-1].at_s - self._marks[0].at_s
        return amount / elapsed_s if elapsed_s > 0 else 0.0

    def time_left_s(self, images_left: int) -> float | None:
        """Return the seconds that `images_left` take at this speed; None while it is unknown."""
        speed = self.images_per_s
        return images_left / speed if speed > 0 else None
