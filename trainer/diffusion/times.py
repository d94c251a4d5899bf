"""Which times: for training, as functions of uniform draws, and as grids for solvers."""

from typing import Literal

import torch
from torch import Tensor

from trainer.diffusion.process import Process, log_snr, time_at

GridKind = Literal["uniform", "trailing", "karras", "log_snr"]
_NOISIEST_FINITE = 0.999  # where the noisiest time has an infinite log-SNR


def uniform_times(process: Process, u: Tensor, *, shift: float = 1.0) -> Tensor:
    """Map uniform draws in (0, 1) to times, or to the process's levels, each equally likely."""
    if process.num_levels is None:
        return shifted(process.min_time + (1 - process.min_time) * u, shift)
    level = torch.floor(shifted(u, shift) * process.num_levels) + 1
    return level.clamp(max=process.num_levels) / process.num_levels


def logit_normal_times(u: Tensor, *, mean: float, std: float, shift: float = 1.0) -> Tensor:
    """Map uniform draws to sigmoid(N(mean, std)) (Esser et al. 2024, section 3.1)."""
    return shifted(torch.sigmoid(mean + std * torch.special.ndtri(u)), shift)


def log_normal_times(process: Process, u: Tensor, *, mean: float, std: float) -> Tensor:
    """Map uniform draws to times whose log(sigma / alpha) is N(mean, std) (Karras et al. 2022).

    Draws beyond either end of the process are moved to it.
    """
    log_ratio = mean + std * torch.special.ndtri(u.double())
    return time_at(process, -2 * log_ratio).clamp(min=process.min_time).to(u.dtype)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Move times towards the noise for shift above 1 (Esser et al. 2024, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def grid(
    process: Process,
    kind: GridKind,
    num_steps: int,
    *,
    first: float = 1.0,
    shift: float = 1.0,
    rho: float = 7.0,
) -> Tensor:
    """Return ``(num_steps + 1,)`` float64 times, falling from `first` to 0.

    Args:
        process: Whose times.
        kind: trailing: evenly down to 0. uniform: evenly down to the least time, then 0. Both
            stop at levels only, where the process has some; at most as many steps then. karras:
            evenly in (sigma / alpha)^(1 / rho) (Karras et al. 2022, equation 5), then 0. log_snr:
            evenly in log(alpha / sigma) (Lu et al. 2022), then 0.
        num_steps: Steps of the solver.
        first: Where to start; below 1 the solver starts from a picture with noise.
        shift: See `shifted`; for uniform and trailing.
        rho: Of karras; larger values spend more steps near the data.
    """
    last = min(process.min_time, first)
    fracs = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    if kind == "trailing":
        t = shifted(first * torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1], shift)
    elif kind == "uniform":
        t = shifted(
            torch.lerp(torch.tensor(first).double(), torch.tensor(last).double(), fracs), shift
        )
    else:
        t = _even_in_noise(process, kind, fracs, first=first, last=last, rho=rho)
    if process.num_levels is not None and kind in {"uniform", "trailing"}:
        # As diffusers rounds halves: trailing t N, else the level, which is one less.
        less = 0 if kind == "trailing" else 1
        place = torch.round(t * process.num_levels - less, decimals=6)  # so that halves are halves
        t = (torch.round(place) + less).clamp(min=1) / process.num_levels
    t[0] = first
    return torch.cat([t, t.new_zeros(1)])


def _even_in_noise(
    process: Process, kind: GridKind, fracs: Tensor, *, first: float, last: float, rho: float
) -> Tensor:
    ends = log_snr(process, torch.tensor([first, last], dtype=torch.float64))
    if ends[0].isinf():
        ends[0] = log_snr(process, torch.tensor(_NOISIEST_FINITE * first, dtype=torch.float64))
    if kind == "log_snr":
        return time_at(process, torch.lerp(ends[0], ends[1], fracs))
    roots = torch.exp(-ends / (2 * rho))
    return time_at(process, -2 * rho * torch.log(torch.lerp(roots[0], roots[1], fracs)))
