"""Show how far a command's work is: a bar on a terminal, a line every few seconds elsewhere."""

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.observe.progress import in_words

LINE_EVERY_S = 5.0


class Countdown:
    """Counts done of a total, with the time left, on stderr."""

    def __init__(self, what: str, total: int) -> None:
        """Name the work and say how much there is."""
        self._what, self._total, self._done = what, total, 0
        self._lock = threading.Lock()
        self._started_s = self._said_s = time.monotonic()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total)

    def advance(self, more: int) -> None:
        """Count `more` as done; any thread may."""
        with self._lock:
            self._done += more
            self._bar.update(self._task, completed=self._done)
            self._say_if_due()

    def _say_if_due(self) -> None:
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s - self._said_s >= LINE_EVERY_S:
            self._said_s = now_s
            left_s = (now_s - self._started_s) * (self._total - self._done) / self._done
            self._console.print(
                f"{self._what}: {self._done}/{self._total}, {in_words(left_s)} left"
            )

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
