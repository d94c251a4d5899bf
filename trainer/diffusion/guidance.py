"""Steer a denoiser: classifier-free and classifier guidance, and known regions.

Everything here maps denoisers ``(x, t) -> x0`` to denoisers, so that it goes with any solver.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.diffusion.process import Process, scales
from trainer.diffusion.solvers import Denoise

Condition = tuple[Tensor, ...]
"""What a network is told of each sample; every tensor has ``B`` rows."""
Conditional = Callable[[Tensor, Tensor, Condition], Tensor]
LogProbability = Callable[[Tensor, Tensor], Tensor]


def combine(with_text: Tensor, without: Tensor, *, scale: float, rescale_frac: float) -> Tensor:
    """Extrapolate from the unconditional to the conditional estimate of x0.

    Args:
        with_text: ``(B, ...)`` x0 given the caption.
        without: x0 given the empty caption, or one of what is not wanted.
        scale: 1 is the conditional model itself; above 1 follows the caption more closely (Ho &
            Salimans 2022).
        rescale_frac: Share by which each sample's standard deviation is brought back to the
            conditional estimate's (Lin et al. 2024, section 3.4).
    """
    guided = without + scale * (with_text - without)
    if rescale_frac == 0:
        return guided
    rows = (-1, *[1] * (guided.ndim - 1))
    ratio = with_text.flatten(1).std(1) / guided.flatten(1).std(1).clamp(min=1e-12)
    return guided * (rescale_frac * ratio.reshape(rows) + (1 - rescale_frac))


def classifier_free(
    denoise: Conditional,
    condition: Condition,
    unwanted: Condition,
    *,
    scale: float,
    rescale_frac: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    split: bool = False,
) -> Denoise:
    """Return the guided denoiser.

    Args:
        denoise: Denoiser given a condition.
        condition: The captions.
        unwanted: Empty captions, or negative prompts; tensors of the same shapes.
        scale: See `combine`; 1 never asks with `unwanted`.
        rescale_frac: See `combine`.
        interval: Times (low, high] in which to guide (Kynkaanniemi et al. 2024); outside of it
            the conditional denoiser alone answers, at half the cost.
        split: Ask twice with B samples instead of once with 2 B, for half the memory.
    """
    low, high = interval
    both = tuple(torch.cat(pair) for pair in zip(condition, unwanted, strict=True))

    def estimates(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if split:
            return denoise(x, t, condition), denoise(x, t, unwanted)
        times = t if t.ndim == 0 else torch.cat([t, t])
        with_text, without = denoise(torch.cat([x, x]), times, both).chunk(2)
        return with_text, without

    def guided(x: Tensor, t: Tensor) -> Tensor:
        inside = (t > low) & (t <= high)
        if scale == 1 or not inside.any():
            return denoise(x, t, condition)
        with_text, without = estimates(x, t)
        x0 = combine(with_text, without, scale=scale, rescale_frac=rescale_frac)
        return torch.where(inside.to(x.device), x0, with_text)

    return guided


def classifier(
    process: Process, denoise: Denoise, log_probability: LogProbability, *, scale: float
) -> Denoise:
    """Return a denoiser of p(x | y) p(y | x)^(scale - 1) for a classifier's y.

    The score gains ``scale`` times the gradient of log p(y | x_t) (Dhariwal & Nichol 2021).

    Args:
        process: The path.
        denoise: Denoiser of the unconditional model.
        log_probability: ``(x_t, t)`` to ``(B,)`` log-probabilities of the wanted class.
        scale: 1 samples from p(x | y).
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_probability(leaf, t).sum(), leaf)
        alpha, sigma = scales(process, t, x)
        return denoise(x, t) + scale * sigma.square() / alpha * gradient

    return guided


def keep_known(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Return a denoiser that knows a part of x0: inpainting by replacement.

    A solver that begins with ``diffuse(known)`` where it is known keeps that part on the path
    from its own noise to `known`, which is what replacing it after every step does (Song et al.
    2021, appendix I.2), and ends with `known` itself.

    Args:
        denoise: Denoiser of the whole.
        known: ``(B, ...)`` x0.
        mask: 1 where x0 is to be found, 0 where it is known; broadcasts with it.
    """

    def partly(x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(known, denoise(x, t), mask)

    return partly
