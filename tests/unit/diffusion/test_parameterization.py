"""Laws of what networks predict."""

from itertools import product

import pytest
import torch

from tests.gaussians import PROCESSES, normals
from trainer.diffusion.parameterization import Parameterization
from trainer.diffusion.process import diffuse, like, score_of

KINDS = ["eps", "x0", "v", "flow", "score", "edm"]
over_all = pytest.mark.parametrize(
    ("process", "kind"),
    list(product(PROCESSES.values(), KINDS)),
    ids=[f"{name}-{kind}" for name, kind in product(PROCESSES, KINDS)],
)


def some(process, first=0.03, last=0.97):
    x0, noise = normals(2, 40, 3, 2)
    t = like(torch.linspace(first, last, 40, dtype=torch.float64), x0)
    return x0, noise, t, diffuse(process, x0, noise, t)


@over_all
def test_the_target_means_the_data_and_the_noise_it_was_made_of(process, kind):
    x0, noise, t, x_t = some(process)
    p = Parameterization(process, kind, sigma_data=0.5)
    target = p.target(x0, noise, t)
    torch.testing.assert_close(p.data(target, x_t, t), x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(p.noise(target, x_t, t), noise, rtol=1e-8, atol=1e-8)


@over_all
@pytest.mark.parametrize("to", KINDS)
def test_a_prediction_converts_into_every_other(process, kind, to):
    x0, noise, t, x_t = some(process)
    p = Parameterization(process, kind, sigma_data=0.5)
    q = Parameterization(process, to, sigma_data=0.5)
    found = p.convert(p.target(x0, noise, t), x_t, t, to)
    torch.testing.assert_close(found, q.target(x0, noise, t), rtol=1e-8, atol=1e-8)
    back = q.convert(found, x_t, t, kind)
    torch.testing.assert_close(back, p.target(x0, noise, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["flow", "vp_cosine", "vp_zero_snr", "table_zero_snr"])
@pytest.mark.parametrize("kind", ["x0", "v", "flow", "edm"])
def test_in_pure_noise_the_data_are_still_told_exactly(name, kind):
    process, one = PROCESSES[name], torch.ones((), dtype=torch.float64)
    x0, noise = normals(2, 5, 3)
    p = Parameterization(process, kind)
    target = p.target(x0, noise, one)
    torch.testing.assert_close(p.data(target, noise, one), x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("kind", ["eps", "v", "flow", "edm"])
def test_in_clean_data_the_noise_is_still_told_exactly(process, kind):
    zero = torch.zeros((), dtype=torch.float64)
    x0, noise = normals(2, 5, 3)
    p = Parameterization(process, kind)
    target = p.target(x0, noise, zero)
    torch.testing.assert_close(p.noise(target, x0, zero), noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.data(target, x0, zero), x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_score_is_that_of_the_process(process):
    x0, noise, t, x_t = some(process)
    target = Parameterization(process, "score").target(x0, noise, t)
    torch.testing.assert_close(target, score_of(process, x0, x_t, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_table_1_of_its_paper(sigma_data):
    process = PROCESSES["edm"]
    x0, noise, t, x_t = some(process)
    sigma = process.sigma(t)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / torch.sqrt(sigma**2 + sigma_data**2)
    c_in = 1 / torch.sqrt(sigma**2 + sigma_data**2)
    p = Parameterization(process, "edm", sigma_data)
    torch.testing.assert_close(p.target(x0, noise, t), (x0 - c_skip * x_t) / c_out)
    torch.testing.assert_close(p.network_input(x_t, t), c_in * x_t)
    raw = normals(*x_t.shape, seed=3)
    torch.testing.assert_close(p.data(raw, x_t, t), c_skip * x_t + c_out * raw)


def test_for_unit_data_edm_is_minus_v():
    x0, noise, t, _ = some(PROCESSES["vp_cosine"])
    edm, v = (Parameterization(PROCESSES["vp_cosine"], kind) for kind in ("edm", "v"))
    torch.testing.assert_close(edm.target(x0, noise, t), -v.target(x0, noise, t))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ve", "edm"])
def test_what_explodes_reaches_the_network_at_unit_variance(kind, name):
    process = PROCESSES[name]
    x0, noise = normals(2, 20, 20_000)
    t = like(torch.linspace(0.01, 1, 20, dtype=torch.float64), x0)
    seen = Parameterization(process, kind).network_input(diffuse(process, x0, noise, t), t)
    torch.testing.assert_close(seen.std(1), torch.ones(20).double(), rtol=0.03, atol=0)


def test_what_does_not_explode_is_shown_as_it_is():
    x = normals(4, 3)
    assert Parameterization(PROCESSES["flow"], "flow").network_input(x, torch.tensor(0.3)) is x


@over_all
def test_the_gain_is_how_errors_of_the_data_show_in_the_prediction(process, kind):
    x0, noise, t, x_t = some(process)
    p = Parameterization(process, kind, sigma_data=0.5)
    wrong = x0 + normals(*x0.shape, seed=5)
    alpha, sigma = process.alpha(t), process.sigma(t)
    wrong_noise = (x_t - alpha * wrong) / sigma
    off = p.target(wrong, wrong_noise, t) - p.target(x0, noise, t)
    ratio = off.square().flatten(1).sum(1) / (wrong - x0).square().flatten(1).sum(1)
    torch.testing.assert_close(torch.exp(p.log_gain(t.flatten())), ratio, rtol=1e-6, atol=1e-9)
