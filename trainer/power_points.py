"""What a training does under power limits: measured one after the other, compared, picked."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.table import Table

CONFIG, RECORD = "power_sweep.yaml", "power_sweep.json"
"""In the folder of a sweep: what was asked for, and what was measured."""
NEAR_FULL_FRAC = 0.95
"""Of the speed without a limit: what counts as nearly as fast."""


@dataclass(frozen=True)
class Point:
    """What was measured under one limit."""

    limit_w: float | None
    """Of each GPU; None is the default of each."""
    num_steps: int
    images: int
    seconds: float
    joules: float
    """Of all GPUs, by their counters."""

    @property
    def images_per_s(self) -> float:
        """Speed."""
        return self.images / self.seconds

    @property
    def watts(self) -> float:
        """Mean power of all GPUs."""
        return self.joules / self.seconds

    @property
    def j_per_image(self) -> float:
        """Energy of one image, of the GPUs alone."""
        return self.joules / self.images


class Trial(Protocol):
    """A training whose steps can be taken one by one, on every rank."""

    def limit(self, watts: float | None) -> None:
        """Set the limit of all GPUs; None is the default of each. Returns when it is in force."""

    def step(self) -> int:
        """Take a step; return its images. The devices have done it all when this returns."""

    def read_j(self) -> float:
        """Return joules of all GPUs since some moment."""

    def agree(self, is_true: bool) -> bool:
        """Return what rank 0 says."""


def order(watts: Sequence[float]) -> tuple[float | None, ...]:
    """Put no limit first, then the limits from the highest down, each once.

    A device that cools is compared with one that was warm, and never the other way around.
    """
    return (None, *sorted(set(watts), reverse=True))


def measure(
    trial: Trial,
    limits: Sequence[float | None],
    *,
    steps: int,
    warmup_steps: int,
    window_s: float,
    clock_s: Callable[[], float] = time.monotonic,
) -> Iterator[Point]:
    """Measure under one limit after the other.

    Args:
        trial: All ranks measure together; joules and the time are those of rank 0.
        limits: In this order.
        steps: To take at least.
        warmup_steps: To take before that.
        window_s: To measure at least.
        clock_s: Seconds.
    """
    for limit_w in limits:
        trial.limit(limit_w)
        for _ in range(warmup_steps):
            trial.step()
        began_s, began_j = clock_s(), trial.read_j()
        num_steps, images = 0, 0
        while trial.agree(num_steps < steps or clock_s() - began_s < window_s):
            images += trial.step()
            num_steps += 1
        elapsed_s, joules = clock_s() - began_s, trial.read_j() - began_j
        yield Point(limit_w, num_steps, images, elapsed_s, joules)


def best(points: Sequence[Point]) -> Point:
    """Return the point with the least energy of an image among those nearly as fast as the first.

    Args:
        points: That without a limit comes first.
    """
    fast = [p for p in points if p.images_per_s >= NEAR_FULL_FRAC * points[0].images_per_s]
    return min(fast, key=lambda point: point.j_per_image)


def record(points: Sequence[Point], gpus: Mapping[str, float]) -> dict[str, Any]:
    """Return what power_sweep.json says.

    Args:
        points: That without a limit comes first.
        gpus: Default limit of each.
    """
    return {
        "gpus": {uuid: {"default_limit_w": watts} for uuid, watts in gpus.items()},
        "points": [
            {
                **asdict(point),
                "images_per_s": point.images_per_s,
                "w": point.watts,
                "j_per_image": point.j_per_image,
                **dict(zip(("speed_frac", "energy_frac"), _shares(point, points[0]), strict=True)),
            }
            for point in points
        ],
        "best_limit_w": best(points).limit_w,
        "near_full_frac": NEAR_FULL_FRAC,
    }


def points_of(told: Mapping[str, Any]) -> list[Point]:
    """Read the points of such a record back."""
    fields = Point.__dataclass_fields__
    return [Point(**{name: row[name] for name in fields}) for row in told["points"]]


def table(points: Sequence[Point]) -> Table:
    """Lay the points out."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("limit of a GPU", "images/s", "W, all GPUs", "J/image", "speed", "energy"):
        shown.add_column(name, justify="right")
    for point in points:
        shown.add_row(
            limit_words(point),
            f"{point.images_per_s:,.1f}",
            f"{point.watts:,.0f}",
            f"{point.j_per_image:,.3g}",
            *(f"{100 * share:.0f} %" for share in _shares(point, points[0])),
        )
    return shown


def verdict(points: Sequence[Point]) -> str:
    """Say which limit to take."""
    found, near = best(points), f"{100 * NEAR_FULL_FRAC:.0f} % of the speed"
    if found.limit_w is None:
        return f"no limit saves energy at {near} without one"
    speed, energy = _shares(found, points[0])
    return (
        f"least energy at {near} or more: {limit_words(found)}, {100 * speed:.0f} % of the speed "
        f"for {100 * energy:.0f} % of the energy of an image"
    )


def limit_words(point: Point) -> str:
    """Name a point's limit."""
    return "none" if point.limit_w is None else f"{point.limit_w:g} W"


def _shares(point: Point, full: Point) -> tuple[float, float]:
    """Return speed and energy of an image, as shares of those without a limit."""
    return point.images_per_s / full.images_per_s, point.j_per_image / full.j_per_image
