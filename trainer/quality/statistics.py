"""Distances between two sets of features, in float64.

Letters: ``N M`` pictures of one and of the other set, ``D`` width of a feature.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from trainer.errors import BadInput

Rows = NDArray[Any]
"""``(N, D)`` features, of any floating type."""
Floats = NDArray[np.float64]

CHUNK_NUMBERS = 2**23
"""Pairs of pictures that are looked at together: 64 MB for each array of them."""
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Gaussian:
    """A normal law by its moments."""

    mean_D: Floats
    """``(D,)``."""
    root_DR: Floats
    """``(D, R)``: the covariance is root root^T, so that it may have any rank."""

    @property
    def spread(self) -> float:
        """The trace of the covariance."""
        return float(np.square(self.root_DR).sum())


def gaussian(mean_D: Floats, covariance_DD: Floats) -> Gaussian:
    """Return the law of given moments; directions without variance, but for rounding, are left out.

    Costs the eigenvectors of the covariance.
    """
    variances, vectors_DD = linalg.eigh(covariance_DD)
    kept = variances > len(variances) * np.finfo(np.float64).eps * max(variances[-1], 0.0)
    return Gaussian(mean_D, vectors_DD[:, kept] * np.sqrt(variances[kept]))


def fit_gaussian(rows_ND: Rows) -> Gaussian:
    """Estimate the law of two or more rows, with N - 1 in the denominator.

    Raises:
        BadInput: There are fewer, or some are not finite.
    """
    rows_ND = checked(rows_ND, at_least=2)
    mean_D = rows_ND.mean(0)
    deviations_ND = (rows_ND - mean_D) / np.sqrt(len(rows_ND) - 1)
    if len(rows_ND) <= len(mean_D):  # the deviations are a root already
        return Gaussian(mean_D, deviations_ND.T)
    return gaussian(mean_D, deviations_ND.T @ deviations_ND)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the squared 2-Wasserstein distance of two normal laws (Dowson and Landau 1982).

    With the features of Inception v3 it is the FID of Heusel et al. 2017. The trace of the square
    root of S_a S_b is taken as the sum of the singular values of A^T B, where S_a = A A^T and
    S_b = B B^T: nothing is inverted and nothing below zero meets a square root, so that covariances
    of fewer pictures than dimensions do no harm.

    The distance of samples is too large, by about a constant over the number of pictures (Chong
    and Forsyth 2020): compare only distances of equal numbers of pictures.

    Raises:
        BadInput: The widths differ.
    """
    checked(b.mean_D[None], at_least=1, width=len(a.mean_D))
    overlap = float(linalg.svdvals(a.root_DR.T @ b.root_DR).sum())
    shift = float(np.square(a.mean_D - b.mean_D).sum())
    return shift + a.spread + b.spread - 2 * overlap


