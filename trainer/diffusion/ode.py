"""Integrate ordinary differential equations adaptively, each sample with its own steps."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Rate = Callable[[Tensor, Tensor], Tensor]

# Dormand & Prince 1980, table 2: nodes, stages, and the difference of the two solutions.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SAFETY, _MIN_GROWTH, _MAX_GROWTH = 0.9, 0.2, 5.0
_FIRST_STEP_FRAC, _LEAST_STEP_FRAC = 0.01, 1e-6


def integrate(
    rate: Rate, x: Tensor, start: Tensor, end: Tensor, *, rtol: float, atol: float
) -> Iterator[Tensor]:
    """Yield x after every round of steps from `start` to `end`, which may lie on either side.

    Args:
        rate: ``(x, t)`` to dx/dt, with t of shape ``(B, 1, ...)``, float64. Every round asks for
            all samples; one that has arrived is asked at the end and stays.
        x: ``(B, ...)``.
        start: 0-dim.
        end: 0-dim.
        rtol: Tolerated root mean square error of a step, relative to x.
        atol: The same, where x is small. A step of a millionth of the way is taken at any error,
            and so is one whose error is not a number: what is not finite is left to the caller.
    """
    rows = (len(x), *[1] * (x.ndim - 1))
    span = (end - start).double().to(x.device)
    t = start.double().to(x.device).expand(rows).clone()
    size = torch.full_like(t, _FIRST_STEP_FRAC) * span
    slope = rate(x, t)
    while True:
        left = end - t
        if not (left.abs() > 0).any():
            return
        size = torch.where(size.abs() >= left.abs(), left, size)
        ahead, slopes = _stages(rate, x, t, size, slope)
        error = _relative_error(x, ahead, size, slopes, rtol=rtol, atol=atol).reshape(rows)
        taken = ~(error > 1) | (size.abs() <= _LEAST_STEP_FRAC * span.abs())
        at_end = size == left
        x = torch.where(taken, ahead, x)
        slope = torch.where(taken, slopes[-1], slope)
        t = torch.where(taken, torch.where(at_end, end.to(t), t + size), t)
        growth = _SAFETY * error.clamp(min=1e-10) ** -0.2
        size = size * growth.clamp(_MIN_GROWTH, _MAX_GROWTH).nan_to_num(1.0)
        size = torch.where(
            size.abs() < _LEAST_STEP_FRAC * span.abs(), _LEAST_STEP_FRAC * span, size
        )
        yield x


def _stages(
    rate: Rate, x: Tensor, t: Tensor, size: Tensor, slope: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return x a step ahead and the slopes at the seven nodes, the last one at the step's end."""
    slopes, ahead = [slope], x
    for node, weights in zip(_NODES, _STAGES, strict=True):
        change = sum(w * k for w, k in zip(weights, slopes, strict=True) if w)
        ahead = x + (size.to(x) * change)
        slopes.append(rate(ahead, t + node * size))
    return ahead, slopes


def _relative_error(
    x: Tensor, ahead: Tensor, size: Tensor, slopes: list[Tensor], *, rtol: float, atol: float
) -> Tensor:
    """Return ``(B,)`` float64: root mean square error over what is tolerated."""
    off = sum(w * k for w, k in zip(_ERROR, slopes, strict=True) if w)
    scale = atol + rtol * torch.maximum(x.abs(), ahead.abs())
    return ((size.to(x) * off) / scale).double().square().flatten(1).mean(1).sqrt()
