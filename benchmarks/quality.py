"""Does Kiln's default recipe teach more than plain DDPM does, with the same network and images?

Runs the demo's commands up to its latents, then trains each recipe with each seed on as many
images and scores captions that no training saw. `python -m benchmarks.quality out=DIR images=N`
keeps what it made in DIR and goes on from there.
"""

import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Claim, Row, claim_at_least, claim_at_most, row_of, write_result
from data_prep.scene_score import score
from data_prep.scenes import caption, held_out_scenes, paint
from trainer.config import DemoConfig
from trainer.config_tools import SampleConfig
from trainer.demo import pipeline_of, source_args
from trainer.diffusion import philox
from trainer.diffusion.process import diffuse, time_at
from trainer.frozen import compose
from trainer.pipeline_local import Here
from trainer.pipeline_stages import stages_of
from trainer.sampler import Sampler, load_sampler, pad_texts

RECIPES = {
    "kiln's default": (),
    "DDPM, eps": ("objective=ddpm_eps",),
    "EDM": ("objective=edm",),
}
OURS, PLAIN = "kiln's default", "DDPM, eps"
SEEDS = (0,)
IMAGES = 24_000
GUIDANCE = (2.0, 4.0)
NUM_CAPTIONS = 100
LOG_SNRS = (4.0, 2.0, 0.0, -2.0, -4.0)


def kiln(*words: str) -> None:
    """Run a command as a user would."""
    subprocess.run([sys.executable, "-m", "trainer.cli", *words], check=True)


def make_data(out: Path) -> Path:
    """Run the demo's commands up to its latents; what is there is not made again."""
    cfg = compose(DemoConfig, "demo", [f"out={out}"])
    here = Here(out)
    here.run("source", (*source_args(cfg), f"out={out / 'source'}"))
    with here.meanwhile("serve", (f"source={out / 'source'}",)):
        prepare, encode, *_ = stages_of(pipeline_of(cfg))
        here.run_stages([prepare, encode])
    return out / "dataset"


def aligned_frac(sampler: Sampler, captions: Sequence[str], guidance_scale: float) -> float:
    """Return the share of captions whose picture shows the right shape in the right colour."""
    words = ["run=x", "sampling.solver=dpm_2m", "sampling.num_steps=24"]
    words += [f"sampling.guidance_scale={guidance_scale}"]
    drawn = sampler.sample(captions, compose(SampleConfig, "sample", words).sampling)
    facts = score(list(drawn), captions)
    return sum(fact.shape_and_colour for fact in facts) / len(facts)


@torch.inference_mode()
def common_loss(sampler: Sampler, count: int = 64) -> float:
    """Return the mean error of v on the VP circle, over noise levels that all processes have.

    For held-out scenes; 1 is what a network pays that says nothing. An error of x0 counts
    1 + SNR, so that no level dominates.
    """
    scenes = held_out_scenes(count, seed=1, two_things_frac=0.0)
    side_px = sampler.cfg.encoders.image_side_px
    pictures = [np.asarray(paint(s, side_px, side_px, jitter_seed=i)) for i, s in enumerate(scenes)]
    tensor = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, _ = sampler.autoencoder.moments(tensor)
    x0 = (mean - sampler.latent_mean_C[:, None, None]) / sampler.latent_std_C[:, None, None]
    condition = pad_texts(sampler.text.encode([caption(scene) for scene in scenes]))
    return float(np.mean([_error(sampler, x0, condition, log_snr) for log_snr in LOG_SNRS]))


def _error(sampler: Sampler, x0: Tensor, condition: tuple[Tensor, Tensor], log_snr: float) -> float:
    p = sampler.parameterization
    ids_B = torch.arange(len(x0))
    noise = philox.normals(
        0, ids_B, torch.zeros_like(ids_B), purpose=philox.NOISE, shape=x0.shape[1:]
    )
    t = time_at(p.process, torch.tensor(log_snr, dtype=torch.float64))
    x_t = diffuse(p.process, x0, noise, t)
    time_B = p.process.network_time(t).float().expand(len(x0))
    found = p.data(sampler.model(p.network_input(x_t, t), time_B, *condition), x_t, t)
    return float((found - x0).square().mean()) * (1 + float(np.exp(log_snr)))


def judge(out: Path, dataset: Path, images: int) -> Iterator[tuple[str, int, float, float]]:
    """Yield (recipe, seed, best share of right pictures, common loss); the seeds come in turn."""
    captions = [
        caption(scene) for scene in held_out_scenes(NUM_CAPTIONS, seed=0, two_things_frac=0.0)
    ]
    for seed in SEEDS:
        for recipe, words in RECIPES.items():
            run = out / f"run_{list(RECIPES).index(recipe)}_{seed}_{images}"
            kiln(
                "train",
                f"run={run}",
                f"data.dataset={dataset}",
                f"seed={seed}",
                f"total_images={images}",
                "logging.wandb=off",
                *words,
            )
            sampler = load_sampler(run, device="cpu", threads=2)
            shares = [aligned_frac(sampler, captions, scale) for scale in GUIDANCE]
            yield recipe, seed, max(shares), common_loss(sampler)


def result(
    found: Sequence[tuple[str, int, float, float]], images: int
) -> tuple[list[Row], list[Claim]]:
    """Make rows and claims of what was judged."""
    rows, best = [], {}
    for recipe in RECIPES:
        for place, metric, unit in (
            (2, "right shape in the right colour", "share"),
            (3, "loss", "v"),
        ):
            values = [float(each[place]) for each in found if each[0] == recipe]
            best[recipe, metric] = median(values)
            rows.append(
                row_of(
                    values,
                    case=f"{images:,} images, seeds {', '.join(map(str, SEEDS))}",
                    system=recipe,
                    metric=metric,
                    unit=unit,
                )
            )
    right = "right shape in the right colour"
    claims = [
        claim_at_least(
            "the default's share of right pictures less that of plain DDPM-eps",
            measured=best[OURS, right] - best[PLAIN, right],
            target=0.0,
        ),
        claim_at_most(
            "the default's loss over that of plain DDPM-eps",
            measured=best[OURS, "loss"] / best[PLAIN, "loss"],
            target=1.0,
        ),
        claim_at_least(
            "the default's share of right pictures less that of the best other recipe",
            measured=best[OURS, right] - max(best[r, right] for r in RECIPES if r != OURS),
            target=0.0,
        ),
    ]
    return rows, claims


def main(argv: Sequence[str]) -> int:
    """Measure, and write the result."""
    words = dict(word.split("=", 1) for word in argv)
    logging.basicConfig(level=logging.WARNING)
    images = int(words.get("images", IMAGES))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(words.get("out", scratch))
        found = list(judge(out, make_data(out), images))
    rows, claims = result(found, images)
    write_result(
        "quality",
        question="Does the default recipe teach more than plain DDPM, with the same network and "
        "images? Loss: mean squared error of v at log-SNRs 4, 2, 0, -2, -4; 1 is to say nothing.",
        rows=rows,
        claims=claims,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
