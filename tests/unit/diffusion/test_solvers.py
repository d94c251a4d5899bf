"""Laws of the solvers: orders, laws of what they draw, and the ends."""

import math
from functools import partial

import pytest
import torch

from tests.gaussians import (
    NORMAL,
    PROCESSES,
    TWO,
    draws,
    energy_distance,
    exact_flow_of_normal,
    last,
    normals,
)
from trainer.diffusion.solvers import (
    SOLVERS,
    Churn,
    Counted,
    ddim,
    dopri5,
    euler,
    euler_maruyama,
    heun,
)
from trainer.diffusion.times import grid

OF_SDE = {"euler_maruyama", "predictor_corrector"}
EXPLODING = {"ve", "edm"}
ENDS_IN_NOISE = {"flow", "vp_cosine", "vp_zero_snr", "table_zero_snr"}
over_processes = pytest.mark.parametrize("name", PROCESSES)
over_solvers = pytest.mark.parametrize("solver", SOLVERS)


# Two samples of 2,000 differ by up to some 3e-3; a sample moved by 0.1 differs by 1.4e-2.
SAME_LAW = 6e-3


def first_time(solver, name):
    return 0.999 if solver in OF_SDE and name in ENDS_IN_NOISE else 1.0


def run(solver, process, data, x, t):
    return last(solver(process, data.denoiser(process), x, t, draws(x)))


@over_processes
@over_solvers
def test_noise_becomes_the_law_whose_denoiser_is_given(solver, name):
    process, first = PROCESSES[name], first_time(solver, name)
    x = TWO.start(process, 2000, first=first)
    num_steps = 240 if solver in OF_SDE else 100
    t = grid(process, "karras" if name in EXPLODING else "uniform", num_steps, first=first)
    end = run(SOLVERS[solver], process, TWO, x, t)
    assert energy_distance(end, TWO.draw(2000, seed=99)) < SAME_LAW


def slope(errors):
    """Of log(error) against log(steps), over the last doubling; steps double."""
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize(
    ("solver", "kind", "orders"),
    [
        ("ddim", "log_snr", (0.85, 1.3)),
        ("euler", "log_snr", (0.85, 1.3)),
        ("heun", "log_snr", (1.85, 2.3)),
        ("dpm_2m", "log_snr", (1.85, 2.3)),
        ("unipc", "log_snr", (2.6, 3.4)),  # the corrector adds one to UniPC-2's order
        ("heun", "karras", (1.85, 2.3)),
        ("dpm_2m", "karras", (1.85, 2.3)),
    ],
)
@over_processes
def test_solvers_of_the_flow_converge_at_their_order(solver, kind, orders, name):
    """Where the flow is known exactly: but for the last step, which ends at the mean of x0."""
    process = PROCESSES[name]
    x = NORMAL.start(process, 100)
    errors = []
    for num_steps in (80, 160, 320):
        t = grid(process, kind, num_steps)
        *_, before, _ = SOLVERS[solver](process, NORMAL.denoiser(process), x, t, draws(x))
        alpha, sigma = process.alpha(t[-2]), process.sigma(t[-2])
        std = torch.sqrt((alpha * NORMAL.stds[0]) ** 2 + sigma**2)
        place = (exact_flow_of_normal(NORMAL, process, x) - NORMAL.means[0]) / NORMAL.stds[0]
        errors.append(float((before - alpha * NORMAL.means[0] - std * place).abs().max()))
    assert orders[0] < slope(errors) < orders[1], errors


def law_of_the_end(solver, process, t):
    """Mean and variance of what a solver makes of exact noise for normal data, without drawing.

    For such data every step is affine in x and in the draws, so that runs with one unit at a time
    give all coefficients.
    """
    num_draws = 2 * len(t)
    x = torch.zeros(num_draws + 2, 1, dtype=torch.float64)
    x[1] = 1

    def draw(k):
        unit = torch.zeros_like(x)
        unit[k + 2] = 1
        return unit

    end = last(solver(process, ONE_D.denoiser(process), x, t, draw))[:, 0]
    factors = end[1:] - end[0]
    alpha, sigma = process.alpha(t[0]), process.sigma(t[0])
    mean = end[0] + factors[0] * alpha * ONE_D.means[0, 0]
    variance = factors[0] ** 2 * ((alpha * ONE_D.stds[0]) ** 2 + sigma**2)
    return float(mean), float(variance + factors[1:].square().sum())


ONE_D = type(NORMAL)([[1.5]], [0.6])


@pytest.mark.parametrize("solver", ["ddpm", "euler_maruyama", "predictor_corrector", "dpm_sde"])
@pytest.mark.parametrize("name", ["vp_linear", "sub_vp", "edm", "flow"])
def test_stochastic_solvers_converge_to_the_law_at_their_weak_order(solver, name):
    process, first = PROCESSES[name], first_time(solver, name)
    errors = []
    for num_steps in (50, 100, 200, 400):
        t = grid(process, "karras", num_steps, first=first)
        mean, variance = law_of_the_end(SOLVERS[solver], process, t)
        errors.append(abs(variance - 0.36) + abs(mean - 1.5))
    assert errors[-1] < 0.02, errors
    assert errors[-1] < errors[0] / (6 if solver == "dpm_sde" else 3), errors


