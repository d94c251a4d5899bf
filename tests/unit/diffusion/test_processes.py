"""Laws of the processes and of what follows from them."""

import pytest
import torch
from diffusers import DDIMScheduler

from tests.gaussians import NORMAL, PROCESSES, TWO, normals
from trainer.diffusion.process import (
    diffuse,
    diffusion,
    drift,
    like,
    log_snr,
    noise_of,
    prior_std,
    probability_flow,
    reverse_drift,
    score_of,
    time_at,
)
from trainer.diffusion.processes import VariancePreserving, VpTable

over_processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
SMOOTH = {name: p for name, p in PROCESSES.items() if p.num_levels is None}
over_smooth = pytest.mark.parametrize("process", SMOOTH.values(), ids=SMOOTH.keys())
ONE = torch.ones((), dtype=torch.float64)


def inner(count=301):
    """Times off the ends and off the levels of a table."""
    return torch.linspace(0.02037, 0.98971, count, dtype=torch.float64)


@over_processes
def test_time_zero_is_the_data(process):
    x0, noise = normals(2, 6, 4, 3, 3)
    assert torch.equal(diffuse(process, x0, noise, 0 * ONE), x0)


@over_processes
def test_noise_only_grows(process):
    t = torch.linspace(0, 1, 997, dtype=torch.float64)
    assert (process.sigma(t).diff() > 0).all()
    assert (process.alpha(t).diff() <= 0).all()
    assert (log_snr(process, t).diff() < 0).all()


