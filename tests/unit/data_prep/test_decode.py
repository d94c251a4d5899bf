import functools
import io
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_prep.config import PrepareConfig
from data_prep.decode import Decoder
from data_prep.perceptual import phash
from data_prep.quarantine import Reason, reason_of
from trainer.frozen import compose

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

from img2dataset.resizer import Resizer

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
SMOOTH = cv2.resize(PIXELS[:5, :8], (60, 40), interpolation=cv2.INTER_CUBIC)
MODES = ("no", "keep_ratio", "keep_ratio_largest", "center_crop", "border")
ALL = "formats=[jpeg,png,webp,gif,bmp,tiff,avif]"
AS_IS = (ALL, "resize_mode=no", "encode_format=png", "min_image_side_px=1")


@functools.cache
def decoder(*overrides):
    return Decoder(config(*overrides))


@functools.cache
def config(*overrides):
    return compose(PrepareConfig, "prepare", ["rows=r", "dataset=d", *overrides])


def encoded(kind, pixels=PIXELS, **options):
    body = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(body, kind, **options)
    return body.getvalue()


def refusal(body, *overrides):
    """The reason and the detail of a body that is not stored, or None."""
    *_, error = decoder(*AS_IS, *overrides)(io.BytesIO(body))
    return error and reason_of("failed_to_resize", error)


def problem(body, *overrides):
    found = refusal(body, *overrides)
    return found and found[0]


def stored(body, *overrides):
    """The pixels (RGB) that are stored of a body, and its facts."""
    picture, *facts, error = decoder(*AS_IS, *overrides)(io.BytesIO(body))
    assert error is None, error
    pixels = cv2.imdecode(np.frombuffer(picture.encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels.shape[1::-1] == tuple(facts[:2])
    return pixels, tuple(facts)


def with_exif(**more):
    exif = Image.Exif()
    exif[0x9286] = encoded("JPEG")  # a thumbnail, with an end marker before the picture's own
    for tag, value in more.items():
        exif[int(tag[1:], 16)] = value
    return exif


def png_chunk(kind, content):
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def png_with(*chunks):
    body = encoded("PNG")
    return body[:33] + b"".join(png_chunk(*chunk) for chunk in chunks) + body[33:]


WHOLE = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "thumbnail": encoded("JPEG", exif=with_exif()),
    "png": encoded("PNG"),
    "webp": encoded("WEBP"),
    "lossless": encoded("WEBP", lossless=True),
}
FORMATS = {
    "jpeg": {"quality": 95, "subsampling": 0},
    "png": {},
    "webp": {"lossless": True},
    "gif": {},
    "bmp": {},
    "tiff": {},
    "avif": {"quality": 95},
}


# --- whole or cut, a picture or not ---------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_whole_pictures_pass_also_with_rubbish_behind(name):
    assert problem(WHOLE[name]) is None
    assert problem(WHOLE[name] + b"\0\0rubbish") is None


@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(sorted(WHOLE)), keep_frac=st.floats(0.02, 0.999))
def test_a_cut_picture_never_passes(name, keep_frac):
    body = WHOLE[name]
    assert problem(body[: int(len(body) * keep_frac)]) == Reason.TRUNCATED


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_a_cut_picture_of_a_rarer_format_never_passes(kind):
    body = encoded(kind)
    assert problem(body) is None
    for keep_frac in (0.3, 0.5, 0.9):
        cut = body[: int(len(body) * keep_frac)]
        assert problem(cut) in {Reason.TRUNCATED, Reason.NOT_AN_IMAGE, Reason.UNDECODABLE}


@pytest.mark.parametrize("body", [b"", b"<!doctype html><p>", b"\x89PNG", b"RIFFxxxxWAVE" * 20])
def test_what_is_no_picture_is_said_to_be_none(body):
    assert problem(body) == Reason.NOT_AN_IMAGE
    assert refusal(b"<html>") == (Reason.NOT_AN_IMAGE, "an HTML or XML page")


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from([b"", *(encoded(kind)[:24] for kind in FORMATS), b"8BPS", b"\0\0\1\0"]),
    rest=st.binary(),
)
def test_no_body_makes_the_decoder_fail(start, rest):
    assert problem(start + rest) in set(Reason)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(WHOLE)), at_frac=st.floats(0, 1), byte=st.integers(0, 255))