@over_processes
@over_solvers
def test_a_denoiser_that_knows_the_answer_is_believed(solver, name):
    process, first = PROCESSES[name], first_time(solver, name)
    answer = normals(2, 3)
    t = grid(process, "log_snr", 7, first=first)
    end = last(
        SOLVERS[solver](process, lambda x, t: answer, normals(2, 3, seed=3), t, draws(answer))
    )
    torch.testing.assert_close(end, answer, rtol=0, atol=1e-9)


@over_solvers
def test_a_solver_yields_once_a_step_and_keeps_float32(solver):
    process = PROCESSES["vp_linear"]
    x = normals(2, 3, dtype=torch.float32)
    steps = list(
        SOLVERS[solver](process, lambda x, t: 0.5 * x, x, grid(process, "uniform", 5), draws(x))
    )
    assert len(steps) == 5 or solver == "dopri5"
    assert all(x.dtype == torch.float32 for x in steps)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "dopri5"])
def test_one_step_from_noise_is_the_mean_of_the_data(solver):
    process = PROCESSES["vp_linear"]
    x = TWO.start(process, 4)
    t = torch.tensor([1.0, 0.0], dtype=torch.float64)
    one = run(SOLVERS[solver], process, TWO, x, t)
    torch.testing.assert_close(one, TWO.denoiser(process)(x, t[0]))


@pytest.mark.parametrize(
    ("solver", "per_step"), [("ddim", 1), ("dpm_2m", 1), ("unipc", 1), ("heun", 2)]
)
def test_solvers_ask_as_often_as_they_say(solver, per_step):
    process = PROCESSES["vp_linear"]
    x, denoise = normals(2, 3), Counted(lambda x, t: 0.5 * x)
    last(SOLVERS[solver](process, denoise, x, grid(process, "uniform", 9), draws(x)))
    assert denoise.calls == 9 * per_step - (per_step - 1)


@over_processes
def test_ddim_with_eta_of_one_is_ddpm_and_of_zero_takes_no_draws(name):
    process = PROCESSES[name]
    x, t = TWO.start(process, 10), grid(process, "log_snr", 9)
    ancestral = run(SOLVERS["ddpm"], process, TWO, x, t)
    torch.testing.assert_close(run(partial(ddim, eta=1.0), process, TWO, x, t), ancestral)

    def refuse(k):
        raise AssertionError(k)

    last(ddim(process, TWO.denoiser(process), x, t, refuse))


@over_processes
@pytest.mark.parametrize("solver", [euler, heun])
def test_churn_keeps_the_law(name, solver):
    process = PROCESSES[name]
    churn = Churn(amount=40.0, min_ratio=0.01, max_ratio=20.0)
    x = TWO.start(process, 2000)
    t = grid(process, "karras", 150)
    end = run(partial(solver, churn=churn), process, TWO, x, t)
    plain = run(solver, process, TWO, x, t)
    assert (end - plain).abs().mean() > 0.3  # other pictures ...
    assert energy_distance(end, TWO.draw(2000, seed=99)) < SAME_LAW  # ... of the same law


@pytest.mark.parametrize("name", [n for n, p in PROCESSES.items() if p.num_levels is None])
def test_the_adaptive_solver_keeps_its_tolerance_and_counts_more_for_less(name):
    process = PROCESSES[name]
    x = NORMAL.start(process, 50)
    t = grid(process, "uniform", 1)
    exact = exact_flow_of_normal(NORMAL, process, x)
    errors, calls = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        denoise = Counted(NORMAL.denoiser(process))
        solver = dopri5(process, denoise, x, t, draws(x), rtol=tolerance, atol=tolerance)
        *_, before, _ = solver
        least = torch.tensor(process.min_time, dtype=torch.float64)
        alpha, sigma = process.alpha(least), process.sigma(least)
        std = torch.sqrt((alpha * NORMAL.stds[0]) ** 2 + sigma**2)
        place = (exact - NORMAL.means[0]) / NORMAL.stds[0]
        errors.append(float((before - alpha * NORMAL.means[0] - std * place).abs().max()))
        calls.append(denoise.calls)
    assert calls == sorted(calls)
    assert calls[-1] < 8 * calls[0]
    for error, tolerance in zip(errors, (1e-3, 1e-5, 1e-7), strict=True):
        assert error < 300 * tolerance, errors


def test_adaptive_steps_belong_to_the_sample():
    process = PROCESSES["vp_linear"]
    x = TWO.start(process, 6)
    t = grid(process, "uniform", 1)
    together = run(dopri5, process, TWO, x, t)
    alone = torch.cat([run(dopri5, process, TWO, x[i : i + 1], t) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_the_adaptive_solver_ends_when_the_network_breaks():
    process = PROCESSES["flow"]
    x = normals(3, 2)
    t = grid(process, "uniform", 1)
    end = last(dopri5(process, lambda x, t: x * math.nan, x, t, draws(x)))
    assert end.isnan().all()


@pytest.mark.parametrize("name", sorted(ENDS_IN_NOISE))
def test_the_reverse_sde_refuses_to_begin_where_it_is_infinite(name):
    process = PROCESSES[name]
    x = normals(2, 2)
    with pytest.raises(ValueError, match=r"Begin later, or take .* ddpm"):
        next(euler_maruyama(process, lambda x, t: x, x, grid(process, "uniform", 5), draws(x)))
