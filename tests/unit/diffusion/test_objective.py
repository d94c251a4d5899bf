"""Laws of the objectives."""

from itertools import product

import pytest
import torch

from tests.gaussians import PROCESSES, TWO, normals
from trainer.diffusion.objective import (
    Weight,
    denoising_loss,
    score_matching_loss,
)
from trainer.diffusion.parameterization import Parameterization
from trainer.diffusion.process import diffuse, diffusion, like, log_snr, score_of

KINDS = ["eps", "x0", "v", "flow", "score", "edm"]
WEIGHTS = [
    Weight("min_snr", gamma=5.0),
    Weight("soft_min_snr", gamma=4.0),
    Weight("p2", gamma=1.0, k=1.0),
    Weight("sigmoid", bias=2.0),
    Weight("edm"),
]
over_kinds = pytest.mark.parametrize(
    ("process", "kind"),
    list(product(PROCESSES.values(), KINDS)),
    ids=[f"{name}-{kind}" for name, kind in product(PROCESSES, KINDS)],
)
over_weights = pytest.mark.parametrize("weight", WEIGHTS, ids=[w.kind for w in WEIGHTS])
PLAIN = Weight()


def some(count=16):
    x0, noise = normals(2, count, 3, 4)
    return x0, noise, torch.linspace(0.03, 0.97, count, dtype=torch.float64)


def told(p, x0, noise, t_B, off=0.0):
    """A network that means x0 + off."""
    t = like(t_B, x0)
    x_t = diffuse(p.process, x0, noise, t)
    alpha, sigma = p.process.alpha(t), p.process.sigma(t)
    guess = x0 + off
    return lambda x, time: p.target(guess, (x_t - alpha * guess) / sigma, t)


@over_kinds
@over_weights
def test_one_weighting_is_one_objective_whatever_is_predicted(process, kind, weight):
    x0, noise, t_B = some()
    off = normals(*x0.shape, seed=4)
    p = Parameterization(process, kind, sigma_data=0.5)
    loss_B = denoising_loss(p, told(p, x0, noise, t_B, off), x0, noise, t_B, weight=weight)
    data = Parameterization(process, "x0", sigma_data=0.5)
    same_B = denoising_loss(data, told(data, x0, noise, t_B, off), x0, noise, t_B, weight=weight)
    torch.testing.assert_close(loss_B, same_B, rtol=2e-5, atol=1e-9)


@over_kinds
def test_the_oracle_has_loss_zero_and_each_sample_its_own(process, kind):
    x0, noise, t_B = some(4)
    p = Parameterization(process, kind)
    target = p.target(x0, noise, like(t_B, x0))
    assert (denoising_loss(p, lambda x, t: target, x0, noise, t_B, weight=PLAIN) == 0).all()
    wrong = target.clone()
    wrong[2] += 2
    loss_B = denoising_loss(p, lambda x, t: wrong, x0, noise, t_B, weight=PLAIN)
    expected = torch.tensor([0.0, 0, 4, 0])
    torch.testing.assert_close(loss_B.float(), expected, rtol=1e-3, atol=1e-6)


def snr_of(process, t):
    return torch.exp(log_snr(process, t))


@pytest.mark.parametrize("name", ["vp_linear", "table", "vp_zero_snr", "table_zero_snr"])
def test_min_snr_weights_are_those_of_its_paper(name):
    process, t = PROCESSES[name], torch.linspace(0.03, 0.99, 50, dtype=torch.float64)
    snr, gamma = snr_of(process, t), 5.0
    kept = snr.clamp(max=gamma)
    for kind, expected in (("eps", kept / snr), ("x0", kept), ("v", kept / (snr + 1))):
        found = Weight("min_snr", gamma=gamma).on_prediction(Parameterization(process, kind), t)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_other_weights_are_those_of_their_papers():
    process, t = PROCESSES["vp_linear"], torch.linspace(0.03, 0.99, 50, dtype=torch.float64)
    snr = snr_of(process, t)
    eps, x0 = (Parameterization(process, kind) for kind in ("eps", "x0"))
    close = torch.testing.assert_close
    close(Weight("soft_min_snr", gamma=4).on_prediction(x0, t), 1 / (1 / snr + 1 / 4))
    close(Weight("p2", gamma=1.5, k=2.0).on_prediction(eps, t), (2 + snr) ** -1.5)
    close(Weight("sigmoid", bias=2.0).on_prediction(eps, t), torch.sigmoid(2 - torch.log(snr)))
    edm, sigma = PROCESSES["edm"], PROCESSES["edm"].sigma(t)
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    close(Weight("edm").on_prediction(Parameterization(edm, "x0", 0.5), t), weight)
    close(Weight("edm").on_prediction(Parameterization(edm, "edm", 0.5), t), torch.ones_like(t))


