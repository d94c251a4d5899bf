"""Statistics of many samples of the same pictures: what they share is computed once.

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
)


def mean_statistic(values_N: NDArray[np.floating]) -> Statistic:
    """Return the statistic that is the mean of one number per picture."""
    return lambda samples_SN: samples_SN @ values_N / samples_SN.sum(1)


def frechet_statistic(rows_ND: Rows, reference: Gaussian) -> Statistic:
    """Return the statistic that is the Frechet distance to a fixed law.

    A sample costs what the eigenvalues of a matrix cost whose side is the number of pictures in it
    or the rank of the reference, whichever is less: covariances of the width are never made.

    Raises:
        BadInput: There are fewer than two rows, or their width is another.
    """
    rows_ND = checked(rows_ND, at_least=2, width=len(reference.mean_D))
    centre_D = rows_ND.mean(0)
    centred_ND, shift_D = rows_ND - centre_D, centre_D - reference.mean_D
    squares_N, seen_NR = np.square(centred_ND).sum(1), centred_ND @ reference.root_DR

    def distance(sample_N: NDArray[np.bool_]) -> float:
        total = sample_N.sum()
        mean_D = sample_N @ centred_ND / total
        own_spread = (squares_N[sample_N].sum() - total * np.square(mean_D).sum()) / (total - 1)
        overlap = _sum_of_deviations(seen_NR[sample_N])
        return float(
            np.square(mean_D + shift_D).sum() + own_spread + reference.spread - 2 * overlap
        )

    return lambda samples_SN: np.array([distance(sample_N) for sample_N in samples_SN])


def _sum_of_deviations(rows_NR: Floats) -> float:
    """Return the trace of the square root of the rows' covariance."""
    rows_NR = rows_NR - rows_NR.mean(0)
    few = len(rows_NR) < rows_NR.shape[1]
    squares = rows_NR @ rows_NR.T if few else rows_NR.T @ rows_NR
    variances = linalg.eigvalsh(squares / (len(rows_NR) - 1))
    return float(np.sqrt(variances.clip(0)).sum())


def kernel_statistic(rows_ND: Rows, other_MD: Rows) -> Statistic:
    """Return the statistic that is KID to a fixed set; all samples together cost S N^2.

    Raises:
        BadInput: A set has fewer than two rows, or the widths differ.
    """
    rows_ND = checked(rows_ND, at_least=2)
    other_MD = checked(other_MD, at_least=2, width=rows_ND.shape[1])
    to_other_N, to_itself_N = mean_kernel(rows_ND, other_MD), own_kernel(rows_ND)
    within_other = mean_within(other_MD)

    def distances(samples_SN: NDArray[np.bool_]) -> Floats:
        in_SN, total_S = samples_SN.astype(np.float64), samples_SN.sum(1)
        sum_S = -in_SN @ to_itself_N
        for part in chunks(len(rows_ND), len(rows_ND)):
            sum_S += (in_SN[:, part] * (in_SN @ kernel(rows_ND, rows_ND[part]))).sum(1)
        within_S = sum_S / (total_S * (total_S - 1))
        found: Floats = within_S + within_other - 2 * in_SN @ to_other_N / total_S
        return found

    return distances
