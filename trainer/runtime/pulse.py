"""Where a rank is in its step: said by the thread that trains, read by those who watch it."""

import time
from collections import defaultdict

PATIENT = frozenset({"start", "checkpoint", "restore", "end"})
"""Phases that belong to no step, and may take their time."""


class Pulse:
    """Step and phase of this rank, and the seconds that each phase took."""

    def __init__(self) -> None:
        """Begin in the phase `start`."""
        self.step, self.phase, self.steps_done = 0, "start", 0
        self.began_s = self._entered_s = time.monotonic()
        self._spent_s: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> str:
        """Do something else from now on; return what was done before.

        Args:
            phase: data, encode, forward, backward, update, agreement, log, or one of `PATIENT`.
        """
        now_s, before = time.monotonic(), self.phase
        self._spent_s[before] += now_s - self._entered_s
        self._entered_s = now_s
        # The clock first: the watchdog must never see an old clock with the limit of a step.
        if phase in PATIENT or before in PATIENT:
            self.began_s = now_s
        self.phase = phase
        return before

    def finish_step(self, step: int) -> None:
        """Step number `step` is done, and the clock of the next one begins."""
        self.began_s = time.monotonic()
        self.step, self.steps_done = step + 1, self.steps_done + 1

    def take_spent_s(self) -> defaultdict[str, float]:
        """Return the seconds spent in each phase that ended since the last call."""
        taken, self._spent_s = self._spent_s, defaultdict(float)
        return taken
