"""Read a picture of a scene back and say which facts of its caption hold.

No learned model: the ground colour comes from the border, the things are the connected parts that
differ from it, a thing's colour is the nearest of the palette and its shape the best of six
templates. Painted pictures read back exactly; blobs, smears and noise read as nothing.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_prep.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    THING_COLOURS,
    Scene,
    Thing,
    draw_shape,
    parse,
)
from trainer.errors import BadInput

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

SIDE_PX = 64  # pictures are read at this size
BORDER_PX = 2
TEMPLATE_PX = 32
GROUND_REACH = 70.0  # RGB distance within which a colour may still be called by its name
THING_REACH = 90.0
DIFFERS = 42.0  # RGB distance from the ground that makes a pixel part of a thing
SOFT_PX = 0.8  # blur of the soft templates, that of an autoencoder
CALM_FRAC = 0.7  # share of the border that must have the ground colour
MIN_AREA_PX = 24
LOOSE_AREA_FRAC = 0.25  # a part smaller than this share of the largest is a crumb
MIN_MATCH = 0.68  # intersection over union with the best template
PLACE_REACH_FRAC = 0.13


@dataclass(frozen=True, slots=True)
class Spot:
    """One thing as seen in a picture."""

    thing: Thing | None
    """What it is, or None where no shape or no colour fits."""
    x_frac: float
    """Centre, from the middle of the picture, as a fraction of the side."""
    y_frac: float
    """Centre, from the middle of the picture, downwards."""
    radius_frac: float
    """Half of the longer side of its box, as a fraction of the picture."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows."""

    background: str | None
    """One of BACKGROUNDS, or None where the border is not of one known colour."""
    spots: tuple[Spot, ...]
    """Every thing, the largest first."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Which facts of a caption hold in a picture; None where the caption does not say."""

    shape_and_colour: bool
    """Exactly the right number of things, each with the right shape and the right colour."""
    background: bool
    """The ground has the right colour."""
    size: bool | None
    """One thing: it is small or large as told."""
    place: bool | None
    """One thing: it is where it should be."""
    relation: bool | None
    """Two things: both are right, and they stand to each other as told."""

    @property
    def all(self) -> bool:
        """Everything that the caption says holds."""
        told = (self.shape_and_colour, self.background, self.size, self.place, self.relation)
        return all(fact for fact in told if fact is not None)


def score(pictures: Sequence[Pixels], captions: Sequence[str]) -> list[Facts]:
    """Say of each picture which facts of its caption hold.

    Args:
        pictures: ``(H, W, 3)`` uint8 RGB each, of any size; an ``(N, H, W, 3)`` array will do.
        captions: As many captions, as `data_prep.scenes.caption` writes them.

    Returns:
        One `Facts` per picture.
    """
    if len(pictures) != len(captions):
        raise BadInput(f"{len(pictures)} pictures and {len(captions)} captions: need as many")
    pairs = zip(pictures, captions, strict=True)
    return [judge(read(picture), parse(text)) for picture, text in pairs]


def share(facts: Sequence[Facts]) -> dict[str, float]:
    """The share of pictures, 0 to 1, for which each fact holds, among those whose caption tells it.

    A fact that no caption tells is left out.
    """
    names = ("shape_and_colour", "background", "size", "place", "relation", "all")
    told = {name: [getattr(fact, name) for fact in facts] for name in names}
    kept = {name: [value for value in row if value is not None] for name, row in told.items()}
    return {name: sum(row) / len(row) for name, row in kept.items() if row}


def judge(reading: Reading, scene: Scene) -> Facts:
    """Compare what a picture shows with what it should show."""
    seen = [spot.thing for spot in reading.spots]
    right = sorted(map(str, seen)) == sorted(map(str, scene.things))
    background = reading.background == scene.background
    if scene.other is None:
        spot = reading.spots[0] if len(reading.spots) == 1 else None
        size = spot is not None and _size(spot) == scene.size
        place = spot is not None and _place(spot) == scene.place
        return Facts(right, background, size, place, None)
    relation = False
    if right:
        first = reading.spots[seen.index(scene.thing)]
        second = reading.spots[seen.index(scene.other)]
        relation = _relation(first, second) == scene.relation
    return Facts(right, background, None, None, relation)


