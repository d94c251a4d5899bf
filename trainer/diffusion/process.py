"""How data turns into noise: x_t = alpha(t) x0 + sigma(t) eps for t in [0, 1], 1 being noise.

A process also says what its network predicts. Everything here is elementwise in t; `like` lines
up one time per sample with a batch.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

MAX_NETWORK_TIME = 1000.0  # what diffusers' sinusoidal time embeddings are made for


class Process(Protocol):
    """A Gaussian path from data to noise, and the network's parameterization on it."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return the data's factor at times in [0, 1]."""

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise's factor at times in [0, 1]."""

    def training_time(self, u: Tensor) -> Tensor:
        """Map uniform draws in (0, 1) to training times."""

    def network_time(self, t: Tensor) -> Tensor:
        """Map times to the network's time input, in [0, 1000]."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict; t broadcasts with x0."""

    def data(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the x0 that a prediction at x_t means; t broadcasts with x_t, and t > 0."""


@dataclass(frozen=True, slots=True)
class RectifiedFlow:
    """Straight paths, x_t = (1 - t) x0 + t eps; the network predicts the velocity eps - x0.

    Liu et al. 2022; the logit-normal training times are Esser et al. 2024, section 3.1.
    """

    logit_mean: float = 0.0
    logit_std: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Return t."""
        return t

    def training_time(self, u: Tensor) -> Tensor:
        """Return logit-normal times."""
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))

    def network_time(self, t: Tensor) -> Tensor:
        """Return 1000 t."""
        return t * MAX_NETWORK_TIME

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity."""
        return noise - x0

    def data(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return x_t - t v."""
        return x_t - t * prediction


class VpScaledLinear:
    """Stable Diffusion's variance-preserving process: sqrt(beta) rises linearly over N levels.

    Level i of the published table (i = 0 ... N-1) lies at t = (i + 1) / N; t = 0 is clean data.
    Between levels log(alpha_bar) is interpolated linearly, so every t in [0, 1] has a value.
    """

    def __init__(
        self,
        *,
        prediction: Literal["eps", "v"] = "eps",
        num_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
    ) -> None:
        self.prediction = prediction
        self.num_steps = num_steps
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
        steps = torch.log1p(-betas).cumsum(0)
        self._log_alpha_bar = torch.cat([steps.new_zeros(1), steps])

    def alpha(self, t: Tensor) -> Tensor:
        """Return sqrt(alpha_bar)."""
        return torch.exp(0.5 * self._log_alpha_bar_at(t)).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """Return sqrt(1 - alpha_bar)."""
        return torch.sqrt(-torch.expm1(self._log_alpha_bar_at(t))).to(t.dtype)

    def training_time(self, u: Tensor) -> Tensor:
        """Return one of the N levels, each as likely as the others."""
        return (torch.floor(u * self.num_steps) + 1).clamp(max=self.num_steps) / self.num_steps

    def network_time(self, t: Tensor) -> Tensor:
        """Return the level, scaled to the usual 1000 where N is not 1000."""
        level = (t * self.num_steps - 1).clamp(min=0)
        return level * (MAX_NETWORK_TIME / self.num_steps)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return eps, or v = alpha eps - sigma x0 (Salimans & Ho 2022)."""
        if self.prediction == "eps":
            return noise
        return self.alpha(t) * noise - self.sigma(t) * x0

    def data(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the x0 that eps or v means."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        if self.prediction == "eps":
            return (x_t - sigma * prediction) / alpha
        return alpha * x_t - sigma * prediction

    def _log_alpha_bar_at(self, t: Tensor) -> Tensor:
        """Return log(alpha_bar) in float64."""
        table = self._log_alpha_bar.to(t.device)
        # A float32 k/N misses level k by some 1e-5 of a level; take it for level k.
        place = (t.double() * self.num_steps).clamp(0, self.num_steps)
        nearest = place.round()
        place = torch.where((place - nearest).abs() < 1e-4, nearest, place)
        low = place.floor().long().clamp(max=self.num_steps - 1)
        return torch.lerp(table[low], table[low + 1], place - low)


def like(values_B: Tensor, x: Tensor) -> Tensor:
    """Reshape one number per sample so that it broadcasts with ``(B, ...)`` tensors."""
    return values_B.reshape(-1, *[1] * (x.ndim - 1))


def diffuse(process: Process, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t; t broadcasts with x0."""
    return process.alpha(t) * x0 + process.sigma(t) * noise


def noise_of(process: Process, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the eps that carries x0 to x_t; needs t > 0."""
    return (x_t - process.alpha(t) * x0) / process.sigma(t)
