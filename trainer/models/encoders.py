"""The frozen encoders of a run, and the fp16 numbers that they make of pictures and captions.

Letters: ``B`` pictures or captions, ``C`` latent channels, ``H W`` rows and columns, ``L`` tokens,
``D`` width of a state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import EncodersConfig
from trainer.errors import BadInput
from trainer.models.autoencoders import Autoencoder, Statistics, load_autoencoder
from trainer.models.text_encoders import TextEncoder, load_text_encoder

MAX_FLOAT16 = 65504.0
_QUOTED_CHARS = 80


@dataclass(frozen=True, slots=True)
class FrozenEncoders:
    """Both encoders, on one device."""

    autoencoder: Autoencoder
    text: TextEncoder


def load_frozen_encoders(cfg: EncodersConfig, device: torch.device) -> FrozenEncoders:
    """Load both encoders in float32, frozen.

    Raises:
        BadInput: There are no such models, or they do not fit the configuration.
        BadWorld: The model hub did not give them.
    """
    autoencoder = load_autoencoder(cfg.autoencoder).to(device)
    need = autoencoder.downscale
    if cfg.buckets is not None and cfg.buckets.step_px % need:
        raise BadInput(
            f"encoders.buckets.step_px={cfg.buckets.step_px} is no multiple of {need}, the pixels "
            f"per row of a latent. Try {math.ceil(cfg.buckets.step_px / need) * need}."
        )
    if cfg.image_side_px % need:
        fitting = max(need, cfg.image_side_px // need * need)
        raise BadInput(
            f"encoders.image_side_px={cfg.image_side_px} is no multiple of {need}, the "
            f"pixels per row of a latent. Try {fitting}."
        )
    return FrozenEncoders(autoencoder, load_text_encoder(cfg.text).to(device))


def picture_moments(autoencoder: Autoencoder, pictures_BHWC: Tensor) -> Tensor:
    """Encode pictures of one size; values too large for fp16 are clamped.

    Args:
        autoencoder: The first stage.
        pictures_BHWC: uint8 RGB on its device.

    Returns:
        ``(B, 2, C, H, W)`` float16 means and log-variances.
    """
    pictures_BCHW = pictures_BHWC.permute(0, 3, 1, 2)
    moments = autoencoder.moments(pictures_BCHW.float() / 127.5 - 1.0)
    return _to_half(torch.stack(moments, dim=1))


def caption_states(text: TextEncoder, ids_BL: Tensor) -> Tensor:
    """Encode captions of equal length: ``(B, L, D)`` float16; too large values are clamped."""
    return _to_half(text.states(ids_BL))


def statistics_of(
    num_values: int, first_C: Sequence[float], second_C: Sequence[float]
) -> Statistics:
    """Give mean and standard deviation of latents drawn from their posteriors.

    Args:
        num_values: Latent numbers per channel.
        first_C: Sums of the means.
        second_C: Sums of mean^2 + variance, the expected square of a drawn latent.
    """
    means, stds = [], []
    for first, second in zip(first_C, second_C, strict=True):
        mean, square = first / num_values, second / num_values
        means.append(mean)
        # A dead channel has no spread; 1 leaves it as it is.
        stds.append(math.sqrt(max(square - mean**2, 0.0)) or 1.0)
    return Statistics(means, stds)


def not_finite_latents(name: str) -> BadInput:
    """Say that the latents of a picture are not finite."""
    return BadInput(
        f"the autoencoder gives latents that are not finite for {name}. Check its weights "
        "(encoders.autoencoder.path) and encoders.image_side_px."
    )


def not_finite_states(caption: str) -> BadInput:
    """Say that the states of a caption are not finite."""
    return BadInput(
        "the text encoder gives states that are not finite for the caption "
        f"{caption[:_QUOTED_CHARS]!r}. Check its weights (encoders.text.path)."
    )


def _to_half(values: Tensor) -> Tensor:
    # Clamping leaves NaN as it is, and would hide infinity.
    fitting = values.clamp(-MAX_FLOAT16, MAX_FLOAT16).where(values.isfinite(), torch.nan)
    return fitting.half()
