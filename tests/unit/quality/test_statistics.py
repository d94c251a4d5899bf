"""Laws of the distances between sets of features, on laws whose distances are known."""

import numpy as np
import pytest
from scipy import linalg, stats

from trainer.errors import BadInput
from trainer.quality import statistics
from trainer.quality.statistics import (
    cosines,
    fit_gaussian,
    frechet_distance,
    gaussian,
    kernel_distance,
    precision_and_recall,
)


def normal(seed, count, width, *, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((count, width))


def distance(a, b):
    return frechet_distance(fit_gaussian(a), fit_gaussian(b))


def covariance(seed, width, rank):
    factor = normal(seed, width, rank)
    return factor @ factor.T / rank


def rotation(width):
    return stats.special_ortho_group(width, seed=0).rvs()


@pytest.mark.parametrize("count", [200, 8])
def test_a_set_is_at_distance_0_of_itself_also_with_fewer_pictures_than_dimensions(count):
    rows = normal(0, count, 32, shift=5)
    assert distance(rows, rows) == pytest.approx(0, abs=1e-10)
    assert kernel_distance(rows, rows) <= 0  # unbiased: below 0 where pictures meet themselves


def test_a_shift_counts_by_its_square_and_a_scale_by_the_square_of_its_difference():
    """|m|^2 + tr(S)(s - 1)^2, the closed form for N(0, S) and N(m, s^2 S)."""
    mean, law = np.arange(6.0), covariance(1, 6, 12)
    moved = gaussian(mean, 2.5**2 * law)
    expected = np.square(mean).sum() + np.trace(law) * 1.5**2
    assert frechet_distance(gaussian(np.zeros(6), law), moved) == pytest.approx(expected)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(20, 20), (3, 20), (3, 2)])
def test_of_commuting_laws_only_the_deviations_differ(rank_a, rank_b):
    """sum (sqrt(a) - sqrt(b))^2, whatever the ranks."""
    turn, rng = rotation(20), np.random.default_rng(0)
    a, b = rng.uniform(1, 2, 20), rng.uniform(1, 2, 20)
    a[rank_a:], b[: 20 - rank_b] = 0, 0
    laws = [gaussian(np.zeros(20), turn * each @ turn.T) for each in (a, b)]
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(*laws) == pytest.approx(expected, rel=1e-10)


def test_a_law_without_variance_is_a_point():
    point = gaussian(np.ones(4), np.zeros((4, 4)))
    assert frechet_distance(point, gaussian(np.zeros(4), np.eye(4))) == pytest.approx(8)
    assert frechet_distance(point, point) == 0


def test_the_trace_is_that_of_the_square_root_of_the_product():
    """The textbook's formula, where it can be computed."""
    a, b = normal(0, 300, 12), normal(1, 300, 12, shift=0.3) @ normal(2, 12, 12)
    one, other = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum()
    expected += np.trace(one + other - 2 * linalg.sqrtm(one @ other).real)
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_with_fewer_pictures_than_dimensions_the_law_is_the_same():
    """By rows and by covariance, and with further dimensions that do not vary."""
    a, b = normal(0, 15, 40), normal(1, 12, 40, shift=0.3)
    laws = [gaussian(rows.mean(0), np.cov(rows.T)) for rows in (a, b)]
    assert frechet_distance(*laws) == pytest.approx(distance(a, b), rel=1e-9)
    few, other = normal(2, 15, 10), normal(3, 30, 10)
    wider = [np.pad(rows, ((0, 0), (0, 30))) for rows in (few, other)]
    assert distance(*wider) == pytest.approx(distance(few, other), rel=1e-9)


@pytest.mark.parametrize("measure", [distance, kernel_distance], ids=["frechet", "kernel"])
def test_distances_do_not_change_when_features_turn_or_pictures_change_places(measure):
    a, b = normal(0, 60, 16), normal(1, 50, 16, shift=0.5)
    turn = rotation(16)
    assert measure(a @ turn, b @ turn) == pytest.approx(measure(a, b), rel=1e-9)
    shuffled = np.random.default_rng(2).permutation(b)
    assert measure(a, shuffled) == pytest.approx(measure(a, b), rel=1e-9)
    assert measure(b, a) == pytest.approx(measure(a, b), rel=1e-9)


