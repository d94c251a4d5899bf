"""Laws of the processes and their parameterizations."""

import pytest
import torch
from diffusers import DDIMScheduler

from trainer.diffusion.process import (
    RectifiedFlow,
    VpScaledLinear,
    diffuse,
    like,
    noise_of,
)

PROCESSES = {
    "flow": RectifiedFlow(),
    "vp_eps": VpScaledLinear(prediction="eps"),
    "vp_v": VpScaledLinear(prediction="v"),
    "vp_short": VpScaledLinear(prediction="v", num_steps=50),
}
over_processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def some(batch=6):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, batch, 4, 3, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.02, 1, batch, dtype=torch.float64)
    return x0, noise, like(t, x0)


@over_processes
def test_the_target_means_the_data_and_the_noise_it_was_made_of(process):
    x0, noise, t = some()
    x_t = diffuse(process, x0, noise, t)
    found = process.data(process.target(x0, noise, t), x_t, t)
    torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(noise_of(process, found, x_t, t), noise, rtol=1e-9, atol=1e-9)


@over_processes
def test_time_zero_is_the_data(process):
    x0, noise, _ = some()
    zero = torch.zeros((), dtype=torch.float64)
    assert torch.equal(diffuse(process, x0, noise, zero), x0)


def test_time_one_is_noise_alone_for_flow_and_nearly_for_vp():
    one = torch.ones((), dtype=torch.float64)
    assert RectifiedFlow().alpha(one) == 0
    assert RectifiedFlow().sigma(one) == 1
    assert 0.06 < VpScaledLinear().alpha(one) < 0.07  # sqrt(0.0047), Stable Diffusion's known leak


@over_processes
def test_noise_only_grows(process):
    t = torch.linspace(0, 1, 997, dtype=torch.float64)
    assert (process.sigma(t).diff() > 0).all()
    assert (process.alpha(t).diff() < 0).all()


@pytest.mark.parametrize("num_steps", [50, 1000])
def test_vp_preserves_variance_on_and_between_levels(num_steps):
    process = VpScaledLinear(num_steps=num_steps)
    t = torch.linspace(0, 1, 1357, dtype=torch.float64)
    squares = process.alpha(t) ** 2 + process.sigma(t) ** 2
    torch.testing.assert_close(squares, torch.ones_like(t), rtol=0, atol=1e-12)


def test_vp_is_the_table_that_stable_diffusion_uses():
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    levels = torch.arange(1000)
    for dtype in (torch.float32, torch.float64):
        t = (levels + 1).to(dtype) / 1000
        process = VpScaledLinear()
        alpha_bar = process.alpha(t) ** 2
        torch.testing.assert_close(alpha_bar.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)
        torch.testing.assert_close(process.network_time(t), levels.to(dtype), rtol=0, atol=1e-3)


def test_every_level_is_trained_equally_often():
    process = VpScaledLinear(num_steps=50)
    u = (torch.arange(1000) + 0.5) / 1000
    levels = (process.training_time(u) * 50).round().long()
    assert torch.equal(torch.bincount(levels)[1:], torch.full((50,), 20))
    assert process.training_time(torch.tensor(1 - 2**-24)) == 1


def test_flow_times_are_logit_normal():
    process = RectifiedFlow(logit_mean=0.5, logit_std=2.0)
    u = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001
    logits = torch.logit(process.training_time(u))
    assert abs(logits.mean() - 0.5) < 1e-6
    assert abs(logits.std() - 2.0) < 0.01
