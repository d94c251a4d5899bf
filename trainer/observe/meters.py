"""Measure how fast training goes, how long it waits for data and how long it still takes."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class _Mark:
    """Clock and sums behind a step."""

    at_s: float
    images: float = 0
    data_wait_s: float = 0.0
    joules: float = 0.0
    measured_joules: float = 0.0
    flops: float = 0.0


class Throughput:
    """Images, operations and joules per second, and data-wait share, over a sliding window."""

    def __init__(
        self, *, window_s: float = 30.0, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the window now, when training starts."""
        self._window_s, self._clock_s = window_s, clock_s
        self._marks = deque([_Mark(clock_s())])

    def add(self, *, images: int, **spent: float) -> None:
        """Count a finished step.

        Args:
            images: That it took.
            spent: Of it: data_wait_s, joules, measured_joules, flops; what is left out is 0.
        """
        last, now_s = self._marks[-1], self._clock_s()
        sums = {name: getattr(last, name) + amount for name, amount in spent.items()}
        self._marks.append(replace(last, at_s=now_s, images=last.images + images, **sums))
        # Two marks always stay, so that steps longer than the window still have a speed.
        while len(self._marks) > 2 and now_s - self._marks[1].at_s >= self._window_s:
            self._marks.popleft()

    @property
    def images_per_s(self) -> float:
        """Images per second over the window; 0 before the first step."""
        return self._per_s("images")

    @property
    def data_wait_frac(self) -> float:
        """Share of the window spent waiting for data, 0 to 1."""
        return self._per_s("data_wait_s")

    @property
    def flops_per_s(self) -> float | None:
        """Floating point operations per second over the window; None where nobody counts them."""
        return self._per_s("flops") if self._marks[-1].flops else None

    @property
    def watts(self) -> float | None:
        """Mean power over the window; None where nothing is metered."""
        return self._per_s("joules") if self._marks[-1].joules else None

    @property
    def j_per_image(self) -> float | None:
        """Joules per image over the window; None where nothing is metered."""
        return self._share("joules", "images")

    @property
    def measured_frac(self) -> float | None:
        """Share of the window's joules that was measured, 0 to 1; None of no joules."""
        return self._share("measured_joules", "joules")

    def _share(self, part: str, whole: str) -> float | None:
        of = self._sum(whole)
        return self._sum(part) / of if of and self._marks[-1].joules else None

    def _per_s(self, name: str) -> float:
        elapsed_s = self._sum("at_s")
        return self._sum(name) / elapsed_s if elapsed_s > 0 else 0.0

    def _sum(self, name: str) -> float:
        """What came to one of a mark's sums over the window."""
        return float(getattr(self._marks[-1], name) - getattr(self._marks[0], name))

    def time_left_s(self, images_left: int) -> float | None:
        """Return the seconds that `images_left` take at this speed; None while it is unknown."""
        speed = self.images_per_s
        return images_left / speed if speed > 0 else None
