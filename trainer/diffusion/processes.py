"""The processes of the literature: VP, sub-VP, VE, EDM and rectified flow.

Everything is elementwise in t and computed in float64; results have t's dtype.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.diffusion.process import Process

MAX_NETWORK_TIME = 1000.0  # what diffusers' sinusoidal time embeddings are made for

Betas = Literal["linear", "scaled_linear", "cosine"]


@dataclass(frozen=True, slots=True)
class RectifiedFlow:
    """Straight paths, x_t = (1 - t) x0 + t eps (Liu et al. 2022)."""

    min_time: float = 1e-3
    num_levels: int | None = None
    explodes: bool = False

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Return t."""
        return t

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return -1."""
        return -torch.ones_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)

    def network_time(self, t: Tensor) -> Tensor:
        """Return 1000 t."""
        return t * MAX_NETWORK_TIME


@dataclass(frozen=True, slots=True)
class VariancePreserving:
    """The VP SDE in continuous time: alpha^2 + sigma^2 = 1 (Song et al. 2021, appendix B).

    Betas are those of DDPM's table, per step of a thousand: beta(t) = 1000 b(t), where b or its
    root rises linearly from `beta_start` to `beta_end`. Cosine is Nichol & Dhariwal 2021.
    """

    betas: Betas = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal_snr: bool = False
    min_time: float = 1e-3
    num_levels: int | None = None
    explodes: bool = False

    def alpha(self, t: Tensor) -> Tensor:
        """Return exp(-1/2 integral of beta), shifted to end at 0 where that is asked for."""
        alpha = self._alpha(t.double())
        if self.zero_terminal_snr:
            last = self._alpha(torch.ones((), dtype=torch.float64))
            alpha = (alpha - last) / (1 - last)
        return alpha.to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """Return sqrt(1 - alpha^2)."""
        return _other_leg(self.alpha(t.double())).to(t.dtype)

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return -beta alpha / 2."""
        rate = self._alpha_rate(t.double())
        if self.zero_terminal_snr:
            rate = rate / (1 - self._alpha(torch.ones((), dtype=torch.float64)))
        return rate.to(t.dtype)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return -alpha alpha' / sigma."""
        return _other_leg_rate(self, t)

    def network_time(self, t: Tensor) -> Tensor:
        """Return 1000 t."""
        return t * MAX_NETWORK_TIME

    def _alpha(self, t: Tensor) -> Tensor:
        if self.betas == "cosine":
            first, last = _cosine_angles(0), _cosine_angles(1)
            alpha = torch.cos(first + (last - first) * t) / math.cos(first)
            return torch.where(t >= 1, torch.zeros_like(t), alpha)
        a, b = self.beta_start, self.beta_end
        if self.betas == "linear":
            integral = a * t + (b - a) * t.square() / 2
        else:
            low, rise = math.sqrt(a), math.sqrt(b) - math.sqrt(a)
            integral = low**2 * t + low * rise * t.square() + rise**2 * t**3 / 3
        return torch.exp(-500.0 * integral)

    def _alpha_rate(self, t: Tensor) -> Tensor:
        if self.betas == "cosine":
            first, last = _cosine_angles(0), _cosine_angles(1)
            return -(last - first) * torch.sin(first + (last - first) * t) / math.cos(first)
        if self.betas == "linear":
            beta = torch.lerp(
                torch.full_like(t, self.beta_start), torch.full_like(t, self.beta_end), t
            )
        else:
            low, high = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
            beta = (low + (high - low) * t).square()
        return -500.0 * beta * self._alpha(t)