def read(picture: Pixels) -> Reading:
    """Read a picture.

    Args:
        picture: ``(H, W, 3)`` uint8 RGB; its central square is read.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise BadInput(f"a picture of {picture.shape} {picture.dtype}: need (H, W, 3) uint8")
    pixels = _square(picture).astype(np.float32)
    inner = np.ones((SIDE_PX, SIDE_PX), bool)
    inner[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    border = pixels[inner]
    ground = np.median(border, axis=0)
    calm = float(np.mean(np.linalg.norm(border - ground, axis=1) < DIFFERS))
    name = _nearest(ground, BACKGROUNDS, GROUND_REACH) if calm >= CALM_FRAC else None
    return Reading(name, _spots(pixels, ground) if name else ())


def _square(picture: Pixels) -> Pixels:
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = np.ascontiguousarray(picture[top : top + side, left : left + side])
    if side == SIDE_PX:
        return cut
    how = cv2.INTER_AREA if side > SIDE_PX else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(cut, (SIDE_PX, SIDE_PX), interpolation=how), np.uint8)


def _nearest(colour: Floats, names: Sequence[str], reach: float) -> str | None:
    distances = [float(np.linalg.norm(colour - np.array(COLOURS[name]))) for name in names]
    best = int(np.argmin(distances))
    return names[best] if distances[best] <= reach else None


def _spots(pixels: Floats, ground: Floats) -> tuple[Spot, ...]:
    """Every connected part that differs from the ground, crumbs left out, the largest first."""
    differs = np.linalg.norm(pixels - ground, axis=2) > DIFFERS
    _, labels, stats, _ = cv2.connectedComponentsWithStats(differs.astype(np.uint8), connectivity=8)
    parts = [(int(row[cv2.CC_STAT_AREA]), label) for label, row in enumerate(stats) if label]
    largest = max(parts, default=(0, 0))[0]
    least = max(MIN_AREA_PX, LOOSE_AREA_FRAC * largest)
    kept = sorted(((area, label) for area, label in parts if area >= least), reverse=True)
    return tuple(_spot(pixels, ground, labels == label, stats[label]) for _, label in kept)


def _spot(pixels: Floats, ground: Floats, part: NDArray[np.bool_], row: NDArray[np.int32]) -> Spot:
    x, y, width, height = (int(value) for value in row[:4])
    core = part & (cv2.erode(part.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
    inside = pixels[core if core.sum() >= MIN_AREA_PX // 3 else part]
    colour = np.median(inside, axis=0)
    name = _nearest(colour, THING_COLOURS, THING_REACH)
    radius_px = round(max(width, height) / 2)
    shape = _shape(pixels, ground, colour, part, radius_px)
    return Spot(
        Thing(shape, name) if shape and name else None,
        (x + width / 2) / SIDE_PX - 0.5,
        (y + height / 2) / SIDE_PX - 0.5,
        max(width, height) / 2 / SIDE_PX,
    )


def _shape(
    pixels: Floats, ground: Floats, colour: Floats, part: NDArray[np.bool_], radius_px: int
) -> str | None:
    """The shape that covers the part best, or None where none covers it well.

    How much of the thing a pixel holds is its position between the two colours, so that soft
    edges count for what they are. A part that is too small for any template, or so mottled that
    its median colour is the ground's, has no shape.
    """
    axis = colour - ground
    if not axis.any():
        return None
    cover = np.clip((pixels - ground) @ axis / float(axis @ axis), 0, 1)
    cover *= cv2.dilate(part.astype(np.uint8), np.ones((3, 3), np.uint8))
    mask = _normal(cover.astype(np.float32))
    if mask is None:
        return None
    matches = [(_overlap(mask, template), name) for name, template in _templates(radius_px)]
    best, name = max(matches, default=(0.0, None))
    return name if best >= MIN_MATCH else None


def _overlap(a: Floats, b: Floats) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _normal(cover: Floats) -> Floats | None:
    """Move and scale a cover to fill TEMPLATE_PX by TEMPLATE_PX, its sides at half cover.

    None where no pixel is half covered.
    """
    if cover.max() < 0.5:
        return None
    edges = []
    for line in (cover.max(axis=0), cover.max(axis=1)):
        inside = np.flatnonzero(line >= 0.5)
        first, last = int(inside[0]), int(inside[-1])
        before = line[first - 1] if first else 0.0
        after = line[last + 1] if last + 1 < len(line) else 0.0
        edges.append((first - float(before), last + 1 + float(after)))
    (left, right), (top, bottom) = edges
    scale = TEMPLATE_PX / max(right - left, bottom - top)
    middle = (left + right) / 2 - 0.5, (top + bottom) / 2 - 0.5
    shift = [(TEMPLATE_PX - 1) / 2 - scale * at for at in middle]
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]], np.float32)
    moved = cv2.warpAffine(cover, matrix, (TEMPLATE_PX, TEMPLATE_PX), flags=cv2.INTER_LINEAR)
    return np.asarray(moved, np.float32)


@functools.cache
def _templates(radius_px: int) -> list[tuple[str, Floats]]:
    """Every shape painted at a radius, sharp and as soft as an autoencoder leaves it.

    None at two pixels and less, where blur leaves nothing of some of them.
    """
    found = []
    for shape in SHAPES:
        canvas = Image.new("L", (SIDE_PX * 8, SIDE_PX * 8), 0)
        middle = SIDE_PX * 4
        draw_shape(ImageDraw.Draw(canvas), shape, (middle, middle), radius_px * 8, 255, 0)
        sharp = np.asarray(canvas.reduce(8), np.float32) / np.float32(255)
        soft = np.asarray(cv2.GaussianBlur(sharp, (0, 0), SOFT_PX), np.float32)
        for cover in map(_normal, (sharp, soft)):
            if cover is None:
                return []
            found.append((shape, cover))
    return found


def _size(spot: Spot) -> str:
    return min(SIZES, key=lambda name: abs(np.log(spot.radius_frac / SIZES[name])))


def _place(spot: Spot) -> str | None:
    def distance(name: str) -> float:
        x_frac, y_frac = PLACES[name][1]
        return float(np.hypot(spot.x_frac - x_frac, spot.y_frac - y_frac))

    best = min(PLACES, key=distance)
    return best if distance(best) <= PLACE_REACH_FRAC else None


def _relation(first: Spot, second: Spot) -> str:
    """The relation whose direction is nearest to that from the second thing to the first."""
    x_frac, y_frac = first.x_frac - second.x_frac, first.y_frac - second.y_frac
    return max(RELATIONS, key=lambda name: np.dot(RELATIONS[name][1], (x_frac, y_frac)))