def test_a_flipped_byte_gives_a_picture_or_a_reason(name, at_frac, byte):
    body = bytearray(WHOLE[name])
    body[int(at_frac * (len(body) - 1))] = byte
    assert problem(bytes(body)) in {None, *Reason}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_let_in_by_the_config_alone(kind):
    body = encoded(kind, **FORMATS[kind])
    others = [name for name in FORMATS if name != kind]
    assert problem(body, f"formats=[{kind}]") is None
    reason, detail = refusal(body, f"formats=[{','.join(others)}]")
    assert reason == Reason.FORMAT_REFUSED
    assert detail.startswith(f"{kind}, may be {others[0]}")


@pytest.mark.parametrize("kind", ["ICO", "PPM", "PCX", "JPEG2000", "ICNS"])
def test_formats_without_a_config_word_are_named_and_refused(kind):
    reason, detail = refusal(encoded(kind, np.zeros((32, 32, 3), np.uint8)))
    assert reason == Reason.FORMAT_REFUSED
    assert kind.lower() in detail


# --- what is refused before any pixel is decoded -----------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_large_pictures_are_refused_before_they_are_decoded(kind):
    body = encoded(kind, **FORMATS[kind])
    assert problem(body, "max_image_pixels=2400") is None
    assert refusal(body, "max_image_pixels=2399") == (Reason.TOO_LARGE, "60x40 px")


def test_a_decompression_bomb_is_refused():
    bomb = bytearray(WHOLE["png"])
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in IHDR
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    assert problem(bytes(bomb)) == Reason.TOO_LARGE


def test_the_texts_of_a_png_are_never_inflated():
    packed = zlib.compress(bytes(300_000_000), 9)
    text, profile = (b"zTXt", b"k\0\0" + packed), (b"iCCP", b"p\0\0" + packed)
    international = (b"iTXt", b"k\0\1\0\0\0" + packed)
    with pytest.raises(ValueError, match="Decompressed data too large"):
        Image.open(io.BytesIO(png_with(text)))
    before_kib = peak_kib()
    pixels, _ = stored(png_with(text, profile, international))
    assert (pixels == PIXELS).all()
    assert peak_kib() - before_kib < 50_000


def peak_kib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def test_a_jpeg_of_very_many_scans_is_refused():
    body = WHOLE["progressive"]
    start = body.index(b"\xff\xda")
    end = body.index(b"\xff\xda", start + 1)
    bomb = body[:end] + body[start:end] * 200 + body[end:]
    reason, detail = refusal(bomb)
    assert reason == Reason.TOO_LARGE
    assert "scans" in detail


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_animations_are_refused(kind):
    frames = [Image.fromarray(np.roll(PIXELS, shift, axis=0)) for shift in (5, 10)]
    body = encoded(kind, save_all=True, append_images=frames)
    reason, detail = refusal(body)
    assert reason == Reason.ANIMATED
    assert "3 frames" in detail


def test_the_second_picture_of_a_jpeg_is_no_animation():
    body = encoded("MPO", save_all=True, append_images=[Image.fromarray(PIXELS[::-1].copy())])
    assert problem(body) is None


def test_small_and_long_pictures_are_refused():
    body = encoded("PNG")  # 60 x 40
    assert problem(body, "min_image_side_px=40") is None
    assert refusal(body, "min_image_side_px=41") == (Reason.TOO_SMALL, "60x40 px")
    assert problem(body, "max_aspect_ratio=1.5") is None
    assert refusal(body, "max_aspect_ratio=1.49") == (Reason.ASPECT_RATIO, "60x40 px")


# --- what is stored ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_decoded_to_its_pixels(kind):
    pixels, facts = stored(encoded(kind, SMOOTH, **FORMATS[kind]))
    limit = {"gif": 40, "jpeg": 4, "avif": 8}.get(kind, 0)  # a palette; lossy; the others exact
    assert np.abs(pixels.astype(int) - SMOOTH).mean() <= limit
    assert facts == (60, 40, 60, 40)


