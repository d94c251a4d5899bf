import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_run import WholeTensors
from trainer.runtime.ema import Ema, gamma_of, half_life, power


class Live(WholeTensors):
    def __init__(self, *values):
        super().__init__({str(n): torch.tensor(value) for n, value in enumerate(values)})
        for fragment, value in zip(self, values, strict=True):
            fragment.weight.copy_(torch.tensor(value).flatten())


@given(st.floats(0.01, 0.28))
def test_gamma_gives_the_profile_its_relative_width(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma_rel)


@given(st.floats(0.03, 0.28), st.lists(st.integers(1, 500), min_size=1, max_size=12))
def test_a_power_average_weighs_the_past_by_its_power(sigma_rel, steps):
    """Whatever the sizes of the steps: the weight of an interval of images is its integral."""
    decay, gamma = power(sigma_rel), gamma_of(sigma_rel)
    weights, seen = [], 0
    for size in steps:
        seen += size
        kept = decay(size, seen)
        weights = [kept * weight for weight in weights] + [1 - kept]
    ends = [sum(steps[: n + 1]) for n in range(len(steps))]
    starts = [0, *ends[:-1]]
    for weight, start, end in zip(weights, starts, ends, strict=True):
        exact = (end / seen) ** (gamma + 1) - (start / seen) ** (gamma + 1)
        assert weight == pytest.approx(exact, abs=1e-12)


@given(st.floats(1, 1e4), st.lists(st.integers(1, 500), min_size=2, max_size=12))
def test_a_half_life_is_what_it_says_however_the_images_are_cut_into_steps(images, steps):
    decay = half_life(images, warmup_ratio=1e9)
    total = sum(steps)
    assert math.prod(decay(size, 1e9) for size in steps) == pytest.approx(0.5 ** (total / images))


def test_early_on_the_half_life_is_a_share_of_the_images_seen():
    assert half_life(1e6, 0.1)(10, 100) == 0.5
    assert half_life(50, 0.1)(50, 1e9) == 0.5


def test_each_average_moves_alone_and_nothing_moves_without_a_change():
    live = Live([1.0, 2.0], [3.0])
    ema = Ema(live, {"fast": lambda *_: 0.0, "slow": lambda *_: 0.75})
    ema.update(images_per_step=1, images_seen=1)
    assert [t.tolist() for t in ema.tensors()["slow"]] == [[1.0, 2.0], [3.0]]
    for fragment in live:
        fragment.weight.add_(4)
    ema.update(images_per_step=1, images_seen=2)
    assert [t.tolist() for t in ema.tensors()["fast"]] == [[5.0, 6.0], [7.0]]
    assert [t.tolist() for t in ema.tensors()["slow"]] == [[2.0, 3.0], [4.0]]
