import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_config
from trainer.runtime.guard import Guard

CFG = replace(tiny_config().rollback, spike_sigmas=6.0, window_steps=16)


def judge(guard, loss, grad_norm=1.0, *, overflowed=False):
    return guard.judge(loss, grad_norm, overflowed=overflowed)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_fault_and_is_not_remembered(bad):
    guard = Guard(CFG)
    assert judge(guard, 1.0) is None
    assert "the loss is" in str(judge(guard, bad))
    assert "gradient's norm is" in str(judge(guard, 1.0, bad))
    assert judge(guard, 1.0, bad, overflowed=True) is None, "the loss scale deals with it"
    assert guard.recent == [1.0, 1.0]


def test_a_leap_is_a_fault_once_enough_was_seen():
    guard = Guard(CFG)
    assert judge(guard, 100.0) is None
    for n in range(16):
        assert judge(guard, 1 + 0.1 * math.sin(n)) is None
    assert "leapt to 3, above" in str(judge(guard, 3.0))
    assert judge(guard, 1.1) is None
    assert judge(Guard(replace(CFG, spike_sigmas=None), guard.recent), 1e9) is None


@given(
    st.lists(st.floats(0.1, 10), min_size=40, max_size=80), st.integers(0, 39), st.floats(0.1, 9)
)
def test_a_resumed_guard_judges_as_one_that_went_on(losses, cut, scale):
    one = Guard(CFG)
    verdicts = [judge(one, loss) for loss in losses]
    other = Guard(CFG)
    first = [judge(other, loss) for loss in losses[:cut]]
    resumed = Guard(CFG, other.recent)
    assert first + [judge(resumed, loss) for loss in losses[cut:]] == verdicts
    scaled = Guard(CFG)
    again = [judge(scaled, scale * loss) is None for loss in losses]
    # In units of the losses' own spread: judging knows no scale, but for rounding at the limit.
    assert sum(a != (v is None) for a, v in zip(again, verdicts, strict=True)) <= 1