@pytest.mark.parametrize("kind", ["png", "webp", "gif", "tiff"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 90)])
def test_transparency_shows_the_stated_colour(kind, mode, background):
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, 30:] = 255
    rgba = Image.fromarray(np.dstack([SMOOTH, alpha]))
    picture = rgba.convert(mode if mode != "P" else "RGBA")
    if mode == "P":
        picture = rgba.quantize(64)
    if kind == "webp":
        picture = picture.convert("RGBA")
    red, green, blue = background
    body = encoded(kind, picture, **FORMATS[kind])
    pixels, _ = stored(body, f"background_rgb=[{red},{green},{blue}]")
    read = Image.open(io.BytesIO(body)).convert("RGBA")
    if 0 not in np.asarray(read)[..., 3]:
        pytest.skip(f"Pillow writes no transparency to a {kind} of mode {mode}")
    expected = Image.alpha_composite(Image.new("RGBA", read.size, background), read)
    assert np.abs(pixels.astype(int) - np.asarray(expected)[..., :3]).max() <= 1


def test_half_transparent_pixels_are_mixed():
    rgba = np.dstack([PIXELS, np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1))])
    pixels, _ = stored(encoded("PNG", rgba), "background_rgb=[255,255,255]")
    alpha = rgba[..., 3:] / 255
    assert np.abs(pixels - (alpha * PIXELS + (1 - alpha) * 255)).max() <= 0.5


