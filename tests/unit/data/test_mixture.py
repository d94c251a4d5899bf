import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.mixture import WHOLE, deal, positions_of, shares, taken

WEIGHTS = st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.1)


@given(WEIGHTS, st.integers(0, 2000), st.integers(0, 100))
def test_a_deal_is_the_same_however_it_is_cut(weights, first, count):
    parts = shares(weights)
    members, samples = deal(0, first + count, parts)
    part_members, part_samples = deal(first, count, parts)
    assert (members[first:] == part_members).all()
    assert (samples[first:] == part_samples).all()


@given(WEIGHTS, st.integers(0, 10**12))
def test_every_member_has_its_quota_within_about_one_sample(weights, position):
    parts = shares(weights)
    counts = taken(position, parts)
    assert sum(counts) == position
    for count, share in zip(counts, parts, strict=True):
        assert abs(count - position * share / sum(parts)) <= max(1, len(parts) / 2)


@given(WEIGHTS, st.integers(0, 10**11), st.integers(1, 50))
def test_positions_are_the_inverse_of_the_deal(weights, first, count):
    parts = shares(weights)
    members, samples = deal(first, count, parts)
    for member in range(len(parts)):
        mine = members == member
        where = positions_of(member, samples[mine], parts)
        assert (where == first + np.flatnonzero(mine)).all()
        assert (np.diff(samples[mine]) == 1).all()


def test_a_member_without_weight_never_comes():
    members, _ = deal(0, 1000, shares([1.0, 0.0, 3.0]))
    assert np.bincount(members, minlength=3).tolist() == [250, 0, 750]


@pytest.mark.parametrize("weights", [[1e-9, 1.0], [3.0, 3.0], [0.0, 2.0]])
def test_weights_become_whole_shares_and_none_above_zero_is_lost(weights):
    parts = shares(weights)
    assert all((part > 0) == (weight > 0) for part, weight in zip(parts, weights, strict=True))
    assert sum(parts) == pytest.approx(WHOLE, abs=len(parts))
