"""Laws of aspect buckets."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.buckets import make_boxes, nearest_box, print_buckets
from tests.tiny import tiny_config
from trainer.config import BucketsConfig
from trainer.data.decode import cover
from trainer.errors import BadInput
from trainer.frozen import freeze, thaw

sides = st.integers(1, 40)


def encoders(side_px, buckets=None):
    plain = thaw(tiny_config().encoders) | {"image_side_px": side_px, "buckets": buckets}
    return freeze(type(tiny_config().encoders), plain)


def boxes_of(side_px, *, step_px, max_aspect):
    return make_boxes(encoders(side_px, {"step_px": step_px, "max_aspect": max_aspect}))


def test_without_buckets_there_is_the_square():
    assert make_boxes(encoders(48)) == ((48, 48),)


@given(st.integers(1, 24), st.integers(1, 16), st.floats(1.01, 8))
def test_boxes_keep_to_area_step_and_aspect_and_come_both_ways_round(steps, step_px, max_aspect):
    side_px = steps * step_px
    boxes = boxes_of(side_px, step_px=step_px, max_aspect=max_aspect)
    assert (side_px, side_px) in boxes
    assert {(h, w) for w, h in boxes} == set(boxes)
    for width, height in boxes:
        assert width % step_px == height % step_px == 0
        assert max(width, height) <= max_aspect * min(width, height)
        assert width * height <= side_px**2
        # Neither side could be a step longer.
        assert (width + step_px) * height > side_px**2 or width * (height + step_px) > side_px**2


def test_the_rule_gives_sizes_of_the_published_table():
    """Podell et al. 2023 (SDXL), appendix I, between 1:4 and 4:1 at 1024 px."""
    table = {(512, 2048), (576, 1728), (640, 1536), (704, 1408), (768, 1344), (832, 1216)}
    table |= {(896, 1152), (960, 1088), (1024, 1024)}
    boxes = set(boxes_of(1024, step_px=64, max_aspect=4))
    assert table | {(b, a) for a, b in table} <= boxes


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_picture_goes_to_the_nearest_shape_and_turned_to_the_turned_one(width, height):
    boxes = boxes_of(256, step_px=32, max_aspect=2)
    box = nearest_box(boxes, width, height)

    def distance(box):
        return abs(math.log(box.width / box.height / (width / height)))

    assert distance(box) == pytest.approx(min(map(distance, boxes)))
    turned = nearest_box(boxes, height, width)
    assert distance(type(box)(turned.height, turned.width)) == pytest.approx(distance(box))


@settings(deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 255))
def test_a_covered_box_is_full_and_its_crop_central(width, height, box_width, box_height, grey):
    picture = np.full((height, width, 3), grey, np.uint8)
    covered = cover(picture, box_width, box_height)
    assert covered.rgb_HWC.shape == (box_height, box_width, 3)
    assert (covered.rgb_HWC == grey).all()
    # One side fits, so that nothing of it is cut; a resized picture is no larger than needed.
    assert min(covered.top, covered.left) == 0
    scale = max(box_width / width, box_height / height)
    assert covered.top == pytest.approx((height * scale - box_height) / 2, abs=1)
    assert covered.left == pytest.approx((width * scale - box_width) / 2, abs=1)


def test_at_its_own_size_a_picture_is_cut_and_not_resized():
    picture = np.random.default_rng(0).integers(0, 256, (30, 47, 3), np.uint8)
    own = cover(picture, 30, 30)
    np.testing.assert_array_equal(own.rgb_HWC, picture[:, own.left : own.left + 30, ::-1])


def test_a_side_that_is_no_multiple_of_the_step_is_refused():
    with pytest.raises(BadInput, match="Try image_side_px=64"):
        encoders(80, {"step_px": 32, "max_aspect": 2})


def test_the_histogram_has_every_bucket(capsys):
    print_buckets({"64x64": 30, "80x48": 10})
    lines = capsys.readouterr().out.splitlines()
    assert any("64x64" in line and "75.0 %" in line for line in lines)
    assert any("80x48" in line and "25.0 %" in line for line in lines)


def test_buckets_are_part_of_the_config_that_training_reads():
    buckets = BucketsConfig(max_aspect=2.0, step_px=16)
    cfg = replace(tiny_config().encoders, image_side_px=64, buckets=buckets)
    assert freeze(type(cfg), thaw(cfg)) == cfg
