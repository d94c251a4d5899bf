"""Training objectives: one number per sample.

A weighting is a function of the log-SNR on the squared error of x0. `denoising_loss` turns it into
the weight on what the network predicts, so that one weighting is the same objective for every
parameterization: with eps, v or x0 the weighted losses of equal estimates are equal numbers.

Letters: ``B`` samples, ``C`` channels, ``H W`` rows and columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.diffusion.parameterization import Parameterization, clamped_scales
from trainer.diffusion.process import diffuse, diffusion, like

Predict = Callable[[Tensor, Tensor], Tensor]
Weighting = Literal["uniform", "min_snr", "soft_min_snr", "p2", "sigmoid", "edm"]


@dataclass(frozen=True, slots=True)
class Weight:
    """How much the noise levels count."""

    kind: Weighting = "uniform"
    """uniform: 1 on what is predicted. On x0, with s the SNR: min_snr min(s, gamma) (Hang et al.
    2023); soft_min_snr s gamma / (s + gamma) (Crowson et al. 2024); p2 s / (k + s)^gamma (Choi et
    al. 2022); sigmoid s sigmoid(bias - log s) (Kingma & Gao 2023); edm 1 / sigma_data^2 + s
    (Karras et al. 2022)."""
    gamma: float = 5.0
    """Of min_snr, soft_min_snr (4 in the paper) and p2 (1 in the paper)."""
    k: float = 1.0
    """Of p2."""
    bias: float = 2.0
    """Of sigmoid."""

    def on_prediction(self, parameterization: Parameterization, t: Tensor) -> Tensor:
        """Return the factor of the squared error of the prediction at t, in t's dtype.

        Finite at both ends of any path. Where the SNR is zero, min_snr, soft_min_snr and p2 give
        weight zero to every prediction but eps: with a zero terminal SNR the last level then
        learns from its neighbours alone; uniform on v is what Lin et al. 2024 train there.
        """
        if self.kind == "uniform":
            return torch.ones_like(t)
        alpha, sigma = clamped_scales(parameterization.process, t)
        log_snr = 2 * (torch.log(alpha) - torch.log(sigma))
        log_weight = self._log_on_data(log_snr, parameterization.sigma_data)
        return torch.exp(log_weight - parameterization.log_gain(t)).to(t.dtype)

    def _log_on_data(self, log_snr: Tensor, sigma_data: float) -> Tensor:
        log_gamma = torch.full_like(log_snr, math.log(self.gamma))
        match self.kind:
            case "min_snr":
                return torch.minimum(log_snr, log_gamma)
            case "soft_min_snr":
                return log_snr + log_gamma - torch.logaddexp(log_snr, log_gamma)
            case "p2":
                log_k = torch.full_like(log_snr, math.log(self.k))
                return log_snr - self.gamma * torch.logaddexp(log_k, log_snr)
            case "sigmoid":
                return log_snr + torch.nn.functional.logsigmoid(self.bias - log_snr)
            case "edm":
                floor = torch.full_like(log_snr, -2 * math.log(sigma_data))
                return torch.logaddexp(floor, log_snr)
            case _:
                raise AssertionError(self.kind)


def denoising_loss(
    parameterization: Parameterization,
    predict: Predict,
    x0: Tensor,
    noise: Tensor,
    t_B: Tensor,
    *,
    weight: Weight,
) -> Tensor:
    """Return the weighted mean squared error of a prediction, per sample.

    Args:
        parameterization: The process, and what the network predicts.
        predict: The network: ``(input, network_time_B)`` to a tensor like x0.
        x0: ``(B, ...)`` clean data, float32.
        noise: Standard normal draws like x0, passed in.
        t_B: ``(B,)`` times.
        weight: Of the noise levels.

    Returns:
        ``(B,)`` float32.
    """
    error, _ = _errors(parameterization, predict, x0, noise, t_B)
    return weight.on_prediction(parameterization, t_B) * error


def score_matching_loss(
    parameterization: Parameterization,
    predict: Predict,
    x0: Tensor,
    noise: Tensor,
    t_B: Tensor,
    *,
    likelihood_weighting: bool,
) -> Tensor:
    """Return denoising score matching, per sample (Vincent 2011; Song et al. 2021, equation 7).

    Whatever the network predicts is read as the score of x_t and compared with that of x_t given
    x0, -eps / sigma.

    Args:
        parameterization: The process, and what the network predicts.
        predict: As in `denoising_loss`.
        x0: ``(B, ...)`` clean data, float32.
        noise: Standard normal draws like x0, passed in.
        t_B: ``(B,)`` times, above 0.
        likelihood_weighting: Weigh with g^2 instead of sigma^2: the mean over uniform times then
            bounds the negative log-likelihood (Song et al. 2021b). Needs alpha > 0.

    Returns:
        ``(B,)`` float32.
    """
    process = parameterization.process
    error, t_B = _errors(parameterization, predict, x0, noise, t_B)
    alpha, sigma = clamped_scales(process, t_B)
    # Errors of the score are (alpha / sigma^2)^2 times those of x0.
    log_gain = 2 * torch.log(alpha) - 4 * torch.log(sigma) - parameterization.log_gain(t_B)
    factor = diffusion(process, t_B.double()).square() if likelihood_weighting else sigma.square()
    return (factor * torch.exp(log_gain)).to(error.dtype) * error


def _errors(
    parameterization: Parameterization, predict: Predict, x0: Tensor, noise: Tensor, t_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``(B,)`` mean squared errors of the prediction, and the times."""
    t = like(t_B, x0)
    x_t = diffuse(parameterization.process, x0, noise, t)
    prediction = predict(
        parameterization.network_input(x_t, t), parameterization.process.network_time(t_B)
    )
    error = prediction.float() - parameterization.target(x0, noise, t).float()
    return error.square().flatten(1).mean(1), t_B
