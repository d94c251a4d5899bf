"""Paint captioned scenes of coloured shapes, every one a pure function of its index and a seed.

A scene is one thing of a size at a place, or two things in a relation, on a background:

    a small red circle on the left, on a yellow background
    a red circle above a blue square, on a white background

`caption` and `parse` are inverse, so a generated picture can be scored exactly against its caption
(data_prep/scene_score.py). A tenth of the combinations (`is_held_out`) is never drawn for training,
nor is any scene with one of `UNSEEN_PAIRS`, the harder test of putting known words together.
"""

import hashlib
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image, ImageDraw

from trainer.errors import BadInput

T = TypeVar("T")
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 36, 42),
    "orange": (241, 122, 22),
    "yellow": (253, 224, 50),
    "green": (42, 152, 72),
    "blue": (38, 84, 214),
    "purple": (136, 48, 170),
    "black": (24, 24, 28),
    "white": (246, 246, 244),
    "grey": (150, 152, 154),
}
THING_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
BACKGROUNDS = ("white", "grey", "black", "yellow", "blue")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.15, "large": 0.235}  # radius as a fraction of the shorter side
PAIR_RADIUS_FRAC = 0.175
PLACES: dict[
    str, tuple[str, tuple[float, float]]
] = {  # phrase; centre from the middle of the picture
    "left": ("on the left", (-0.23, 0.0)),
    "right": ("on the right", (0.23, 0.0)),
    "top": ("at the top", (0.0, -0.23)),
    "bottom": ("at the bottom", (0.0, 0.23)),
    "middle": ("in the middle", (0.0, 0.0)),
}
RELATIONS: dict[str, tuple[str, tuple[float, float]]] = {  # phrase; centre of the first thing
    "above": ("above", (0.0, -0.25)),
    "below": ("below", (0.0, 0.25)),
    "left_of": ("to the left of", (-0.25, 0.0)),
    "right_of": ("to the right of", (0.25, 0.0)),
}
UNSEEN_PAIRS = frozenset({("green", "star"), ("orange", "ring"), ("purple", "triangle")})
HELD_OUT_IN = 10  # one combination in this many is held out
TWO_THINGS_FRAC = 0.35
SMALLEST_PX = 8
MOVE_FRAC, SCALE_FRAC, SHADE = 0.005, 0.02, 6  # how far jitter goes, each way


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape in a colour."""

    shape: str
    """One of SHAPES."""
    colour: str
    """One of THING_COLOURS."""

    def __post_init__(self) -> None:
        _one_of("shape", self.shape, SHAPES)
        _one_of("colour of a thing", self.colour, THING_COLOURS)


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing with a size and a place, or two things in a relation, on a background."""

    background: str
    """One of BACKGROUNDS, never the colour of a thing."""
    thing: Thing
    """The only thing, or the one that the relation speaks of first."""
    size: str | None = None
    """One of SIZES for one thing, None for two."""
    place: str | None = None
    """One of PLACES for one thing, None for two."""
    relation: str | None = None
    """One of RELATIONS for two things, None for one."""
    other: Thing | None = None
    """The second thing."""

    def __post_init__(self) -> None:
        _one_of("background", self.background, BACKGROUNDS)
        if self.other is None:
            _one_of("size", self.size, SIZES)
            _one_of("place", self.place, PLACES)
        else:
            _one_of("relation", self.relation, RELATIONS)
        extra = (self.relation,) if self.other is None else (self.size, self.place)
        if any(value is not None for value in extra):
            raise BadInput("a scene has a size and a place (one thing) or a relation (two things)")
        if len(set(self.things)) < len(self.things):
            raise BadInput(f"two equal things ({self.thing}): give them another shape or colour")
        if any(thing.colour == self.background for thing in self.things):
            raise BadInput(f"a {self.background} thing cannot be seen on {self.background}")

    @property
    def things(self) -> tuple[Thing, ...]:
        """The things, the first one first."""
        return (self.thing,) if self.other is None else (self.thing, self.other)


def _one_of(what: str, value: str | None, known: Collection[str]) -> None:
    if value not in known:
        raise BadInput(f"{what}: got {value!r}, know {', '.join(known)}")


class _Choices:
    """A stream of choices that is a function of its name alone."""

    def __init__(self, *name: object) -> None:
        digest = hashlib.blake2b("\0".join(map(str, name)).encode(), digest_size=48).digest()
        self._left = int.from_bytes(digest, "big")

    def pick(self, options: Sequence[T]) -> T:
        self._left, chosen = divmod(self._left, len(options))
        return options[chosen]

    def uniform(self, low: float, high: float) -> float:
        self._left, chosen = divmod(self._left, 1 << 20)
        return low + (high - low) * chosen / (1 << 20)


