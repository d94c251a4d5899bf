"""Turn a downloaded body into the picture to store, or into the reason why not, in one decode."""

import io
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.config import PrepareConfig
from data_prep.perceptual import phash_of_grey
from data_prep.policy import policy_denied
from data_prep.quarantine import Reason, marked
from data_prep.resize import Resize
from data_prep.structure import (
    essential_png,
    format_of,
    is_whole_webp,
    jpeg_scans,
    looks_like,
    rare_format_of,
)

Bgr = NDArray[Any]
"""(H, W, 3), uint8."""

_MAX_SCANS = 100  # each costs a pass over all pixels; encoders write about ten
_REDUCTIONS = (
    (8, cv2.IMREAD_REDUCED_COLOR_8),
    (4, cv2.IMREAD_REDUCED_COLOR_4),
    (2, cv2.IMREAD_REDUCED_COLOR_2),
    (1, cv2.IMREAD_COLOR),
)
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


class Unfit(Exception):
    """The body is not stored; says why."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Picture(NamedTuple):
    """What is stored of a body."""

    encoded: bytes
    """The picture, resized and encoded; without EXIF or any other metadata."""
    phash: int
    """Its perceptual hash."""


Resized = tuple[Picture | None, int | None, int | None, int | None, int | None, str | None]
"""What img2dataset's downloader takes from its resizer: the picture, width, height, width and
height of the original, error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a body says about itself before its pixels are decoded."""

    body: bytes
    """What is decoded: the body, a PNG without its texts."""
    format: str
    """One of the config's `formats`."""
    opened: Image.Image
    """The same by Pillow, which has read no pixel yet."""
    orientation: int
    """As EXIF counts: 1 upright, 2 to 8 others."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture once it stands upright."""
        width, height = self.opened.size
        return (height, width) if self.orientation >= 5 else (width, height)


class Decoder:
    """Takes the place of img2dataset's resizer: the same sizes, but every body is judged first."""

    def __init__(self, cfg: PrepareConfig) -> None:
        """Prepare to decode by the rules of `cfg`."""
        self._cfg = cfg
        self._denied = policy_denied(cfg.policy)
        self._resize = Resize(
            mode=cfg.resize_mode,
            side_px=cfg.image_side_px,
            only_if_bigger=cfg.resize_only_if_bigger,
        )
        red, green, blue = cfg.background_rgb
        self._background_bgr = (blue, green, red)
        flag = {
            "jpg": cv2.IMWRITE_JPEG_QUALITY,
            "png": cv2.IMWRITE_PNG_COMPRESSION,
            "webp": cv2.IMWRITE_WEBP_QUALITY,
        }[cfg.encode_format]
        self._encode_params = [flag, cfg.quality]
        cv2.setNumThreads(1)  # processes share the cores among them

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: object = None) -> Resized:
        """Judge, decode, resize and encode a body; nothing is raised."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of what is odd but readable
                return self._picture(img_stream.getvalue())
        except Unfit as unfit:
            reason, detail = unfit.reason, unfit.detail
        # Broken files make the decoders raise whatever they like.
        except Exception as error:
            reason, detail = Reason.UNDECODABLE, f"{type(error).__name__}: {error}"
        return None, None, None, None, None, marked(reason, detail)

    def _picture(self, body: bytes) -> Resized:
        if self._denied is not None and (found := self._denied.find(body)):
            raise Unfit(Reason.DENIED_CONTENT, found)
        header = read_header(body, self._cfg.formats)
        width, height = header.size
        self._judge_size(width, height)
        scale = self._resize.scale(width, height)
        pixels = decode_bgr(header, self._background_bgr, scale=scale)
        pixels = self._resize.scaled(pixels, width, height)
        std = float(cv2.meanStdDev(pixels)[1].max())
        if std < self._cfg.min_std:
            raise Unfit(Reason.BLANK, f"standard deviation {std:.2f} of 255")
        pixels = self._resize.framed(pixels, width, height, self._background_bgr)
        done, encoded = cv2.imencode(f".{self._cfg.encode_format}", pixels, self._encode_params)
        if not done:
            raise Unfit(Reason.UNDECODABLE, "the resized picture could not be encoded")
        picture = Picture(
            encoded.tobytes(), phash_of_grey(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY))
        )
        return picture, pixels.shape[1], pixels.shape[0], width, height, None

    def _judge_size(self, width: int, height: int) -> None:
        shorter, longer = sorted((width, height))
        if width * height > self._cfg.max_image_pixels:
            raise Unfit(Reason.TOO_LARGE, f"{width}x{height} px")
        if shorter < max(1, self._cfg.min_image_side_px):
            raise Unfit(Reason.TOO_SMALL, f"{width}x{height} px")
        if longer > self._cfg.max_aspect_ratio * shorter:
            raise Unfit(Reason.ASPECT_RATIO, f"{width}x{height} px")


def read_header(body: bytes, formats: tuple[str, ...]) -> Header:
    """Judge a body by its structure and its header; no pixel is decoded.

    Args:
        body: As it was downloaded.
        formats: Formats that are let in; code for others never sees the body.

    Raises:
        Unfit: It is no picture, of another format, cut, animated, or made to exhaust decoders.
    """
    kind = format_of(body)
    if kind not in formats:
        named = kind or rare_format_of(body)
        if named is None:
            raise Unfit(Reason.NOT_AN_IMAGE, looks_like(body))
        raise Unfit(Reason.FORMAT_REFUSED, f"{named}, may be {', '.join(formats)}")
    whole = _require_whole(kind, body)
    try:
        opened = Image.open(io.BytesIO(whole), formats=[kind.upper()])
        # The further pictures of a JPEG are previews or depth, not a film.
        num_frames = 1 if kind == "jpeg" else getattr(opened, "n_frames", 1)
    except Image.DecompressionBombError as error:
        raise Unfit(Reason.TOO_LARGE, str(error)) from error
    # Broken files make Pillow raise OSError, ValueError, SyntaxError, struct.error and more.
    except Exception as error:
        raise Unfit(Reason.NOT_AN_IMAGE, f"a damaged {kind} ({type(error).__name__})") from error
    if num_frames > 1:
        raise Unfit(Reason.ANIMATED, f"{kind} of {num_frames} frames")
    return Header(body=whole, format=kind, opened=opened, orientation=_orientation(opened))


def _require_whole(kind: str, body: bytes) -> bytes:
    """Raise if a body's structure shows that its end is missing; give what is to be decoded."""
    cut = Unfit(Reason.TRUNCATED, f"{kind} of {len(body)} bytes has no end")
    if kind == "jpeg":
        scans = jpeg_scans(body)
        if not scans:
            raise cut
        if scans > _MAX_SCANS:
            raise Unfit(Reason.TOO_LARGE, f"jpeg of {scans} scans")
    if kind == "webp" and not is_whole_webp(body):
        raise cut
    if kind == "png":
        essential = essential_png(body)
        if essential is None:
            raise cut
        return essential
    return body


