"""What a network predicts, and what a prediction says of the data and of the noise.

Every parameterization is a mixture p = a x0 + b eps whose weights depend on alpha and sigma.
With x_t = alpha x0 + sigma eps that is a system of two equations, so x0 and eps follow from p and
x_t by one formula for all of them, and exactly so at the ends of the path as far as they say
anything there.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.diffusion.process import Process, scales

Prediction = Literal["eps", "x0", "v", "flow", "score", "edm"]
_NEXT_TO_NOTHING = 1e-12


def mixture(
    kind: Prediction, alpha: Tensor, sigma: Tensor, *, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """Return a and b of the target a x0 + b eps.

    Args:
        kind: eps: the noise (Ho et al. 2020). x0: the data. v: alpha eps - sigma x0, for
            processes that do not preserve variance on the circle of their radius (Salimans &
            Ho 2022). flow: eps - x0 (Liu et al. 2022). score: that of x_t, -eps / sigma (Song &
            Ermon 2019). edm: F of Karras et al. 2022, table 1, which is -v where sigma_data is 1.
        alpha: The data's factor.
        sigma: The noise's factor.
        sigma_data: Standard deviation of the data, for edm.
    """
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    match kind:
        case "eps":
            return zero, one
        case "x0":
            return one, zero
        case "flow":
            return -one, one
        case "score":
            return zero, -1 / sigma
        case "v":
            radius = torch.hypot(alpha, sigma)
            return -sigma / radius, alpha / radius
        case "edm":
            radius = torch.hypot(alpha * sigma_data, sigma)
            return sigma / (sigma_data * radius), -alpha * sigma_data / radius


@dataclass(frozen=True)
class Parameterization:
    """A process, and what a network predicts on it; t broadcasts with x everywhere."""

    process: Process
    kind: Prediction
    sigma_data: float = 1.0
    """Standard deviation of the data; only edm and the edm weight ask for it."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict."""
        alpha, sigma = scales(self.process, t, x0)
        a, b = mixture(self.kind, alpha, sigma, sigma_data=self.sigma_data)
        return a * x0 + b * noise

    def data(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the x0 that a prediction means; eps and score say nothing where alpha is 0."""
        alpha, sigma = scales(self.process, t, x_t)
        a, b = mixture(self.kind, alpha, sigma, sigma_data=self.sigma_data)
        if self.kind == "score":  # times -sigma: finite at t = 0
            prediction, b = -sigma * prediction, torch.ones_like(b)
        return (b * x_t - sigma * prediction) / (alpha * b - sigma * a)

    def noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the eps that a prediction means; x0 says nothing at t = 0."""
        alpha, sigma = scales(self.process, t, x_t)
        if self.kind == "score":
            return -sigma * prediction
        a, b = mixture(self.kind, alpha, sigma, sigma_data=self.sigma_data)
        return (alpha * prediction - a * x_t) / (alpha * b - sigma * a)

    def convert(self, prediction: Tensor, x_t: Tensor, t: Tensor, to: Prediction) -> Tensor:
        """Return the prediction that another parameterization would have made."""
        alpha, sigma = scales(self.process, t, x_t)
        a, b = mixture(to, alpha, sigma, sigma_data=self.sigma_data)
        if to == "score":
            return -self.noise(prediction, x_t, t) / sigma
        if to in {"eps", "x0"}:  # the other half may be undefined
            return self.noise(prediction, x_t, t) if to == "eps" else self.data(prediction, x_t, t)
        return a * self.data(prediction, x_t, t) + b * self.noise(prediction, x_t, t)

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return x_t as the network sees it: of unit variance where the process or edm asks."""
        if not self.process.explodes and self.kind != "edm":
            return x_t
        alpha, sigma = scales(self.process, t, x_t)
        return x_t / torch.hypot(alpha * self.sigma_data, sigma)

    def log_gain(self, t: Tensor) -> Tensor:
        """Return the log of how much larger the squared error of a prediction is than that of x0.

        An error e of x0 at a given x_t is one of -(alpha / sigma) e in eps, so that the mixture is
        off by (a - b alpha / sigma) e. Float64; alpha and sigma are kept off zero by 1e-12.
        """
        alpha, sigma = clamped_scales(self.process, t)
        a, b = mixture(self.kind, alpha, sigma, sigma_data=self.sigma_data)
        return 2 * torch.log((a - b * alpha / sigma).abs())


def clamped_scales(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma in float64, each at least 1e-12, so that their logs are finite."""
    t = t.double()
    return (
        process.alpha(t).clamp(min=_NEXT_TO_NOTHING),
        process.sigma(t).clamp(min=_NEXT_TO_NOTHING),
    )
