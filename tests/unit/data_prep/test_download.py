import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.bodies import body_problem
from data_prep.quarantine import Reason, marked, reason_of

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


def encoded(kind, **options):
    body = io.BytesIO()
    Image.fromarray(PIXELS).save(body, kind, **options)
    return body.getvalue()


def with_thumbnail():
    exif = Image.Exif()
    exif[0x9286] = encoded("JPEG")  # an end marker before the picture's own
    return encoded("JPEG", exif=exif)


WHOLE = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "thumbnail": with_thumbnail(),
    "png": encoded("PNG"),
    "webp": encoded("WEBP"),
    "lossless": encoded("WEBP", lossless=True),
}


def problem(body, max_pixels=10_000):
    found = body_problem(body, max_pixels=max_pixels)
    return found and found[0]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_pictures_pass_also_with_rubbish_behind(name):
    assert problem(WHOLE[name]) is None
    assert problem(WHOLE[name] + b"\0\0rubbish") is None


@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(sorted(WHOLE)), keep_frac=st.floats(0.02, 0.999))
def test_a_cut_picture_never_passes(name, keep_frac):
    body = WHOLE[name]
    assert problem(body[: int(len(body) * keep_frac)]) == Reason.TRUNCATED


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_rarer_formats_are_decoded_to_be_judged(kind):
    body = encoded(kind)
    assert problem(body) is None
    assert problem(body[: len(body) // 2]) in {Reason.TRUNCATED, Reason.NOT_AN_IMAGE}


@pytest.mark.parametrize("body", [b"", b"<!doctype html><p>", b"\x89PNG", b"RIFFxxxxWAVE" * 20])
def test_what_is_no_picture_is_said_to_be_none(body):
    assert problem(body) in {Reason.NOT_AN_IMAGE, Reason.TRUNCATED}
    assert problem(b"<html>") == Reason.NOT_AN_IMAGE


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from([b"", b"GIF89a", b"BM", b"II*\0", b"8BPS"]), rest=st.binary())
def test_no_body_makes_the_judge_fail(start, rest):
    body_problem(start + rest, max_pixels=100)


def test_large_pictures_are_refused_before_they_are_decoded():
    assert problem(WHOLE["png"], max_pixels=40 * 60 - 1) == Reason.TOO_LARGE
    bomb = bytearray(WHOLE["png"])
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in IHDR
    assert problem(bytes(bomb)) in {Reason.TOO_LARGE, Reason.NOT_AN_IMAGE}


@pytest.mark.parametrize("reason", Reason)
def test_our_own_reasons_survive_as_text(reason):
    text = f"<urlopen error {marked(reason, 'some detail')}>"
    assert reason_of("failed_to_download", text) == (reason, "some detail")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 404: Not Found", "http_404"),
        ("HTTP Error 503: Service Unavailable", "http_503"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error [Errno 111] Connection refused>", "connection"),
        ("<urlopen error [Errno -2] Name or service not known>", "connection"),
        ("[Errno 104] Connection reset by peer", "connection"),
        ("Remote end closed connection without response", "connection"),
        ("IncompleteRead(10 bytes read, 5 more expected)", "truncated"),
        ("Use of image disallowed by X-Robots-Tag directive", "opt_out"),
        ("<urlopen error unknown url type: file>", "scheme_refused"),
        ("something nobody has seen", "other"),
    ],
)
def test_messages_of_the_libraries_are_recognised(message, reason):
    assert reason_of("failed_to_download", message) == (reason, message)


def test_failures_to_decode_have_their_own_reason():
    assert reason_of("failed_to_resize", "Image decoding error")[0] == "undecodable"
    assert reason_of("failed_to_resize", "image too small")[0] == "too_small"
