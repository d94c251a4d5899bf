"""Laws of the decode path of training."""

import io
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from trainer.data.decode import decode_bgr, decode_square
from trainer.data.structure import plain_jpeg_size
from trainer.errors import BadData

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"


def smooth(width, height, *, seed=0, channels=3):
    """A picture whose detail is coarser than any reduction below."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 7, channels), np.uint8)
    return cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(picture, kind="PNG", **options):
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def jpeg(picture, **options):
    return encoded(picture, "JPEG", quality=95, **options)


def rgb_of(content):
    """What Pillow decodes, whatever the mode, on white."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.asarray(picture.convert("RGB"))


def square_of(rgb, side_px):
    """The centre as Pillow resizes it: by averages of whole pixels, else by its cubic filter."""
    side = min(rgb.shape[:2])
    top, left = (rgb.shape[0] - side) // 2, (rgb.shape[1] - side) // 2
    centre = Image.fromarray(np.ascontiguousarray(rgb[top : top + side, left : left + side]))
    how = Image.Resampling.BICUBIC if side % side_px else Image.Resampling.BOX
    return np.asarray(centre.resize((side_px, side_px), how))


def mean_abs_diff(one, other):
    return np.abs(one.astype(int) - other.astype(int)).mean()


def pictures():
    """Files of every mode that a dataset may hold, by name."""
    rgb = Image.fromarray(smooth(61, 45))
    alpha = Image.fromarray(smooth(61, 45, channels=4, seed=1), "RGBA")
    palette = rgb.quantize(40)
    sixteen = Image.fromarray(smooth(61, 45)[..., 0].astype(np.uint16) * 257)
    clear = rgb.quantize(20)
    turned = Image.Exif()
    turned[0x0112] = 6
    bgr16 = cv2.cvtColor(smooth(61, 45), cv2.COLOR_RGB2BGR).astype(np.uint16) * 257
    return {
        "jpg": jpeg(rgb),
        "jpg 4:2:0": jpeg(rgb, subsampling="4:2:0"),
        "jpg progressive": jpeg(rgb, progressive=True),
        "jpg grey": jpeg(rgb.convert("L")),
        "jpg cmyk": jpeg(rgb.convert("CMYK")),
        "jpg turned": jpeg(rgb, exif=turned.tobytes()),
        "png": encoded(rgb),
        "png grey": encoded(rgb.convert("L")),
        "png alpha": encoded(alpha),
        "png grey alpha": encoded(alpha.convert("LA")),
        "png palette": encoded(palette),
        "png clear palette": encoded(clear, transparency=3),
        "png 16 bit": encoded(sixteen),
        "png 16 bit rgb": cv2.imencode(".png", bgr16)[1].tobytes(),
        "webp": encoded(rgb, "WEBP", lossless=True),
        "webp lossy": encoded(rgb, "WEBP", quality=95),
        "webp alpha": encoded(alpha, "WEBP", lossless=True),
        "webp turned": encoded(rgb, "WEBP", lossless=True, exif=turned.tobytes()),
    }


PICTURES = pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_every_mode_decodes_to_what_pillow_decodes(name):
    wanted = rgb_of(PICTURES[name])
    if name == "png 16 bit":
        wanted = np.repeat(smooth(61, 45)[..., :1], 3, axis=2)
    found = decode_bgr(PICTURES[name], name=name)[..., ::-1]
    assert found.shape == wanted.shape
    assert mean_abs_diff(found, wanted) < 1
    assert np.abs(found.astype(int) - wanted).max() <= 12
    # JPEGs are not reduced to these sides.
    for side_px in (25, 32, 45, 60, *([] if name.startswith("jpg") else [9, 15])):
        square = decode_square(PICTURES[name], side_px, name=name)
        assert mean_abs_diff(square, square_of(found, side_px)) < 0.6, side_px


@pytest.mark.parametrize("name", ["jpg", "jpg progressive", "jpg grey", "png", "png grey", "webp"])
def test_the_pixels_that_latents_are_made_of_are_those_that_opencv_decodes(name):
    pixels = cv2.imdecode(np.frombuffer(PICTURES[name], np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decode_bgr(PICTURES[name], name=name), pixels)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photographs beside the checkout")
def test_photographs_have_the_pixels_that_opencv_decodes():
    for path in sorted(PHOTOS.glob("*.jpg"))[::20]:
        content = path.read_bytes()
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(decode_bgr(content, name=path.name), pixels)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(8, 64), st.sampled_from([0, 2]))
def test_a_reduced_decode_is_near_the_whole_one(width, height, side_px, subsampling):
    content = jpeg(smooth(width, height), subsampling=subsampling)
    wanted = square_of(decode_bgr(content, name="x")[..., ::-1], side_px)
    square = decode_square(content, side_px, name="x")
    assert square.shape == (side_px, side_px, 3)
    assert square.flags.c_contiguous
    # The crop lies on whole pixels of the reduced picture: up to one pixel of the square aside.
    slope = sum(np.abs(np.diff(wanted.astype(int), axis=axis)).mean() for axis in (0, 1))
    assert mean_abs_diff(square, wanted) < 1.5 + slope


@settings(deadline=None, max_examples=30)
@given(st.integers(24, 40), st.integers(1, 5), st.sampled_from([1, 1.25, 1.5, 1.75]))
def test_a_reduced_decode_of_whole_blocks_loses_nothing(side_px, half, more):
    side = round(side_px * half * more) * 16
    content = jpeg(smooth(side, side))
    wanted = square_of(decode_bgr(content, name="x")[..., ::-1], side_px)
    assert mean_abs_diff(decode_square(content, side_px, name="x"), wanted) < 1.5


