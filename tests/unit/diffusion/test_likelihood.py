"""Laws of the adaptive integrator, of the likelihood and of the ensemble's variance."""

import math

import pytest
import torch

from tests.gaussians import PROCESSES, TWO, Mixture, normals
from trainer.diffusion.likelihood import log_likelihood
from trainer.diffusion.ode import integrate
from trainer.diffusion.uncertainty import mean_and_variance

ZERO, ONE = (torch.tensor(v, dtype=torch.float64) for v in (0.0, 1.0))
UNIT = Mixture([[0.6, 0.0], [-0.6, 0.0]], [0.8, 0.8])


def end_of(rate, x, start, end, tolerance):
    *_, x = integrate(rate, x, start, end, rtol=tolerance, atol=tolerance)
    return x


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_an_integral_is_as_exact_as_asked(tolerance):
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    found = end_of(lambda x, t: x * torch.cos(5 * t), x, ZERO, 2 * ONE, tolerance)
    torch.testing.assert_close(found, x * math.exp(math.sin(10) / 5), rtol=20 * tolerance, atol=0)


def test_there_and_back_again():
    x = normals(5, 3)

    def rate(x, t):
        return torch.sin(x) + t

    there = end_of(rate, x, ZERO, ONE, 1e-10)
    torch.testing.assert_close(end_of(rate, there, ONE, ZERO, 1e-10), x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["flow", "vp_linear", "vp_cosine", "sub_vp", "table"])
@pytest.mark.parametrize("data", [UNIT, TWO], ids=["wide", "two"])
def test_the_likelihood_is_the_closed_form(name, data):
    process = PROCESSES[name]
    least = torch.tensor(process.min_time, dtype=torch.float64)
    x = data.start(process, 20, first=process.min_time)
    found = log_likelihood(process, data.denoiser(process), x, rtol=1e-6, atol=1e-6)
    expected = data.log_density(process, x, least)
    # What the prior misses: these data are not of unit variance, and some are left at t = 1.
    one = ONE.clone()
    prior_is_exact = float(process.alpha(one)) == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 if prior_is_exact else 0.1)


@pytest.mark.parametrize("name", ["ve", "edm"])
def test_the_likelihood_of_exploding_processes_is_the_closed_form(name):
    process = PROCESSES[name]
    x = UNIT.start(process, 10, first=process.min_time)
    found = log_likelihood(process, UNIT.denoiser(process), x, rtol=1e-7, atol=1e-7)
    least = torch.tensor(process.min_time, dtype=torch.float64)
    torch.testing.assert_close(found, UNIT.log_density(process, x, least), rtol=0, atol=2e-3)


def test_probes_estimate_the_exact_divergence_without_bias():
    process = PROCESSES["flow"]
    x = TWO.start(process, 4, first=process.min_time)
    exact = log_likelihood(process, TWO.denoiser(process), x)
    signs = normals(100, 4, 2, seed=5).sign()
    estimated = log_likelihood(process, TWO.denoiser(process), x, probes=signs)
    torch.testing.assert_close(estimated, exact, rtol=0, atol=0.4)
    both = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:, None].expand(2, 4, 2)
    whole = log_likelihood(process, TWO.denoiser(process), x, probes=both)
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-3)  # all signs there are


def test_variance_over_an_ensemble_is_the_textbooks():
    members = normals(7, 3, 4, dtype=torch.float32)
    mean, variance = mean_and_variance(iter(members))
    torch.testing.assert_close(mean, members.double().mean(0))
    torch.testing.assert_close(variance, members.double().var(0))
    _, none = mean_and_variance([members[0]] * 3)
    assert (none == 0).all()


def test_one_sample_has_no_variance():
    with pytest.raises(ValueError, match=r"an ensemble of 1 has no variance\. Give at least 2"):
        mean_and_variance([torch.zeros(3)])
