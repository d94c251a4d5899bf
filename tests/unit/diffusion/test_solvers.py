"""Laws of the solvers and of guidance, and equality with diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from trainer.diffusion.guidance import classifier_free, combine
from trainer.diffusion.process import RectifiedFlow, VpScaledLinear
from trainer.diffusion.solvers import SOLVERS, ddim, heun, times

FLOW, EPS, V = RectifiedFlow(), VpScaledLinear(), VpScaledLinear(prediction="v")
MEAN, STD = 1.5, 0.3


def last(steps):
    *_, x = steps
    return x


def gaussian_oracle(process):
    """E[x0 | x_t] where the data are N(MEAN, STD^2)."""

    def denoise(x, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
        return MEAN + gain * (x - alpha * MEAN)

    return denoise


def exact_end(process, x):
    """The probability-flow ODE of a Gaussian is affine: it keeps the standardised value."""
    one = torch.ones((), dtype=torch.float64)
    alpha, sigma = process.alpha(one), process.sigma(one)
    return MEAN + STD * (x - alpha * MEAN) / torch.sqrt((alpha * STD) ** 2 + sigma**2)


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("process", [FLOW, EPS], ids=["flow", "vp"])
def test_noise_becomes_the_law_whose_denoiser_is_given(name, process):
    one = torch.ones((), dtype=torch.float64)
    alpha, sigma = process.alpha(one), process.sigma(one)  # at t = 1 VP still holds some data
    x = alpha * MEAN + torch.sqrt((alpha * STD) ** 2 + sigma**2) * noise(4000)
    end = last(SOLVERS[name](process, gaussian_oracle(process), x, times(400)))
    assert abs(end.mean() - MEAN) < 0.03
    assert abs(end.std() - STD) < 0.015


def error(solver, process, num_steps):
    x = noise(500)
    end = last(solver(process, gaussian_oracle(process), x, times(num_steps)))
    return float((end - exact_end(process, x)).abs().max())


def test_ddim_is_of_first_order_and_heun_of_a_higher_one():
    assert 1.7 < error(ddim, FLOW, 40) / error(ddim, FLOW, 80) < 2.4
    assert error(heun, FLOW, 40) / error(heun, FLOW, 80) > 3
    assert error(heun, FLOW, 40) < error(ddim, FLOW, 80)  # at equal cost
    assert error(heun, EPS, 80) < error(ddim, EPS, 80)
    assert error(heun, EPS, 160) < error(heun, EPS, 80) / 1.7


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("process", [FLOW, EPS, V], ids=["flow", "eps", "v"])
def test_a_denoiser_that_knows_the_answer_is_believed(name, process):
    answer = noise(2, 3)
    end = last(SOLVERS[name](process, lambda x, t: answer, torch.ones(2, 3).double(), times(7)))
    torch.testing.assert_close(end, answer, rtol=0, atol=1e-12)


def test_a_solver_yields_once_a_step_and_keeps_float32():
    steps = list(heun(FLOW, lambda x, t: 0.5 * x, noise(2, dtype=torch.float32), times(5)))
    assert len(steps) == 5
    assert all(x.dtype == torch.float32 for x in steps)


def test_shifted_times_keep_their_ends_and_stay_longer_in_the_noise():
    plain, shifted = times(10), times(10, shift=3.0)
    assert (shifted[0], shifted[-1]) == (1, 0)
    assert (shifted[1:-1] > plain[1:-1]).all()


def network(x, t):
    """Some smooth function of both arguments, standing in for a network."""
    return torch.tanh(0.7 * x + 0.001 * t) - 0.2 * x


@pytest.mark.parametrize(
    ("process", "prediction_type"), [(EPS, "epsilon"), (V, "v_prediction")], ids=["eps", "v"]
)
def test_ddim_equals_diffusers(process, prediction_type):
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(20)
    x = want = noise(2, 4, 8, 8, dtype=torch.float32)
    for t in theirs.timesteps:
        want = theirs.step(network(want, float(t)), t, want).prev_sample

    def denoise(x, t):
        return process.data(network(x, float(process.network_time(t))), x, t)

    end = last(ddim(process, denoise, x, times(20)))
    torch.testing.assert_close(end, want, rtol=1e-5, atol=3e-5)


def test_euler_on_a_flow_equals_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[float(t) for t in times(20)[:-1]])
    x = want = noise(2, 4, 8, 8, dtype=torch.float32)
    for t in theirs.timesteps:
        want = theirs.step(network(want, float(t)), t, want).prev_sample

    def denoise(x, t):
        return FLOW.data(network(x, float(FLOW.network_time(t))), x, t)

    end = last(ddim(FLOW, denoise, x, times(20)))
    torch.testing.assert_close(end, want, rtol=1e-5, atol=1e-5)


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_other():
    a, b = noise(2, 3, 5)
    assert torch.equal(combine(a, b, scale=0, rescale_frac=0), b)
    torch.testing.assert_close(combine(a, b, scale=1, rescale_frac=0), a)
    torch.testing.assert_close(combine(a, b, scale=3, rescale_frac=0) - a, 2 * (a - b))


def test_rescaled_guidance_has_the_conditional_spread():
    a, b = noise(2, 3, 50)
    rescaled = combine(a, b, scale=7.5, rescale_frac=1.0)
    torch.testing.assert_close(rescaled.std(1), a.std(1))


def test_outside_the_interval_the_unconditional_model_is_not_asked():
    asked = []

    def without(x, t):
        asked.append(float(t))
        return x * 0

    guided = classifier_free(lambda x, t: x, without, scale=2.0, interval=(0.25, 0.75))
    list(ddim(FLOW, guided, noise(3), times(4)))
    assert asked == [0.75, 0.5]

    unguided = classifier_free(lambda x, t: x, without, scale=1.0)
    list(ddim(FLOW, unguided, noise(3), times(4)))
    assert asked == [0.75, 0.5]
