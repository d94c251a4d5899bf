"""What does a sampler cost besides its network, and how many steps does a picture need?

Needs the run of the demo (`make demo`), or another one of painted scenes:
`python -m benchmarks.sampling run=DIR`.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from benchmarks.harness import (
    Case,
    Claim,
    Row,
    claim_at_least,
    claim_at_most,
    measure,
    seconds,
    write_result,
)
from data_prep.scene_score import score
from data_prep.scenes import caption, held_out_scenes
from trainer.config_tools import SampleConfig, SamplingConfig
from trainer.diffusion.guidance import Condition
from trainer.diffusion.process import prior_std
from trainer.drawing import draw_latents
from trainer.frozen import compose
from trainer.sampler import Sampler, load_sampler, pad_texts

RUN = Path("demo/scenes/run")
BATCH_IMAGES = 16
STEPS = 20
CAPTIONS = 100
DDPM_STEPS = 1000
CASE = f"{BATCH_IMAGES} pictures with guidance, {STEPS} steps, one thread"
BESIDES = "time besides the network"
PACKAGES = ("torch", "diffusers")


class Bench:
    """A loaded run, and one batch of captions for it."""

    def __init__(self, run: Path) -> None:
        words = [f"run={run}", f"sampling.num_steps={STEPS}", "sampling.solver=dpm_2m"]
        self.cfg: SamplingConfig = compose(SampleConfig, "sample", words).sampling
        self.sampler: Sampler = load_sampler(run, device="cpu", threads=2)
        self.captions = [
            caption(scene) for scene in held_out_scenes(CAPTIONS, seed=0, two_things_frac=0.0)
        ]
        texts = self.sampler.text.encode(self.captions[:BATCH_IMAGES])
        text_BLD, mask_BL = pad_texts([*texts, *[self.sampler.null_text_LD] * BATCH_IMAGES])
        self.both: Condition = (text_BLD, mask_BL)

    @torch.inference_mode()
    def draw(self, solver: str, *, split: bool = False) -> None:
        """Draw one batch of latents."""
        text_BLD, mask_BL = self.both
        cfg = replace(self.cfg, solver=solver, guidance_split=split)  # type: ignore[arg-type]
        for _ in draw_latents(
            self.sampler.model,
            self.sampler.parameterization,
            (text_BLD[:BATCH_IMAGES], mask_BL[:BATCH_IMAGES]),
            (text_BLD[BATCH_IMAGES:], mask_BL[BATCH_IMAGES:]),
            numbers=range(BATCH_IMAGES),
            shape=self.sampler.latent_shape,
            cfg=cfg,
        ):
            pass

    def clocked(self, action: Callable[[], None]) -> tuple[float, float]:
        """Return the seconds of an action, and how many of them the network took."""
        entered_s = network_s = 0.0

        def enter(*_: object) -> None:
            nonlocal entered_s
            entered_s = time.perf_counter()

        def leave(*_: object) -> None:
            nonlocal network_s
            network_s += time.perf_counter() - entered_s

        model = self.sampler.model
        hooks = model.register_forward_pre_hook(enter), model.register_forward_hook(leave)
        whole_s = seconds(action)()
        for hook in hooks:
            hook.remove()
        return whole_s, network_s

    @torch.inference_mode()
    def diffusers(self) -> None:
        """The same solver and guidance as a loop over diffusers' scheduler."""
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", final_sigmas_type="zero"
        )
        scheduler.set_timesteps(STEPS)
        x = prior_std(self.sampler.parameterization.process) * torch.randn(
            BATCH_IMAGES, *self.sampler.latent_shape
        )
        for t in scheduler.timesteps:
            time_B = t.float().expand(2 * BATCH_IMAGES)
            out: Tensor = self.sampler.model(torch.cat([x, x]), time_B, *self.both)
            with_text, without = out.chunk(2)
            guided = without + self.cfg.guidance_scale * (with_text - without)
            x = scheduler.step(guided, t, x).prev_sample

    def aligned_frac(self, **changes: Any) -> float:
        """Draw all captions; return the share that shows the right shape in the right colour."""
        drawn = self.sampler.sample(self.captions, replace(self.cfg, **changes))
        facts = score(list(drawn), self.captions)
        return sum(fact.shape_and_colour for fact in facts) / len(facts)