def _orientation(opened: Image.Image) -> int:
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


def decode_bgr(header: Header, background_bgr: tuple[int, int, int], *, scale: float) -> Bgr:
    """Decode a picture once: upright, 8 bits per colour, transparency laid on a background.

    JPEGs that get much smaller are reduced while they are decoded, to no less than twice the
    wanted size; the final averaging leaves a difference like that of compression at quality 95.

    Args:
        header: What to decode.
        background_bgr: Colour behind transparent pixels.
        scale: By which factor the picture will be resized.

    Raises:
        Unfit: It cannot be decoded, or not in full.
    """
    flag = _OPENCV.get((header.format, header.opened.mode))
    if header.format == "png" and "transparency" in header.opened.info:
        flag = None  # OpenCV would drop it
    reduction = 1
    if header.format == "jpeg" and flag is not None:
        reduction, flag = next(
            (times, flag) for times, flag in _REDUCTIONS if times == 1 or 2 * times * scale <= 1
        )
    found = _with_pillow(header.opened) if flag is None else _with_opencv(header.body, flag)
    if found.dtype == np.uint16:
        found = (found >> 8).astype(np.uint8)
    width, height = (-(-side // reduction) for side in header.opened.size)
    if found.shape[:2] != (height, width):
        raise Unfit(Reason.UNDECODABLE, f"decoded to {found.shape[1]}x{found.shape[0]} px")
    if found.shape[2] == 4:
        found = _composited(found, background_bgr)
    return _upright(found, header.orientation)


def _with_opencv(body: bytes, flag: int) -> NDArray[Any]:
    if flag != cv2.IMREAD_UNCHANGED:  # which ignores the orientation by itself
        flag |= cv2.IMREAD_IGNORE_ORIENTATION
    found: NDArray[Any] | None = cv2.imdecode(np.frombuffer(body, np.uint8), flag)
    if found is None:
        raise Unfit(Reason.UNDECODABLE, "OpenCV cannot decode it")
    return found


def _with_pillow(opened: Image.Image) -> NDArray[Any]:
    """Decode what OpenCV does not know, or gets wrong: CMYK, palettes with transparency, GIF..."""
    try:
        opened.load()
    except OSError as error:
        reason = Reason.TRUNCATED if "truncated" in str(error) else Reason.UNDECODABLE
        raise Unfit(reason, f"{opened.format}: {error}") from error
    if opened.mode.startswith("I;16"):
        values_HW = np.asarray(opened)
        pixels = np.repeat((values_HW >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if "transparency" not in opened.info:
            return pixels
        alpha_HW = np.where(values_HW == opened.info["transparency"], 0, 255).astype(np.uint8)
        return np.dstack([pixels, alpha_HW])
    if opened.mode in {"I", "F"}:
        raise Unfit(Reason.UNDECODABLE, f"values of mode {opened.mode} have no known range")
    if opened.has_transparency_data:
        return np.asarray(opened.convert("RGBA"))[..., [2, 1, 0, 3]]
    return np.ascontiguousarray(np.asarray(opened.convert("RGB"))[..., ::-1])


def _composited(bgra_HWC: NDArray[np.uint8], background_bgr: tuple[int, int, int]) -> Bgr:
    """Lay a picture on a colour, rounded to the nearest value."""
    alpha_HW1 = bgra_HWC[..., 3:].astype(np.uint16)
    behind = np.array(background_bgr, np.uint16) * (255 - alpha_HW1)
    return ((bgra_HWC[..., :3] * alpha_HW1 + behind + 127) // 255).astype(np.uint8)


def _upright(pixels: Bgr, orientation: int) -> Bgr:
    """Turn and mirror a picture as its EXIF orientation asks."""
    if orientation in {5, 7}:
        pixels = cv2.transpose(pixels)
    if orientation in _FLIPS:
        pixels = cv2.flip(pixels, _FLIPS[orientation])
    if orientation in _TURNS:
        pixels = cv2.rotate(pixels, _TURNS[orientation])
    return pixels
