"""What drawn pictures of painted scenes show, read back and counted; beside chance and ceiling."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.scene_score import Facts, score
from data_prep.scenes import Scene, caption, held_out_scenes, paint, parse
from trainer.config_tools import EvaluateConfig
from trainer.errors import BadInput
from trainer.quality.shares import Share, wilson
from trainer.real_pictures import captioned_pictures
from trainer.sampler import Pixels, Sampler

FACTS = ("shape_and_colour", "background", "size", "place", "relation", "all")
PROBE_CAPTIONS = 32


@dataclass(frozen=True)
class Material:
    """What all checkpoints of a run are judged on."""

    captions: list[str]
    """To draw and to score."""
    unseen: list[str]
    """Further ones, of the harder test."""
    columns: Mapping[str, Pixels]
    """Pictures that belong to `captions`: real ones, reconstructed, drawn by chance."""
    has_scenes: bool
    """Whether pictures can be read back."""


def shares(facts: Sequence[Facts]) -> dict[str, Share]:
    """Return the share for which each fact holds, among those whose caption tells it."""
    told = {name: [getattr(each, name) for each in facts] for name in FACTS}
    kept = {name: [value for value in row if value is not None] for name, row in told.items()}
    return {name: wilson(sum(row), len(row)) for name, row in kept.items() if row}


def has_scenes(dataset: Path) -> bool:
    """Whether a dataset's captions are those of painted scenes."""
    try:
        for text, _ in captioned_pictures(dataset, PROBE_CAPTIONS, side_px=8):
            parse(text)
    except BadInput:
        return False
    return True


def scenes_material(cfg: EvaluateConfig, sampler: Sampler) -> Material:
    """Choose held-out scenes, and paint those that are scored."""
    seed, two = cfg.sampling.seed, cfg.two_things_frac
    scenes = held_out_scenes(cfg.num_captions, seed=seed, two_things_frac=two)
    unseen = held_out_scenes(
        cfg.num_unseen_pairs, seed=seed, two_things_frac=two, unseen_pairs=True
    )
    real = painted(scenes, sampler.cfg.encoders.image_side_px)
    return Material(
        captions=[caption(scene) for scene in scenes],
        unseen=[caption(scene) for scene in unseen],
        columns={"real": real, "reconstructed": sampler.reconstruct(real)},
        has_scenes=True,
    )


def with_chance(
    material: Material, cfg: EvaluateConfig, sampler: Sampler, on_steps: Callable[[int], None]
) -> Material:
    """Add what the network drew before its training."""
    drawn = sampler.untrained().sample(material.captions, cfg.sampling, on_steps=on_steps)
    return replace(material, columns={"chance": drawn, **material.columns})


def pictures_material(
    cfg: EvaluateConfig, sampler: Sampler, dataset: Path, *, scenes: bool
) -> Material:
    """Take captions and pictures of a dataset; `scenes` says whether they can be read back."""
    side_px = sampler.cfg.encoders.image_side_px
    captions, pictures = zip(
        *captioned_pictures(dataset, cfg.num_captions, side_px=side_px), strict=True
    )
    real = np.stack(pictures)
    return Material(
        captions=list(captions),
        unseen=[],
        columns={"real": real, "reconstructed": sampler.reconstruct(real)},
        has_scenes=scenes,
    )


def judge_scenes(material: Material, drawn: Pixels) -> tuple[dict[str, Any], list[Facts]]:
    """Read pictures of `captions`, then of `unseen`, back.

    Returns:
        Scores by name, each with its columns; and what was found in each picture of `captions`.
    """
    count = len(material.captions)
    facts = score(list(drawn), [*material.captions, *material.unseen])
    columns = {"": shares(facts[:count])}
    for name, pictures in material.columns.items():
        columns[name] = shares(score(list(pictures), material.captions))
    scores = {f"{name}_frac": row(name, columns) for name in columns[""]}
    if material.unseen:
        harder = wilson(sum(f.shape_and_colour for f in facts[count:]), len(material.unseen))
        scores["shape_and_colour_unseen_pairs_frac"] = row("x", {"": {"x": harder}})
    return scores, facts[:count]


def row(name: str, columns: Mapping[str, Mapping[str, Share]]) -> dict[str, float]:
    """Return a score as evaluation.json has it: the value, then the other columns."""
    return dict(_cells(name, columns))


def _cells(name: str, columns: Mapping[str, Mapping[str, Share]]) -> Iterator[tuple[str, float]]:
    for column, found in columns.items():
        share, prefix = found[name], f"{column}_" if column else ""
        yield column or "value", share.value
        yield f"{prefix}low", share.low
        yield f"{prefix}high", share.high
        yield f"{prefix}count", share.count


def psnr(a: Pixels, b: Pixels) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return ``(N,)`` peak signal-to-noise ratios in dB of ``(N, H, W, 3)`` uint8 pictures."""
    error = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
    ratio: np.ndarray[Any, np.dtype[np.float64]] = 10 * np.log10(255**2 / np.maximum(error, 1e-3))
    return ratio


def painted(scenes: Sequence[Scene], side_px: int) -> Pixels:
    """Paint scenes as ``(N, side_px, side_px, 3)``, each in its own shades and places."""
    pictures = [paint(s, side_px, side_px, jitter_seed=i) for i, s in enumerate(scenes)]
    return np.stack([np.asarray(picture) for picture in pictures])