def test_a_transparent_colour_of_a_png_shows_the_background():
    marked = PIXELS.copy()
    marked[:, :30] = (1, 2, 3)
    body = encoded("PNG", marked, transparency=(1, 2, 3))
    pixels, _ = stored(body, "background_rgb=[9,9,9]")
    assert (pixels[:, :30] == 9).all()
    assert (pixels[:, 30:] == marked[:, 30:]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff"])
def test_other_modes_become_rgb(kind, mode):
    if mode == "I;16":
        values = SMOOTH[..., 0].astype(np.uint16) * 257
        picture, expected = Image.fromarray(values), SMOOTH[..., :1]
    else:
        picture = Image.fromarray(SMOOTH).convert(mode)
        expected = np.asarray(picture.convert("RGB"))
    try:
        body = encoded(kind, picture, **FORMATS[kind])
    except OSError:
        pytest.skip(f"Pillow writes no {kind} of mode {mode}")
    pixels, _ = stored(body)
    assert pixels.shape == (40, 60, 3)
    limit = 25 if kind == "jpeg" else 3
    assert np.abs(pixels.astype(int) - expected).mean() <= limit


def test_sixteen_bits_become_eight_in_colour_and_with_alpha():
    wide = SMOOTH.astype(np.uint16) * 257
    for pixels16 in (wide, np.dstack([wide, np.full((40, 60), 65535, np.uint16)])):
        body = cv2.imencode(".png", pixels16)[1].tobytes()
        pixels, _ = stored(body)
        assert (pixels == SMOOTH[..., ::-1]).all()


def test_a_transparent_grey_of_sixteen_bits_shows_the_background():
    grey = SMOOTH[..., 0].astype(np.uint16) * 257
    grey[:, :30] = 1000
    grey[:, 30] = 1001  # of the same upper byte
    body = cv2.imencode(".png", grey)[1].tobytes()
    body = body[:33] + png_chunk(b"tRNS", struct.pack(">H", 1000)) + body[33:]
    pixels, _ = stored(body, "background_rgb=[9,8,7]")
    assert (pixels[:, :30] == (9, 8, 7)).all()
    assert (pixels[:, 30:] == (grey[:, 30:, None] >> 8)).all()


def test_values_without_a_range_are_refused():
    body = encoded("TIFF", Image.fromarray(np.random.default_rng(0).random((40, 60), np.float32)))
    assert problem(body) == Reason.UNDECODABLE


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_pictures_are_turned_upright_exactly_once(kind, orientation):
    body = encoded(kind, SMOOTH, exif=with_exif(x0112=orientation), **FORMATS[kind])
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB"))
    pixels, facts = stored(body)
    assert pixels.shape == upright.shape
    assert facts[2:] == upright.shape[1::-1]
    assert np.abs(pixels.astype(int) - upright).mean() < 2


def test_a_broken_exif_block_turns_nothing():
    body = encoded("JPEG", SMOOTH, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    assert stored(body)[1] == (60, 40, 60, 40)


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_nothing_that_was_not_seen_is_stored(form):
    exif = with_exif(x010F="SecretCamera", x8825={1: "N", 2: (48.0, 51.0, 30.0)})
    body = encoded("JPEG", exif=exif, icc_profile=b"secret profile" * 20, comment=b"secret")
    picture, *_ = decoder(f"encode_format={form}")(io.BytesIO(body))
    read = Image.open(io.BytesIO(picture.encoded))
    assert not read.getexif()
    assert b"ecret" not in picture.encoded
    assert not {"exif", "icc_profile", "comment", "xmp"} & set(read.info)


def test_blank_pictures_are_refused():
    flat = np.full((64, 64, 3), (250, 250, 250), np.uint8)
    assert problem(encoded("PNG", flat)) == Reason.BLANK
    assert problem(encoded("PNG", flat), "min_std=0") is None
    border = ("resize_mode=border", "image_side_px=64", "background_rgb=[0,0,0]")
    assert problem(encoded("PNG", flat[:30]), *border) == Reason.BLANK  # the bars do not count
    noisy = (flat + np.random.default_rng(0).integers(-3, 4, flat.shape)).astype(np.uint8)
    assert problem(encoded("JPEG", noisy)) == Reason.BLANK
    flat[20:40, 20:40] = (235, 254, 235)  # as bright, but of another colour
    assert problem(encoded("PNG", flat)) is None


def test_the_hash_is_of_what_is_stored():
    picture, *_ = decoder(*AS_IS)(io.BytesIO(encoded("PNG")))
    rgb = cv2.imdecode(np.frombuffer(picture.encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert phash(rgb) == picture.phash


# --- against img2dataset ----------------------------------------------------------------------


def theirs(body, mode, *, side, only_if_bigger, form="png"):
    quality = 95 if form == "jpg" else 6
    resizer = Resizer(side, mode, only_if_bigger, encode_format=form, encode_quality=quality)
    return resizer(io.BytesIO(body))


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    side=st.integers(1, 70),
    only_if_bigger=st.booleans(),
)
def test_sizes_and_pixels_are_those_of_img2dataset(mode, width, height, side, only_if_bigger):
    body = encoded("PNG", np.random.default_rng(1).integers(0, 255, (height, width, 3), np.uint8))
    lax = config("max_aspect_ratio=90", "min_std=0", "min_image_side_px=0", "encode_format=png")
    changes = {"resize_mode": mode, "image_side_px": side, "resize_only_if_bigger": only_if_bigger}
    picture, *facts = Decoder(replace(lax, **changes))(io.BytesIO(body))
    expected = theirs(body, mode, side=side, only_if_bigger=only_if_bigger)
    assert facts == list(expected[1:])
    assert picture.encoded == expected[0]


@pytest.mark.parametrize("mode", MODES)
def test_photos_are_stored_as_img2dataset_stores_them(mode):
    photos = sorted(PHOTOS.rglob("*.jpg"))[::40]
    if not photos:
        pytest.skip(f"{PHOTOS} is not there: the real photos are optional")
    for photo in photos:
        body = photo.read_bytes()
        same = (f"resize_mode={mode}", "image_side_px=256", "max_aspect_ratio=90")
        picture, *facts = decoder(*same)(io.BytesIO(body))
        expected = theirs(body, mode, side=256, only_if_bigger=False, form="jpg")
        assert facts == list(expected[1:])
        assert picture.encoded == expected[0]


@pytest.mark.parametrize("times", [2, 4, 8])
@pytest.mark.parametrize("odd", [0, 1, 3])
def test_reduced_decoding_changes_about_what_compression_does(times, odd):
    side = 64 * 2 * times
    pixels = cv2.resize(SMOOTH, (side + odd + 50, side + odd), interpolation=cv2.INTER_CUBIC)
    pixels = cv2.add(pixels, np.random.default_rng(0).integers(0, 20, pixels.shape, np.uint8))
    body = encoded("JPEG", pixels, quality=95)
    picture, *facts = decoder("image_side_px=64", "encode_format=png")(io.BytesIO(body))
    expected = theirs(body, "keep_ratio", side=64, only_if_bigger=False)
    assert facts == list(expected[1:])
    exact, found = (
        cv2.imdecode(np.frombuffer(each, np.uint8), cv2.IMREAD_COLOR).astype(float)
        for each in (expected[0], picture.encoded)
    )
    compressed = cv2.imdecode(cv2.imencode(".jpg", exact)[1], cv2.IMREAD_COLOR)
    error, usual_error = np.square(found - exact).mean(), np.square(compressed - exact).mean()
    assert error < 1.5 * usual_error
