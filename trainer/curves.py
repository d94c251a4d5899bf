"""Quality of one checkpoint against steps, solvers and guidance: points, curves and picture grids.

Each point draws the same captions with the same noise. It is written when it is done, so that a
command that was stopped goes on with the next point.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.scene_score import score
from trainer.config_tools import EvaluateConfig, SamplingConfig
from trainer.curve_pictures import Cells, draw_chart, draw_grid
from trainer.data.publish import publish_bytes, publish_json
from trainer.diffusion.parameterization import Parameterization
from trainer.drawing import check_sampling
from trainer.errors import BadInput
from trainer.fidelity import FEWEST
from trainer.frozen import thaw
from trainer.judge import Judge, passes_per_step
from trainer.labels import Label, label_of, png_bytes
from trainer.observe.evaluations import FOLDER
from trainer.quality.shares import Share, wilson
from trainer.sampler import Pixels, Sampler

log = logging.getLogger(__name__)

CURVES = "curves"
_SHOWN = 4
"""Pictures of each point that the grids show."""


@dataclass(frozen=True)
class Point:
    """One way to draw the captions."""

    curve: str
    """steps or guidance: on which curve it lies."""
    sampling: SamplingConfig

    @property
    def x(self) -> float:
        """Where on the curve it lies."""
        cfg = self.sampling
        return cfg.num_steps if self.curve == "steps" else cfg.guidance_scale


def points(cfg: EvaluateConfig) -> list[Point]:
    """List the points of both curves, the cheap ones first."""
    told = cfg.curves
    if told is None:
        return []
    found = [
        Point("steps", replace(cfg.sampling, solver=solver, num_steps=num_steps))
        for num_steps in sorted(set(told.steps))
        for solver in dict.fromkeys(told.solvers)
    ]
    for scale in sorted(set(told.guidance)):
        # A negative prompt works through guidance, and scale 1 is none.
        negative = "" if scale == 1 else cfg.sampling.negative
        sampling = replace(cfg.sampling, guidance_scale=scale, negative=negative)
        found.append(Point("guidance", sampling))
    return found


def check_curves(
    cfg: EvaluateConfig, parameterization: Parameterization, *, caption_dropout: float
) -> None:
    """Refuse what a solver cannot do on a run's process, before anything is drawn.

    Raises:
        BadInput: As `trainer.drawing.check_sampling`.
    """
    for point in points(cfg):
        check_sampling(parameterization, point.sampling, caption_dropout=caption_dropout)


def curve_passes(cfg: EvaluateConfig) -> int:
    """Return how many passes of a picture through the denoiser the curves cost, about."""
    count = cfg.curves.num_captions if cfg.curves else 0
    return sum(
        count * point.sampling.num_steps * passes_per_step(point.sampling) for point in points(cfg)
    )


def draw_curves(
    cfg: EvaluateConfig, sampler: Sampler, judge: Judge, advance: Callable[[int], None]
) -> Path:
    """Draw every point that is not there yet, then the charts and grids; return curves.json.

    Raises:
        BadInput: Nothing can be scored.
    """
    if not judge.material.has_scenes and judge.fidelity is None:
        raise BadInput(
            "curves= needs something to score: these are no painted scenes, and no network gives "
            "features. Give features=efficientnet_lite0 (pip install -e '.[quality]'), or another."
        )
    assert cfg.curves is not None
    folder = Path(cfg.run) / FOLDER
    captions = judge.material.captions[: cfg.curves.num_captions]
    rows = []
    for point in points(cfg):
        rows.append(_measure(point, cfg, sampler, judge, captions=captions, advance=advance))
    told = {
        "step": sampler.state.step,
        "images_seen": sampler.state.images_seen,
        "weights": cfg.weights,
        "num_captions": len(captions),
        "points": rows,
    }
    publish_json(folder / "curves.json", told)
    _draw(folder, rows, captions, label=label_of(sampler, cfg.sampling))
    return folder / "curves.json"


def _measure(
    point: Point,
    cfg: EvaluateConfig,
    sampler: Sampler,
    judge: Judge,
    *,
    captions: Sequence[str],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Draw and score a point, or read what was found before; its pictures lie beside it."""
    per_step = passes_per_step(point.sampling)
    folder = Path(cfg.run) / FOLDER / CURVES
    path = folder / f"{point.curve}_{_key(point, cfg, sampler, judge, captions)}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    else:
        if (folder / found["pictures"]).exists():
            advance(len(captions) * point.sampling.num_steps * per_step)
            return found
    drawn = sampler.sample(
        captions, point.sampling, on_steps=lambda steps: advance(steps * per_step)
    )
    strip = path.with_suffix(".png")
    side_by_side = np.concatenate(list(drawn[:_SHOWN]), axis=1)
    publish_bytes(strip, png_bytes(side_by_side, label_of(sampler, point.sampling)))
    found = {
        "curve": point.curve,
        "x": point.x,
        "solver": point.sampling.solver,
        "sampling": thaw(point.sampling),
        "scores": {name: _told(share) for name, share in _scores(drawn, captions, judge)},
        "pictures": strip.name,
    }
    publish_json(path, found)
    return found


def _scores(drawn: Pixels, captions: Sequence[str], judge: Judge) -> Iterator[tuple[str, Share]]:
    if judge.material.has_scenes:
        facts = score(list(drawn), list(captions))
        right = sum(fact.shape_and_colour for fact in facts)
        yield "shape_and_colour_frac", wilson(right, len(facts))
    if judge.fidelity is not None and len(drawn) >= FEWEST:
        yield from judge.fidelity.scores(judge.fidelity.features(drawn)).items()


def _told(share: Share) -> dict[str, float]:
    return {"value": share.value, "low": share.low, "high": share.high, "count": share.count}


def _key(
    point: Point, cfg: EvaluateConfig, sampler: Sampler, judge: Judge, captions: Sequence[str]
) -> str:
    """Name all that the point's numbers depend on."""
    sampling = thaw(replace(point.sampling, batch_images=1))
    judges = [judge.fidelity.features.fingerprint, judge.fidelity.source] if judge.fidelity else []
    told = [sampler.state.step, cfg.weights, sampling, list(captions), judges]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _draw(
    folder: Path, rows: Sequence[Mapping[str, Any]], captions: Sequence[str], *, label: Label
) -> None:
    for curve, x_label in (("steps", "steps"), ("guidance", "guidance scale")):
        mine = [row for row in rows if row["curve"] == curve]
        if not mine:
            continue
        series: dict[str, list[Mapping[str, Any]]] = {}
        for row in mine:
            series.setdefault(row["solver"], []).append(row)
        draw_chart(folder / f"curves_{curve}.png", series, x_label=x_label)
        cells: Cells = {
            (row["solver"], f"{row['x']:g}"): _tiles(folder / CURVES / row["pictures"])
            for row in mine
        }
        lines = [f'"{text}"' for text in captions[:_SHOWN]]
        sheet = draw_grid(cells, x_label=x_label, captions=lines)
        publish_bytes(folder / f"grid_{curve}.png", png_bytes(np.asarray(sheet), label))


def _tiles(strip: Path) -> list[Pixels]:
    with Image.open(strip) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    side = pixels.shape[0]
    return [pixels[:, left : left + side] for left in range(0, pixels.shape[1], side)]
