"""Decode a dataset's pictures, resize and crop them, as fast as equal quality allows."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from trainer.data.pixels import (
    Bgr,
    Undecodable,
    decode_pixels,
    is_reducible,
    read_orientation,
    upright,
)
from trainer.data.structure import (
    MAX_JPEG_SCANS,
    essential_png,
    format_of,
    is_whole_webp,
    jpeg_scans,
    looks_like,
    plain_jpeg_size,
)
from trainer.errors import BadData

MAX_PIXELS = 2**26
"""Pictures that announce more are not decoded; 8192x8192 take 200 MB in each thread."""

_BEHIND_BGR = (255, 255, 255)
# A JPEG is reduced to the wanted side itself, or to this many times of it: resizing it by less
# makes it dull (decision 16).
_MARGIN = 1.25


class Covered(NamedTuple):
    """A picture that was resized to cover a box, and cut to it."""

    rgb_HWC: NDArray[np.uint8]
    top: int
    """First row of the crop in the resized picture."""
    left: int
    """First column."""


def decode_square(
    content: bytes,
    side_px: int,
    *,
    name: str,
    max_pixels: int = MAX_PIXELS,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Decode a picture for training: resize its shorter side and crop the centre.

    The same bytes give the same pixels in any thread. They are near those of `decode_bgr` and
    `cover`, but not equal: large JPEGs are reduced while they are decoded, and another filter
    resizes the rest. `kiln encode` does not use it.

    Args:
        content: JPEG, PNG or WebP of any colour mode.
        side_px: Side of the result.
        name: Named in the error.
        max_pixels: Refuse, unread, what has more.
        out: Where to write the result, ``(side_px, side_px, 3)`` uint8, contiguous; None: new.

    Returns:
        ``(side_px, side_px, 3)`` uint8 RGB, contiguous; `out` if it was given.

    Raises:
        BadData: The bytes are no whole picture, or one of too many pixels.
    """
    assert out is None or out.shape == (side_px, side_px, 3)
    assert out is None or (out.dtype == np.uint8 and out.flags.c_contiguous)
    bgr_HWC = _decode(content, name=name, max_pixels=max_pixels, side_px=side_px)
    height, width = bgr_HWC.shape[:2]
    shorter = min(height, width)
    top, left = (height - shorter) // 2, (width - shorter) // 2
    bgr_HWC = bgr_HWC[top : top + shorter, left : left + shorter]
    if shorter != side_px:
        bgr_HWC = _resized(bgr_HWC, side_px)
    rgb_HWC: NDArray[np.uint8] = cv2.cvtColor(bgr_HWC, cv2.COLOR_BGR2RGB, dst=out)
    return rgb_HWC


def decode_bgr(content: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP at its full size to upright ``(H, W, 3)`` BGR.

    Transparency is laid on white. Latents depend on these pixels: see decision 16 before a change.

    Args:
        content: The file.
        name: Named in the error.
        max_pixels: Refuse, unread, what has more.

    Raises:
        BadData: The bytes are no whole picture, or one of too many pixels.
    """
    return _decode(content, name=name, max_pixels=max_pixels)


def cover(bgr_HWC: NDArray[np.uint8], width_px: int, height_px: int) -> Covered:
    """Resize a picture until it just covers a box, and crop the centre.

    Latents depend on these pixels: see decision 16 before a change.
    """
    height, width = bgr_HWC.shape[:2]
    scale = max(width_px / width, height_px / height)
    if scale != 1:
        size = (max(width_px, round(width * scale)), max(height_px, round(height * scale)))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        bgr_HWC = cv2.resize(bgr_HWC, size, interpolation=how)
    top, left = (bgr_HWC.shape[0] - height_px) // 2, (bgr_HWC.shape[1] - width_px) // 2
    crop = bgr_HWC[top : top + height_px, left : left + width_px]
    return Covered(cv2.cvtColor(crop, cv2.COLOR_BGR2RGB), top, left)


def _resized(bgr_HWC: Bgr, side_px: int) -> Bgr:
    """Resize a square, by averaging if whole pixels become one, else by a better filter.

    PyTorch's antialiased cubic filter on bytes takes half the time of OpenCV's averaging of
    fractions of pixels.
    """
    if len(bgr_HWC) % side_px == 0:
        averaged: Bgr = cv2.resize(bgr_HWC, (side_px, side_px), interpolation=cv2.INTER_AREA)
        return averaged
    bgr_1CHW = torch.from_numpy(bgr_HWC).permute(2, 0, 1)[None]
    size = (side_px, side_px)
    found = torch.nn.functional.interpolate(bgr_1CHW, size, mode="bicubic", antialias=True)
    return found[0].permute(1, 2, 0).numpy()


def _decode(content: bytes, *, name: str, max_pixels: int, side_px: int | None = None) -> Bgr:
    """Decode a picture; JPEGs reduced as far as a square of `side_px` allows, None: not at all."""
    plain = plain_jpeg_size(content)  # most are, and Pillow would take 0.1 ms to say so
    if plain is None:
        with _named(name):
            kind, whole, opened = _opened(content)
    width, height = plain or opened.size
    if width * height > max_pixels:
        raise BadData(
            f"{name} announces {width}x{height} pixels, and at most {max_pixels} are decoded: take "
            "it out of the dataset with `kiln remove`."
        )
    with _named(name):
        reduction = _reduction(min(width, height), side_px)
        if plain is not None:
            return _jpeg(content, plain, reduction)
        if is_reducible(kind, opened):
            bgr_HWC = _jpeg(whole, opened.size, reduction)
        else:
            bgr_HWC = decode_pixels(whole, kind, opened, _BEHIND_BGR)
        return upright(bgr_HWC, read_orientation(opened))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the picture in whatever the decoders raise: broken files make them raise anything."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise BadData(
            f"{name} does not decode as a picture ({error}); `kiln verify` re-hashes its tar."
        ) from error


def _opened(content: bytes) -> tuple[str, bytes, Image.Image]:
    """Judge a picture by structure and header: give format, what to decode, and the header."""
    kind = format_of(content)
    if kind not in {"jpeg", "png", "webp"}:
        raise Undecodable(kind or looks_like(content))
    whole = essential_png(content) if kind == "png" else content
    if whole is None or (kind == "webp" and not is_whole_webp(whole)):
        raise Undecodable(f"{kind} of {len(content)} bytes has no end", truncated=True)
    opened = Image.open(io.BytesIO(whole), formats=[kind.upper()])
    if "progressive" in opened.info and jpeg_scans(whole) > MAX_JPEG_SCANS:
        raise Undecodable(f"more than {MAX_JPEG_SCANS} scans")
    return kind, whole, opened


def _reduction(shorter_px: int, side_px: int | None) -> int:
    """Give the number by which a JPEG's sides may be divided while it is decoded."""
    if side_px is None:
        return 1
    fits = (
        n for n in (8, 4, 2) if shorter_px == n * side_px or shorter_px >= _MARGIN * n * side_px
    )
    return next(fits, 1)


def _jpeg(content: bytes, size: tuple[int, int], reduction: int) -> Bgr:
    """Decode a JPEG by libjpeg-turbo, which says if data are missing."""
    width, height = (-(-side // reduction) for side in size)
    bgr_HWC: Bgr = simplejpeg.decode_jpeg(
        content, "BGR", min_width=width, min_height=height, min_factor=reduction
    )
    return bgr_HWC
