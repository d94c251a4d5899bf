"""From noise to data: solvers as generators that yield x after every step, over any process.

A denoiser is ``denoise(x, t) -> x0`` with t in (0, 1], 0-dim and float64, or one per sample where
a solver says so. Draws are passed in as ``draw(k)``, the k-th standard normal tensor like x of a
trajectory. The caller adds the network, the guidance, progress bars and previews.

Notation: rho = sigma / alpha is the noise per data, lambda = -log(rho) half the log-SNR.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from trainer.diffusion.ode import integrate
from trainer.diffusion.process import (
    Process,
    diffuse,
    diffusion,
    log_snr,
    noise_of,
    probability_flow,
    reverse_drift,
    score_of,
    time_at,
)

Denoise = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[int], Tensor]


class Solver(Protocol):
    """The one signature; a solver takes its own options besides."""

    def __call__(
        self, process: Process, denoise: Denoise, x: Tensor, t: Tensor, draw: Draw, /
    ) -> Iterator[Tensor]:
        """Yield x at each time of ``t[1:]``.

        Args:
            process: The path.
            denoise: See the module.
            x: ``(B, ...)`` noisy data at ``t[0]``.
            t: Falling times, the last one 0; see `trainer.diffusion.times.grid`.
            draw: See the module; deterministic solvers never ask.
        """


@dataclass(frozen=True, slots=True)
class Churn:
    """Noise added before each step and removed by it (Karras et al. 2022, algorithm 2)."""

    amount: float = 0.0
    """S_churn; at most sqrt(2) - 1 of the noise is added per step."""
    min_ratio: float = 0.0
    """S_tmin, in units of sigma / alpha."""
    max_ratio: float = math.inf
    """S_tmax."""
    noise_scale: float = 1.0
    """S_noise."""

    def apply(
        self, process: Process, x: Tensor, now: Tensor, num_steps: int, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return x at an earlier, noisier time, and that time; never before t = 1."""
        ratio = float(process.sigma(now) / process.alpha(now))
        if self.amount == 0 or not self.min_ratio <= ratio <= self.max_ratio:
            return x, now
        raised = ratio * (1 + min(self.amount / num_steps, math.sqrt(2) - 1))
        before = time_at(process, torch.tensor(-2 * math.log(raised), dtype=torch.float64))
        gain = process.alpha(before) / process.alpha(now)
        added = (process.sigma(before) ** 2 - (gain * process.sigma(now)) ** 2).clamp(min=0).sqrt()
        return gain * x + added * self.noise_scale * noise(), before


NO_CHURN = Churn()


@dataclass
class Counted:
    """A denoiser that counts how often it was asked: the number of function evaluations."""

    denoise: Denoise
    calls: int = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Ask, and count."""
        self.calls += 1
        return self.denoise(x, t)


def ddim(
    process: Process, denoise: Denoise, x: Tensor, t: Tensor, draw: Draw, *, eta: float = 0.0
) -> Iterator[Tensor]:
    """Step with x0 and eps held fixed, renewing a share of the noise (Song et al. 2021).

    With eta = 0 nothing is renewed: Euler's method on the probability-flow ODE, in rho and for
    rectified flow in t. With eta = 1 each step is drawn from its exact posterior, which is DDPM.
    Arguments and yields as in `Solver`.
    """
    for step, (now, then) in enumerate(itertools.pairwise(t)):
        x0 = denoise(x, now)
        eps = noise_of(process, x0, x, now)
        sigma = process.sigma(then)
        kept = process.alpha(now) / process.alpha(then) * sigma / process.sigma(now)
        renewed = eta * sigma * torch.sqrt((1 - kept.square()).clamp(min=0))
        x = process.alpha(then) * x0 + torch.sqrt(sigma.square() - renewed.square()) * eps
        if renewed > 0:
            x = x + renewed * draw(step)
        yield x


def ddpm(process: Process, denoise: Denoise, x: Tensor, t: Tensor, draw: Draw) -> Iterator[Tensor]:
    """Draw each step from its posterior given x0, with its smallest variance (Ho et al. 2020)."""
    return ddim(process, denoise, x, t, draw, eta=1.0)


def euler_maruyama(
    process: Process,
    denoise: Denoise,
    x: Tensor,
    t: Tensor,
    draw: Draw,
    *,
    corrector_snr: float = 0.0,
) -> Iterator[Tensor]:
    """Integrate the reverse SDE; the last step, to t = 0, takes the denoised x.

    `corrector_snr` is r of one step of annealed Langevin dynamics, of size 2 (r sigma)^2, at each
    new time (Song & Ermon 2019; Song et al. 2021, algorithm 1); 0 leaves it out. Arguments and
    yields as in `Solver`.

    Raises:
        ValueError: alpha is 0 at the first time.
    """
    if process.alpha(t[0]) == 0:
        raise ValueError(
            f"alpha is 0 at the first time, {float(t[0]):g}, where the reverse SDE of this process "
            "is infinite. Begin later, or take a solver that steps over it, such as ddpm."
        )
    for step, (now, then) in enumerate(itertools.pairwise(t)):
        x0 = denoise(x, now)
        if then == 0:
            yield x0
            return
        elapsed = now - then
        slope = reverse_drift(process, x, score_of(process, x0, x, now), now)
        noise = diffusion(process, now) * torch.sqrt(elapsed) * draw(2 * step)
        x = x - elapsed * slope + noise
        if corrector_snr > 0:
            size = 2 * (corrector_snr * process.sigma(then)) ** 2
            score = score_of(process, denoise(x, then), x, then)
            x = x + size * score + torch.sqrt(2 * size) * draw(2 * step + 1)
        yield x


def predictor_corrector(
    process: Process, denoise: Denoise, x: Tensor, t: Tensor, draw: Draw
) -> Iterator[Tensor]:
    """Reverse SDE by Euler-Maruyama, each step corrected by Langevin dynamics with r = 0.16."""
    return euler_maruyama(process, denoise, x, t, draw, corrector_snr=0.16)


def euler(
    process: Process, denoise: Denoise, x: Tensor, t: Tensor, draw: Draw, *, churn: Churn = NO_CHURN
) -> Iterator[Tensor]:
    """Integrate the probability-flow ODE by Euler's method in rho; `ddim` but for the churn."""
    for step, (now, then) in enumerate(itertools.pairwise(t)):
        x, before = churn.apply(process, x, now, len(t) - 1, partial(draw, step))
        x = diffuse(process, *_both(process, denoise, x, before), then)
        yield x


