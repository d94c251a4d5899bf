"""Laws of the objectives."""

import pytest
import torch

from trainer.diffusion.objective import (
    denoising_loss,
    kl_to_standard_normal,
    reconstruction_loss,
)
from trainer.diffusion.process import RectifiedFlow, VpScaledLinear, like

PROCESSES = [RectifiedFlow(), VpScaledLinear(prediction="eps"), VpScaledLinear(prediction="v")]


def some():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 8, 8, generator=generator)
    return x0, noise, torch.tensor([0.1, 0.4, 0.7, 1.0])


@pytest.mark.parametrize("process", PROCESSES)
def test_the_oracle_has_loss_zero_and_each_sample_its_own(process):
    x0, noise, t_B = some()
    target = process.target(x0, noise, like(t_B, x0))
    assert (denoising_loss(process, lambda x, t: target, x0, noise, t_B) == 0).all()

    wrong = target.clone()
    wrong[2] += 2
    loss_B = denoising_loss(process, lambda x, t: wrong, x0, noise, t_B)
    torch.testing.assert_close(loss_B, torch.tensor([0.0, 0, 4, 0]), rtol=1e-5, atol=1e-6)


def test_a_network_that_says_nothing_pays_the_targets_variance():
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 64, 4, 8, 8, generator=generator)
    t_B = torch.linspace(0.1, 0.9, 64)
    flow, vp = (
        denoising_loss(p, lambda x, t: torch.zeros_like(x), x0, noise, t_B).mean()
        for p in (RectifiedFlow(), VpScaledLinear(prediction="v"))
    )
    assert abs(flow - 2) < 0.1
    assert abs(vp - 1) < 0.05


def test_the_network_sees_the_noised_sample_and_its_time():
    x0, noise, t_B = some()
    seen = {}

    def network(x, t):
        seen.update(x=x, t=t)
        return x

    denoising_loss(RectifiedFlow(), network, x0, noise, t_B)
    assert torch.equal(seen["t"], t_B * 1000)
    torch.testing.assert_close(seen["x"][3], noise[3])


def test_kl_is_zero_only_at_the_standard_normal():
    zero = torch.zeros(2, 4, 3, 3)
    assert (kl_to_standard_normal(zero, zero) == 0).all()
    assert (kl_to_standard_normal(zero + 0.5, zero) == 0.125).all()
    assert (kl_to_standard_normal(zero, zero - 1) > 0).all()


def test_a_perfect_reconstruction_pays_only_for_its_latent():
    x0, _, _ = some()
    zero = torch.zeros(4, 4, 3, 3)
    weights = {"absolute_weight": 1.0, "kl_weight": 0.1}
    assert (reconstruction_loss(x0, x0, zero, zero, **weights) == 0).all()
    latent_only = reconstruction_loss(x0, x0, zero + 1, zero, **weights)
    torch.testing.assert_close(latent_only, torch.full((4,), 0.05))


def test_errors_cost_their_square_and_their_size():
    x0, _, _ = some()
    zero = torch.zeros(4, 4, 3, 3)
    loss_B = reconstruction_loss(x0, x0 + 0.5, zero, zero, absolute_weight=0.2, kl_weight=0.0)
    torch.testing.assert_close(loss_B, torch.full((4,), 0.25 + 0.2 * 0.5))
