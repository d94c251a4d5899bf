"""Tell a picture's format from its first bytes, and from its structure whether it is whole."""

import contextlib
import struct

from PIL import Image

MAX_JPEG_SCANS = 100
"""Each costs a pass over all pixels; encoders write about ten."""

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_BARE_MARKERS = {0x01, *range(0xD0, 0xD8)}  # JPEG markers without a length
_START_OF_SCAN = b"\xff\xda"
_BASELINE = 0xC0
# Tables, comments, and application data other than Exif (E1) and Adobe's (EE).
_HARMLESS_SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xEE)})
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"eXIf", b"IDAT", b"IEND"})
_STARTS = (
    (_JPEG_START, "jpeg"),
    (_PNG_START, "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)
_PREFIX_BYTES = 16


def format_of(body: bytes) -> str | None:
    """Name the format that the first bytes announce: one of the config's `formats`, or None."""
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return "webp"
    if body[4:8] == b"ftyp" and body[8:12] in {b"avif", b"avis"}:
        return "avif"
    return next((name for start, name in _STARTS if body.startswith(start)), None)


def rare_format_of(body: bytes) -> str | None:
    """Name another format that Pillow could read, from the first bytes alone; None if it is none.

    Nothing of the body is parsed by the code for these formats.
    """
    Image.init()
    for name, (_, accepts) in sorted(Image.OPEN.items()):
        with contextlib.suppress(Exception):  # they were written for whole files
            if accepts and accepts(body[:_PREFIX_BYTES]) is True:
                return name.lower()
    return None


def jpeg_scans(body: bytes) -> int:
    """Count the scans of a JPEG; 0 if no end marker follows the entropy-coded data of the first.

    OpenCV fills the missing part of a cut JPEG with grey and says nothing.
    """
    at = 2
    while at + 4 <= len(body) and body[at] == 0xFF:
        marker = body[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _BARE_MARKERS:
            at += 2
        elif marker == _START_OF_SCAN[1]:
            # Scan data escapes 0xff; an end marker before here is a thumbnail's.
            end = body.find(_JPEG_END, at)
            return body.count(_START_OF_SCAN, at, end) if end >= 0 else 0
        else:
            at += 2 + int.from_bytes(body[at + 2 : at + 4], "big")
    return 0


def plain_jpeg_size(body: bytes) -> tuple[int, int] | None:
    """Read width and height of the commonest kind of JPEG without a library; None for all others.

    That is: baseline, 8 bits, grey or three colours, and no Exif or Adobe segment, which might say
    that the picture is turned or its colours are others.
    """
    at = 2
    while body[:2] == b"\xff\xd8" and at + 10 <= len(body) and body[at] == 0xFF:
        marker, num_bytes = body[at + 1], int.from_bytes(body[at + 2 : at + 4], "big")
        if marker == _BASELINE:
            bits, height, width, colours = struct.unpack_from(">BHHB", body, at + 4)
            plain = bits == 8 and colours in {1, 3} and width and height
            return (width, height) if plain else None
        if marker not in _HARMLESS_SEGMENTS:
            return None
        at += 2 + num_bytes
    return None


def essential_png(body: bytes) -> bytes | None:
    """Give a PNG without the chunks that no pixel depends on; None if IEND is not reached.

    A few kilobytes of compressed text can blow up to gigabytes; what is not there does not.
    """
    at = len(_PNG_START)
    pieces = [body[:at]]
    while at + 12 <= len(body):
        kind, end = body[at + 4 : at + 8], at + 12 + int.from_bytes(body[at : at + 4], "big")
        if end > len(body):
            return None
        if kind in _PNG_KEPT:
            pieces.append(body[at:end])
        if kind == b"IEND":
            return b"".join(pieces)
        at = end
    return None


def is_whole_webp(body: bytes) -> bool:
    """Whether the file is as long as its RIFF header says."""
    return len(body) >= 8 + int.from_bytes(body[4:8], "little")


def looks_like(body: bytes) -> str:
    """Describe a body that is no picture."""
    start = body[:64].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<svg")):
        return "an HTML or XML page"
    return f"{len(body)} bytes of no known format"
