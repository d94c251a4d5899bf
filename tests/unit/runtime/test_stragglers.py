"""How much slower than the others a rank is by itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.runtime.stragglers import Share, rank_ratios


def shares(*owns_s, step_s=10.0):
    return [Share(own_s, step_s, f"node-{rank}") for rank, own_s in enumerate(owns_s)]


def test_a_share_is_read_as_it_was_told():
    (share,) = shares(1.5)
    assert Share.unpack(share.pack()) == share


@given(st.lists(st.floats(1.0, 9.0), min_size=1, max_size=9), st.booleans())
def test_the_median_rank_is_once_as_slow_as_itself(owns_s, is_forward_own):
    ratios = rank_ratios(shares(*owns_s), is_forward_own=is_forward_own)
    assert 1.0 in ratios
    assert (max(ratios) > 1) == (max(owns_s) - sorted(owns_s)[(len(owns_s) - 1) // 2] > 0.5)


def test_a_slow_rank_of_two_is_measured_by_the_other():
    assert rank_ratios(shares(1, 3), is_forward_own=True) == [1, 3]


def test_where_only_the_wait_for_data_is_known_the_rest_counts_as_equal():
    """Rank 2 waits 5 s of 10 for its data; the other 5 are everybody's."""
    ratios = rank_ratios(shares(0.001, 0.001, 5.0), is_forward_own=False)
    assert ratios == pytest.approx([1, 1, 2], rel=1e-3)


def test_many_times_next_to_nothing_is_not_slow():
    assert rank_ratios(shares(1e-6, 1e-6, 1e-2), is_forward_own=True) == [1, 1, 1]
