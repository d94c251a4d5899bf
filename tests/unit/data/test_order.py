import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import permute, samples_at, unpermute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1000, 9973, 65536])
def test_every_epoch_visits_every_sample_once(size):
    for epoch in (0, 1, 5):
        out = permute(np.arange(size), size, seed=3, epoch=epoch)
        assert np.array_equal(np.sort(out), np.arange(size))


@given(
    size=st.integers(1, 5_526_641_167),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_inverse_undoes_the_permutation_at_any_size(size, seed, epoch, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50)))
    samples = permute(places, size, seed=seed, epoch=epoch)
    assert ((samples >= 0) & (samples < size)).all()
    assert np.array_equal(unpermute(samples, size, seed=seed, epoch=epoch), places)


def test_epochs_and_seeds_differ_and_neighbours_scatter():
    size = 10_000
    first = permute(np.arange(size), size, seed=0, epoch=0)
    for other in ({"seed": 0, "epoch": 1}, {"seed": 1, "epoch": 0}):
        assert (permute(np.arange(size), size, **other) == first).mean() < 0.01
    # The mean distance between neighbours of a uniform shuffle is size/3.
    assert abs(np.abs(np.diff(first)).mean() / (size / 3) - 1) < 0.05


def test_a_batch_rolls_over_into_the_next_epoch():
    samples, visits = samples_at(np.arange(0, 30), num_samples=10, seed=1)
    assert visits.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    for epoch in range(3):
        assert sorted(samples[visits == epoch].tolist()) == list(range(10))


def test_the_sequence_does_not_depend_on_how_it_is_cut():
    whole, _ = samples_at(np.arange(100), num_samples=37, seed=5)
    pieces = [
        samples_at(np.arange(a, a + 20), num_samples=37, seed=5)[0] for a in range(0, 100, 20)
    ]
    assert np.array_equal(np.concatenate(pieces), whole)
