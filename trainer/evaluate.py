"""Score a run's samples against captions that training never saw, beside chance and ceiling."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from data_prep.scene_score import Facts, score
from data_prep.scenes import Scene, caption, held_out_scenes, paint, parse
from trainer.command import run_command
from trainer.config_tools import EvaluateConfig
from trainer.data.manifest import load_manifest
from trainer.data.publish import publish_bytes
from trainer.errors import BadInput
from trainer.frozen import thaw
from trainer.gallery import Shown, dataset_pictures, reconstructions, write_gallery
from trainer.observe.countdown import Countdown
from trainer.observe.energy import open_meters
from trainer.observe.ledger import Ledger
from trainer.place import place
from trainer.sampler import Pixels, Sampler, load_sampler

log = logging.getLogger(__name__)

FACTS = ("shape_and_colour", "background", "size", "place", "relation", "all")
PROBE_CAPTIONS = 32
Z_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Share:
    """A count of successes with its 95 % Wilson interval."""

    value: float
    count: int
    low: float
    high: float


def main(argv: Sequence[str]) -> int:
    """`kiln evaluate run=RUN`."""
    return run_command(run, EvaluateConfig, "evaluate", argv)


def run(cfg: EvaluateConfig) -> int:
    """Write RUN/evaluation.json and RUN/samples; print the scores."""
    run_dir = Path(cfg.run)
    sampler = load_sampler(run_dir, device=cfg.device, threads=cfg.threads)
    meters = open_meters(tdp_w_per_core=sampler.cfg.logging.tdp_w_per_core)
    with Ledger(run_dir / "ledger.jsonl", stage="evaluate", meters=meters) as ledger:
        ledger.switch("evaluation")
        judged = _judge_scenes if _has_scenes(sampler) else _judge_pictures
        scores, samples = judged(cfg, sampler)
        path = write_gallery(
            run_dir / "samples", samples, reconstructions(sampler, cfg.num_reconstructions)
        )
    lines = "".join(f"{shown.caption}\n" for shown in samples)
    publish_bytes(run_dir / "captions.txt", lines.encode())
    evaluation = {
        "step": sampler.state.step,
        "images_seen": sampler.state.images_seen,
        "num_captions": len(samples),
        "interval": "95 % Wilson",
        "sampling": thaw(cfg.sampling),
        **scores,
    }
    # Not sorted: the first score is the one that a report puts first.
    text = json.dumps(evaluation, indent=1, allow_nan=False)
    publish_bytes(run_dir / "evaluation.json", f"{text}\n".encode())
    _print_scores(evaluation)
    log.info("%d pictures: %s", len(samples), path)
    return 0


def wilson(num_right: int, count: int) -> Share:
    """Return a share and its 95 % interval (Wilson 1927), which is sensible at 0 and 1 too."""
    p, z2 = num_right / count, Z_95**2
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    # At 0 and 1 the bound is p itself, but for rounding.
    return Share(p, count, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def shares(facts: Sequence[Facts]) -> dict[str, Share]:
    """Return the share for which each fact holds, among those whose caption tells it."""
    told = {name: [getattr(each, name) for each in facts] for name in FACTS}
    kept = {name: [value for value in row if value is not None] for name, row in told.items()}
    return {name: wilson(sum(row), len(row)) for name, row in kept.items() if row}


def _judge_scenes(cfg: EvaluateConfig, sampler: Sampler) -> tuple[dict[str, Any], list[Shown]]:
    """Score held-out captions of scenes exactly."""
    seed = cfg.sampling.seed
    two = cfg.two_things_frac
    scenes = held_out_scenes(cfg.num_captions, seed=seed, two_things_frac=two)
    unseen = held_out_scenes(
        cfg.num_unseen_pairs, seed=seed, two_things_frac=two, unseen_pairs=True
    )
    captions = [caption(scene) for scene in scenes]
    every = captions + [caption(scene) for scene in unseen]
    untrained = sampler.untrained()
    num_steps = (len(every) + len(captions)) * cfg.sampling.num_steps
    with Countdown("sampling", num_steps, unit="steps") as countdown:
        drawn = sampler.sample(every, cfg.sampling, on_steps=countdown.advance)
        by_chance = untrained.sample(captions, cfg.sampling, on_steps=countdown.advance)
    facts = score(list(drawn), every)
    real = _painted(scenes, sampler.cfg.encoders.image_side_px)
    columns = {
        "": shares(facts[: len(captions)]),
        "chance": shares(score(list(by_chance), captions)),
        "real": shares(score(list(real), captions)),
        "reconstructed": shares(score(list(sampler.reconstruct(real)), captions)),
    }
    scores = {f"{name}_frac": dict(_row(name, columns)) for name in columns[""]}
    if unseen:
        harder = wilson(sum(f.shape_and_colour for f in facts[len(captions) :]), len(unseen))
        scores["shape_and_colour_unseen_pairs_frac"] = dict(_row("x", {"": {"x": harder}}))
    shown = [
        Shown(text, picture, fact.shape_and_colour)
        for text, picture, fact in zip(every, drawn, facts, strict=True)
    ]
    return {"scores": scores, "scorer": "scenes read back"}, shown[: len(captions)]


def _row(name: str, columns: dict[str, dict[str, Share]]) -> Iterator[tuple[str, float]]:
    for column, found in columns.items():
        share, prefix = found[name], f"{column}_" if column else ""
        yield column or "value", share.value
        yield f"{prefix}low", share.low
        yield f"{prefix}high", share.high
        yield f"{prefix}count", share.count


def _judge_pictures(cfg: EvaluateConfig, sampler: Sampler) -> tuple[dict[str, Any], list[Shown]]:
    """Say what can be said of pictures that cannot be read back: how good the autoencoder is."""
    dataset, side_px = place(sampler.cfg.data.dataset), sampler.cfg.encoders.image_side_px
    manifest = load_manifest(dataset)
    found = dataset_pictures(dataset, manifest, cfg.num_captions, side_px=side_px)
    captions = [text for text, _ in found]
    real = np.stack([picture for _, picture in found])
    psnr_db = float(psnr(real, sampler.reconstruct(real)).mean())
    with Countdown("sampling", len(captions) * cfg.sampling.num_steps, unit="steps") as countdown:
        drawn = sampler.sample(captions, cfg.sampling, on_steps=countdown.advance)
    log.warning(
        "%s holds no painted scenes, so no exact score exists: the captions are of training "
        "pictures, and only the autoencoder is measured",
        dataset,
    )
    facts = {
        "scores": {"autoencoder_psnr_db": {"value": psnr_db, "count": len(real)}},
        "scorer": "none for these pictures; captions of the training data",
    }
    return facts, [Shown(text, picture) for text, picture in zip(captions, drawn, strict=True)]


def psnr(a: Pixels, b: Pixels) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return ``(N,)`` peak signal-to-noise ratios in dB of ``(N, H, W, 3)`` uint8 pictures."""
    error = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
    ratio: np.ndarray[Any, np.dtype[np.float64]] = 10 * np.log10(255**2 / np.maximum(error, 1e-3))
    return ratio


