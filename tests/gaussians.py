"""Data whose denoiser, score and density are known in closed form: mixtures of normals."""

import math

import torch

from trainer.diffusion.process import Process
from trainer.diffusion.processes import (
    Edm,
    RectifiedFlow,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    VpTable,
)

PROCESSES: dict[str, Process] = {
    "flow": RectifiedFlow(),
    "vp_linear": VariancePreserving("linear"),
    "vp_scaled_linear": VariancePreserving("scaled_linear", 0.00085, 0.012),
    "vp_cosine": VariancePreserving("cosine"),
    "vp_zero_snr": VariancePreserving("scaled_linear", 0.00085, 0.012, zero_terminal_snr=True),
    "table": VpTable(),
    "table_zero_snr": VpTable(zero_terminal_snr=True),
    "sub_vp": SubVariancePreserving(),
    "ve": VarianceExploding(),
    "edm": Edm(),
}


def normals(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Mixture:
    """A mixture of isotropic normals in D dimensions, noised by a process."""

    def __init__(self, means_KD, stds_K, weights_K=None):
        self.means = torch.tensor(means_KD, dtype=torch.float64)
        self.stds = torch.tensor(stds_K, dtype=torch.float64)
        weights = weights_K or [1 / len(stds_K)] * len(stds_K)
        self.log_weights = torch.tensor(weights, dtype=torch.float64).log()

    def draw(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.log_weights.exp(), count, True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.stds[which, None] * noise

    def _parts(self, x_BD, alpha, sigma):
        """Posterior log-weights up to a constant, and variances, of the components at x."""
        variances_K = (alpha * self.stds) ** 2 + sigma**2
        off_BKD = x_BD[:, None, :] - alpha[..., None] * self.means
        squares_BK = off_BKD.square().sum(2)
        log_BK = self.log_weights - 0.5 * squares_BK / variances_K
        return log_BK - 0.5 * x_BD.shape[1] * torch.log(2 * math.pi * variances_K), off_BKD

    def at(self, process, t):
        """alpha and sigma as (1, 1) or (B, 1)."""
        t = t.double().reshape(-1, 1)
        return process.alpha(t), process.sigma(t)

    def log_density(self, process, x_BD, t):
        logs_BK, _ = self._parts(x_BD, *self.at(process, t))
        return torch.logsumexp(logs_BK, 1)

    def denoiser(self, process):
        """(x, t) -> E[x0 | x_t = x]."""

        def denoise(x_BD, t):
            alpha, sigma = self.at(process, t)
            logs_BK, off_BKD = self._parts(x_BD, alpha, sigma)
            gain_K = alpha * self.stds**2 / ((alpha * self.stds) ** 2 + sigma**2)
            means_BKD = self.means + gain_K[..., None] * off_BKD
            return (logs_BK.softmax(1)[:, :, None] * means_BKD).sum(1)

        return denoise

    def start(self, process, count, seed=1, first=1.0):
        """Exact draws of x at the first time."""
        t = torch.tensor(first, dtype=torch.float64)
        x0 = self.draw(count, seed)
        return process.alpha(t) * x0 + process.sigma(t) * normals(*x0.shape, seed=seed + 1)


NORMAL = Mixture([[1.5, -0.5]], [0.6])
TWO = Mixture([[-1.0, 0.4], [1.1, 0.1]], [0.25, 0.4], [0.4, 0.6])


def exact_flow_of_normal(normal, process, x, first=1.0):
    """Where the probability-flow ODE carries x: it keeps the standardised value of a normal."""
    t = torch.tensor(first, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    std = normal.stds[0]
    return normal.means[0] + std * (x - alpha * normal.means[0]) / torch.sqrt(
        (alpha * std) ** 2 + sigma**2
    )


def energy_distance(a_ND, b_MD):
    """2 E|a - b| - E|a - a'| - E|b - b'|; 0 only for equal laws (Szekely & Rizzo 2004)."""
    between = torch.cdist(a_ND, b_MD).mean()
    n, m = len(a_ND), len(b_MD)
    within_a = torch.cdist(a_ND, a_ND).sum() / (n * (n - 1))
    within_b = torch.cdist(b_MD, b_MD).sum() / (m * (m - 1))
    return float(2 * between - within_a - within_b)


def draws(x, seed=7):
    """What solvers take: the k-th draw like x."""
    return lambda k: normals(*x.shape, seed=seed + 1000 * k, dtype=x.dtype)


def last(steps):
    *_, x = steps
    return x
