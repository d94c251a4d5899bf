"""From one batch of captions to latents: noise, guidance and solver as a sampling config says."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trainer.config_tools import SamplingConfig
from trainer.diffusion import philox
from trainer.diffusion.guidance import Condition, classifier_free, keep_known
from trainer.diffusion.parameterization import Parameterization
from trainer.diffusion.process import diffuse, prior_std
from trainer.diffusion.solvers import (
    SOLVERS,
    Churn,
    Counted,
    Draw,
    Solver,
    ddim,
    dopri5,
    euler,
    heun,
)
from trainer.diffusion.times import grid
from trainer.errors import BadInput, BadWorld

log = logging.getLogger(__name__)

# Shape suffixes: B samples, C latent channels, H W rows and columns, L text tokens, D text width.


@dataclass(frozen=True)
class Known:
    """A picture to start from, and which part of it to draw anew."""

    latents_CHW: Tensor
    """Normalised."""
    mask_HW: Tensor | None
    """1 where to draw, 0 where to keep, between on the border; None: draw everywhere."""


def check_sampling(
    parameterization: Parameterization, cfg: SamplingConfig, *, caption_dropout: float
) -> None:
    """Refuse what a solver cannot do on a process, or a network was not trained for.

    Raises:
        BadInput: More steps than levels, a solver of the SDE that would begin where it is
            infinite, or guidance away from an empty caption that training never showed.
    """
    process = parameterization.process
    if process.num_levels is not None:
        most = max(1, math.floor(process.num_levels * cfg.first_time))
        if cfg.num_steps > most:
            since = "" if cfg.first_time == 1 else f", {most} of them up to t={cfg.first_time:g}"
            raise BadInput(
                f"sampling.num_steps={cfg.num_steps}, but the run was trained on "
                f"{process.num_levels} levels{since}. Try sampling.num_steps={most}."
            )
    if caption_dropout == 0 and cfg.guidance_scale != 1:
        raise BadInput(
            f"sampling.guidance_scale={cfg.guidance_scale:g} steers away from what the network "
            "draws without a caption, but it was trained with objective.caption_dropout=0 and has "
            'never seen an empty one. Give guidance=1 and negative="", or train with '
            "objective.caption_dropout=0.1."
        )
    first = torch.tensor(cfg.first_time, dtype=torch.float64)
    of_sde = cfg.solver in {"euler_maruyama", "predictor_corrector"}
    if of_sde and process.alpha(first) == 0:
        raise BadInput(
            f"sampling.solver={cfg.solver} integrates the reverse SDE, which is infinite at t=1 "
            f"for this run's process, {type(process).__name__}: no data is left there. Try "
            "sampling.first_time=0.999, or sampling.solver=ddpm."
        )


def draw_latents(
    network: nn.Module,
    parameterization: Parameterization,
    condition: Condition,
    unwanted: Condition,
    *,
    numbers: Sequence[int],
    shape: tuple[int, int, int],
    cfg: SamplingConfig,
    known: Known | None = None,
) -> Iterator[Tensor]:
    """Yield normalised latents ``(B, C, H, W)`` after every step.

    All draws are keyed by (seed, the picture's number), so a picture does not depend on which
    others are drawn with it, but for rounding.

    Args:
        network: ``(x, time_B, text_BLD, mask_BL)`` to a prediction.
        parameterization: What it predicts.
        condition: Text states and mask of the captions.
        unwanted: Those of the empty or negative ones, of the same shapes.
        numbers: Of the pictures.
        shape: ``(C, H, W)``.
        cfg: How.
        known: What to start from instead of noise alone; its time is ``cfg.first_time``.

    Raises:
        BadWorld: The network gave something that is no finite number.
    """
    process = parameterization.process

    def denoise(x: Tensor, t: Tensor, given: Condition) -> Tensor:
        time_B = process.network_time(t).to(x).reshape(-1).expand(len(x))
        prediction = network(parameterization.network_input(x, t), time_B, *given)
        return parameterization.data(prediction, x, t)

    guided = classifier_free(
        denoise,
        condition,
        unwanted,
        scale=cfg.guidance_scale,
        rescale_frac=cfg.guidance_rescale_frac,
        interval=cfg.guidance_interval,
        split=cfg.guidance_split,
    )
    ids_B = torch.tensor(list(numbers), device=condition[0].device)
    first = _normals(ids_B, cfg.seed, philox.NOISE, 0, shape)
    t = grid(process, cfg.grid, cfg.num_steps, first=cfg.first_time, shift=cfg.time_shift)
    draw: Draw = partial(_draw, ids_B, cfg.seed, shape)
    start = prior_std(process) * first
    if known is not None:
        start = diffuse(process, known.latents_CHW, first, t[0])
        if known.mask_HW is not None:
            guided = keep_known(guided, known.latents_CHW, known.mask_HW)
    counted = Counted(guided)
    steps = solver(cfg)(process, counted, start, t, draw)
    for step, x_BCHW in enumerate(steps, start=1):
        if not x_BCHW.isfinite().all():
            raise BadWorld(
                f"step {step} of sampling.solver={cfg.solver} gave numbers that are not finite. "
                "The weights are damaged or the run diverged: try an earlier checkpoint, or a "
                "smaller sampling.guidance_scale."
            )
        yield x_BCHW
    if cfg.is_adaptive:
        log.info("%d pictures took %d evaluations each", len(numbers), counted.calls)


def solver(cfg: SamplingConfig) -> Solver:
    """Return the solver with its options."""
    match cfg.solver:
        case "ddim":
            return partial(ddim, eta=cfg.eta)
        case "euler" | "heun":
            told = cfg.churn
            churn = Churn(told.amount, told.min_ratio, told.max_ratio, told.noise_scale)
            return partial(heun if cfg.solver == "heun" else euler, churn=churn)
        case "dopri5":
            return partial(dopri5, rtol=cfg.tolerance, atol=cfg.tolerance)
        case name:
            return SOLVERS[name]


def _draw(ids_B: Tensor, seed: int, shape: tuple[int, int, int], number: int) -> Tensor:
    return _normals(ids_B, seed, philox.SOLVER, number, shape)


def _normals(
    ids_B: Tensor, seed: int, purpose: int, visit: int, shape: tuple[int, int, int]
) -> Tensor:
    visits_B = torch.full_like(ids_B, visit)
    return philox.normals(seed, ids_B, visits_B, purpose=purpose, shape=shape)