def draw_scene(index: int, *, seed: int, two_things_frac: float = TWO_THINGS_FRAC) -> Scene:
    """The training scene number `index`; never a held-out one.

    Args:
        index: Any integer from 0; the same one gives the same scene.
        seed: Another seed gives another sequence.
        two_things_frac: Share of the scenes with two things, 0 to 1.
    """
    attempt = 0
    while True:
        scene = _any_scene(_Choices("train", seed, index, attempt), two_things_frac)
        if scene is not None and not is_held_out(scene):
            return scene
        attempt += 1


def held_out_scenes(
    count: int,
    *,
    seed: int,
    two_things_frac: float = TWO_THINGS_FRAC,
    unseen_pairs: bool = False,
) -> list[Scene]:
    """Draw `count` different scenes that training never sees.

    Args:
        count: How many; at most a hundred or so of each kind can be asked for in earnest.
        seed: Another seed gives another choice.
        two_things_frac: Share of the scenes with two things, 0 to 1.
        unseen_pairs: True asks for scenes with a pair of UNSEEN_PAIRS, False for new
            combinations of pairs that training has seen.
    """
    found: dict[Scene, None] = {}
    for attempt in range(max(1000, 2000 * count)):
        if len(found) == count:
            break
        scene = _any_scene(_Choices("held out", seed, attempt), two_things_frac)
        if scene and is_held_out(scene) and _has_unseen_pair(scene) == unseen_pairs:
            found[scene] = None
    if len(found) < count:
        raise BadInput(
            f"asked for {count} held-out scenes, there are about {len(found)}: ask fewer"
        )
    return list(found)


def held_out_captions(count: int, *, seed: int) -> list[str]:
    """Captions of `count` different scenes that training never sees."""
    return [caption(scene) for scene in held_out_scenes(count, seed=seed)]


def is_held_out(scene: Scene) -> bool:
    """Whether this combination is kept from training, for the evaluation."""
    digest = hashlib.blake2b(caption(scene).encode(), digest_size=8).digest()
    return _has_unseen_pair(scene) or int.from_bytes(digest, "big") % HELD_OUT_IN == 0


def _has_unseen_pair(scene: Scene) -> bool:
    return any((thing.colour, thing.shape) in UNSEEN_PAIRS for thing in scene.things)


def _any_scene(choices: _Choices, two_things_frac: float) -> Scene | None:
    """A scene drawn evenly from its kind, or None where the draw is no legal scene."""
    two = choices.uniform(0, 1) < two_things_frac
    background = choices.pick(BACKGROUNDS)
    thing = Thing(choices.pick(SHAPES), choices.pick(THING_COLOURS))
    other = Thing(choices.pick(SHAPES), choices.pick(THING_COLOURS))
    if background in (thing.colour, other.colour if two else None) or (two and thing == other):
        return None
    if two:
        relation = choices.pick(tuple(RELATIONS))
        return Scene(background, thing, relation=relation, other=other)
    return Scene(background, thing, choices.pick(tuple(SIZES)), choices.pick(tuple(PLACES)))


def caption(scene: Scene) -> str:
    """The scene in plain English; `parse` reads it back."""
    ground = f"on {_a(scene.background)} background"
    if scene.other is None:
        thing = f"{scene.size} {scene.thing.colour} {scene.thing.shape}"
        return f"{_a(thing)} {PLACES[scene.place or ''][0]}, {ground}"
    first, second = (_a(f"{thing.colour} {thing.shape}") for thing in scene.things)
    return f"{first} {RELATIONS[scene.relation or ''][0]} {second}, {ground}"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _any_of(words: Sequence[str]) -> str:
    return "(" + "|".join(words) + ")"


_THING = rf"an? {_any_of(THING_COLOURS)} {_any_of(SHAPES)}"
_GROUND = rf", on an? {_any_of(BACKGROUNDS)} background"
_PLACE_OF = {phrase: name for name, (phrase, _) in PLACES.items()}
_RELATION_OF = {phrase: name for name, (phrase, _) in RELATIONS.items()}
_ONE = re.compile(
    rf"an? {_any_of(tuple(SIZES))} {_any_of(THING_COLOURS)} {_any_of(SHAPES)} "
    rf"{_any_of(tuple(_PLACE_OF))}{_GROUND}"
)
_TWO = re.compile(rf"{_THING} {_any_of(tuple(_RELATION_OF))} {_THING}{_GROUND}")


