"""Derive the report's headline numbers from a run's story."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.observe.accounts import Total, measured_frac, totals
from trainer.observe.charts import Point
from trainer.observe.ledger import Bucket
from trainer.observe.progress import in_words
from trainer.observe.story import Story

_TAIL_FRAC = 0.05
"""The last share of logged steps, over which the final loss is averaged."""
J_PER_KWH = 3.6e6


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What the summary says; None is not known yet."""

    steps: int
    total_steps: int | None
    images: int
    train_s: float
    train_j: float
    all_j: float
    """With preparing and encoding the data."""
    measured_frac: float
    productive_s: float
    productive_j: float
    final_loss: float | None
    score: tuple[str, float, float | None] | None
    """Name, value and chance level of the first score of the evaluation."""


def headline(story: Story) -> Numbers:
    """Compute the summary's numbers."""
    sums = totals(story.ledger)
    train = [total for (stage, _), total in sums.items() if stage == "train"]
    productive = sums.get(("train", Bucket.PRODUCTIVE), Total())
    last = story.metrics[-1] if story.metrics else {}
    return Numbers(
        steps=int(last.get("step", 0)),
        total_steps=story.plan.get("total_steps"),
        images=int(last.get("images_seen", 0)),
        train_s=sum(total.seconds for total in train),
        train_j=sum(total.joules for total in train),
        all_j=sum(total.joules for total in sums.values()),
        measured_frac=measured_frac(list(sums.values())),
        productive_s=productive.seconds,
        productive_j=productive.joules,
        final_loss=_final_loss(story.metrics),
        score=next(iter(scores(story.evaluation)), None),
    )


def curve(metrics: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """Return (images seen, value) of every logged step that has the metric."""
    return [
        (float(row["images_seen"]), float(row[key])) for row in metrics if row.get(key) is not None
    ]


def scores(evaluation: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Return (name, value, chance level) of each score of evaluation.json.

    `scores` maps a name to a number, or to a mapping with `value` and perhaps `chance`.
    """
    found: list[tuple[str, float, float | None]] = []
    for name, score in dict(evaluation.get("scores", {})).items():
        if isinstance(score, Mapping):
            if score.get("value") is not None:
                found.append((name, float(score["value"]), score.get("chance")))
        elif score is not None:
            found.append((name, float(score), None))
    return found


def score_text(name: str, value: float) -> str:
    """Write a score: a share (name ends in _frac) as percent, anything else as it is."""
    return f"{100 * value:.1f} %" if name.endswith("_frac") else f"{value:.4g}"


def score_label(name: str) -> str:
    """Write a score's name for people."""
    return name.removesuffix("_frac").replace("_", " ")


def in_joules(joules: float) -> str:
    """Write an energy: '812 J', '14.2 kJ', '3.10 MJ'."""
    for unit, name in ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ")):
        if joules >= unit:
            return f"{_three_digits(joules / unit)} {name}"
    return f"{_three_digits(joules)} J"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".removesuffix(".")


def duration(seconds: float) -> str:
    """Write a time: tenths below ten seconds, words above."""
    return f"{seconds:.1f} s" if seconds < 10 else in_words(seconds)


def _final_loss(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    losses = [y for _, y in curve(metrics, "train/loss")]
    tail = losses[-max(1, round(len(losses) * _TAIL_FRAC)) :]
    return sum(tail) / len(tail) if tail else None
