"""Kiln's trainer: streams published latents into a ZeRO diffusion trainer and accounts for it."""

__version__ = "0.1.0"
