"""Moving averages of the fp32 weights, on this rank's fragments: no collective, no gather."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from trainer.config_engine import EmaConfig
from trainer.runtime.fragments import FragmentReader

POWER = "power_"
Decay = Callable[[float, float], float]
"""(images of a step, images seen with it) -> the average's share of itself."""


class Ema:
    """Averages each fragment where it lives; 4 bytes x parameters / ranks for each average."""

    def __init__(self, fragments: FragmentReader, decays: Mapping[str, Decay]) -> None:
        """Start every average from the current weights."""
        self._decays = dict(decays)
        self._live = [fragment.weight for fragment in fragments]
        self._averages = {
            name: [weight.detach().float().clone() for weight in self._live] for name in decays
        }

    def update(self, *, images_per_step: int, images_seen: int) -> None:
        """Move the averages towards the weights after one optimizer step.

        Args:
            images_per_step: Images in that step.
            images_seen: Images since the start of training, that step included.
        """
        for name, decay in self._decays.items():
            share = 1.0 - decay(images_per_step, images_seen)
            torch._foreach_lerp_(self._averages[name], self._live, share)

    def tensors(self) -> Mapping[str, list[Tensor]]:
        """The averages, fp32, one tensor per fragment in the fragments' order; no copies."""
        return self._averages


def decays(cfg: EmaConfig) -> dict[str, Decay]:
    """Name the averages of a config; the first is the one that pictures are drawn with."""
    half_lives = {
        f"half_life_{images:g}": half_life(images, cfg.warmup_ratio)
        for images in cfg.half_life_images
    }
    return half_lives | {f"{POWER}{width:g}": power(width) for width in cfg.power_sigma_rel}


def half_life(images: float, warmup_ratio: float) -> Decay:
    """Halve a weight's share every so many images, but early on every share of the images seen."""

    def decay(images_per_step: float, images_seen: float) -> float:
        return float(0.5 ** (images_per_step / min(images, max(images_seen * warmup_ratio, 1e-8))))

    return decay


def power(sigma_rel: float) -> Decay:
    """Weigh the past by t^gamma (Karras et al. 2024, equation 2): its width grows with training."""
    exponent = gamma_of(sigma_rel) + 1

    def decay(images_per_step: float, images_seen: float) -> float:
        return float((1 - images_per_step / images_seen) ** exponent)

    return decay


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent whose profile has a relative width (Karras et al. 2024, appendix C).

    The width is sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), below 0.2887 for gamma > 0.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
