"""Show training's progress: a live bar on a terminal, else a plain line now and then."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trainer.observe.evaluations import is_evaluation

ProgressMode = Literal["auto", "plain", "quiet"]


class Sink(Protocol):
    """Takes the rows of metrics.jsonl as they are made."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row; must not fail."""

    def close(self, *, exit_code: int = 0) -> None:
        """Take no more rows."""


class LiveProgress:
    """A rich bar: steps, loss, images per second, time left."""

    def __init__(self, console: Console, *, total_steps: int) -> None:
        """Start drawing on the console."""
        columns = (
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        self._progress = Progress(*columns, console=console, expand=True)
        self._task = self._progress.add_task("training", total=total_steps, facts="")
        self._progress.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Redraw with this row, unless it is an evaluation's."""
        if is_evaluation(row):
            return
        self._progress.update(self._task, completed=row["step"], facts=_facts(row))

    def close(self, *, exit_code: int = 0) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()


class PlainProgress:
    """One line every few seconds, and one for the last step."""

    def __init__(
        self,
        console: Console,
        *,
        total_steps: int,
        every_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Print to the console at most every `every_s` seconds."""
        self._console, self._total_steps, self._every_s = console, total_steps, every_s
        self._clock_s = clock_s
        self._printed_s: float | None = None
        self._pending: Mapping[str, Any] | None = None

    def log(self, row: Mapping[str, Any]) -> None:
        """Print this row if it is due; evaluations are not of the training's present step."""
        if is_evaluation(row):
            return
        self._pending = row
        now_s = self._clock_s()
        if self._printed_s is None or now_s - self._printed_s >= self._every_s:
            self._printed_s = now_s
            self._print()

    def close(self, *, exit_code: int = 0) -> None:
        """Print the last row, unless it was."""
        self._print()

    def _print(self) -> None:
        if self._pending is not None:
            row, self._pending = self._pending, None
            text = f"step {row['step']}/{self._total_steps}  {_facts(row)}"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def open_progress(
    mode: ProgressMode, *, total_steps: int, every_s: float = 10.0, console: Console | None = None
) -> Sink | None:
    """Choose how to show progress on stderr; None when quiet."""
    if mode == "quiet":
        return None
    console = console or Console(stderr=True)
    if mode == "auto" and console.is_terminal:
        return LiveProgress(console, total_steps=total_steps)
    return PlainProgress(console, total_steps=total_steps, every_s=every_s)


def in_words(seconds: float) -> str:
    """Write a span of time for people: '8 s', '3 min 20 s', '2 h 05 min'."""
    whole = round(seconds)
    minutes, rest_s = divmod(whole, 60)
    hours, rest_min = divmod(minutes, 60)
    if hours:
        return f"{hours} h {rest_min:02d} min"
    return f"{minutes} min {rest_s:02d} s" if minutes else f"{rest_s} s"


def _facts(row: Mapping[str, Any]) -> str:
    parts = []
    if (loss := row.get("train/loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (speed := row.get("speed/images_per_s")) is not None:
        parts.append(f"{speed:.1f} images/s")
    if (mfu := row.get("speed/mfu_frac")) is not None:
        parts.append(f"MFU {100 * mfu:.0f} %")
    if (joules := row.get("energy/j_per_image")) is not None:
        measured = row.get("energy/measured_frac") or 0.0
        parts.append(f"{joules:.3g} J/image ({100 * measured:.0f} % measured)")
    if (left_s := row.get("time/left_s")) is not None:
        parts.append(f"{in_words(left_s)} left")
    return "  ".join(parts)
