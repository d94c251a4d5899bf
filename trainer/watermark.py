"""Hide a text in pictures and read it back: the blind-watermark package (DWT, DCT and SVD).

A label in a file's metadata is lost with the first screenshot; this one is in the pixels. Measured
on four photographs at 256 px: 16 bytes are read back exactly from a PNG and from JPEGs of quality
80 to 95, at a PSNR of 33 to 38 dB; at quality 70 a bit may flip. It does not
survive a crop, a resize or an adversary.
"""

import multiprocessing
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import BadInput

BLOCK_PX = 8
BLOCKS_PER_BIT = 8
_PASSWORD = 1
# The package clips what it makes too bright or too dark, and loses the bits with it.
_MARGIN = 12

Pixels = NDArray[np.uint8]


def check_watermark(text: str, side_px: int) -> None:
    """Refuse a text that a picture cannot hold safely.

    Raises:
        BadInput: It is empty or too long for the pictures, or the package is not installed.
    """
    num_bytes, most = len(text.encode()), (side_px // BLOCK_PX) ** 2 // (8 * BLOCKS_PER_BIT)
    if not 0 < num_bytes <= most:
        need_px = BLOCK_PX * int(np.ceil(np.sqrt(8 * BLOCKS_PER_BIT * max(1, num_bytes))))
        raise BadInput(
            f"watermark={text!r} has {num_bytes} bytes, and pictures of {side_px}x{side_px} px "
            f"hold 1 to {most}. Give a shorter text, draw at least {need_px}x{need_px} px, or "
            "leave watermark=null."
        )
    _package()


def embed(picture: Pixels, text: str) -> Pixels:
    """Return an ``(H, W, 3)`` uint8 RGB picture with a text in it; see `check_watermark`."""
    calm = picture.clip(_MARGIN, 255 - _MARGIN)
    marker = _package().WaterMark(_PASSWORD, _PASSWORD)
    marker.read_img(img=np.ascontiguousarray(calm[..., ::-1]))
    marker.read_wm(_bits(text.encode()).tolist(), mode="bit")
    marked: NDArray[np.float64] = marker.embed()
    rounded = np.round(marked).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(rounded[..., ::-1])


def extract(picture: Pixels, num_bytes: int) -> bytes:
    """Read a text of that many UTF-8 bytes back; of an unmarked picture, nonsense."""
    marker = _package().WaterMark(_PASSWORD, _PASSWORD)
    bgr = np.ascontiguousarray(picture[..., ::-1])
    found = marker.extract(embed_img=bgr, wm_shape=8 * num_bytes, mode="bit")
    return np.packbits(np.asarray(found) >= 0.5).tobytes()


def _bits(data: bytes) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(data, np.uint8)).astype(np.bool_)


@cache
def _package() -> Any:  # noqa: ANN401 - an untyped package
    """Import blind-watermark, which sets how this process starts others, and undo that."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(None, force=True)
    try:
        import blind_watermark  # noqa: PLC0415 - optional
    except ImportError as error:
        raise BadInput(
            "watermark= needs the package blind-watermark: pip install --no-deps -c "
            "constraints.txt blind-watermark PyWavelets"
        ) from error
    finally:
        multiprocessing.set_start_method(before, force=True)
    blind_watermark.bw_notes.close()  # or it greets on standard output
    return blind_watermark
