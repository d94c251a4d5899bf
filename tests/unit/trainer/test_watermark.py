"""Laws of the hidden text, on photographs."""

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from trainer.errors import BadInput
from trainer.watermark import check_watermark, embed, extract

if find_spec("blind_watermark") is None:
    pytest.skip("blind-watermark is not installed", allow_module_level=True)

TEXT = "kiln:7f3a:ünïq"  # 16 bytes


def photographs():
    faces = Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    skimage = Path(find_spec("skimage").submodule_search_locations[0]) / "data"
    return [faces, *(skimage / f"{name}.png" for name in ("astronaut", "coffee", "chelsea"))]


def square(path, side_px):
    with Image.open(path) as picture:
        side = min(picture.size)
        small = picture.convert("RGB").crop((0, 0, side, side)).resize((side_px, side_px))
        return np.asarray(small)


def as_jpeg(pixels, quality):
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize("path", photographs(), ids=lambda path: path.stem)
def test_a_text_is_read_back_from_pixels_and_from_a_jpeg(path):
    assert len(TEXT.encode()) == 16
    picture = square(path, 256)
    marked = embed(picture, TEXT)
    assert marked.dtype == np.uint8
    assert marked.shape == picture.shape
    assert extract(marked, 16).decode() == TEXT
    assert extract(as_jpeg(marked, 90), 16).decode() == TEXT
    error = np.square(marked.astype(float) - picture).mean()
    assert 10 * np.log10(255**2 / error) > 32
    assert extract(picture, 16) != TEXT.encode()


@pytest.mark.parametrize("colour", ["black", "white", "blue"])
def test_flat_colours_hold_a_text_too(colour):
    marked = embed(np.asarray(Image.new("RGB", (128, 128), colour)), "kiln")
    assert extract(as_jpeg(marked, 90), 4) == b"kiln"


def test_equal_pictures_give_equal_bits():
    picture = square(photographs()[0], 128)
    assert (embed(picture, "kiln") == embed(picture, "kiln")).all()


def test_a_text_that_does_not_fit_is_refused_with_the_sizes():
    check_watermark("k", 64)
    check_watermark(TEXT, 256)
    with pytest.raises(BadInput, match=r"64x64 px hold 1 to 1\..*at least 128x128 px"):
        check_watermark("kiln", 64)
    check_watermark("kiln", 128)
    with pytest.raises(BadInput, match="has 17 bytes"):
        check_watermark(TEXT + "x", 256)
    with pytest.raises(BadInput, match="has 0 bytes"):
        check_watermark("", 256)
