"""Pictures from bytes: decoded, resized and cut to a box."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.errors import BadData


def decode_square(content: bytes, side_px: int, *, name: str) -> NDArray[np.uint8]:
    """Decode a picture, resize its shorter side and crop the centre.

    Args:
        content: JPEG, PNG or WebP.
        side_px: Side of the result.
        name: Named in the error.

    Returns:
        ``(side_px, side_px, 3)`` RGB.

    Raises:
        BadInput: The bytes are no picture.
    """
    return cover(decode_bgr(content, name=name), side_px, side_px).rgb_HWC


def decode_bgr(content: bytes, *, name: str) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP to ``(H, W, 3)`` BGR; `name` is for the error."""
    bgr: NDArray[np.uint8] | None = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        raise BadData(f"{name} does not decode as a picture; `kiln verify` re-hashes its tar.")
    return bgr


class Covered(NamedTuple):
    """A picture that was resized to cover a box, and cut to it."""

    rgb_HWC: NDArray[np.uint8]
    top: int
    """First row of the crop in the resized picture."""
    left: int
    """First column."""


def cover(bgr_HWC: NDArray[np.uint8], width_px: int, height_px: int) -> Covered:
    """Resize a picture until it just covers a box, and crop the centre."""
    height, width = bgr_HWC.shape[:2]
    scale = max(width_px / width, height_px / height)
    if scale != 1:
        size = (max(width_px, round(width * scale)), max(height_px, round(height * scale)))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        bgr_HWC = cv2.resize(bgr_HWC, size, interpolation=how)
    top, left = (bgr_HWC.shape[0] - height_px) // 2, (bgr_HWC.shape[1] - width_px) // 2
    crop = bgr_HWC[top : top + height_px, left : left + width_px, ::-1]
    return Covered(np.ascontiguousarray(crop).astype(np.uint8, copy=False), top, left)