@given(st.integers(1, 40), st.sampled_from(["PNG", "WEBP"]))
@settings(deadline=None, max_examples=25)
def test_the_square_of_a_square_is_itself(side_px, kind):
    square = decode_square(encoded(smooth(50, 41), kind), side_px, name="x")
    lossless = {"lossless": True} if kind == "WEBP" else {}
    again = decode_square(encoded(square, kind, **lossless), side_px, name="x")
    np.testing.assert_array_equal(square, again)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("side_px", [8, 20, 40, 64, 90, 200])
@pytest.mark.parametrize("size", [(320, 160), (160, 320), (200, 160)])
def test_the_crop_is_centred(size, side_px, kind):
    ramp = np.linspace(30, 220, max(size))
    plane = np.broadcast_to(ramp if size[0] == max(size) else ramp[:, None], size[::-1])
    picture = np.repeat(plane[..., None], 3, axis=2).round().astype(np.uint8)
    square = decode_square(encoded(picture, kind), side_px, name="x")
    per_pixel = (ramp[1] - ramp[0]) * min(size) / side_px
    assert square.mean() == pytest.approx(ramp.mean(), abs=per_pixel / 2 + 0.6)


@pytest.mark.parametrize("grey", [0, 1, 128, 255])
def test_a_flat_picture_stays_flat(grey):
    for size in ((64, 64), (91, 130), (500, 300)):
        content = encoded(np.full((*size, 3), grey, np.uint8))
        assert (decode_square(content, 37, name="x") == grey).all()


def test_pixels_do_not_depend_on_threads():
    contents = [*PICTURES.values(), *(jpeg(smooth(400, 300, seed=seed)) for seed in range(20))]
    alone = [decode_square(content, 48, name="x") for content in contents]
    for num_threads in range(1, 5):
        with ThreadPoolExecutor(num_threads) as threads:
            found = list(threads.map(lambda each: decode_square(each, 48, name="x"), contents))
        for one, other in zip(alone, found, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["jpg", "png", "webp alpha"])
def test_a_square_goes_to_its_row_of_a_batch(name):
    batch = np.zeros((3, 24, 24, 3), np.uint8)
    row = batch[1]
    assert decode_square(PICTURES[name], 24, name=name, out=row).ctypes.data == row.ctypes.data
    np.testing.assert_array_equal(row, decode_square(PICTURES[name], 24, name=name))
    assert not batch[::2].any()


@pytest.mark.parametrize("decode", [decode_bgr, lambda *a, **k: decode_square(*a, 8, **k)])
@pytest.mark.parametrize("keep_frac", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", PICTURES)
def test_a_cut_picture_is_bad_data_and_no_grey_half(name, keep_frac, decode):
    cut = PICTURES[name][: int(len(PICTURES[name]) * keep_frac)]
    with pytest.raises(BadData, match=r"^0123\.x does not decode as a picture \(.*kiln verify"):
        decode(cut, name="0123.x")


@pytest.mark.parametrize("name", ["png", "webp", "jpg", "jpg progressive"])
def test_broken_bytes_give_a_picture_or_bad_data(name):
    random = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(PICTURES[name])
        broken[random.integers(len(broken))] ^= 1 << random.integers(8)
        try:
            found = decode_square(bytes(broken), 16, name="x")
        except BadData:
            continue
        assert found.shape == (16, 16, 3)


def test_what_is_no_picture_is_named():
    with pytest.raises(BadData, match=r"^0123\.jpg does not decode as a picture \(an HTML"):
        decode_square(b"<html>", 32, name="0123.jpg")
    gif = encoded(smooth(20, 20), "GIF")
    with pytest.raises(BadData, match=r"0123\.jpg does not decode as a picture \(gif\)"):
        decode_square(gif, 32, name="0123.jpg")


def announcing(kind, width, height):
    """A small file whose header announces a large picture."""
    if kind == "png":
        body = bytearray(encoded(smooth(16, 16)))
        body[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        body[29:33] = zlib.crc32(body[12:29]).to_bytes(4, "big")
        return bytes(body)
    body = bytearray(jpeg(smooth(16, 16)))
    at = body.index(b"\xff\xc0") + 5
    body[at : at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(body)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_bomb_is_refused_by_its_header(kind):
    body = announcing(kind, 9000, 9000)
    with pytest.raises(BadData, match=r"bomb announces 9000x9000 pixels, and at most 67108864"):
        decode_square(body, 8, name="bomb")
    with pytest.raises(BadData, match="kiln remove"):
        decode_bgr(PICTURES["webp"], name="bomb", max_pixels=61 * 45 - 1)
    assert decode_bgr(PICTURES["webp"], name="bomb", max_pixels=61 * 45).shape == (45, 61, 3)


def test_a_jpeg_of_endless_scans_is_refused():
    body = jpeg(smooth(16, 16), progressive=True)
    at = body.rindex(b"\xff\xda")
    with pytest.raises(BadData, match="more than 100 scans"):
        decode_square(body[:at] + body[at:-2] * 120 + body[-2:], 8, name="bomb")


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    mode=st.sampled_from(["L", "RGB", "CMYK"]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "progressive": st.just(True),
            "exif": st.just(b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
            "comment": st.just(b"hello"),
            "icc_profile": st.just(bytes(1000)),
            "dpi": st.just((72, 72)),
        },
    ),
)
def test_the_size_of_a_plain_jpeg_is_what_pillow_says_and_others_are_left_to_it(
    width, height, mode, options
):
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "JPEG", **options)
    special = mode == "CMYK" or {"progressive", "exif"} & set(options)
    found = plain_jpeg_size(file.getvalue())
    assert found == (None if special else (width, height))
    for end in range(0, len(file.getvalue()), 7):
        assert plain_jpeg_size(file.getvalue()[:end]) in {None, found}
