"""Rows of metrics that evaluations give, whenever they come, and how readers merge them by step."""

import fcntl
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from trainer.observe.jsonl import JsonLines, read_rows

log = logging.getLogger(__name__)

FOLDER = "evaluations"
METRICS = "metrics.jsonl"
_IS_SCORE = re.compile(r"eval(_[\w.+]+)?/")
# An evaluation holds metrics.jsonl for milliseconds, training for as long as it lasts.
_HOLD_TRIES, _HOLD_PAUSE_S = 11, 0.1

Row = Mapping[str, Any]


def result_path(run: Path, step: int, weights: str) -> Path:
    """Where the evaluation of a checkpoint lies; weights as in `trainer.runtime.weights`."""
    suffix = "" if weights == "ema" else f"_{weights}"
    return run / FOLDER / f"step_{step:08d}{suffix}.json"


def strip_path(run: Path, step: int, weights: str) -> Path:
    """Where the first pictures that an evaluation drew lie, side by side: of later ones too."""
    return result_path(run, step, weights).with_suffix(".png")


def metrics_row(evaluation: Row) -> dict[str, Any]:
    """Return the row of an evaluation: `eval/SCORE`, with `_low` and `_high` where it has them.

    Of raw weights they are `eval_raw/SCORE`, and so on. A score is a number, or has a `value`.
    """
    row = {"step": evaluation["step"], "images_seen": evaluation["images_seen"]}
    weights = evaluation.get("weights", "ema")
    prefix = "eval" if weights == "ema" else f"eval_{weights}"
    for name, score in evaluation["scores"].items():
        told = score if isinstance(score, Mapping) else {"value": score}
        for suffix in ("value", "low", "high"):
            if told.get(suffix) is not None:
                row[f"{prefix}/{name}" + ("" if suffix == "value" else f"_{suffix}")] = told[suffix]
    return row


def is_evaluation(row: Row) -> bool:
    """Whether a row of metrics.jsonl is of an evaluation, not of a training step."""
    return any(_IS_SCORE.match(key) for key in row)


def training_rows(rows: Iterable[Row]) -> list[Row]:
    """Leave the rows of evaluations out."""
    return [row for row in rows if not is_evaluation(row)]


def evaluation_rows(run: Path, rows: Iterable[Row]) -> list[Row]:
    """Return one row per evaluated step, by step, also of evaluations that are not merged yet.

    Args:
        run: Run directory.
        rows: Of its metrics.jsonl: of the same numbers given twice, the later ones count.
    """
    found: dict[int, dict[str, Any]] = {}
    for row in (*rows, *map(metrics_row, _read_results(run))):
        if is_evaluation(row):
            found.setdefault(row["step"], {}).update(row)
    return [found[step] for step in sorted(found)]


def best_images(run: Path, score: str | None) -> int | None:
    """Return the images seen where a score was best so far; None if nobody looked at it.

    Args:
        run: Run directory.
        score: E.g. eval/all; with a minus before it the smallest is the best.
    """
    if score is None:
        return None
    name, sign = (score[1:], -1) if score.startswith("-") else (score, 1)
    found = [row for row in evaluation_rows(run, read_rows(run / METRICS)) if name in row]
    best = max(found, key=lambda row: sign * row[name], default=None)
    return None if best is None else int(best["images_seen"])


class Merger:
    """Finds finished evaluations that metrics.jsonl does not have; for its one writer."""

    def __init__(self, run: Path) -> None:
        """Look at nothing yet."""
        self._run = run
        self._merged: set[str] | None = None
        self._stamps: dict[Path, int] = {}

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that are new, oldest step first; the caller must append them."""
        stamps = {path: path.stat().st_mtime_ns for path in _results(self._run)}
        fresh = [path for path, stamp in stamps.items() if self._stamps.get(path) != stamp]
        if not fresh:
            return []
        if self._merged is None:
            written = read_rows(self._run / METRICS)
            self._merged = {_content(row) for row in written if is_evaluation(row)}
        rows = [metrics_row(evaluation) for evaluation in _read_results(self._run, fresh)]
        new = [row for row in rows if _content(row) not in self._merged]
        self._merged |= {_content(row) for row in new}
        self._stamps = stamps
        return new


def hold_metrics(run: Path) -> BinaryIO | None:
    """Be the writer of metrics.jsonl until the file that is returned is closed, or a kill.

    None: another process is that, and stays it for more than a second, or the file system has no
    locks.
    """
    file = (run / METRICS).open("ab")
    for _ in range(_HOLD_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(_HOLD_PAUSE_S)
        except OSError:  # Lustre without -o flock
            break
    file.close()
    return None


def is_held(run: Path) -> bool:
    """Whether a process is the writer of metrics.jsonl, as training is; False without locks."""
    try:
        with (run / METRICS).open("rb") as file:
            # Whoever wants to become the writer meanwhile tries again for a second.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def merge(run: Path) -> list[dict[str, Any]] | None:
    """Append the rows of finished evaluations to metrics.jsonl, unless a training run writes it.

    Returns:
        The rows that were appended; None: another process holds the file, and will do it, or
        nothing can be locked, and whoever trains the run next will.
    """
    held = hold_metrics(run)
    if held is None:
        return None
    with held:
        now_unix_s = round(time.time(), 3)
        rows = [{**row, "time_unix_s": now_unix_s} for row in Merger(run).rows()]
        file = JsonLines(run / METRICS)
        try:
            file.append(rows)
        finally:
            file.close()
    return rows


def _results(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step_*.json"))


def _read_results(run: Path, paths: Sequence[Path] | None = None) -> Iterator[Row]:
    for path in _results(run) if paths is None else paths:
        try:
            evaluation = json.loads(path.read_text(encoding="utf-8"))
            metrics_row(evaluation)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s): `kiln evaluate again=true` makes it anew", path, error)
            continue
        yield evaluation


def _content(row: Row) -> str:
    """Say what a row tells, but for when and by whom."""
    told = {key: value for key, value in row.items() if key not in {"time_unix_s", "attempt"}}
    return json.dumps(told, sort_keys=True)
