"""Intervals hold the truth as often as they say."""

import numpy as np
import pytest

from trainer.errors import BadInput
from trainer.quality import statistics
from trainer.quality.bootstrap import interval
from trainer.quality.resampled import frechet_statistic, kernel_statistic, mean_statistic
from trainer.quality.statistics import (
    fit_gaussian,
    frechet_distance,
    gaussian,
    kernel_distance,
)


def normal(seed, count, width, *, shift=0.0):
    return shift + np.random.default_rng(seed).standard_normal((count, width))


def assert_share(held, expected, *, tolerance):
    """Within three standard errors of what the method gives, which is near what it promises."""
    error = 3 * np.sqrt(expected * (1 - expected) / len(held))
    assert abs(np.mean(held) - expected) < error + tolerance


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says(level):
    rng, held = np.random.default_rng(0), []
    for _ in range(500):
        values = rng.exponential(size=61)  # skewed, of mean 1
        found = interval(mean_statistic(values), 61, seed=rng, draws=300, level=level)
        assert found.value == pytest.approx(values.mean())
        held.append(found.low <= 1 <= found.high)
    assert_share(held, level, tolerance=0.02)


@pytest.mark.parametrize("count", [11, 1000])
def test_the_interval_of_a_mean_is_as_wide_as_the_normal_one(count):
    values = np.random.default_rng(0).standard_normal(count)
    found = interval(mean_statistic(values), count, seed=1, draws=4000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(count)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)
    assert found.bias == pytest.approx(0, abs=0.1 * half)


@pytest.mark.parametrize(
    ("count", "width"), [(60, 12), (40, 100)], ids=["many pictures", "fewer than dimensions"]
)
def test_the_interval_of_a_frechet_distance_is_that_of_other_sets_of_as_many_pictures(count, width):
    """It has about their width and holds their mean; not moved, it would lie above."""
    law = gaussian(np.zeros(width), np.eye(width))
    sets = [normal(i, count, width, shift=0.4) for i in range(120)]
    distances = [frechet_distance(fit_gaussian(rows), law) for rows in sets]
    truth = np.mean(distances)
    found = [
        interval(frechet_statistic(rows, law), count, seed=i, draws=100)
        for i, rows in enumerate(sets)
    ]
    assert_share([each.low <= truth <= each.high for each in found], 0.95, tolerance=0.03)
    assert np.mean([each.low + each.bias <= truth <= each.high + each.bias for each in found]) < 0.6
    breadth = np.mean([each.high - each.low for each in found])
    assert breadth == pytest.approx(2 * 1.96 * np.std(distances), rel=0.25)


def test_the_bias_of_a_frechet_distance_is_its_distance_from_that_of_infinitely_many_pictures():
    law, shift = gaussian(np.zeros(12), np.eye(12)), 0.4
    found = [
        interval(frechet_statistic(normal(i, 150, 12, shift=shift), law), 150, seed=i, draws=40)
        for i in range(60)
    ]
    truth = 12 * shift**2
    assert np.mean([each.value for each in found]) > 1.15 * truth
    assert np.mean([each.value - each.bias for each in found]) == pytest.approx(truth, rel=0.05)


def test_the_interval_of_a_kernel_distance_holds_the_distance_of_the_laws():
    """To a set that stays as it is, so the truth is what many pictures have to that set."""
    other = normal(10_000, 300, 6)
    truth = kernel_distance(normal(10_001, 4000, 6, shift=0.5), other)
    held = []
    for i in range(200):
        rows = normal(i, 80, 6, shift=0.5)
        found = interval(kernel_statistic(rows, other), 80, seed=i, draws=200)
        held.append(found.low <= truth <= found.high)
    assert_share(held, 0.95, tolerance=0.03)


@pytest.mark.parametrize(("count", "width", "rank"), [(40, 12, 12), (12, 40, 40), (30, 40, 8)])
def test_the_statistic_of_a_sample_is_that_of_its_pictures(count, width, rank, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_NUMBERS", 100)
    rows = normal(0, count, width, shift=3)
    other = normal(1, 50, rank) @ normal(2, rank, width)
    samples = np.random.default_rng(3).random((5, count)) < np.linspace(0.4, 1.0, 5)[:, None]
    law = fit_gaussian(other)
    frechet = frechet_statistic(rows, law)(samples)
    kernels = kernel_statistic(rows, other)(samples)
    means = mean_statistic(rows[:, 0])(samples)
    for i, sample in enumerate(samples):
        own = rows[sample]
        assert frechet[i] == pytest.approx(frechet_distance(fit_gaussian(own), law), rel=1e-6)
        assert kernels[i] == pytest.approx(kernel_distance(own, other), rel=1e-9)
        assert means[i] == pytest.approx(own[:, 0].mean())


def test_the_seed_decides_the_interval():
    statistic = mean_statistic(np.random.default_rng(0).standard_normal(50))
    once, again, other = (interval(statistic, 50, seed=seed, draws=100) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    owned = np.random.default_rng(1)
    assert interval(statistic, 50, seed=owned, draws=100) == once
    assert interval(statistic, 50, seed=owned, draws=100) != once


@pytest.mark.parametrize("change", [{"draws": 0}, {"level": 1.0}, {"num_pictures": 3}])
def test_what_has_no_interval_is_refused(change):
    options = {"num_pictures": 5, "draws": 10, "level": 0.9} | change
    with pytest.raises(BadInput, match="an interval needs"):
        interval(mean_statistic(np.zeros(5)), options.pop("num_pictures"), seed=0, **options)


def test_pictures_of_another_network_are_refused():
    with pytest.raises(BadInput, match="widths 4 and 5"):
        kernel_statistic(np.zeros((10, 5)), np.zeros((9, 4)))
    with pytest.raises(BadInput, match="widths 4 and 3"):
        frechet_statistic(np.zeros((10, 4)), gaussian(np.zeros(3), np.eye(3)))