def _has_scenes(sampler: Sampler) -> bool:
    """Whether the dataset's captions are those of painted scenes."""
    dataset = place(sampler.cfg.data.dataset)
    found = dataset_pictures(dataset, load_manifest(dataset), PROBE_CAPTIONS, side_px=8)
    try:
        for text, _ in found:
            parse(text)
    except BadInput:
        return False
    return True


def _painted(scenes: Sequence[Scene], side_px: int) -> Pixels:
    pictures = [paint(s, side_px, side_px, jitter_seed=i) for i, s in enumerate(scenes)]
    return np.stack([np.asarray(picture) for picture in pictures])


def _print_scores(evaluation: dict[str, Any]) -> None:
    columns = ("value", "chance", "reconstructed", "real")
    title = f"After {evaluation['images_seen']:,} training images"
    table = Table("score", "this run", "chance", "rebuilt", "real", "of", title=title, box=SIMPLE)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for name, facts in evaluation["scores"].items():
        cells = [_cell(name, facts, column) for column in columns]
        table.add_row(name.removesuffix("_frac").replace("_", " "), *cells, str(facts["count"]))
    Console().print(table)


def _cell(name: str, facts: dict[str, float], column: str) -> str:
    if column not in facts:
        return "-"
    if not name.endswith("_frac"):
        return f"{facts[column]:.1f}"
    text = f"{100 * facts[column]:.0f} %"
    if column == "value":  # the other intervals are in evaluation.json
        text += f" ({100 * facts['low']:.0f}-{100 * facts['high']:.0f})"
    return text
