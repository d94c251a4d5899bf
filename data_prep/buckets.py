"""Aspect buckets: the picture sizes of nearly equal area that a dataset is encoded at."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from trainer.config import EncodersConfig


class Box(NamedTuple):
    """Width and height of a bucket's pictures, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def make_boxes(encoders: EncodersConfig) -> tuple[Box, ...]:
    """Return the sizes that pictures are encoded at, by rising aspect ratio (width / height).

    Without `encoders.buckets` that is the square alone. With it, every multiple of step_px gets
    the largest other side at which the area is at most image_side_px^2, so that no bucket costs
    more than the square. This is NovelAI's rule ("Aspect Ratio Bucketing", 2022) with a bound on
    the aspect ratio in place of bounds on the sides.
    """
    side_px = encoders.image_side_px
    boxes = {Box(side_px, side_px)}
    if encoders.buckets is not None:
        step_px, max_aspect = encoders.buckets.step_px, encoders.buckets.max_aspect
        for width in range(step_px, math.floor(side_px * max_aspect) + 1, step_px):
            height = side_px**2 // width // step_px * step_px
            if height and max(width, height) <= max_aspect * min(width, height):
                boxes |= {Box(width, height), Box(height, width)}
    return tuple(sorted(boxes, key=lambda box: (box.width / box.height, box)))


def nearest_box(boxes: Sequence[Box], width: int, height: int) -> Box:
    """Return the box whose aspect ratio is nearest to a picture's, on a logarithmic scale."""
    aspect = math.log(width / height)
    return min(boxes, key=lambda box: abs(math.log(box.width / box.height) - aspect))


def print_buckets(counts: Mapping[str, int]) -> None:
    """Print how many pictures each bucket has.

    Args:
        counts: 'WIDTHxHEIGHT' -> pictures.
    """
    most, total = max(counts.values()), sum(counts.values())
    table = Table("bucket", "aspect", "pictures", "share", "", title="Aspect buckets")
    for column in table.columns[1:4]:
        column.justify = "right"
    sizes = [Box(*map(int, name.split("x"))) for name in counts]
    for box in sorted(sizes, key=lambda box: box.width / box.height):
        count = counts[str(box)]
        share, bar = f"{100 * count / total:.1f} %", "#" * math.ceil(30 * count / most)
        table.add_row(str(box), f"{box.width / box.height:.2f}", str(count), share, bar)
    Console().print(table)
