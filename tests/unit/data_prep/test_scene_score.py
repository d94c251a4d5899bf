"""The score: painted pictures are right, shuffled captions and noise are at chance."""

import cv2
import numpy as np
import pytest

from data_prep.scene_score import read, score, share
from data_prep.scenes import BACKGROUNDS, COLOURS, Scene, Thing, caption, draw_scene, paint
from trainer.errors import BadInput

SCENES = [draw_scene(index, seed=11) for index in range(400)]
CAPTIONS = [caption(scene) for scene in SCENES]
PICTURES = [
    np.asarray(paint(scene, 64, 64, jitter_seed=index)) for index, scene in enumerate(SCENES)
]
RIGHT = dict.fromkeys(("shape_and_colour", "background", "size", "place", "relation"), 1.0)


def test_every_painted_picture_is_right():
    assert share(score(PICTURES, CAPTIONS)) == RIGHT | {"all": 1.0}


@pytest.mark.parametrize("size", [(40, 32), (96, 96), (200, 256), (1024, 900)])
def test_painted_pictures_of_other_sizes_are_right(size):
    pictures = [np.asarray(paint(scene, *size, jitter_seed=1)) for scene in SCENES[:40]]
    assert share(score(pictures, CAPTIONS[:40])) == RIGHT | {"all": 1.0}


def test_the_blur_and_noise_of_an_autoencoder_are_forgiven():
    rng = np.random.default_rng(0)
    soft = [cv2.GaussianBlur(picture, (0, 0), 0.8).astype(float) for picture in PICTURES]
    noisy = [np.clip(p + rng.normal(0, 6, p.shape), 0, 255).astype(np.uint8) for p in soft]
    assert share(score(noisy, CAPTIONS))["all"] >= 0.98


def test_shuffled_captions_score_near_chance():
    shares = share(score(PICTURES, CAPTIONS[1:] + CAPTIONS[:1]))
    assert shares["shape_and_colour"] < 0.06
    assert shares["all"] < 0.02
    assert shares["background"] == pytest.approx(0.2, abs=0.08)
    assert shares["place"] < 0.25


def test_noise_and_blank_pictures_show_nothing():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(100)]
    smears = [cv2.GaussianBlur(picture, (0, 0), 9) for picture in noise]
    blank = [np.full((64, 64, 3), value, np.uint8) for value in range(0, 256, 5)]
    for pictures in (noise, smears, blank):
        facts = score(pictures, CAPTIONS[: len(pictures)])
        assert not any(fact.shape_and_colour or fact.place for fact in facts)


def test_parts_too_small_for_a_template_have_no_shape():
    for side_px in (5, 6, 7, 8):
        picture = np.full((64, 64, 3), COLOURS["white"], np.uint8)
        picture[30 : 30 + side_px, 30 : 30 + side_px] = COLOURS["red"]
        (spot,) = read(picture).spots
        assert spot.thing == (None if side_px == 5 else Thing("square", "red"))
        assert spot.radius_frac == side_px / 2 / 64


def test_a_part_whose_median_is_the_ground_has_no_shape():
    picture = np.full((64, 64, 3), COLOURS["grey"], np.uint8)
    checks = np.indices((20, 20)).sum(0) % 3  # each colour in a third of the pixels
    for channel in range(3):
        picture[20:40, 20:40, channel] += ((checks == channel) * 90).astype(np.uint8)
    with np.errstate(all="raise"):
        (spot,) = read(picture).spots
    assert spot.thing is None


def test_any_picture_can_be_read():
    rng = np.random.default_rng(5)
    for index in range(400):
        picture = np.full((64, 64, 3), COLOURS[BACKGROUNDS[index % len(BACKGROUNDS)]], np.uint8)
        for _ in range(rng.integers(1, 5)):
            (y, x), (height, width) = rng.integers(0, 60, 2), rng.integers(1, 9, 2)
            picture[y : y + height, x : x + width] = rng.integers(0, 256, 3)
        with np.errstate(all="raise"):
            assert len(read(picture).spots) <= 4


def test_each_fact_fails_alone():
    good = Scene("yellow", Thing("circle", "red"), "small", "left")
    others = {
        "shape_and_colour": Scene("yellow", Thing("square", "red"), "small", "left"),
        "background": Scene("grey", Thing("circle", "red"), "small", "left"),
        "size": Scene("yellow", Thing("circle", "red"), "large", "left"),
        "place": Scene("yellow", Thing("circle", "red"), "small", "right"),
    }
    for name, scene in others.items():
        fact = score([np.asarray(paint(scene, 64, 64))], [caption(good)])[0]
        held = {key: getattr(fact, key) for key in others}
        assert held == {key: key != name for key in others}
        assert not fact.all


def test_the_relation_tells_which_thing_is_where():
    things = Thing("circle", "red"), Thing("square", "blue")
    picture = np.asarray(paint(Scene("white", things[0], None, None, "above", things[1]), 64, 64))
    captions = [
        "a red circle above a blue square, on a white background",
        "a blue square below a red circle, on a white background",
        "a blue square above a red circle, on a white background",
        "a red circle to the left of a blue square, on a white background",
    ]
    facts = score([picture] * 4, captions)
    assert [fact.relation for fact in facts] == [True, True, False, False]
    assert all(fact.shape_and_colour for fact in facts)


def test_colours_swapped_between_two_things_are_wrong():
    swapped = Scene("white", Thing("circle", "blue"), None, None, "above", Thing("square", "red"))
    text = "a red circle above a blue square, on a white background"
    assert not score([np.asarray(paint(swapped, 64, 64))], [text])[0].shape_and_colour


def test_a_second_thing_that_nobody_asked_for_is_wrong():
    two = Scene("white", Thing("circle", "red"), None, None, "left_of", Thing("star", "blue"))
    text = "a small red circle on the left, on a white background"
    fact = score([np.asarray(paint(two, 64, 64))], [text])[0]
    assert not fact.shape_and_colour
    assert not fact.place


def test_share_leaves_out_what_no_caption_tells():
    facts = score(PICTURES[:1], CAPTIONS[:1])
    told = "relation" if SCENES[0].other else "place"
    assert told in share(facts)
    assert len({"relation", "place"} & set(share(facts))) == 1


def test_unequal_counts_are_refused():
    with pytest.raises(BadInput, match="2 pictures and 1 captions"):
        score(PICTURES[:2], CAPTIONS[:1])


@pytest.mark.parametrize("picture", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3))])
def test_an_array_that_is_no_picture_is_refused(picture):
    with pytest.raises(BadInput, match=r"need \(H, W, 3\) uint8"):
        read(picture)