def heun(
    process: Process, denoise: Denoise, x: Tensor, t: Tensor, draw: Draw, *, churn: Churn = NO_CHURN
) -> Iterator[Tensor]:
    """Integrate the probability-flow ODE by the trapezoidal rule, second order.

    The variable is rho, in which d(x / alpha) = eps d rho (Karras et al. 2022), or, for processes
    that end in pure noise, where rho is infinite, tau = sigma / (alpha + sigma), in which
    d(x / (alpha + sigma)) = (eps - x0) d tau. Two evaluations per step, one in the last, to t = 0,
    where eps is undefined. Arguments and yields as in `Solver`.
    """
    to_noise = process.alpha(torch.ones_like(t[0])) == 0
    for step, (now, then) in enumerate(itertools.pairwise(t)):
        x, before = churn.apply(process, x, now, len(t) - 1, partial(draw, step))
        x0, eps = _both(process, denoise, x, before)
        ahead = diffuse(process, x0, eps, then)
        if then > 0:
            x0_ahead, eps_ahead = _both(process, denoise, ahead, then)
            change, change_ahead = eps, eps_ahead
            if to_noise:
                change, change_ahead = eps - x0, eps_ahead - x0_ahead
            step_size = _place(process, then, to_noise) - _place(process, before, to_noise)
            scale = process.alpha(then) + (process.sigma(then) if to_noise else 0)
            ahead = ahead + scale * step_size / 2 * (change_ahead - change)
        x = ahead
        yield x


def dpm_2m(
    process: Process, denoise: Denoise, x: Tensor, t: Tensor, draw: Draw
) -> Iterator[Tensor]:
    """DPM-Solver++ 2M: second order with one evaluation per step (Lu et al. 2022, algorithm 2)."""
    return _dpm(process, denoise, x, t, draw, stochastic=False)


def dpm_sde(
    process: Process, denoise: Denoise, x: Tensor, t: Tensor, draw: Draw
) -> Iterator[Tensor]:
    """SDE-DPM-Solver++ 2M, its stochastic sibling (Lu et al. 2022, appendix)."""
    return _dpm(process, denoise, x, t, draw, stochastic=True)


def unipc(process: Process, denoise: Denoise, x: Tensor, t: Tensor, draw: Draw) -> Iterator[Tensor]:
    """UniPC of second order with B(h) = e^h - 1 on x0 (Zhao et al. 2023), one evaluation a step.

    Each evaluation first corrects the step that led to it, then predicts the next.
    """
    estimates: list[tuple[Tensor, Tensor]] = []  # half log-SNR and x0 of the last times
    previous = x
    for step, (now, then) in enumerate(itertools.pairwise(t)):
        x0 = denoise(x, now)
        here = _half_log_snr(process, now)
        if step > 0 and estimates[-1][0].isfinite():
            x = _unipc_correct(process, previous, t[step - 1], now, estimates, x0)
        estimates = [*estimates[-1:], (here, x0)]
        previous = x
        x = _unipc_predict(process, x, now, then, estimates)
        yield x


