"""Fold the latents' normalisation into an autoencoder, so that it makes and takes normalised ones.

Letters: ``C`` latent channels.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


@torch.no_grad()
def fold_normalisation(net: Any, mean_C: Tensor, std_C: Tensor) -> Any:  # noqa: ANN401 - untyped
    """Return an AutoencoderKL whose latents are ``(latents - mean) / std`` of the given one's.

    Latents leave and enter by 1x1 convolutions, affine maps without padding, so the change is
    exact: ``mean' = (mean - mu) / std`` and ``logvar' = logvar - 2 ln(std)`` on the way out, and
    ``latents = latents' std + mu`` on the way in. An autoencoder without these convolutions gets
    them, as identities. Only the clamp of log-variances to [-30, 20], which diffusers does
    behind them, stays where it is.

    Args:
        net: A diffusers AutoencoderKL; not changed.
        mean_C: Means of its latents.
        std_C: Their standard deviations.
    """
    own = {name: value for name, value in net.config.items() if not name.startswith("_")}
    own |= {"use_quant_conv": True, "use_post_quant_conv": True}
    own |= {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}
    folded: Any = AutoencoderKL.from_config(own)
    for conv in (folded.quant_conv, folded.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    folded.load_state_dict(net.state_dict(), strict=False)
    mean_C, std_C = mean_C.double().cpu(), std_C.double().cpu()
    weight, bias = _affine(folded.quant_conv)
    scale = torch.cat([1 / std_C, torch.ones_like(std_C)])
    shift = torch.cat([-mean_C / std_C, -2 * std_C.log()])
    _set_affine(folded.quant_conv, scale[:, None] * weight, scale * bias + shift)
    weight, bias = _affine(folded.post_quant_conv)
    _set_affine(folded.post_quant_conv, weight * std_C, bias + weight @ mean_C)
    return folded.eval().requires_grad_(False)


def _affine(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert conv.bias is not None
    return conv.weight[:, :, 0, 0].double(), conv.bias.double()


def _set_affine(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    assert conv.bias is not None
    conv.weight[:, :, 0, 0].copy_(weight)
    conv.bias.copy_(bias)