def kernel(x_ND: Floats, y_MD: Floats) -> Floats:
    """Return KID's kernel of all pairs, ``(N, M)``: (x y / D + 1)^3."""
    found: Floats = (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3
    return found


def kernel_distance(x_ND: Rows, y_MD: Rows) -> float:
    """Return the squared maximum mean discrepancy of two sets: KID (Binkowski et al. 2018).

    The unbiased estimate over all pairs, not over random blocks of them: it has no draws of its
    own, costs (N + M)^2 D, and holds a bounded number of pairs at a time. It may be below zero.

    Raises:
        BadInput: A set has fewer than two pictures, or the widths differ.
    """
    x_ND = checked(x_ND, at_least=2)
    y_MD = checked(y_MD, at_least=2, width=x_ND.shape[1])
    return float(mean_within(x_ND) + mean_within(y_MD) - 2 * mean_kernel(x_ND, y_MD).mean())


def mean_kernel(x_ND: Floats, y_MD: Floats) -> Floats:
    """Return ``(N,)`` means of the kernel between each x and all y."""
    parts = [kernel(x_ND[part], y_MD).mean(1) for part in chunks(len(x_ND), len(y_MD))]
    return np.concatenate(parts)


def own_kernel(x_ND: Floats) -> Floats:
    """Return ``(N,)`` kernels of each x with itself."""
    found: Floats = (np.square(x_ND).sum(1) / x_ND.shape[1] + 1) ** 3
    return found


def mean_within(x_ND: Floats) -> float:
    """Return the mean of the kernel over all pairs of different pictures."""
    others = len(x_ND) * mean_kernel(x_ND, x_ND) - own_kernel(x_ND)
    return float(others.mean() / (len(x_ND) - 1))


def precision_and_recall(
    real_ND: Rows, drawn_MD: Rows, *, neighbours: int = 3
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Say which pictures lie in the other set's manifold (Kynkaanniemi et al. 2019).

    A set's manifold is the union of balls around its pictures, each as far as the picture's
    `neighbours`-th nearest other one. The mean of the first answer is the precision, of the second
    the recall.

    Returns:
        ``(M,)`` whether each drawn picture lies in the real manifold, and ``(N,)`` whether each
        real one lies in the drawn manifold.

    Raises:
        BadInput: A set has no more than `neighbours` pictures, or the widths differ.
    """
    real_ND = checked(real_ND, at_least=neighbours + 1)
    drawn_MD = checked(drawn_MD, at_least=neighbours + 1, width=real_ND.shape[1])
    # Differences of large numbers lose digits; distances do not change by a shift.
    centre_D = real_ND.mean(0)
    real_ND, drawn_MD = real_ND - centre_D, drawn_MD - centre_D
    return (
        _lie_within(drawn_MD, real_ND, _square_radii(real_ND, neighbours)),
        _lie_within(real_ND, drawn_MD, _square_radii(drawn_MD, neighbours)),
    )


def _square_radii(rows_ND: Floats, neighbours: int) -> Floats:
    parts = [
        # Each picture is its own nearest, at place 0.
        np.partition(_square_distances(rows_ND[part], rows_ND), neighbours, axis=1)[:, neighbours]
        for part in chunks(len(rows_ND), len(rows_ND))
    ]
    return np.concatenate(parts)


def _lie_within(points_ND: Floats, centres_MD: Floats, square_radii_M: Floats) -> NDArray[np.bool_]:
    parts = [
        (_square_distances(points_ND[part], centres_MD) <= square_radii_M).any(1)
        for part in chunks(len(points_ND), len(centres_MD))
    ]
    return np.concatenate(parts)


def _square_distances(x_ND: Floats, y_MD: Floats) -> Floats:
    scale_NM = np.square(x_ND).sum(1)[:, None] + np.square(y_MD).sum(1)
    found: Floats = scale_NM - 2 * (x_ND @ y_MD.T)
    # Equal pictures are at distance 0, also in balls of radius 0.
    found[found < _ROUNDING * scale_NM] = 0
    return found


def cosines(a_ND: Rows, b_ND: Rows) -> Floats:
    """Return ``(N,)`` cosines of pairs, -1 to 1: of pictures and captions, the CLIP score.

    Papers report its mean times 100, or max(0, it) times 2.5 (Hessel et al. 2021).

    Raises:
        BadInput: The sets differ in number or width, or a row has no direction.
    """
    a_ND, b_ND = checked(a_ND, at_least=1), checked(b_ND, at_least=1)
    if a_ND.shape != b_ND.shape:
        raise BadInput(
            f"got features of shapes {a_ND.shape} and {b_ND.shape}; pairs need equal ones."
        )
    lengths_N = np.sqrt(np.square(a_ND).sum(1) * np.square(b_ND).sum(1))
    if not lengths_N.all():
        raise BadInput("a feature is all zeros, so it has no direction: is it a network's output?")
    found: Floats = (a_ND * b_ND).sum(1) / lengths_N
    return found.clip(-1, 1)


def checked(rows_ND: Rows, *, at_least: int, width: int | None = None) -> Floats:
    """Return rows in float64.

    Raises:
        BadInput: They are fewer, no matrix, of another width, or not finite.
    """
    rows = np.asarray(rows_ND, np.float64)
    if rows.ndim != 2 or len(rows) < at_least:
        raise BadInput(
            f"got features of shape {rows.shape}; this measure needs (pictures, width) with "
            f"{at_least} or more pictures."
        )
    if not np.isfinite(rows).all():
        raise BadInput(
            f"features of {(~np.isfinite(rows).all(1)).sum()} of {len(rows)} pictures are not "
            "finite: the network or its weights are broken."
        )
    if width is not None and rows.shape[1] != width:
        raise BadInput(
            f"got features of widths {rows.shape[1]} and {width}; both sets need the same network."
        )
    return rows


def chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Yield parts of the rows of a matrix that is too large to be held."""
    step = max(1, CHUNK_NUMBERS // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)
