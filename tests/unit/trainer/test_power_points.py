"""A sweep over power limits finds the law of the device that it measures."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.recorded_gpus import DEFAULT_W, RecordedGpus
from trainer.errors import BadWorld
from trainer.power_points import (
    NEAR_FULL_FRAC,
    Point,
    best,
    measure,
    order,
    points_of,
    record,
    table,
    verdict,
)
from trainer.power_rank import Limits, tell

IDLE_W, FULL_W, IMAGES_PER_S = 80.0, 380.0, 100.0
GPUS = ("GPU-a", "GPU-b")
IMAGES = 8


def clock_frac(limit_w):
    """Of the full clock; power is idle power and the cube of the clock, up to the limit."""
    power_w = min(limit_w, FULL_W)
    return ((power_w - IDLE_W) / (FULL_W - IDLE_W)) ** (1 / 3)


class Law:
    """A training on two GPUs that slow down under a limit; time passes as it computes."""

    def __init__(self):
        self.now_s, self.did = 0.0, []
        self.gpus = RecordedGpus(*GPUS, wants_w=FULL_W, clock_s=lambda: self.now_s)
        self.limits = Limits(self.gpus, GPUS)

    def limit(self, watts):
        self.limits.set(watts)
        self.did.append(watts)

    def step(self):
        self.now_s += IMAGES / (IMAGES_PER_S * clock_frac(self.gpus.limits["GPU-a"]))
        self.did.append("step")
        return IMAGES

    def read_j(self):
        return self.limits.read_j()

    def agree(self, is_true):
        return is_true


def swept(watts, **told):
    law = Law()
    told = {"steps": 50, "warmup_steps": 3, "window_s": 1.0, **told}
    return law, list(measure(law, order(watts), clock_s=lambda: law.now_s, **told))


limits = st.lists(st.integers(int(IDLE_W) + 20, 450), min_size=1, max_size=8)


@given(limits, st.integers(1, 60), st.floats(0.1, 30))
def test_points_are_those_of_the_law_whatever_is_measured(watts, steps, window_s):
    law, points = swept(watts, steps=steps, window_s=window_s)
    assert [point.limit_w for point in points] == [None, *sorted(set(watts), reverse=True)]
    for point in points:
        limit_w = DEFAULT_W if point.limit_w is None else point.limit_w
        assert point.images_per_s == pytest.approx(IMAGES_PER_S * clock_frac(limit_w))
        assert point.watts == pytest.approx(len(GPUS) * min(limit_w, FULL_W), rel=1e-3)
        assert point.j_per_image == pytest.approx(point.watts / point.images_per_s)
        assert point.num_steps >= steps
        assert point.seconds >= window_s * (1 - 1e-9)
    assert law.gpus.log[-2:] == [(uuid, min(watts)) for uuid in GPUS]


@given(limits)
def test_the_pick_is_the_cheapest_image_among_those_nearly_as_fast(watts):
    _, points = swept(watts)

    def energy(limit_w):
        return min(limit_w, FULL_W) / clock_frac(limit_w)

    fast = [w for w in (DEFAULT_W, *watts) if clock_frac(w) >= NEAR_FULL_FRAC]
    found = best(points)
    limit_w = DEFAULT_W if found.limit_w is None else found.limit_w
    assert energy(limit_w) == pytest.approx(min(map(energy, fast)), rel=1e-3)
    assert found.images_per_s >= NEAR_FULL_FRAC * points[0].images_per_s


def test_without_the_wish_for_speed_the_least_energy_is_where_calculus_says():
    """The energy of an image is (idle + k c^3) / c: least where idle is twice k c^3."""
    _, points = swept(range(90, 400))
    least = min(points, key=lambda point: point.j_per_image)
    assert least.limit_w == pytest.approx(1.5 * IDLE_W, abs=2)
    assert best(points).limit_w > least.limit_w


def test_each_limit_is_set_before_its_warm_up_and_that_is_not_measured():
    law, points = swept([200], steps=2, warmup_steps=3, window_s=0.001)
    assert law.did == [None, *["step"] * 5, 200, *["step"] * 5]
    assert [point.num_steps for point in points] == [2, 2]


def test_a_sweep_is_read_back_as_it_was_written():
    _, points = swept([300, 200])
    told = json.loads(json.dumps(record(points, dict.fromkeys(GPUS, DEFAULT_W))))
    assert points_of(told) == points
    assert told["best_limit_w"] == best(points).limit_w
    assert told["gpus"] == {uuid: {"default_limit_w": DEFAULT_W} for uuid in GPUS}
    first, second, _ = told["points"]
    assert first["speed_frac"] == first["energy_frac"] == 1
    assert second["speed_frac"] == second["images_per_s"] / first["images_per_s"]
    assert second["energy_frac"] == second["j_per_image"] / first["j_per_image"]


def test_counters_that_stand_still_are_told_and_nothing_is_written(tmp_path):
    law = Law()
    with pytest.raises(
        BadWorld, match=r"counters of GPU-a, GPU-b did not move in 10\.0 s\. Give a"
    ):
        tell(tmp_path, [Point(None, 50, 400, 10.0, 0.0)], law.limits)
    assert not any(tmp_path.iterdir())


def shown(points):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table(points))
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def test_the_table_and_the_verdict_say_what_a_limit_costs_and_saves():
    points = [
        Point(None, 50, 1000, 10.0, 8000.0),
        Point(300, 50, 960, 10.0, 5760.0),
        Point(200, 50, 700, 10.0, 3500.0),
    ]
    assert shown(points)[1:] == [
        "none 100.0 800 8 100 % 100 %",
        "300 W 96.0 576 6 96 % 75 %",
        "200 W 70.0 350 5 70 % 62 %",
    ]
    assert verdict(points) == (
        "least energy at 95 % of the speed or more: 300 W, 96 % of the speed for 75 % of the "
        "energy of an image"
    )
    assert (
        verdict([points[0], points[2]]) == "no limit saves energy at 95 % of the speed without one"
    )


def test_the_command_imports_without_torch():
    code = "import sys, trainer.power_sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
