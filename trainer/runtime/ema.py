"""Exponential moving average of the fp32 weights, on this rank's fragments: no collective."""

import torch
from torch import Tensor

from trainer.runtime.fragments import FragmentReader


class Ema:
    """Averages each fragment where it lives; 4 bytes x parameters / ranks of memory."""

    def __init__(
        self, fragments: FragmentReader, *, half_life_images: float, warmup_ratio: float
    ) -> None:
        """Start from the current weights.

        Args:
            fragments: The engine's fragments.
            half_life_images: Images after which a weight's share has halved.
            warmup_ratio: Early on, the half life is at most this share of the images seen.
        """
        self._half_life_images, self._warmup_ratio = half_life_images, warmup_ratio
        self._live = [fragment.weight for fragment in fragments]
        self._average = [weight.detach().float().clone() for weight in self._live]

    def update(self, *, images_per_step: int, images_seen: int) -> None:
        """Move the average towards the weights after one optimizer step.

        Args:
            images_per_step: Images in that step.
            images_seen: Images since the start of training, that step included.
        """
        half_life = min(self._half_life_images, max(images_seen * self._warmup_ratio, 1e-8))
        decay = 0.5 ** (images_per_step / half_life)
        torch._foreach_lerp_(self._average, self._live, 1.0 - decay)

    def tensors(self) -> list[Tensor]:
        """The averages, fp32, one per fragment and in the fragments' order; views, not copies."""
        return self._average
