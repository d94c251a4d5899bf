"""Laws of training times and of solvers' grids."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from tests.gaussians import PROCESSES
from trainer.diffusion.process import log_snr
from trainer.diffusion.times import (
    grid,
    log_normal_times,
    logit_normal_times,
    shifted,
    uniform_times,
)

KINDS = ["uniform", "trailing", "karras", "log_snr"]
U = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001


def test_every_level_is_trained_equally_often():
    levels = (uniform_times(PROCESSES["table"], U[:4000] * 4001 / 4000) * 1000).round().long()
    assert torch.equal(torch.bincount(levels)[1:], torch.full((1000,), 4))
    assert uniform_times(PROCESSES["table"], torch.tensor(1 - 2**-24)) == 1


def test_uniform_times_fill_the_path():
    t = uniform_times(PROCESSES["vp_linear"], U)
    assert 1e-3 < t.min() < 2e-3
    assert 0.999 < t.max() < 1
    assert abs(t.mean() - 0.5005) < 1e-6


def test_flow_times_are_logit_normal():
    logits = torch.logit(logit_normal_times(U, mean=0.5, std=2.0))
    assert abs(logits.mean() - 0.5) < 1e-6
    assert abs(logits.std() - 2.0) < 0.01


def test_shifting_a_logit_normal_moves_its_mean_by_the_logarithm():
    logits = torch.logit(logit_normal_times(U, mean=0.5, std=1.0, shift=3.0))
    assert abs(logits.mean() - 0.5 - torch.tensor(3.0).log()) < 1e-6


@pytest.mark.parametrize("name", ["edm", "ve", "vp_linear", "flow"])
def test_noise_levels_are_log_normal_on_any_process(name):
    process = PROCESSES[name]
    t = log_normal_times(process, U, mean=-1.2, std=1.2)
    log_ratio = -log_snr(process, t) / 2
    assert abs(log_ratio.median() + 1.2) < 0.01
    quartiles = torch.quantile(log_ratio, torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert abs(quartiles.diff() - 2 * 0.6745 * 1.2) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("first", [1.0, 0.6])
def test_grids_fall_from_the_first_time_to_zero(kind, name, first):
    for num_steps in (1, 2, 7, 50):
        t = grid(PROCESSES[name], kind, num_steps, first=first)
        assert (t[0], t[-1], len(t)) == (first, 0, num_steps + 1)
        assert (t.diff() < 0).all()


def test_shifted_times_keep_their_ends_and_stay_longer_in_the_noise():
    flow = PROCESSES["flow"]
    plain, more = grid(flow, "trailing", 10), grid(flow, "trailing", 10, shift=3.0)
    assert (more[0], more[-1]) == (1, 0)
    assert (more[1:-1] > plain[1:-1]).all()
    torch.testing.assert_close(shifted(shifted(plain, 3.0), 1 / 3), plain)


def test_karras_is_equation_5_of_its_paper():
    process = PROCESSES["edm"]
    sigmas = process.sigma(grid(process, "karras", 18))
    i = torch.arange(18, dtype=torch.float64)
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    torch.testing.assert_close(sigmas[:-1], (high + i / 17 * (low - high)) ** 7)
    assert sigmas[-1] == 0


def test_log_snr_steps_are_equal():
    t = grid(PROCESSES["vp_linear"], "log_snr", 9)
    widths = log_snr(PROCESSES["vp_linear"], t[:-1]).diff()
    torch.testing.assert_close(widths, widths[:1].expand(8))


@pytest.mark.parametrize("num_steps", [7, 20, 50, 1000])
@pytest.mark.parametrize(("kind", "spacing"), [("trailing", "trailing"), ("uniform", "linspace")])
def test_levels_are_those_of_diffusers(num_steps, kind, spacing):
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(num_steps)
    t = grid(PROCESSES["table"], kind, num_steps)
    levels = PROCESSES["table"].network_time(t[:-1]).round().long()
    assert torch.equal(levels, theirs.timesteps)


def test_karras_ratios_are_those_of_diffusers():
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    euler = EulerDiscreteScheduler(**betas, use_karras_sigmas=True)
    dpm = DPMSolverMultistepScheduler(**betas, use_karras_sigmas=True)
    t = grid(PROCESSES["table"], "karras", 12)[:-1]
    ratios = torch.exp(-log_snr(PROCESSES["table"], t) / 2).float()
    for theirs in (euler, dpm):
        theirs.set_timesteps(12)
        torch.testing.assert_close(ratios, theirs.sigmas[:-1], rtol=2e-5, atol=0)
