"""Exact log-likelihood by the instantaneous change of variables, for small models.

Chen et al. 2018 (neural ODEs), Song et al. 2021, section 4.3. Nats.
"""

import math

import torch
from torch import Tensor

from trainer.diffusion.ode import integrate
from trainer.diffusion.process import Process, prior_std, probability_flow
from trainer.diffusion.solvers import Denoise


def log_likelihood(
    process: Process,
    denoise: Denoise,
    x: Tensor,
    *,
    probes: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """Return ``(B,)`` log-densities in nats under the model's probability-flow ODE.

    They are of x as data at the process's least time, whose noise is the model's resolution, and
    with a normal prior of the process's final spread for data of unit variance.

    Args:
        process: The path.
        denoise: ``(x, t) -> x0``, differentiable; t has one time per sample, shaped like x.
        x: ``(B, ...)``; float64 for tight tolerances.
        probes: ``(K, B, ...)`` of zero mean and unit variance for Hutchinson's estimate of the
            divergence, passed in; None computes it exactly, at one backward pass per dimension.
        rtol: As in `trainer.diffusion.ode.integrate`, over x and the log-density together.
        atol: The same.
    """
    num_dims = x[0].numel()

    def rate(state: Tensor, t: Tensor) -> Tensor:
        place = state[:, :-1].reshape(x.shape)
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        with torch.enable_grad():
            leaf = place.detach().requires_grad_()
            flow = probability_flow(process, denoise(leaf, t), leaf, t)
            divergence_B = _divergence(flow, leaf, probes)
        return torch.cat([flow.detach().flatten(1), divergence_B[:, None]], dim=1)

    start = torch.full((), process.min_time, dtype=torch.float64, device=x.device)
    state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    *_, state = integrate(rate, state, start, torch.ones_like(start), rtol=rtol, atol=atol)
    std = prior_std(process)
    end, gained_B = state[:, :-1], state[:, -1]
    log_prior_B = -0.5 * (end / std).square().sum(1) - num_dims * math.log(
        std * math.sqrt(2 * math.pi)
    )
    return log_prior_B + gained_B


def _divergence(flow: Tensor, leaf: Tensor, probes: Tensor | None) -> Tensor:
    """Return ``(B,)``: the trace of d flow / d leaf, or its estimate."""
    total = leaf.new_zeros(len(leaf))
    if probes is not None:
        for probe in probes:
            (back,) = torch.autograd.grad(flow, leaf, probe, retain_graph=True)
            total = total + (back * probe).flatten(1).sum(1)
        return total / len(probes)
    for dim in range(leaf[0].numel()):
        (back,) = torch.autograd.grad(flow.flatten(1)[:, dim].sum(), leaf, retain_graph=True)
        total = total + back.flatten(1)[:, dim]
    return total
