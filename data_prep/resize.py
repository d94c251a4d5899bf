"""Resize pictures to the sizes that img2dataset gives them, in its five modes."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.config import ResizeMode

Pixels = NDArray[np.uint8]

_BY_SHORTER_SIDE = ("keep_ratio", "center_crop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """How pictures get their stored size."""

    mode: ResizeMode
    """As img2dataset names them."""
    side_px: int
    """Of the shorter side (keep_ratio, center_crop) or the longer one (others)."""
    only_if_bigger: bool
    """Leave pictures as they are of which that side is not longer."""

    def scale(self, width: int, height: int) -> float:
        """Give the factor from the original to the stored size; 1 leaves a picture alone."""
        return 1.0 if self._spares(width, height) else self.side_px / self._side(width, height)

    def _side(self, width: int, height: int) -> int:
        return (min if self.mode in _BY_SHORTER_SIDE else max)(width, height)

    def _spares(self, width: int, height: int) -> bool:
        small = self._side(width, height) <= self.side_px
        return self.mode == "no" or (self.only_if_bigger and small)

    def scaled(self, bgr_HWC: Pixels, width: int, height: int) -> Pixels:
        """Scale a picture, by averaging or by Lanczos interpolation.

        Args:
            bgr_HWC: Its pixels, perhaps reduced while they were decoded.
            width: Of the original.
            height: Of the original.
        """
        scale = self.scale(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if size == (bgr_HWC.shape[1], bgr_HWC.shape[0]):
            return bgr_HWC
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4
        scaled: Pixels = cv2.resize(bgr_HWC, size, interpolation=how)
        return scaled

    def framed(
        self, bgr_HWC: Pixels, width: int, height: int, background: tuple[int, int, int]
    ) -> Pixels:
        """Crop (center_crop) or pad (border) a scaled picture to a square; others stay.

        Args:
            bgr_HWC: The scaled picture.
            width: Of the original.
            height: Of the original.
            background: Colour of the border, as BGR.
        """
        if self._spares(width, height):
            return bgr_HWC
        side, (high, wide) = self.side_px, bgr_HWC.shape[:2]
        top, left = abs(high - side) // 2, abs(wide - side) // 2
        if self.mode == "center_crop":
            return np.ascontiguousarray(bgr_HWC[top : top + side, left : left + side])
        if self.mode == "border":
            edges = top, side - high - top, left, side - wide - left
            padded: Pixels = cv2.copyMakeBorder(
                bgr_HWC, *edges, cv2.BORDER_CONSTANT, value=background
            )
            return padded
        return bgr_HWC
