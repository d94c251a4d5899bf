"""Show how far a long count is: a live bar on a terminal, a line every few seconds elsewhere."""

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 5.0


class Countdown:
    """Things done, the rate, the share kept and the time left, on stderr."""

    def __init__(self, what: str, total: int, *, unit: str = "rows") -> None:
        """Name the work and say how much there is."""
        self._what, self._total, self._unit = what, total, unit
        self._lock = threading.Lock()
        self._done = 0
        self._kept: int | None = None
        self._started_s = self._said_s = time.monotonic()
        self._console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, facts="starting workers")

    def update(self, done: int, kept: int | None = None) -> None:
        """Take new totals since the start."""
        if done == 0:  # workers are starting; their seconds say nothing about the rate
            self._started_s = self._said_s = time.monotonic()
            return
        self._done, self._kept = done, kept
        self._bar.update(self._task, completed=done, facts=self._facts())
        if not self._console.is_terminal and time.monotonic() - self._said_s > _LINE_EVERY_S:
            self._say()

    def of(self, done: int, total: int) -> None:
        """Take a new total of work, and how much of it is done."""
        self._total = total
        self._bar.update(self._task, total=total)
        self.update(done)

    def expect(self, total: int) -> None:
        """Take a new total of work; what is done stays done."""
        self._total = total
        self._bar.update(self._task, total=total)

    def advance(self, more: int) -> None:
        """Count `more` as done; any thread may."""
        with self._lock:
            self.update(self._done + more)

    def finish(self) -> None:
        """Say the last line."""
        if not self._console.is_terminal:
            self._say()

    def _say(self) -> None:
        self._said_s = time.monotonic()
        left_s = (self._total - self._done) / max(self._per_s(), 1e-9)
        text = f"{self._what}: {self._done}/{self._total} {self._unit}, {self._facts()}"
        self._console.print(f"{text}, {left_s:.0f} s left", highlight=False, soft_wrap=True)

    def _facts(self) -> str:
        facts = f"{self._per_s():.0f} {self._unit}/s"
        if self._kept is None:
            return facts
        return f"{facts}, {100 * self._kept / max(1, self._done):.1f} % kept"

    def _per_s(self) -> float:
        return self._done / max(time.monotonic() - self._started_s, 1e-9)

    def __enter__(self) -> "Countdown":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
