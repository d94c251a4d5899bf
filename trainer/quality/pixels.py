"""Resize and normalise pictures for a network, in batches and on any device."""

import torch
from torch import Tensor

Colour = tuple[float, float, float]


def resized(pictures_BCHW: Tensor, size_px: tuple[int, int]) -> Tensor:
    """Resize ``(B, 3, H, W)`` pictures, 0 to 1, to (rows, columns): bicubic, antialiased.

    It is Pillow's filter, without its rounding and clipping between rows and columns.
    """
    found = torch.nn.functional.interpolate(
        pictures_BCHW, size_px, mode="bicubic", align_corners=False, antialias=True
    )
    return found.clamp(0, 1)


def normalised(pictures_BCHW: Tensor, mean: Colour, std: Colour) -> Tensor:
    """Subtract the mean of each colour and divide by its standard deviation."""
    mean_C11, std_C11 = pictures_BCHW.new_tensor([mean, std])[..., None, None]
    found: Tensor = (pictures_BCHW - mean_C11) / std_C11
    return found
