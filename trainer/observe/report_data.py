"""Thin a run's curves to what a screen can show, with every spike, as data for the page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.observe.charts import FRAME, Point
from trainer.observe.columns import Columns, Floats, columns_of
from trainer.observe.dashboard import Panel, Section, evaluation_section, training_sections
from trainer.observe.merging import period_ends
from trainer.observe.story import Story

MOST_BINS = 1500
_S_PER_HOUR = 3600.0
_KEYS = {"images": "images_seen", "steps": "step"}
_AT_ONCE_S = 1e-3
"""Joules of a period without a length are spread over so much."""

Row = Mapping[str, Any]
Data = dict[str, Any]


@dataclass(frozen=True)
class Curves:
    """Columns in bins, each of one attempt; a bin of one row has that row's numbers."""

    axes: Mapping[str, Floats]
    """Of the last row of each bin, by the name of the axis: images, steps, hours, joules."""
    attempts: Floats
    mean: Mapping[str, Floats]
    low: Mapping[str, Floats]
    high: Mapping[str, Floats]

    def points(self, key: str, axis: str = "images") -> list[Point]:
        """Return (place on the axis, mean) of the bins that have both."""
        if key not in self.mean:
            return []
        pairs = zip(self.axes[axis].tolist(), self.mean[key].tolist(), strict=True)
        return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def sections_of(story: Story) -> list[Section]:
    """Choose the charts for which a run has numbers: of evaluations, then of training."""
    evaluation = evaluation_section(story.evaluations)
    training = training_sections([story.metrics.newest()])
    return [*([evaluation] if evaluation else []), *training]


def training_curves(story: Story) -> Curves:
    """Bin the rows of training."""
    return _binned(story.metrics, _axes(story, story.metrics), most_bins=MOST_BINS)


def evaluation_curves(story: Story) -> Curves:
    """Place each evaluation where training had reached its step."""
    rows, training = columns_of(story.evaluations), story.metrics
    axes = {name: rows[key] for name, key in _KEYS.items()}
    reached = _axes(story, training)
    for name in ("hours", "joules"):
        values = reached[name]
        there = np.isfinite(values)
        axes[name] = (
            np.interp(rows["step"], training["step"][there], values[there])
            if there.any()
            else np.full(len(rows), np.nan)
        )
    return _binned(rows, axes, most_bins=max(1, len(rows)))


def page_data(stories: Sequence[Story], state: str) -> Data:
    """Return what the page's script draws, as plain JSON.

    Args:
        stories: Of the runs, in the order of their colours.
        state: Whether the runs go on: `running`, `stopped`, `finished`.
    """
    panels: dict[str, Data] = {}
    for story in stories:
        for section in sections_of(story):
            of = "evaluation" if section.name == "Evaluation" else "training"
            for panel in section.panels:
                panels.setdefault(panel.keys[0], _panel(panel, of))
    runs = [_run(story, panels.values()) for story in stories]
    for each in panels.values():
        each["drawn"] = any(_has_two_points(run[each["of"]], each["id"]) for run in runs)
    return {"state": state, "frame": FRAME, "panels": list(panels.values()), "runs": runs}


def _has_two_points(curves: Data, key: str) -> bool:
    """Whether there is a curve to draw, not a dot."""
    values = curves["values"].get(key, {"mean": []})["mean"]
    places = zip(curves["axes"]["images"], values, strict=False)
    return len({x for x, y in places if x is not None and y is not None}) >= 2


def cumulative_joules(ledger: Iterable[Row], at_unix_s: Floats) -> Floats:
    """Return the joules of training up to some times; NaN where no account has any.

    Args:
        ledger: Rows; the joules of a period are spread evenly over it.
        at_unix_s: Any times.
    """
    rows = [row for row in ledger if row["stage"] == "train"]
    joules: dict[tuple[Any, float], float] = {}
    ends = period_ends(rows)
    for row in rows:
        key = ((row["stage"], row["rank"], row["attempt"]), row["start_unix_s"])
        joules[key] = joules.get(key, 0.0) + row["joules"]
    if sum(joules.values()) <= 0:
        return np.full(len(at_unix_s), np.nan)
    begins = np.array([start for _, start in ends])
    amounts = np.array([joules[key] for key in ends])
    return spread(begins, np.array(list(ends.values())), amounts, at_unix_s)


