"""Refuse model sections whose numbers contradict each other, without torch."""

from trainer.config import TransformerConfig, UNetConfig
from trainer.errors import BadInput


def check_section(cfg: UNetConfig | TransformerConfig) -> None:
    """Check a denoiser's section.

    Raises:
        BadInput: Its numbers contradict each other.
    """
    if isinstance(cfg, UNetConfig):
        _check_unet(cfg)
    else:
        _check_transformer(cfg)


def _check_unet(cfg: UNetConfig) -> None:
    levels = len(cfg.block_channels)
    for key, values in (
        ("cross_attention", cfg.cross_attention),
        ("head_width", cfg.head_width),
    ):
        if len(values) != levels:
            raise BadInput(
                f"model.{key} has {len(values)} values for {levels} model.block_channels. "
                f"Give one per level."
            )
    for channels, width in zip(cfg.block_channels, cfg.head_width, strict=True):
        if channels % width or channels % cfg.norm_groups:
            raise BadInput(
                f"model.block_channels has {channels}, which model.head_width={width} and "
                f"model.norm_groups={cfg.norm_groups} must divide. "
                f"Try head_width={channels} and norm_groups=1, or a rounder width."
            )
    if cfg.latent_side % 2 ** (levels - 1):
        raise BadInput(
            f"model.latent_side={cfg.latent_side} cannot be halved {levels - 1} times, once per "
            f"level but the last. Try {2 ** (levels - 1)} or fewer model.block_channels."
        )


def _check_transformer(cfg: TransformerConfig) -> None:
    if cfg.latent_side % cfg.patch_side:
        raise BadInput(
            f"model.latent_side={cfg.latent_side} is no multiple of "
            f"model.patch_side={cfg.patch_side}. Try model.patch_side=1."
        )