def overhead(bench: Bench) -> tuple[list[Row], list[Claim]]:
    """Time solvers, and of that the calls of the network."""
    besides: dict[str, Callable[[], None]] = {
        f"kiln {name}": partial(bench.draw, name)
        for name in ("dpm_2m", "unipc", "ddim", "ddpm", "heun")
    }
    rows = measure(
        [
            *(_besides_network(system, bench, action) for system, action in besides.items()),
            _besides_network("diffusers DPM-Solver++ loop", bench, bench.diffusers),
            _whole("kiln dpm_2m", partial(bench.draw, "dpm_2m")),
            _whole("kiln dpm_2m, guidance in two calls", partial(bench.draw, "dpm_2m", split=True)),
            _whole("diffusers DPM-Solver++ loop", bench.diffusers),
        ],
        repetitions=7,
    )
    found = {(row.metric, row.system): row.median for row in rows}
    claims = [
        claim_at_most(
            f"{system}: time besides the network, % of the network's",
            measured=found[BESIDES, system],
            target=3.0,
        )
        for system in besides
    ]
    return rows, claims


def steps_needed(bench: Bench) -> tuple[list[Row], list[Claim]]:
    """Score the alignment of few steps beside that of a thousand."""
    asked = [("ddpm", DDPM_STEPS), ("dpm_2m", 10), ("dpm_2m", STEPS), ("unipc", 10), ("heun", 12)]
    found = {}
    for solver, num_steps in asked:
        started_s = time.perf_counter()
        found[solver, num_steps] = bench.aligned_frac(solver=solver, num_steps=num_steps)
        elapsed_s = time.perf_counter() - started_s
        print(f"{solver} {num_steps}: {found[solver, num_steps]:.2f} in {elapsed_s:.0f} s")
    rows = [
        Row(
            case=f"{CAPTIONS} held-out captions, guidance {bench.cfg.guidance_scale:g}",
            system=f"kiln {solver}, {num_steps} steps",
            metric="right shape in the right colour",
            unit="share",
            median=value,
            min=value,
            max=value,
            repetitions=1,
        )
        for (solver, num_steps), value in found.items()
    ]
    claim = claim_at_least(
        f"DPM-Solver++ at {STEPS} steps: alignment less that of {DDPM_STEPS}-step DDPM",
        measured=found["dpm_2m", STEPS] - found["ddpm", DDPM_STEPS],
        target=-0.02,
    )
    return rows, [claim]


def main(argv: Sequence[str]) -> int:
    """Measure, and write the result."""
    run = Path(dict(word.split("=", 1) for word in argv).get("run", RUN))
    if not (run / "config.yaml").is_file():
        print(f"{run} is no run: `make demo` makes it, or give run=DIR", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    bench = Bench(run)
    rows, claims = overhead(bench)
    more_rows, more_claims = steps_needed(bench)
    write_result(
        "sampling",
        question="What does a sampler cost besides its network, and how many steps are needed?",
        rows=[*rows, *more_rows],
        claims=[*claims, *more_claims],
    )
    return 0


def _besides_network(system: str, bench: Bench, action: Callable[[], None]) -> Case:
    def run() -> float:
        whole_s, network_s = bench.clocked(action)
        return 100 * (whole_s - network_s) / network_s

    return Case(case=CASE, system=system, metric=BESIDES, unit="%", run=run, packages=PACKAGES)


def _whole(system: str, action: Callable[[], None]) -> Case:
    return Case(
        case=CASE, system=system, metric="time", unit="s", run=seconds(action), packages=PACKAGES
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