@over_weights
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow", "edm"])
@pytest.mark.parametrize("name", ["flow", "vp_cosine", "vp_zero_snr", "table_zero_snr", "edm"])
def test_weights_are_finite_at_both_ends(weight, kind, name):
    p = Parameterization(PROCESSES[name], kind)
    t = torch.tensor([p.process.min_time, 1.0])
    found = weight.on_prediction(p, t)
    assert found.isfinite().all()
    assert (found >= 0).all()


def test_with_zero_terminal_snr_min_snr_keeps_eps_whole_and_gives_the_data_nothing():
    process, one = PROCESSES["table_zero_snr"], torch.ones(1)
    weight = Weight("min_snr")
    assert weight.on_prediction(Parameterization(process, "eps"), one) == 1
    for kind in ("x0", "v"):
        assert weight.on_prediction(Parameterization(process, kind), one) < 1e-20


def test_a_network_that_says_nothing_pays_the_targets_variance():
    x0, noise = normals(2, 64, 256)
    t_B = torch.linspace(0.1, 0.9, 64, dtype=torch.float64)
    flow, v = (
        denoising_loss(p, lambda x, t: torch.zeros_like(x), x0, noise, t_B, weight=PLAIN).mean()
        for p in (
            Parameterization(PROCESSES["flow"], "flow"),
            Parameterization(PROCESSES["table"], "v"),
        )
    )
    assert abs(flow - 2) < 0.1
    assert abs(v - 1) < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vp_linear", "sub_vp", "ve", "edm", "flow"])
@pytest.mark.parametrize("likelihood_weighting", [False, True])
def test_score_matching_compares_scores_whatever_is_predicted(name, kind, likelihood_weighting):
    process = PROCESSES[name]
    p = Parameterization(process, kind, sigma_data=0.5)
    x0, noise, t_B = some()
    off = normals(*x0.shape, seed=4)
    loss_B = score_matching_loss(
        p,
        told(p, x0, noise, t_B, off),
        x0,
        noise,
        t_B,
        likelihood_weighting=likelihood_weighting,
    )
    t = like(t_B, x0)
    x_t, sigma = diffuse(process, x0, noise, t), process.sigma(t)
    error = score_of(process, x0 + off, x_t, t) + noise / sigma
    factor = diffusion(process, t) ** 2 if likelihood_weighting else sigma**2
    expected = (factor * error.square()).flatten(1).mean(1)
    torch.testing.assert_close(loss_B.double(), expected, rtol=2e-5, atol=1e-9)


def test_score_matching_times_sigma_squared_is_the_loss_of_eps():
    x0, noise, t_B = some()
    p = Parameterization(PROCESSES["vp_linear"], "eps")
    network = told(p, x0, noise, t_B, normals(*x0.shape, seed=4))
    matching = score_matching_loss(p, network, x0, noise, t_B, likelihood_weighting=False)
    plain = denoising_loss(p, network, x0, noise, t_B, weight=PLAIN)
    torch.testing.assert_close(matching.double(), plain, rtol=1e-5, atol=1e-9)


def test_score_matching_is_least_at_the_true_score():
    """Vincent 2011: the best predictor of the noise is the true denoiser, here known exactly."""
    process, p = PROCESSES["vp_linear"], Parameterization(PROCESSES["vp_linear"], "x0")
    x0 = TWO.draw(20_000)
    noise = normals(*x0.shape, seed=2)
    t_B = torch.full((len(x0),), 0.4, dtype=torch.float64)

    def loss(shift):
        def network(x, time):
            return TWO.denoiser(process)(x, t_B[:1]) + shift

        return float(
            score_matching_loss(p, network, x0, noise, t_B, likelihood_weighting=False).mean()
        )

    assert loss(0.0) < min(loss(0.05), loss(-0.05))


def test_the_network_sees_the_noised_sample_and_its_time():
    x0, noise = normals(2, 4, 3, dtype=torch.float32)
    t_B = torch.tensor([0.1, 0.4, 0.7, 1.0])
    seen = {}

    def network(x, t):
        seen.update(x=x, t=t)
        return x

    p = Parameterization(PROCESSES["flow"], "flow")
    loss_B = denoising_loss(p, network, x0, noise, t_B, weight=PLAIN)
    assert torch.equal(seen["t"], t_B * 1000)
    torch.testing.assert_close(seen["x"][3], noise[3])
    assert loss_B.dtype == torch.float32