@over_processes
def test_the_rates_are_the_derivatives(process):
    t = inner().requires_grad_()
    for value, rate in ((process.alpha, process.alpha_rate), (process.sigma, process.sigma_rate)):
        small = 1e-6
        difference = (value(t + small) - value(t - small)) / (2 * small)
        torch.testing.assert_close(difference, rate(t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vp_linear", "vp_scaled_linear", "vp_cosine", "table"])
def test_vp_preserves_variance_on_and_between_levels(name):
    process = PROCESSES[name]
    t = torch.linspace(0, 1, 1357, dtype=torch.float64)
    squares = process.alpha(t) ** 2 + process.sigma(t) ** 2
    torch.testing.assert_close(squares, torch.ones_like(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_some_processes_end_in_noise_alone(name):
    to_noise = {"flow", "vp_cosine", "vp_zero_snr", "table_zero_snr"}
    assert (PROCESSES[name].alpha(ONE) == 0) == (name in to_noise)
    if name == "table":
        assert 0.06 < PROCESSES[name].alpha(ONE) < 0.07  # sqrt(0.0047), Stable Diffusion's leak


@over_smooth
def test_the_forward_sde_moves_mean_and_variance_as_the_path_does(process):
    t = inner()
    f, g = drift(process, t), diffusion(process, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close(process.alpha_rate(t), f * alpha)
    variance_rate = 2 * sigma * process.sigma_rate(t)
    torch.testing.assert_close(variance_rate, 2 * f * sigma**2 + g**2)


@pytest.mark.parametrize("name", ["vp_linear", "sub_vp"])
def test_vp_and_sub_vp_are_those_of_their_paper(name):
    process, t = PROCESSES[name], inner()
    beta = 0.1 + (20 - 0.1) * t
    torch.testing.assert_close(drift(process, t), -beta / 2)
    rest = torch.exp(-2 * (0.1 * t + 19.9 * t**2 / 2))
    expected = beta if name == "vp_linear" else beta * (1 - rest)
    torch.testing.assert_close(diffusion(process, t) ** 2, expected)


@over_processes
def test_score_and_noise_are_two_names_of_one_thing(process):
    x0, noise = normals(2, 301, 5)
    t = like(inner(), x0)
    x_t = diffuse(process, x0, noise, t)
    torch.testing.assert_close(noise_of(process, x0, x_t, t), noise, rtol=1e-8, atol=1e-8)
    score = score_of(process, x0, x_t, t)
    torch.testing.assert_close(score, -noise / process.sigma(t), rtol=1e-8, atol=1e-8)


@over_processes
def test_the_denoiser_gives_the_gradient_of_the_log_density(process):
    for t in (0.1 * ONE, 0.7 * ONE):
        x = TWO.start(process, 50, first=float(t)).requires_grad_()
        (gradient,) = torch.autograd.grad(TWO.log_density(process, x, t).sum(), x)
        score = score_of(process, TWO.denoiser(process)(x, t), x, t)
        torch.testing.assert_close(score, gradient, rtol=1e-7, atol=1e-9)


@over_smooth
def test_the_flow_is_the_reverse_sde_without_half_of_its_noise(process):
    t = 0.6 * ONE
    x = TWO.start(process, 50, first=0.6)
    x0 = TWO.denoiser(process)(x, t)
    score = score_of(process, x0, x, t)
    half = diffusion(process, t) ** 2 * score / 2
    flow = probability_flow(process, x0, x, t)
    torch.testing.assert_close(flow, reverse_drift(process, x, score, t) + half)


@over_smooth
def test_the_flow_carries_the_density(process):
    """d log p / dt along the flow is minus its divergence (continuity equation)."""
    t, small = 0.5 * ONE, 1e-5
    x = NORMAL.start(process, 20, first=0.5).requires_grad_()
    flow = probability_flow(process, NORMAL.denoiser(process)(x, t), x, t)
    divergence = sum(
        torch.autograd.grad(flow[:, d].sum(), x, retain_graph=True)[0][:, d] for d in range(2)
    )
    ahead = NORMAL.log_density(process, x + small * flow, t + small)
    behind = NORMAL.log_density(process, x - small * flow, t - small)
    torch.testing.assert_close((ahead - behind) / (2 * small), -divergence, rtol=1e-5, atol=1e-6)


@over_processes
def test_times_are_found_by_their_log_snr(process):
    t = inner()
    torch.testing.assert_close(time_at(process, log_snr(process, t)), t, rtol=1e-9, atol=1e-9)
    beyond = torch.tensor([1e9, -1e9], dtype=torch.float64)
    found = time_at(process, beyond)
    assert found[0] < 1e-6  # a table takes less than a ten-thousandth of a level for none
    assert found[1] > 1 - 1e-6


@over_processes
def test_the_prior_is_what_unit_data_become(process):
    x0, noise = normals(2, 100_000)
    spread = diffuse(process, x0, noise, ONE).std()
    assert abs(spread / prior_std(process) - 1) < 0.01


@over_processes
def test_network_times_rise_within_what_embeddings_are_made_for(process):
    t = torch.linspace(process.min_time, 1, 200, dtype=torch.float64)
    times = process.network_time(t)
    assert (times.diff() > 0).all()
    assert times[0] >= 0
    assert times[-1] <= 1000


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero", [False, True])
def test_tables_are_those_of_diffusers(betas, zero):
    names = {"cosine": "squaredcos_cap_v2"}
    start, end = (1e-4, 0.02) if betas == "linear" else (0.00085, 0.012)
    theirs = DDIMScheduler(
        beta_start=start,
        beta_end=end,
        beta_schedule=names.get(betas, betas),
        rescale_betas_zero_snr=zero,
    )
    process = VpTable(betas, start, end, zero_terminal_snr=zero)
    levels = torch.arange(1000)
    for dtype in (torch.float32, torch.float64):
        t = (levels + 1).to(dtype) / 1000
        alpha_bar = process.alpha(t) ** 2
        torch.testing.assert_close(alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=2e-7)
        torch.testing.assert_close(process.network_time(t), levels.to(dtype), rtol=0, atol=1e-3)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_a_table_of_many_levels_becomes_the_continuous_process(betas):
    t = inner(11)
    smooth = VariancePreserving(betas, 1e-4, 0.02).alpha(t)
    few, many = (
        VpTable(betas, 0.1 / n, 20 / n, num_levels=n).alpha(t) - smooth for n in (1000, 10_000)
    )
    assert many.abs().max() < 0.15 * few.abs().max() < 0.01
