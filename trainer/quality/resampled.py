"""Statistics of pictures that each stand in a sample several times or not at all.

What a bootstrap needs, at the price of little more than the pictures that stand in it: all that
does not depend on the counts is computed once.

Letters: ``S`` samples, ``N M`` pictures, ``D`` width of a feature, ``R`` rank.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from trainer.quality.bootstrap import Statistic
from trainer.quality.statistics import (
    Floats,
    Gaussian,
    Rows,
    checked,
    chunks,
    kernel,
    mean_kernel,
    mean_within,
    own_kernel,
    root,
)

MIN_PICTURES = 10
"""With fewer, samples of one picture alone are met, which has no pairs."""


def mean_statistic(values_N: NDArray[np.floating]) -> Statistic:
    """Return the statistic that is the mean of one number per picture."""
    return lambda counts_SN: counts_SN @ values_N / counts_SN.sum(1)


def frechet_statistic(rows_ND: Rows, reference: Gaussian) -> Statistic:
    """Return the statistic that is the Frechet distance to a fixed law.

    A sample costs what the eigenvalues of a matrix cost whose side is the number of pictures in it
    or the rank of the reference, whichever is less: covariances of the width are never made.

    Raises:
        BadInput: There are fewer than two rows, or their width is another.
    """
    rows_ND = checked(rows_ND, at_least=2, width=len(reference.mean_D))
    factor_DR = root(reference.covariance_DD)
    spread = float(np.trace(reference.covariance_DD))
    centre_D = rows_ND.mean(0)
    centred_ND, shift_D = rows_ND - centre_D, centre_D - reference.mean_D
    squares_N, seen_NR = np.square(centred_ND).sum(1), centred_ND @ factor_DR

    def distance(counts_N: Floats) -> float:
        total, mean_D = counts_N.sum(), counts_N @ centred_ND / counts_N.sum()
        own_spread = (counts_N @ squares_N - total * np.square(mean_D).sum()) / (total - 1)
        overlap = _sum_of_deviations(seen_NR, counts_N)
        return float(np.square(mean_D + shift_D).sum() + own_spread + spread - 2 * overlap)

    return lambda counts_SN: np.array([distance(counts_N) for counts_N in counts_SN])


def _sum_of_deviations(rows_NR: Floats, counts_N: Floats) -> float:
    """Return the trace of the square root of a sample's covariance."""
    stand = counts_N > 0
    counts_N, rows_NR = counts_N[stand], rows_NR[stand]
    total = counts_N.sum()
    centred_NR = (rows_NR - counts_N @ rows_NR / total) * np.sqrt(counts_N)[:, None]
    few = len(centred_NR) < centred_NR.shape[1]
    squares = centred_NR @ centred_NR.T if few else centred_NR.T @ centred_NR
    return float(np.sqrt(linalg.eigvalsh(squares / (total - 1)).clip(0)).sum())


def kernel_statistic(rows_ND: Rows, other_MD: Rows) -> Statistic:
    """Return the statistic that is KID to a fixed set.

    It is a mean over pairs of different pictures: a picture beside its own copy is no pair. So
    samples are, on average, as far from the other set as the pictures themselves are.

    Raises:
        BadInput: There are fewer than `MIN_PICTURES` rows, or the widths differ.
    """
    rows_ND = checked(rows_ND, at_least=MIN_PICTURES)
    other_MD = checked(other_MD, at_least=2, width=rows_ND.shape[1])
    to_other_N, to_itself_N = mean_kernel(rows_ND, other_MD), own_kernel(rows_ND)
    within_other = mean_within(other_MD)

    def distances(counts_SN: Floats) -> Floats:
        total_S, squares_SN = counts_SN.sum(1), np.square(counts_SN)
        sum_S = -squares_SN @ to_itself_N
        for part in chunks(len(rows_ND), len(rows_ND)):
            sum_S += (counts_SN[:, part] * (counts_SN @ kernel(rows_ND, rows_ND[part]))).sum(1)
        within_S = sum_S / (np.square(total_S) - squares_SN.sum(1))
        found: Floats = within_S + within_other - 2 * counts_SN @ to_other_N / total_S
        return found

    return distances
