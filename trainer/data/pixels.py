"""Decode a picture that Pillow opened to upright 8-bit pixels, by OpenCV where it is as correct."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bgr = NDArray[Any]
"""(H, W, 3), uint8."""

_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_ORIENTATION = 0x0112
_FLIPS = {2: 1, 4: 0}
_TURNS = {
    3: cv2.ROTATE_180,
    6: cv2.ROTATE_90_CLOCKWISE,
    7: cv2.ROTATE_180,
    8: cv2.ROTATE_90_COUNTERCLOCKWISE,
}
# What OpenCV decodes several times faster than Pillow, and as correctly: (format, mode) -> flag.
_OPENCV: dict[tuple[str, str], int] = {
    **{("jpeg", mode): cv2.IMREAD_COLOR for mode in ("L", "RGB")},
    **{("png", mode): cv2.IMREAD_COLOR for mode in ("1", "L", "P", "RGB", "I;16")},
    **{("webp", mode): cv2.IMREAD_COLOR for mode in ("RGB", "RGBX")},
    ("png", "RGBA"): cv2.IMREAD_UNCHANGED,
    ("webp", "RGBA"): cv2.IMREAD_UNCHANGED,
}


class Undecodable(ValueError):
    """The pixels cannot be decoded, or not in full."""

    def __init__(self, detail: str, *, truncated: bool = False) -> None:
        super().__init__(detail)
        self.truncated = truncated
        """Whether the decoder says that the end is missing."""


def is_reducible(kind: str, opened: Image.Image) -> bool:
    """Whether `decode_pixels` can reduce the picture while it decodes it."""
    return kind == "jpeg" and (kind, opened.mode) in _OPENCV


def decode_pixels(
    body: bytes,
    kind: str,
    opened: Image.Image,
    background_bgr: tuple[int, int, int],
    *,
    reduction: int = 1,
) -> Bgr:
    """Decode a picture once: as it is stored, 8 bits per colour, transparency laid on a background.

    Args:
        body: The file.
        kind: Its format by `structure.format_of`.
        opened: The same by Pillow, which has read no pixel yet.
        background_bgr: Colour behind transparent pixels.
        reduction: 1, 2, 4 or 8: by what the sides are divided, rounded up; for what
            `is_reducible`.

    Raises:
        Undecodable: It cannot be decoded, or not in full.
    """
    flag = _OPENCV.get((kind, opened.mode))
    if kind == "png" and "transparency" in opened.info:
        flag = None  # OpenCV would drop it
    if reduction > 1:
        flag = _REDUCED[reduction]
    found = _with_pillow(opened) if flag is None else _with_opencv(body, flag)
    if found.dtype == np.uint16:
        found = (found >> 8).astype(np.uint8)
    width, height = (-(-side // reduction) for side in opened.size)
    if found.shape[:2] != (height, width):
        raise Undecodable(f"decoded to {found.shape[1]}x{found.shape[0]} px")
    return _composited(found, background_bgr) if found.shape[2] == 4 else found


def read_orientation(opened: Image.Image) -> int:
    """Read the EXIF orientation; 1 if there is none, or the EXIF block is broken."""
    block = opened.info.get("exif")
    if not block:
        return 1
    exif = Image.Exif()
    try:
        exif.load(block)
        found = exif.get(_ORIENTATION, 1)
    except Exception:  # broken metadata is no broken picture
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def upright(pixels: Bgr, orientation: int) -> Bgr:
    """Turn and mirror a picture as its EXIF orientation asks."""
    if orientation in {5, 7}:
        pixels = cv2.transpose(pixels)
    if orientation in _FLIPS:
        pixels = cv2.flip(pixels, _FLIPS[orientation])
    if orientation in _TURNS:
        pixels = cv2.rotate(pixels, _TURNS[orientation])
    return pixels


def _with_opencv(body: bytes, flag: int) -> NDArray[Any]:
    if flag != cv2.IMREAD_UNCHANGED:  # which ignores the orientation by itself
        flag |= cv2.IMREAD_IGNORE_ORIENTATION
    found: NDArray[Any] | None = cv2.imdecode(np.frombuffer(body, np.uint8), flag)
    if found is None:
        raise Undecodable("OpenCV cannot decode it")
    return found


def _with_pillow(opened: Image.Image) -> NDArray[Any]:
    """Decode what OpenCV does not know, or gets wrong: CMYK, palettes with transparency, GIF..."""
    try:
        opened.load()
    except OSError as error:
        truncated = "truncated" in str(error)
        raise Undecodable(f"{opened.format}: {error}", truncated=truncated) from error
    if opened.mode.startswith("I;16"):
        values_HW = np.asarray(opened)
        pixels = np.repeat((values_HW >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if "transparency" not in opened.info:
            return pixels
        alpha_HW = np.where(values_HW == opened.info["transparency"], 0, 255).astype(np.uint8)
        return np.dstack([pixels, alpha_HW])
    if opened.mode in {"I", "F"}:
        raise Undecodable(f"values of mode {opened.mode} have no known range")
    if opened.has_transparency_data:
        return np.asarray(opened.convert("RGBA"))[..., [2, 1, 0, 3]]
    return np.ascontiguousarray(np.asarray(opened.convert("RGB"))[..., ::-1])


def _composited(bgra_HWC: NDArray[np.uint8], background_bgr: tuple[int, int, int]) -> Bgr:
    """Lay a picture on a colour, rounded to the nearest value."""
    alpha_HW1 = bgra_HWC[..., 3:].astype(np.uint16)
    behind = np.array(background_bgr, np.uint16) * (255 - alpha_HW1)
    return ((bgra_HWC[..., :3] * alpha_HW1 + behind + 127) // 255).astype(np.uint8)