def spread(begins: Floats, stops: Floats, amounts: Floats, at: Floats) -> Floats:
    """Return how much of amounts has come by some moments, each spread evenly over its span.

    Args:
        begins: Of the spans, in seconds.
        stops: Of the spans; a span may have no length.
        amounts: One of each span.
        at: Moments, in seconds.
    """
    stops = np.maximum(stops, begins + _AT_ONCE_S)
    rates = amounts / (stops - begins)
    times, changes = np.concatenate((begins, stops)), np.concatenate((rates, -rates))
    order = np.argsort(times, kind="stable")
    times, rate = times[order], np.cumsum(changes[order])
    come = np.concatenate(([0.0], np.cumsum(rate[:-1] * np.diff(times))))
    return np.asarray(np.interp(at, times, come))


def _axes(story: Story, rows: Columns) -> dict[str, Floats]:
    times = rows["time_unix_s"]
    known = times[np.isfinite(times)]
    begun_s = min((row["start_unix_s"] for row in story.ledger if row["stage"] == "train"),
                  default=known[0] if len(known) else 0.0)  # fmt: skip
    return {
        **{name: rows[key] for name, key in _KEYS.items()},
        "hours": (times - begun_s) / _S_PER_HOUR,
        "joules": cumulative_joules(story.ledger, times),
    }


def _binned(rows: Columns, axes: Mapping[str, Floats], *, most_bins: int) -> Curves:
    attempts = rows["attempt"]
    starts = _bin_starts(attempts, most_bins)
    stops = np.append(starts[1:], len(rows)) - 1
    mean, low, high = {}, {}, {}
    for key, values in rows.by_key.items():
        if key in {*_KEYS.values(), "time_unix_s", "attempt"} or not len(rows):
            continue
        there = np.isfinite(values)
        count = np.add.reduceat(there, starts, dtype=np.float64)
        sums = np.add.reduceat(np.where(there, values, 0.0), starts)
        mean[key] = np.divide(sums, count, out=np.full(len(starts), np.nan), where=count > 0)
        low[key] = _finite(np.minimum.reduceat(np.where(there, values, np.inf), starts))
        high[key] = _finite(np.maximum.reduceat(np.where(there, values, -np.inf), starts))
    at = {name: values[stops] if len(rows) else values for name, values in axes.items()}
    return Curves(at, attempts[stops] if len(rows) else attempts, mean, low, high)


def _bin_starts(attempts: Floats, most_bins: int) -> Any:  # noqa: ANN401 - an array of integers
    """Cut rows into bins of about equal length that begin anew with each attempt."""
    per_bin = max(1, math.ceil(len(attempts) / most_bins))
    changes = np.flatnonzero(np.diff(np.nan_to_num(attempts, nan=-1.0))) + 1
    begins = [0, *changes.tolist()] if len(attempts) else []
    ends = [*changes.tolist(), len(attempts)]
    parts = [np.arange(begin, end, per_bin) for begin, end in zip(begins, ends, strict=False)]
    return np.concatenate(parts) if parts else np.empty(0, int)


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)


def picture_steps(story: Story) -> list[int]:
    """Return the steps whose pictures were judged; those of the newest are in the page."""
    found = {int(row["step"]) for row in story.evaluations}
    newest = story.evaluation.get("step")
    return sorted(found | ({newest} if isinstance(newest, int) else set()))


def _panel(panel: Panel, of: str) -> Data:
    return {
        "id": panel.keys[0],
        "title": panel.name,
        "keys": list(panel.keys),
        "of": of,
        "from_zero": panel.from_zero,
        "noisy": panel.is_noisy,
    }


def _run(story: Story, panels: Iterable[Data]) -> Data:
    keys = {key: panel["of"] for panel in panels for key in panel["keys"]}
    parts = {"training": training_curves(story), "evaluation": evaluation_curves(story)}
    return {
        "name": story.name,
        "pictures": picture_steps(story),
        **{of: _curves(curves, [key for key, its in keys.items() if its == of])
           for of, curves in parts.items()},
    }  # fmt: skip


def _curves(curves: Curves, keys: Sequence[str]) -> Data:
    there = [key for key in keys if key in curves.mean]
    return {
        "axes": {name: _plain(values, digits=12) for name, values in curves.axes.items()},
        "attempts": _plain(curves.attempts, digits=12),
        "values": {key: _values(curves, key) for key in there},
    }


def _values(curves: Curves, key: str) -> Data:
    mean, low, high = curves.mean[key], curves.low[key], curves.high[key]
    found: Data = {"mean": _plain(mean, digits=6)}
    if np.any(high > low):
        found |= {"low": _plain(low, digits=6), "high": _plain(high, digits=6)}
    return found


def _plain(values: Floats, *, digits: int) -> list[float | int | None]:
    return [_short(value, digits) if math.isfinite(value) else None for value in values.tolist()]


def _short(value: float, digits: int) -> float | int:
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded
