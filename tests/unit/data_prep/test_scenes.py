"""Scenes: captions and scenes are inverse, training and evaluation never meet, painting is pure."""

import itertools

import numpy as np
import pytest

from data_prep.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    THING_COLOURS,
    UNSEEN_PAIRS,
    Scene,
    Thing,
    caption,
    draw_scene,
    held_out_captions,
    held_out_scenes,
    is_held_out,
    paint,
    parse,
)
from trainer.errors import BadInput

THINGS = [Thing(shape, colour) for shape in SHAPES for colour in THING_COLOURS]
SINGLES = [
    Scene(background, thing, size, place)
    for background, thing, size, place in itertools.product(BACKGROUNDS, THINGS, SIZES, PLACES)
    if thing.colour != background
]
PAIRS = [
    Scene(background, first, relation=relation, other=second)
    for background, relation, first, second in itertools.product(
        BACKGROUNDS, RELATIONS, THINGS, THINGS
    )
    if first != second and background not in (first.colour, second.colour)
]
RED_CIRCLE, BLUE_SQUARE = Thing("circle", "red"), Thing("square", "blue")


def test_parse_is_the_inverse_of_caption_for_every_scene():
    captions = {caption(scene): scene for scene in SINGLES + PAIRS}
    assert len(captions) == len(SINGLES) + len(PAIRS)
    assert all(parse(text) == scene for text, scene in captions.items())


def test_captions_are_plain_english():
    one = Scene("yellow", RED_CIRCLE, "small", "left")
    two = Scene("white", Thing("ring", "orange"), relation="left_of", other=BLUE_SQUARE)
    assert caption(one) == "a small red circle on the left, on a yellow background"
    assert caption(two) == "an orange ring to the left of a blue square, on a white background"


def test_parse_forgives_capitals_spaces_and_a_full_stop():
    assert parse(" A small  red circle On the left, on a yellow background. ") == Scene(
        "yellow", RED_CIRCLE, "small", "left"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a red circle on a yellow background",
        "a small red circle on the left, on a purple background",
        "a small red hexagon on the left, on a yellow background",
        "a red circle above a blue square, on a white background and a star",
    ],
)
def test_parse_refuses_what_is_no_caption(text):
    with pytest.raises(BadInput, match="write it like 'a small red circle"):
        parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"background": "pink"}, "background: got 'pink', know white"),
        ({"size": "huge"}, "size: got 'huge'"),
        ({"size": None}, "size: got None"),
        ({"place": "above"}, "place: got 'above'"),
        ({"other": BLUE_SQUARE}, "relation: got None"),
        ({"other": BLUE_SQUARE, "relation": "above"}, "one thing"),
        ({"relation": "above"}, "one thing"),
        ({"thing": Thing("star", "yellow")}, "cannot be seen"),
        (
            {"other": RED_CIRCLE, "relation": "above", "size": None, "place": None},
            "two equal things",
        ),
    ],
)
def test_an_impossible_scene_is_refused(fields, message):
    good = {"background": "yellow", "thing": RED_CIRCLE, "size": "small", "place": "left"}
    with pytest.raises(BadInput, match=message):
        Scene(**{**good, **fields})


@pytest.mark.parametrize(
    ("shape", "colour", "message"),
    [("cube", "red", "shape: got 'cube'"), ("star", "grey", "colour of a thing: got 'grey'")],
)
def test_an_unknown_thing_is_refused(shape, colour, message):
    with pytest.raises(BadInput, match=message):
        Thing(shape, colour)


def test_a_drawn_scene_depends_on_index_and_seed_alone():
    scenes = [draw_scene(index, seed=3) for index in range(200)]
    assert [draw_scene(index, seed=3) for index in reversed(range(200))] == scenes[::-1]
    assert [draw_scene(index, seed=4) for index in range(200)] != scenes


def test_training_never_draws_a_held_out_scene():
    drawn = {draw_scene(index, seed=0) for index in range(3000)}
    assert not any(is_held_out(scene) for scene in drawn)
    assert not drawn & set(held_out_scenes(100, seed=0))
    assert not any((thing.colour, thing.shape) in UNSEEN_PAIRS for s in drawn for thing in s.things)


def test_training_draws_every_word():
    drawn = [draw_scene(index, seed=0) for index in range(1000)]
    words = {word.strip(",") for scene in drawn for word in caption(scene).split()}
    assert {*SHAPES, *THING_COLOURS, *BACKGROUNDS, *SIZES} <= words
    assert {scene.place for scene in drawn} == {*PLACES, None}
    assert {scene.relation for scene in drawn} == {*RELATIONS, None}


@pytest.mark.parametrize("frac", [0.0, 0.5, 1.0])
def test_the_share_of_two_things_is_the_one_asked_for(frac):
    drawn = [draw_scene(index, seed=0, two_things_frac=frac) for index in range(800)]
    share = sum(scene.other is not None for scene in drawn) / len(drawn)
    assert share == pytest.approx(frac, abs=0.08)


def test_about_a_tenth_of_the_seen_pairs_is_held_out():
    fresh = [s for s in SINGLES if not {(t.colour, t.shape) for t in s.things} & UNSEEN_PAIRS]
    assert sum(map(is_held_out, fresh)) / len(fresh) == pytest.approx(0.1, abs=0.02)


def test_held_out_captions_are_held_out_different_and_repeatable():
    captions = held_out_captions(64, seed=1)
    assert len(set(captions)) == 64
    assert all(is_held_out(parse(text)) for text in captions)
    assert held_out_captions(64, seed=1) == captions != held_out_captions(64, seed=2)


def test_the_harder_test_asks_for_unseen_pairs_only():
    def unseen(scene: Scene) -> bool:
        return any((thing.colour, thing.shape) in UNSEEN_PAIRS for thing in scene.things)

    assert all(map(unseen, held_out_scenes(50, seed=0, unseen_pairs=True)))
    assert not any(map(unseen, held_out_scenes(50, seed=0)))


def test_more_held_out_scenes_than_there_are_is_refused():
    with pytest.raises(BadInput, match="ask fewer"):
        held_out_scenes(900, seed=0, two_things_frac=0.0)


@pytest.mark.parametrize("size", [(8, 8), (24, 24), (64, 48), (100, 333), (1024, 768)])
def test_a_painted_picture_has_the_size_asked_for_and_repeats(size):
    scene = draw_scene(1, seed=0)
    picture = paint(scene, *size, jitter_seed=5)
    assert (picture.size, picture.mode) == (size, "RGB")
    assert picture.tobytes() == paint(scene, *size, jitter_seed=5).tobytes()


def test_jitter_changes_the_picture():
    scene = draw_scene(1, seed=0)
    pictures = {paint(scene, 64, 64, jitter_seed=seed).tobytes() for seed in (None, 0, 1)}
    assert len(pictures) == 3


def test_a_picture_without_jitter_shows_the_colours_of_the_palette():
    for thing in THINGS:
        background = "white" if thing.colour != "white" else "black"
        pixels = np.asarray(paint(Scene(background, thing, "large", "middle"), 64, 64))
        found = {tuple(int(v) for v in pixel) for pixel in pixels.reshape(-1, 3)}
        assert {COLOURS[background], COLOURS[thing.colour]} <= found


def test_a_picture_too_small_to_show_anything_is_refused():
    with pytest.raises(BadInput, match=r"7x64 px: both sides need 8 px"):
        paint(draw_scene(0, seed=0), 7, 64)
