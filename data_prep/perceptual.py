"""Hash a picture so that near-duplicates differ in few bits: the classical 64-bit DCT hash."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_SIDE_PX = 32
_LOW = 8


def phash(rgb_HWC: NDArray[np.uint8]) -> int:
    """Hash a picture by the signs of its lowest spatial frequencies.

    The picture is made grey, shrunk to 32 x 32 by averaging and transformed by a DCT-II; each of
    the 8 x 8 lowest frequencies gives one bit: whether it is above their median, in which the mean
    brightness takes no part. Two versions of one picture (resized, recompressed) differ in few
    bits, two unrelated pictures in 32 on average.

    Source: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010,
    section 3.2.1, in the 32 x 32 form of the Python package ImageHash.

    Args:
        rgb_HWC: A picture of any size.

    Returns:
        64 bits, the frequencies row by row, the mean brightness in the highest bit.
    """
    return phash_of_grey(cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY))


def phash_of_grey(grey_HW: NDArray[Any]) -> int:
    """Hash a picture of which the grey values (uint8) are known already; see `phash`."""
    while min(grey_HW.shape) >= 4 * _SIDE_PX:  # halving is the one area average that is fast
        grey_HW = cv2.resize(grey_HW, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    small_HW = cv2.resize(grey_HW, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small_HW.astype(np.float32))[:_LOW, :_LOW].ravel()
    # The 32nd of 63 values is their median.
    median = np.partition(low[1:], low.size // 2 - 1)[low.size // 2 - 1]
    return int.from_bytes(np.packbits(low > median).tobytes(), "big")
