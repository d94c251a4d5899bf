"""From one batch of captions to latents: noise, guidance and solver as a sampling config says."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from trainer.config_tools import SamplingConfig
from trainer.diffusion import philox
from trainer.diffusion.guidance import Condition, classifier_free
from trainer.diffusion.parameterization import Parameterization
from trainer.diffusion.process import prior_std
from trainer.diffusion.solvers import SOLVERS, Churn, Draw, Solver, ddim, dopri5, euler, heun
from trainer.diffusion.times import grid
from trainer.errors import BadInput, BadWorld

# Shape suffixes: B samples, C latent channels, H W rows and columns, L text tokens, D text width.


def check_sampling(parameterization: Parameterization, cfg: SamplingConfig) -> None:
    """Refuse what a solver cannot do on a process.

    Raises:
        BadInput: More steps than levels, or a solver of the SDE that would begin where it is
            infinite.
    """
    process = parameterization.process
    if process.num_levels is not None and cfg.num_steps > process.num_levels:
        raise BadInput(
            f"sampling.num_steps={cfg.num_steps}, but the run was trained on {process.num_levels} "
            f"levels. Try sampling.num_steps={process.num_levels}."
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
    steps = solver(cfg)(process, guided, prior_std(process) * first, t, draw)
    for step, x_BCHW in enumerate(steps, start=1):
        if not x_BCHW.isfinite().all():
            raise BadWorld(
                f"step {step} of sampling.solver={cfg.solver} gave numbers that are not finite. "
                "The weights are damaged or the run diverged: try an earlier checkpoint, or a "
                "smaller sampling.guidance_scale."
            )
        yield x_BCHW


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