def dopri5(
    process: Process,
    denoise: Denoise,
    x: Tensor,
    t: Tensor,
    draw: Draw,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-3,
) -> Iterator[Tensor]:
    """Integrate the probability-flow ODE adaptively (Dormand & Prince 1980), then denoise.

    Every sample has its own step sizes, so that it does not depend on the others; the denoiser is
    asked with one time per sample, shaped to broadcast with x. Of the grid only the first time
    matters. Tolerances as in `trainer.diffusion.ode.integrate`; yields x after each round of
    steps, until the last sample has arrived.
    """

    def rate(x: Tensor, t: Tensor) -> Tensor:
        return probability_flow(process, denoise(x, t), x, t)

    last = torch.full((), process.min_time, dtype=torch.float64, device=t.device)
    for ahead in integrate(rate, x, t[0], last, rtol=rtol, atol=atol):
        x = ahead
        yield x
    yield denoise(x, last)


SOLVERS: dict[str, Solver] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler_maruyama": euler_maruyama,
    "predictor_corrector": predictor_corrector,
    "euler": euler,
    "heun": heun,
    "dpm_2m": dpm_2m,
    "dpm_sde": dpm_sde,
    "unipc": unipc,
    "dopri5": dopri5,
}


def _both(process: Process, denoise: Denoise, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x0 and eps."""
    x0 = denoise(x, t)
    return x0, noise_of(process, x0, x, t)


def _place(process: Process, t: Tensor, to_noise: Tensor) -> Tensor:
    """Return the variable of `heun`."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return sigma / (alpha + sigma if to_noise else alpha)


def _half_log_snr(process: Process, t: Tensor) -> Tensor:
    return log_snr(process, t) / 2


def _dpm(
    process: Process, denoise: Denoise, x: Tensor, t: Tensor, draw: Draw, *, stochastic: bool
) -> Iterator[Tensor]:
    before: tuple[Tensor, Tensor] | None = None  # half log-SNR and x0 of the time before
    for step, (now, then) in enumerate(itertools.pairwise(t)):
        x0 = denoise(x, now)
        here, there = _half_log_snr(process, now), _half_log_snr(process, then)
        width = there - here
        estimate = x0
        if before is not None and then > 0:
            # Where the time before is pure noise its distance is infinite, and the slope 0.
            estimate = x0 + width / (here - before[0]) / 2 * (x0 - before[1])
        fades = torch.exp(-2 * width) if stochastic else torch.exp(-width)
        ratio = process.sigma(then) / process.sigma(now)
        x = ratio * (torch.exp(-width) if stochastic else 1) * x
        x = x + process.alpha(then) * (1 - fades) * estimate
        if stochastic and then > 0:
            x = x + process.sigma(then) * torch.sqrt(1 - fades) * draw(step)
        before = (here, x0)
        yield x


def _unipc_predict(
    process: Process, x: Tensor, now: Tensor, then: Tensor, estimates: list[tuple[Tensor, Tensor]]
) -> Tensor:
    here, x0 = estimates[-1]
    width = _half_log_snr(process, then) - here
    mean = x0
    if len(estimates) > 1 and then > 0:
        mean = x0 + width / (here - estimates[0][0]) / 2 * (x0 - estimates[0][1])
    ratio = process.sigma(then) / process.sigma(now)
    return ratio * x - process.alpha(then) * torch.expm1(-width) * mean


def _unipc_correct(
    process: Process,
    x: Tensor,
    before: Tensor,
    now: Tensor,
    estimates: list[tuple[Tensor, Tensor]],
    x0_now: Tensor,
) -> Tensor:
    """Take the step from `before` to `now` again, knowing x0 at its end."""
    start, x0 = estimates[-1]
    width = _half_log_snr(process, now) - start
    bend = torch.expm1(-width)
    change = (x0_now - x0) / 2
    if len(estimates) > 1 and estimates[0][0].isfinite():
        # Weights of the two differences that make the step exact for x0 quadratic in lambda:
        # w1 + w2 = phi_2, r w1 + w2 = 2 phi_3, where r is where the earlier time lies.
        place = (estimates[0][0] - start) / width
        phi_2 = 1 / -width * bend - 1
        first = phi_2 / bend
        second = 2 * (phi_2 / -width - 0.5) / bend
        weight = (second - first) / (place - 1)
        change = weight / place * (estimates[0][1] - x0) + (first - weight) * (x0_now - x0)
    ratio = process.sigma(now) / process.sigma(before)
    return ratio * x - process.alpha(now) * bend * (x0 + change)
