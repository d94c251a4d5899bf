"""Which charts show a run: one list, for Kiln's report and for W&B's workspace."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.observe.report_numbers import score_label

Row = Mapping[str, Any]

X_KEY = "images_seen"
X_LABEL = "images seen"
PICTURES = "samples"
"""The key of pictures in W&B; the report shows them from the run's folder."""


@dataclass(frozen=True)
class Panel:
    """One chart over the images seen."""

    title: str
    keys: tuple[str, ...]
    """Of metrics.jsonl: the curve, and then others that stand behind it."""
    unit: str = ""
    """What the title does not say."""
    from_zero: bool = False
    """Whether the y axis must show 0."""
    is_noisy: bool = False
    """Whether a running mean says more than the points, which stay behind it."""
    is_wide: bool = False
    """Whether it is as wide as two others."""

    @property
    def name(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Section:
    """Charts that belong together."""

    name: str
    panels: tuple[Panel, ...]


_TRAINING = (
    Section(
        "Training",
        (
            Panel("Loss", ("train/loss",), is_noisy=True, is_wide=True),
            Panel("Gradient norm", ("train/grad_norm",), is_noisy=True),
            Panel("Learning rate", ("train/lr",), from_zero=True),
        ),
    ),
    Section(
        "Speed",
        (
            Panel("Images per second", ("speed/images_per_s",), from_zero=True),
            Panel("Model FLOP utilization", ("speed/mfu_frac",), "share of peak", from_zero=True),
            Panel("Operations per rank", ("speed/tflops_per_rank",), "TFLOP/s", from_zero=True),
            Panel("Waiting for data", ("speed/data_wait_frac",), "share of time", from_zero=True),
            Panel("Slowest rank", ("speed/slowest_rank_ratio",), "times the median rank"),
        ),
    ),
    Section(
        "Energy",
        (
            Panel("Power", ("energy/w",), "W", from_zero=True),
            Panel("Energy per image", ("energy/j_per_image",), "J", from_zero=True),
        ),
    ),
)


def training_sections(rows: Iterable[Row]) -> list[Section]:
    """Choose the charts of training for which a run has numbers."""
    there = _keys(rows)
    found = []
    for section in _TRAINING:
        panels = tuple(panel for panel in section.panels if panel.keys[0] in there)
        if panels:
            found.append(Section(section.name, panels))
    return found


def evaluation_section(rows: Iterable[Row]) -> Section | None:
    """Make a chart of each score, between the ends of its interval; None without scores.

    Args:
        rows: Of evaluations: a score is `eval/SCORE`, or `eval_WEIGHTS/SCORE`.
    """
    there = [key for key in _keys(rows) if key.startswith("eval")]
    panels = tuple(
        Panel(_score_title(key), (key, *_ends(key, there)))
        for key in there
        if not key.endswith(("_low", "_high"))
    )
    return Section("Evaluation", panels) if panels else None


def _keys(rows: Iterable[Row]) -> dict[str, None]:
    """Return the keys that have a number in some row, in order."""
    return dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)


def _ends(key: str, there: list[str]) -> list[str]:
    return [end for end in (f"{key}_low", f"{key}_high") if end in there]


def _score_title(key: str) -> str:
    prefix, _, name = key.partition("/")
    weights = prefix.removeprefix("eval").removeprefix("_")
    return score_label(name).capitalize() + (f", {weights} weights" if weights else "")
