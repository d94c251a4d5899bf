"""Laws of guidance and of known regions."""

from functools import partial

import pytest
import torch

from tests.gaussians import PROCESSES, TWO, Mixture, draws, energy_distance, last, normals
from trainer.diffusion.guidance import classifier, classifier_free, combine, keep_known
from trainer.diffusion.process import diffuse, like
from trainer.diffusion.solvers import SOLVERS, ddim, ddpm, dopri5, dpm_2m
from trainer.diffusion.times import grid

FLOW, VP = PROCESSES["flow"], PROCESSES["vp_linear"]


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_other():
    a, b = normals(2, 3, 5)
    assert torch.equal(combine(a, b, scale=0, rescale_frac=0), b)
    torch.testing.assert_close(combine(a, b, scale=1, rescale_frac=0), a)
    torch.testing.assert_close(combine(a, b, scale=3, rescale_frac=0) - a, 2 * (a - b))


def test_rescaled_guidance_has_the_conditional_spread():
    a, b = normals(2, 3, 50)
    rescaled = combine(a, b, scale=7.5, rescale_frac=1.0)
    torch.testing.assert_close(rescaled.std(1), a.std(1))


class Network:
    """A conditional denoiser that remembers how it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, condition):
        (shift_B,) = condition
        self.asked.append((float(t.flatten()[0]), len(x)))
        return torch.tanh(x) + like(shift_B, x) * t


def guided(network, **options):
    condition, unwanted = (torch.full((3,), v).double() for v in (0.5, -0.2))
    return classifier_free(network, (condition,), (unwanted,), **options)


def test_one_batched_call_is_two_calls():
    together, split = Network(), Network()
    x, t = normals(3, 4), grid(FLOW, "uniform", 6)
    for process in (FLOW, VP):
        a = last(ddim(process, guided(together, scale=3.0), x, t, draws(x)))
        b = last(ddim(process, guided(split, scale=3.0, split=True), x, t, draws(x)))
        torch.testing.assert_close(a, b)
    assert {size for _, size in together.asked} == {6}
    assert len(together.asked) == 12
    assert {size for _, size in split.asked} == {3}
    assert len(split.asked) == 24


def test_outside_the_interval_the_unconditional_model_is_not_asked():
    network = Network()
    x = normals(3, 4)
    steer = guided(network, scale=2.0, interval=(0.25, 0.75))
    last(ddim(FLOW, steer, x, grid(FLOW, "trailing", 4), draws(x)))
    assert network.asked == [(1.0, 3), (0.75, 6), (0.5, 6), (0.25, 3)]

    network.asked.clear()
    last(ddim(FLOW, guided(network, scale=1.0), x, grid(FLOW, "trailing", 4), draws(x)))
    assert all(size == 3 for _, size in network.asked)


def test_samples_with_times_of_their_own_are_guided_each_in_its_interval():
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x = normals(3, 4)
    steer = guided(Network(), scale=2.0, interval=(0.25, 0.75))
    found = steer(x, like(t, x))
    plain = guided(Network(), scale=1.0)(x, like(t, x))
    always = guided(Network(), scale=2.0)(x, like(t, x))
    torch.testing.assert_close(found, torch.stack([plain[0], always[1], plain[2]]))


@pytest.mark.parametrize("name", ["vp_linear", "flow", "edm"])
def test_a_classifier_turns_the_law_into_the_conditional_one(name):
    """p(component | x) of a mixture is known, and so is what it must lead to."""
    process = PROCESSES[name]
    first = Mixture([[-1.0, 0.4]], [0.25])

    def log_probability(x, t):
        alpha, sigma = TWO.at(process, t)
        logs_BK, _ = TWO._parts(x, alpha, sigma)
        return torch.log_softmax(logs_BK, 1)[:, 0]

    denoise = classifier(process, TWO.denoiser(process), log_probability, scale=1.0)
    start = 0.999 if name == "flow" else 1.0  # in pure noise a classifier can say nothing
    x = TWO.start(process, 1500, first=start)
    t = grid(process, "log_snr", 60, first=start)
    end = last(ddim(process, denoise, x, t, draws(x)))
    assert energy_distance(end, first.draw(1500, seed=9)) < 0.01
    torch.testing.assert_close(
        denoise(x, t[20]), first.denoiser(process)(x, t[20]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_known_is_kept_exactly(name, solver):
    process = PROCESSES[name]
    first = 0.999 if solver in {"euler_maruyama", "predictor_corrector"} else 1.0
    known, noise = normals(2, 3, 4)
    mask = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    t = grid(process, "log_snr", 8, first=first)
    denoise = keep_known(lambda x, t: torch.tanh(x), known, mask)
    end = last(
        SOLVERS[solver](process, denoise, diffuse(process, known, noise, t[0]), t, draws(known))
    )
    torch.testing.assert_close(end[:, 1::2], known[:, 1::2], rtol=0, atol=1e-9)
    assert ((end - known)[:, 0::2].abs() > 1e-3).all()


@pytest.mark.parametrize("solver", [ddim, dpm_2m])
def test_knowing_is_replacing_after_every_step(solver):
    known, noise = normals(2, 3, 4)
    mask = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    t = grid(VP, "log_snr", 8)

    def mixing(x, t):
        return torch.tanh(x.sum(1, keepdim=True) - x)

    x = diffuse(VP, known, noise, t[0])
    steps = solver(VP, keep_known(mixing, known, mask), x, t, draws(x))
    for then, x_then in zip(t[1:-1], steps, strict=False):
        replaced = diffuse(VP, known, noise, then)
        torch.testing.assert_close(x_then[:, 1::2], replaced[:, 1::2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", [ddim, ddpm, dopri5])
def test_starting_from_a_noised_picture_keeps_its_law(solver):
    """Begun at any time with the law of that time, the end is the law of the data (img2img)."""
    for first in (0.3, 0.7):
        x = TWO.start(VP, 2000, first=first)
        t = grid(VP, "log_snr", 100, first=first)
        end = last(solver(VP, TWO.denoiser(VP), x, t, draws(x)))
        assert energy_distance(end, TWO.draw(2000, seed=99)) < 6e-3


def test_guidance_goes_with_the_adaptive_solver():
    x = normals(3, 4)
    steer = guided(Network(), scale=2.0, interval=(0.1, 0.6))
    adaptive = last(
        partial(dopri5, rtol=1e-7, atol=1e-7)(FLOW, steer, x, grid(FLOW, "uniform", 1), draws(x))
    )
    fine = last(SOLVERS["heun"](FLOW, steer, x, grid(FLOW, "uniform", 2000), draws(x)))
    torch.testing.assert_close(adaptive, fine, rtol=0, atol=2e-3)
