"""How much an ensemble of samples disagrees per number: of seeds, or of weight averages."""

from collections.abc import Iterable

import torch
from torch import Tensor


def mean_and_variance(ensemble: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased variance over tensors of one shape, kept in float64.

    One member at a time (Welford 1962), so that an ensemble needs the memory of three samples.

    Raises:
        ValueError: Fewer than two members.
    """
    count, mean, total = 0, torch.zeros(()), torch.zeros(())
    for member in ensemble:
        count += 1
        off = member.double() - mean
        mean = mean + off / count
        total = total + off * (member.double() - mean)
    if count < 2:
        raise ValueError(f"an ensemble of {count} has no variance. Give at least 2 members.")
    return mean, total / (count - 1)
