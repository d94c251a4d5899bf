import pytest

from trainer.observe.meters import Throughput


class Clock:
    def __init__(self):
        self.at_s = 0.0

    def __call__(self):
        return self.at_s


def test_before_the_first_step_nothing_is_known():
    meter = Throughput(clock_s=Clock())
    assert (meter.images_per_s, meter.data_wait_frac, meter.time_left_s(10)) == (0, 0, None)


@pytest.mark.parametrize("step_s", [0.01, 1.0, 7.0, 100.0])
def test_a_steady_pace_is_measured_exactly_at_any_step_length(step_s):
    clock = Clock()
    meter = Throughput(window_s=30, clock_s=clock)
    for _ in range(50):
        clock.at_s += step_s
        meter.add(images=8, data_wait_s=step_s / 4)
        assert meter.images_per_s == pytest.approx(8 / step_s)
        assert meter.data_wait_frac == pytest.approx(0.25)
        assert meter.time_left_s(80) == pytest.approx(10 * step_s)


def test_the_window_forgets_what_is_older():
    clock = Clock()
    meter = Throughput(window_s=10, clock_s=clock)
    for images in [100] * 20 + [10] * 11:
        clock.at_s += 1
        meter.add(images=images)
    assert meter.images_per_s == pytest.approx(10)


def test_power_and_operations_are_those_of_the_window():
    clock = Clock()
    meter = Throughput(window_s=10, clock_s=clock)
    assert (meter.watts, meter.j_per_image, meter.flops_per_s) == (None, None, None)
    assert meter.measured_frac is None
    for joules in (1000.0, *[40.0] * 5):
        clock.at_s += 4
        meter.add(images=8, joules=joules, measured_joules=joules / 4, flops=2e9)
    assert meter.measured_frac == pytest.approx(0.25)
    assert meter.watts == pytest.approx(10)
    assert meter.j_per_image == pytest.approx(5)
    assert meter.flops_per_s == pytest.approx(0.5e9)
