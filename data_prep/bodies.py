"""Judge a downloaded body before it is decoded: a picture, whole, and not too large."""

import io
import warnings
from collections.abc import Callable

from PIL import Image

from data_prep.quarantine import Reason

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_BARE_MARKERS = {0x01, *range(0xD0, 0xD8)}  # JPEG markers without a length
_START_OF_SCAN = 0xDA


def body_problem(body: bytes, *, max_pixels: int) -> tuple[Reason, str] | None:
    """Give the reason not to decode a body, or None.

    OpenCV fills the missing part of a cut picture with grey and says nothing, so the structure of
    the file decides. Only headers are read, except for rare formats, which are decoded once.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return _problem(body, max_pixels)
    except Image.DecompressionBombError as error:
        return Reason.TOO_LARGE, str(error)
    # Broken files make Pillow raise OSError, ValueError, SyntaxError, struct.error and more.
    except Exception as error:
        return Reason.NOT_AN_IMAGE, f"{_looks_like(body)} ({type(error).__name__})"


def _problem(body: bytes, max_pixels: int) -> tuple[Reason, str] | None:
    known = _known_format(body)
    if known is not None and not known[1](body):
        return Reason.TRUNCATED, f"{known[0]} of {len(body)} bytes has no end"
    with Image.open(io.BytesIO(body)) as picture:
        width, height = picture.size
        if width * height > max_pixels:
            return Reason.TOO_LARGE, f"{width}x{height} px"
        if known is None:
            try:
                picture.load()
            except OSError as error:
                return Reason.TRUNCATED, f"{picture.format}: {error}"
    return None


def _known_format(body: bytes) -> tuple[str, Callable[[bytes], bool]] | None:
    """Give the name of a common format, and what tells whether such a file is whole."""
    if body.startswith(_JPEG_START):
        return "JPEG", is_whole_jpeg
    if body.startswith(_PNG_START):
        return "PNG", is_whole_png
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return "WebP", is_whole_webp
    return None


def is_whole_jpeg(body: bytes) -> bool:
    """Whether the entropy-coded data is followed by an end marker."""
    at = 2
    while at + 4 <= len(body) and body[at] == 0xFF:
        marker = body[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _BARE_MARKERS:
            at += 2
        else:
            at += 2 + int.from_bytes(body[at + 2 : at + 4], "big")
            if marker == _START_OF_SCAN:
                # Scan data escapes 0xff; an end marker before here is a thumbnail's.
                return body.find(_JPEG_END, at) >= 0
    return False


def is_whole_png(body: bytes) -> bool:
    """Whether the chunks reach IEND."""
    at = len(_PNG_START)
    while at + 12 <= len(body):
        kind = body[at + 4 : at + 8]
        at += 12 + int.from_bytes(body[at : at + 4], "big")
        if kind == b"IEND":
            return at <= len(body)
    return False


def is_whole_webp(body: bytes) -> bool:
    """Whether the file is as long as its RIFF header says."""
    return len(body) >= 8 + int.from_bytes(body[4:8], "little")


def _looks_like(body: bytes) -> str:
    start = body[:64].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "an HTML or XML page"
    known = _known_format(body)
    return f"a damaged {known[0]}" if known else f"{len(body)} bytes of no known format"