def parse(text: str) -> Scene:
    """The scene that a caption describes.

    Raises:
        BadInput: The text is no caption of a scene.
    """
    words = " ".join(text.lower().split()).rstrip(".")
    if found := _ONE.fullmatch(words):
        size, colour, shape, place, background = found.groups()
        return Scene(background, Thing(shape, colour), size, _PLACE_OF[place])
    if found := _TWO.fullmatch(words):
        colour, shape, phrase, colour_2, shape_2, background = found.groups()
        things = Thing(shape, colour), Thing(shape_2, colour_2)
        return Scene(background, things[0], relation=_RELATION_OF[phrase], other=things[1])
    raise BadInput(
        f"no caption of a scene: {text!r}; write it like 'a small red circle on the left, on a "
        "yellow background' or 'a red circle above a blue square, on a white background' "
        f"(shapes: {', '.join(SHAPES)}; colours: {', '.join(THING_COLOURS)}; "
        f"backgrounds: {', '.join(BACKGROUNDS)})"
    )


def paint(
    scene: Scene, width_px: int, height_px: int, *, jitter_seed: int | None = None
) -> Image.Image:
    """Paint a scene, anti-aliased; all of it stays inside the central square of the picture.

    Args:
        scene: What to paint.
        width_px: Width, at least 8.
        height_px: Height, at least 8.
        jitter_seed: Moves, scales and shades a little, as a function of the seed and the scene;
            None paints it exactly.

    Returns:
        An RGB picture of width_px by height_px.
    """
    side_px = min(width_px, height_px)
    if side_px < SMALLEST_PX:
        raise BadInput(f"a scene of {width_px}x{height_px} px: both sides need {SMALLEST_PX} px")
    choices = None if jitter_seed is None else _Choices("paint", jitter_seed, caption(scene))
    scale = max(2, min(8, 512 // side_px))
    ground = _shade(COLOURS[scene.background], choices)
    canvas = Image.new("RGB", (width_px * scale, height_px * scale), ground)
    draw = ImageDraw.Draw(canvas)
    unit = side_px * scale
    for thing, (x_frac, y_frac), radius_frac in _layout(scene):
        x = width_px * scale / 2 + (x_frac + _wobble(choices, MOVE_FRAC)) * unit
        y = height_px * scale / 2 + (y_frac + _wobble(choices, MOVE_FRAC)) * unit
        radius = radius_frac * (1 + _wobble(choices, SCALE_FRAC)) * unit
        fill = _shade(COLOURS[thing.colour], choices)
        draw_shape(draw, thing.shape, (x, y), radius, fill, ground)
    return canvas.reduce(scale)


def _layout(scene: Scene) -> list[tuple[Thing, tuple[float, float], float]]:
    """Each thing with its centre from the middle and its radius, as fractions of the side."""
    if scene.other is None:
        return [(scene.thing, PLACES[scene.place or ""][1], SIZES[scene.size or ""])]
    x_frac, y_frac = RELATIONS[scene.relation or ""][1]
    return [
        (scene.thing, (x_frac, y_frac), PAIR_RADIUS_FRAC),
        (scene.other, (-x_frac, -y_frac), PAIR_RADIUS_FRAC),
    ]


def _wobble(choices: _Choices | None, reach: float) -> float:
    return choices.uniform(-reach, reach) if choices else 0.0


def _shade(colour: Colour, choices: _Choices | None) -> Colour:
    red, green, blue = (round(min(255, max(0, v + _wobble(choices, SHADE)))) for v in colour)
    return red, green, blue


def draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    at: tuple[float, float],
    radius: float,
    fill: Colour | int,
    hole: Colour | int,
) -> None:
    """Draw one shape around `at` (x, y in px); `hole` is the colour inside a ring."""
    x, y = at
    if shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        if shape == "ring":
            r = 0.55 * radius
            draw.ellipse((x - r, y - r, x + r, y + r), fill=hole)
        return
    draw.polygon([(x + radius * u, y + radius * v) for u, v in _OUTLINES[shape]], fill=fill)


def _star() -> list[tuple[float, float]]:
    spokes = [(1.15 if i % 2 == 0 else 0.5, math.pi * (i / 5 - 0.5)) for i in range(10)]
    return [(r * math.cos(angle), r * math.sin(angle) + 0.06) for r, angle in spokes]


_ARM = 0.34
_QUARTER = [(-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM)]
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0.0, -1.0), (1.06, 0.84), (-1.06, 0.84)],
    "star": _star(),
    "cross": [
        turn
        for k in range(4)
        for turn in [((u, v), (-v, u), (-u, -v), (v, -u))[k] for u, v in _QUARTER]
    ],
}
