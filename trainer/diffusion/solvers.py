"""From noise to data: solvers as generators that yield x after every step.

A denoiser is ``denoise(x, t) -> x0`` with t in (0, 1], 0-dim and float64 (which, being 0-dim,
leaves x in its own precision); the caller adds the network, the
guidance, progress bars and previews. All solvers take any process.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from trainer.diffusion.process import Process, noise_of

Denoise = Callable[[Tensor, Tensor], Tensor]


def times(num_steps: int, *, shift: float = 1.0) -> Tensor:
    """Return ``(num_steps + 1,)`` float64 times from 1 down to 0.

    Args:
        num_steps: Steps of the solver.
        shift: 1 spaces them evenly; above 1 spends more steps near the noise
            (Esser et al. 2024, equation 23).
    """
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


def ddim(process: Process, denoise: Denoise, x: Tensor, t: Tensor) -> Iterator[Tensor]:
    """Step with x0 and eps held fixed: DDIM (Song et al. 2021), and Euler for rectified flow.

    Args:
        process: The path.
        denoise: See the module.
        x: ``(B, ...)`` standard normal noise.
        t: Falling times, the first one 1.

    Yields:
        x at each next time.
    """
    for now, then in itertools.pairwise(t):
        x0 = denoise(x, now)
        eps = noise_of(process, x0, x, now)
        x = process.alpha(then) * x0 + process.sigma(then) * eps
        yield x


def heun(process: Process, denoise: Denoise, x: Tensor, t: Tensor) -> Iterator[Tensor]:
    """Integrate dx = x0 d(alpha) + eps d(sigma) by the trapezoidal rule: second order.

    Two evaluations per step; the last step to t = 0, where eps is undefined, is a DDIM step.
    Arguments and yields as in `ddim`.
    """
    for now, then in itertools.pairwise(t):
        x0 = denoise(x, now)
        eps = noise_of(process, x0, x, now)
        ahead = process.alpha(then) * x0 + process.sigma(then) * eps
        if then > 0:
            x0_ahead = denoise(ahead, then)
            eps_ahead = noise_of(process, x0_ahead, ahead, then)
            rise = process.alpha(then) - process.alpha(now)
            fall = process.sigma(then) - process.sigma(now)
            x = x + rise / 2 * (x0 + x0_ahead) + fall / 2 * (eps + eps_ahead)
        else:
            x = ahead
        yield x


SOLVERS = {"ddim": ddim, "heun": heun}
