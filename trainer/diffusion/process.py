"""How data turns into noise: x_t = alpha(t) x0 + sigma(t) eps for t in [0, 1], 1 being noise.

A process is a pair of functions with their derivatives (`trainer.diffusion.processes` has them);
everything else that the literature asks of one follows here: the log-SNR, the forward SDE
dx = f x dt + g dw, its reverse, and the probability-flow ODE (Song et al. 2021,
https://arxiv.org/abs/2011.13456).
"""

from typing import Protocol

import torch
from torch import Tensor

_BISECTIONS = 64


class Process(Protocol):
    """A Gaussian path from data to noise."""

    @property
    def min_time(self) -> float:
        """Smallest time worth visiting: solvers jump from there to t = 0 in one step."""

    @property
    def num_levels(self) -> int | None:
        """Times i / N, i = 1 ... N, are the only ones that are trained; None for all times."""

    @property
    def explodes(self) -> bool:
        """Whether x_t grows with the noise, so that a network's input must be scaled down."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return the data's factor at times in [0, 1]."""

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise's factor at times in [0, 1]; 0 at t = 0."""

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return d alpha / dt."""

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return d sigma / dt; infinite at t = 0 where sigma rises like a square root."""

    def network_time(self, t: Tensor) -> Tensor:
        """Map times to the network's time input, in [0, 1000]."""


def like(values_B: Tensor, x: Tensor) -> Tensor:
    """Reshape one number per sample so that it broadcasts with ``(B, ...)`` tensors."""
    return values_B.reshape(-1, *[1] * (x.ndim - 1))


def scales(process: Process, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma at t, which broadcasts with x, in x's dtype and on its device."""
    t = t.double()
    return process.alpha(t).to(x), process.sigma(t).to(x)


def diffuse(process: Process, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t; t broadcasts with x0."""
    alpha, sigma = scales(process, t, x0)
    return alpha * x0 + sigma * noise


def noise_of(process: Process, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the eps that carries x0 to x_t; needs t > 0."""
    alpha, sigma = scales(process, t, x_t)
    return (x_t - alpha * x0) / sigma


def score_of(process: Process, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the score of x_t whose denoised estimate is x0 (Tweedie's formula); needs t > 0."""
    alpha, sigma = scales(process, t, x_t)
    return (alpha * x0 - x_t) / sigma.square()


def log_snr(process: Process, t: Tensor) -> Tensor:
    """Return log(alpha^2 / sigma^2): +inf for clean data, -inf for pure noise."""
    return 2 * (torch.log(process.alpha(t)) - torch.log(process.sigma(t)))


def time_at(process: Process, log_snr_: Tensor) -> Tensor:
    """Return float64 times in [0, 1] of these log-SNRs, by bisection; the nearer end else."""
    low = torch.zeros_like(log_snr_, dtype=torch.float64)
    high = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        clean = log_snr(process, middle) > log_snr_
        low, high = torch.where(clean, middle, low), torch.where(clean, high, middle)
    return high


def drift(process: Process, t: Tensor) -> Tensor:
    """Return f of the forward SDE dx = f x dt + g dw; infinite where alpha is 0."""
    return process.alpha_rate(t) / process.alpha(t)


def diffusion(process: Process, t: Tensor) -> Tensor:
    """Return g of the forward SDE; infinite where alpha is 0."""
    sigma, f = process.sigma(t), drift(process, t)
    return torch.sqrt(2 * sigma * (process.sigma_rate(t) - f * sigma))


def reverse_drift(process: Process, x: Tensor, score: Tensor, t: Tensor) -> Tensor:
    """Return the drift of the reverse SDE, f x - g^2 score, for t that falls (Anderson 1982)."""
    t = t.double()
    return drift(process, t).to(x) * x - diffusion(process, t).square().to(x) * score


def probability_flow(process: Process, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return dx/dt of the ODE with the SDE's marginals, f x - g^2 score / 2; needs t > 0.

    Written as alpha' x0 + sigma' eps, which stays finite where f and g do not.
    """
    eps, t = noise_of(process, x0, x_t, t), t.double()
    return process.alpha_rate(t).to(x_t) * x0 + process.sigma_rate(t).to(x_t) * eps


def prior_std(process: Process) -> float:
    """Return the standard deviation of x_1 for data of zero mean and unit variance."""
    one = torch.ones((), dtype=torch.float64)
    return float(torch.hypot(process.alpha(one), process.sigma(one)))
