"""Text-conditioned denoisers: diffusers networks behind one forward.

Letters: ``B`` samples, ``C`` latent channels, ``H W`` latent rows and columns, ``L`` text tokens,
``D`` width of a text state.
"""

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from trainer.config import TransformerConfig, UNetConfig
from trainer.models.networks import pooling_heads
from trainer.models.sections import check_section


class Denoiser(nn.Module):
    """A diffusers network; `inner` is what export saves."""

    def __init__(self, inner: nn.Module, *, num_tokens: int = 0) -> None:
        """Wrap `inner`; captions are padded to `num_tokens`, or not at all.

        A network that pools captions needs a fixed length: its pooling knows no mask, and a
        sample must not depend on how long the other captions of its batch are.
        """
        super().__init__()
        self.inner = inner
        self._num_tokens = num_tokens

    def forward(
        self, latents_BCHW: Tensor, time_B: Tensor, text_BLD: Tensor, text_mask_BL: Tensor
    ) -> Tensor:
        """Predict what the process asks for.

        Args:
            latents_BCHW: Noisy latents, normalised.
            time_B: ``process.network_time``, in [0, 1000].
            text_BLD: Text states.
            text_mask_BL: bool, true on real tokens; each caption has at least one.

        Returns:
            ``(B, C, H, W)`` fp32, whatever the precision of the weights.
        """
        missing = max(0, self._num_tokens - text_BLD.shape[1])
        text_BLD = nn.functional.pad(text_BLD * text_mask_BL[:, :, None], (0, 0, 0, missing))
        text_mask_BL = nn.functional.pad(text_mask_BL, (0, missing))
        dtype = next(self.inner.parameters()).dtype
        predicted: Tensor = self.inner(
            latents_BCHW.to(dtype),
            timestep=time_B,  # bf16 would not tell 999 from 1000
            encoder_hidden_states=text_BLD.to(dtype),
            encoder_attention_mask=text_mask_BL,
            **self._extras(),
        ).sample
        return predicted.float()

    def recompute_activations(self) -> None:
        """Trade compute for memory in the backward pass."""
        inner: Any = self.inner
        inner.enable_gradient_checkpointing()

    def _extras(self) -> dict[str, Any]:
        if isinstance(self.inner, PixArtTransformer2DModel):
            return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return {}


def build_denoiser(cfg: UNetConfig | TransformerConfig, *, seed: int = 0) -> Denoiser:
    """Make a freshly initialised denoiser; equal seeds give equal weights.

    The output layer starts at zero: an untrained network predicts nothing rather than noise.

    Raises:
        BadInput: The numbers of the model section contradict each other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = denoiser_class(cfg)(**diffusers_options(cfg))
    last = inner.conv_out if isinstance(cfg, UNetConfig) else inner.proj_out
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    num_tokens = cfg.pooled_tokens if isinstance(cfg, UNetConfig) else 0
    return Denoiser(inner, num_tokens=num_tokens)


def denoiser_class(cfg: UNetConfig | TransformerConfig) -> Any:  # noqa: ANN401 - untyped
    """Return the diffusers class that a model section means."""
    return UNet2DConditionModel if isinstance(cfg, UNetConfig) else PixArtTransformer2DModel


def diffusers_options(cfg: UNetConfig | TransformerConfig) -> dict[str, Any]:
    """Return the arguments of that class.

    Raises:
        BadInput: The numbers of the model section contradict each other.
    """
    check_section(cfg)
    return _unet(cfg) if isinstance(cfg, UNetConfig) else _transformer(cfg)


def _unet(cfg: UNetConfig) -> dict[str, Any]:
    levels = len(cfg.block_channels)
    return {
        "sample_size": cfg.latent_side,
        "in_channels": cfg.latent_channels,
        "out_channels": cfg.latent_channels,
        "block_out_channels": cfg.block_channels,
        "layers_per_block": cfg.layers_per_block,
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in cfg.cross_attention
        ),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if attends else "UpBlock2D"
            for attends in reversed(cfg.cross_attention)
        ),
        # diffusers takes the number of heads under this name (its issue 2011).
        "attention_head_dim": tuple(
            cfg.block_channels[level] // cfg.head_width[level] for level in range(levels)
        ),
        "cross_attention_dim": cfg.text_width,
        "norm_num_groups": cfg.norm_groups,
        "use_linear_projection": cfg.linear_projection,
        "resnet_time_scale_shift": "scale_shift" if cfg.time_scale_shift else "default",
        "addition_embed_type": "text" if cfg.pooled_tokens else None,
        "addition_embed_type_num_heads": pooling_heads(cfg),
    }


def _transformer(cfg: TransformerConfig) -> dict[str, Any]:
    width = cfg.num_heads * cfg.head_width
    return {
        "num_attention_heads": cfg.num_heads,
        "attention_head_dim": cfg.head_width,
        "in_channels": cfg.latent_channels,
        "out_channels": cfg.latent_channels,
        "num_layers": cfg.num_layers,
        "cross_attention_dim": width,
        "caption_channels": cfg.text_width,
        "sample_size": cfg.latent_side,
        "patch_size": cfg.patch_side,
        "use_additional_conditions": False,
    }