class VpTable:
    """The VP process of a table of N levels, as DDPM and Stable Diffusion train it.

    Level i of the published table (i = 0 ... N-1) lies at t = (i + 1) / N; t = 0 is clean data.
    Between levels alpha is interpolated linearly, so every t in [0, 1] has a value.
    """

    explodes = False

    def __init__(
        self,
        betas: Betas = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        *,
        num_levels: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> None:
        """Make the table.

        Args:
            betas: How they rise; cosine ignores the next two and is cut at 0.999.
            beta_start: The first.
            beta_end: The last.
            num_levels: N.
            zero_terminal_snr: Shift and scale the alphas so that the last is 0, where the table
                leaves some data in the noise (Lin et al. 2024, algorithm 1).
        """
        self.num_levels, self.min_time = num_levels, 1 / num_levels
        alphas = torch.exp(
            0.5 * torch.log1p(-_beta_table(betas, num_levels, beta_start, beta_end)).cumsum(0)
        )
        if zero_terminal_snr:
            first, last = alphas[0], alphas[-1]
            alphas = (alphas - last) * first / (first - last)
        self._alphas = torch.cat([alphas.new_ones(1), alphas])

    def alpha(self, t: Tensor) -> Tensor:
        """Return sqrt(alpha_bar)."""
        low, frac = self._place(t)
        alphas = self._alphas.to(t.device)
        return torch.lerp(alphas[low], alphas[low + 1], frac).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """Return sqrt(1 - alpha_bar)."""
        low, frac = self._place(t)
        alphas = self._alphas.to(t.device)
        return _other_leg(torch.lerp(alphas[low], alphas[low + 1], frac)).to(t.dtype)

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return the slope between two levels; on a level, that of the noisier side."""
        low, _ = self._place(t)
        slopes = self._alphas.diff().to(t.device) * self.num_levels
        return slopes[low].to(t.dtype)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return -alpha alpha' / sigma."""
        return _other_leg_rate(self, t)

    def network_time(self, t: Tensor) -> Tensor:
        """Return the level, scaled to the usual 1000 where N is not 1000."""
        level = (t * self.num_levels - 1).clamp(min=0)
        return level * (MAX_NETWORK_TIME / self.num_levels)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the level below in the table that begins with clean data, and how far behind."""
        # A float32 k/N misses level k by some 1e-5 of a level; take it for level k.
        place = (t.double() * self.num_levels).clamp(0, self.num_levels)
        nearest = place.round()
        place = torch.where((place - nearest).abs() < 1e-4, nearest, place)
        low = place.floor().long().clamp(max=self.num_levels - 1)
        return low, place - low


@dataclass(frozen=True, slots=True)
class SubVariancePreserving:
    """The sub-VP SDE: the alpha of linear VP, but sigma = 1 - alpha^2 (Song et al. 2021)."""

    beta_start: float = 1e-4
    beta_end: float = 0.02
    min_time: float = 1e-3
    num_levels: int | None = None
    explodes: bool = False

    def alpha(self, t: Tensor) -> Tensor:
        """Return that of VP."""
        return self._preserving().alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Return 1 - alpha^2."""
        return (1 - self.alpha(t.double()).square()).to(t.dtype)

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return that of VP."""
        return self._preserving().alpha_rate(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return -2 alpha alpha'."""
        return -2 * self.alpha(t) * self.alpha_rate(t)

    def network_time(self, t: Tensor) -> Tensor:
        """Return 1000 t."""
        return t * MAX_NETWORK_TIME

    def _preserving(self) -> VariancePreserving:
        return VariancePreserving(beta_start=self.beta_start, beta_end=self.beta_end)


@dataclass(frozen=True, slots=True)
class VarianceExploding:
    """The VE SDE, g = sigma_min R^t sqrt(2 ln R) with R = sigma_max / sigma_min.

    Its exact marginal is sigma^2 = sigma_min^2 (R^2t - 1), of which Song et al. 2021 drop the 1.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    num_levels: int | None = None
    explodes: bool = True

    @property
    def min_time(self) -> float:
        """Return where sigma is sigma_min."""
        return math.log(2) / (2 * self._log_ratio)

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Return sigma_min sqrt(R^2t - 1)."""
        rise = torch.expm1(2 * self._log_ratio * t.double())
        return (self.sigma_min * torch.sqrt(rise)).to(t.dtype)

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return g^2 / (2 sigma)."""
        growth = torch.exp(2 * self._log_ratio * t.double())
        rate = self.sigma_min**2 * self._log_ratio * growth / self.sigma(t.double())
        return rate.to(t.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        """Return 1000 t, which is nearly affine in log(sigma)."""
        return t * MAX_NETWORK_TIME

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True, slots=True)
class Edm:
    """Noise that grows evenly, x_t = x0 + sigma eps with sigma = t sigma_max (Karras et al. 2022).

    The paper's time is sigma itself.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    num_levels: int | None = None
    explodes: bool = True

    @property
    def min_time(self) -> float:
        """Return where sigma is sigma_min."""
        return self.sigma_min / self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Return t sigma_max."""
        return t * self.sigma_max

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Return sigma_max."""
        return torch.full_like(t, self.sigma_max)

    def network_time(self, t: Tensor) -> Tensor:
        """Return log(sigma), scaled from [sigma_min, sigma_max] to [0, 1000]."""
        place = torch.log(t / self.min_time) / math.log(self.sigma_max / self.sigma_min)
        return (place * MAX_NETWORK_TIME).clamp(min=0)


def _cosine_angles(t: float) -> float:
    return math.pi / 2 * (t + 0.008) / 1.008


def _beta_table(betas: Betas, num_levels: int, start: float, end: float) -> Tensor:
    """Return ``(N,)`` float64."""
    if betas == "linear":
        return torch.linspace(start, end, num_levels, dtype=torch.float64)
    if betas == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_levels, dtype=torch.float64).square()
    levels = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
    alpha_bar = torch.cos(math.pi / 2 * (levels + 0.008) / 1.008).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def _other_leg(alpha: Tensor) -> Tensor:
    """Return sqrt(1 - alpha^2) without cancellation near 1."""
    return torch.sqrt((1 - alpha) * (1 + alpha))


def _other_leg_rate(process: Process, t: Tensor) -> Tensor:
    t64 = t.double()
    return (-process.alpha(t64) * process.alpha_rate(t64) / process.sigma(t64)).to(t.dtype)
