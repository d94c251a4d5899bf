"""Derive the report's headline numbers from a run's story."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.observe.accounts import Total, combined
from trainer.observe.columns import Columns
from trainer.observe.ledger import Bucket
from trainer.observe.progress import in_words
from trainer.observe.story import Story

_TAIL_FRAC = 0.05
"""The last share of logged steps, over which the final loss is averaged."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What the summary says; None is not known yet."""

    steps: int
    total_steps: int | None
    images: int
    train: Total
    productive_s: float
    final_loss: float | None
    score: tuple[str, float, float | None] | None
    """Name, value and chance level of the first score of the evaluation."""


def images_seen(story: Story) -> int:
    """Return how many images the run's last logged step had trained on."""
    return int(story.metrics.newest().get("images_seen", 0))


def headline(story: Story, sums: Mapping[tuple[str, Bucket], Total]) -> Numbers:
    """Compute the summary's numbers.

    Args:
        story: Of the run.
        sums: Of its ledger, from `totals`.
    """
    return Numbers(
        steps=int(story.metrics.newest().get("step", 0)),
        total_steps=story.plan.get("total_steps"),
        images=images_seen(story),
        train=combined(total for (stage, _), total in sums.items() if stage == "train"),
        productive_s=sums.get(("train", Bucket.PRODUCTIVE), Total()).seconds,
        final_loss=_final_loss(story.metrics),
        score=next(iter(scores(story.evaluation)), None),
    )


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
            return f"{three_digits(joules / unit)} {name}"
    return f"{three_digits(joules)} J"


def three_digits(value: float) -> str:
    """Write a number with three digits that count: '0.0123', '12.3', '1,230'."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:#.3g}".removesuffix(".")


def duration(seconds: float) -> str:
    """Write a time: tenths below ten seconds, words above."""
    return f"{seconds:.1f} s" if seconds < 10 else in_words(seconds)


def _final_loss(metrics: Columns) -> float | None:
    losses = metrics["train/loss"]
    known = losses[np.isfinite(losses)]
    tail = known[-max(1, round(len(known) * _TAIL_FRAC)) :]
    return float(tail.mean()) if len(tail) else None