def test_the_kernel_distance_is_the_textbooks_sum_over_pairs(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_NUMBERS", 40)  # several parts, the last one smaller
    x, y = normal(0, 13, 5), normal(1, 9, 5, shift=1)

    def k(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j)
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j)
    across = sum(k(a, b) for a in x for b in y)
    expected = within_x / (13 * 12) + within_y / (9 * 8) - 2 * across / (13 * 9)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_the_kernel_distance_of_equal_laws_is_0_on_average_and_the_frechet_distance_is_not():
    pairs = [(normal(2 * i, 20, 8), normal(2 * i + 1, 30, 8)) for i in range(400)]
    kernels = np.array([kernel_distance(a, b) for a, b in pairs])
    assert abs(kernels.mean()) < 3 * kernels.std() / np.sqrt(len(kernels))
    assert np.mean([distance(a, b) for a, b in pairs[:50]]) > 1


def test_equal_sets_have_precision_and_recall_1_and_distant_sets_0(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_NUMBERS", 150)
    rows = normal(0, 40, 6, shift=100)
    rows[:5] = rows[0]  # also with copies, whose balls are points
    same, far = precision_and_recall(rows, rows), precision_and_recall(rows, rows + 50)
    assert all(each.all() for each in same)
    assert not any(each.any() for each in far)


def test_a_generator_that_drops_modes_is_precise_and_does_not_recall():
    """Half of the modes: all that is drawn is real, half of what is real is drawn."""
    modes = 20 * np.eye(4)
    real = np.concatenate([mode + normal(i, 50, 4) for i, mode in enumerate(modes)])
    drawn = np.concatenate([real[:50] + 1e-3, real[50:100] - 1e-3])
    precise, recalled = precision_and_recall(real, drawn)
    assert precise.shape == (100,)
    assert precise.mean() == 1
    assert recalled.shape == (200,)
    assert recalled[:100].mean() > 0.95
    assert not recalled[100:].any()
    swapped = precision_and_recall(drawn, real)
    np.testing.assert_array_equal(swapped[0], recalled)
    np.testing.assert_array_equal(swapped[1], precise)


def test_balls_are_those_of_the_definition():
    """Loops over pictures, as the paper's algorithm 1."""
    real, drawn = normal(0, 25, 3), normal(1, 30, 3, shift=0.8)

    def inside(points, centres):
        radii = [np.sort(np.linalg.norm(centres - c, axis=1))[2] for c in centres]
        return [
            any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
            for p in points
        ]

    precise, recalled = precision_and_recall(real, drawn, neighbours=2)
    np.testing.assert_array_equal(precise, inside(drawn, real))
    np.testing.assert_array_equal(recalled, inside(real, drawn))


def test_cosines_know_directions_and_not_lengths():
    a = normal(0, 7, 5)
    lengths = np.arange(1.0, 8)[:, None]
    np.testing.assert_allclose(cosines(a, lengths * a), 1)
    np.testing.assert_allclose(cosines(a, -lengths * a), -1)
    orthogonal = np.array([[1.0, 0]]), np.array([[0, 3.0]])
    assert cosines(*orthogonal) == pytest.approx(0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: fit_gaussian(np.zeros((1, 4))), "2 or more pictures"),
        (lambda: fit_gaussian(np.zeros(4)), r"\(pictures, width\)"),
        (lambda: fit_gaussian(np.array([[1.0], [np.nan], [np.inf]])), "2 of 3 pictures are not"),
        (lambda: distance(normal(0, 5, 3), normal(0, 5, 4)), "widths 4 and 3"),
        (lambda: kernel_distance(normal(0, 5, 3), normal(0, 5, 4)), "widths 4 and 3"),
        (lambda: precision_and_recall(normal(0, 3, 3), normal(0, 9, 3)), "4 or more pictures"),
        (lambda: cosines(normal(0, 5, 3), normal(0, 4, 3)), "pairs need equal ones"),
        (lambda: cosines(np.zeros((2, 3)), normal(0, 2, 3)), "no direction"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, match):
    with pytest.raises(BadInput, match=match):
        call()
