"""Choose the diffusers scheduler that steps as Kiln's ddim solver does on a run's process."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from trainer.build import build_parameterization
from trainer.config_diffusion import (
    DenoisingConfig,
    ExplodingProcessConfig,
    FlowProcessConfig,
    VpProcessConfig,
)
from trainer.errors import BadInput

NETWORK_STEPS = 1000
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
STOCK_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclass(frozen=True, slots=True)
class Schedule:
    """A diffusers scheduler, and how the network's time follows from its timesteps."""

    scheduler: Any
    time_factor: float = 1.0
    time_offset: float = 0.0


def make_schedule(objective: DenoisingConfig) -> Schedule:
    """Make the scheduler of an objective; it starts at full noise and ends at the data.

    Raises:
        BadInput: diffusers has no scheduler that steps on this process from these predictions.
    """
    process, prediction = objective.process, objective.prediction
    match process:
        case FlowProcessConfig() if prediction == "flow":
            return Schedule(FlowMatchEulerDiscreteScheduler(NETWORK_STEPS, shift=1.0))
        case VpProcessConfig() if prediction in STOCK_PREDICTIONS:
            return _preserving(objective, process)
        case ExplodingProcessConfig(kind="edm") if prediction == "edm":
            return _edm(objective, process)
    raise BadInput(
        f"objective.process.kind={process.kind} with objective.prediction={prediction} has no "
        "scheduler in diffusers that draws what Kiln draws; it has for flow with flow, for vp with "
        "eps, x0 or v, and for edm with edm. Draw from the run itself: kiln sample run=..."
    )


def _preserving(objective: DenoisingConfig, process: VpProcessConfig) -> Schedule:
    options = {
        "prediction_type": STOCK_PREDICTIONS[objective.prediction],
        "timestep_spacing": "trailing",  # the first step is at full noise
        "steps_offset": 1,  # read for other spacings only; StableDiffusionPipeline insists
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    if process.num_levels is None:
        betas = _levels(objective).tolist()
        # Level i lies at t = (i + 1) / 1000, and the network is told 1000 t.
        return Schedule(DDIMScheduler(NETWORK_STEPS, trained_betas=betas, **options), 1.0, 1.0)
    scheduler = DDIMScheduler(
        process.num_levels,
        process.beta_start,
        process.beta_end,
        _BETAS[process.betas],
        rescale_betas_zero_snr=process.zero_terminal_snr,
        **options,
    )
    return Schedule(scheduler, NETWORK_STEPS / process.num_levels)


def _levels(objective: DenoisingConfig) -> torch.Tensor:
    """Return the betas, in float64, of a thousand levels of a continuous process."""
    t = torch.linspace(0, 1, NETWORK_STEPS + 1, dtype=torch.float64)
    alpha_bar = build_parameterization(objective).process.alpha(t).square()
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def _edm(objective: DenoisingConfig, process: ExplodingProcessConfig) -> Schedule:
    scheduler = EDMEulerScheduler(
        sigma_min=process.sigma_min, sigma_max=process.sigma_max, sigma_data=objective.sigma_data
    )
    # Its timesteps are log(sigma) / 4; the network is told log(sigma) from 0 to 1000.
    per_log = NETWORK_STEPS / math.log(process.sigma_max / process.sigma_min)
    return Schedule(scheduler, 4 * per_log, -per_log * math.log(process.sigma_min))
