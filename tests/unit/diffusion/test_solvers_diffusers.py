"""Equality with diffusers' schedulers on the same network, wherever both define the thing."""

from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from tests.gaussians import PROCESSES, last, normals
from trainer.diffusion.parameterization import Parameterization
from trainer.diffusion.solvers import ddim, ddpm, dpm_2m, dpm_sde, euler, heun, unipc
from trainer.diffusion.times import grid

TRAILING = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
TABLE, FLOW, EDM = PROCESSES["table"], PROCESSES["flow"], PROCESSES["edm"]
over_kinds = pytest.mark.parametrize("kind", TYPES)


def network(x, t):
    """Some smooth function of both arguments, standing in for a network."""
    return torch.tanh(0.7 * x + 0.001 * t) - 0.2 * x


def noise(seed=0):
    return normals(2, 4, 8, 8, seed=seed, dtype=torch.float32)


def step_noise(k):
    return noise(seed=100 + k)


def ours(solver, p, t, x):
    def denoise(x, t):
        time = float(p.process.network_time(t))
        return p.data(network(p.network_input(x, t), time), x, t)

    return last(solver(p.process, denoise, x, t, step_noise))


def theirs(scheduler, x, **of_step):
    for step, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        extra = {name: value(step) for name, value in of_step.items()}
        x = scheduler.step(network(scaled, float(t)), t, x, **extra).prev_sample
    return x


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def table(kind, num_steps):
    return Parameterization(TABLE, kind), grid(TABLE, "trailing", num_steps)


def exploded(x):
    """Euler and Heun of diffusers keep x / alpha."""
    return x / TABLE.alpha(torch.ones((), dtype=torch.float64))


@over_kinds
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim(kind, eta):
    scheduler = DDIMScheduler(**TRAILING, prediction_type=TYPES[kind], clip_sample=False)
    scheduler.set_timesteps(20)
    wanted = theirs(scheduler, noise(), eta=lambda k: eta, variance_noise=step_noise)
    same(ours(partial(ddim, eta=eta), *table(kind, 20), noise()), wanted)


@over_kinds
def test_ddpm(kind, monkeypatch):
    drawn = iter(range(50))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *_, **__: step_noise(next(drawn)),
    )
    scheduler = DDPMScheduler(**TRAILING, prediction_type=TYPES[kind], clip_sample=False)
    scheduler.set_timesteps(50)
    same(ours(ddpm, *table(kind, 50), noise()), theirs(scheduler, noise()))


@over_kinds
@pytest.mark.parametrize(
    ("solver", "scheduler"), [(euler, EulerDiscreteScheduler), (heun, HeunDiscreteScheduler)]
)
def test_euler_and_heun(kind, solver, scheduler):
    theirs_ = scheduler(**TRAILING, prediction_type=TYPES[kind])
    theirs_.set_timesteps(20)
    same(ours(solver, *table(kind, 20), noise()), theirs(theirs_, exploded(noise())))


@over_kinds
@pytest.mark.parametrize("num_steps", [8, 20])
def test_dpm_solver_pp(kind, num_steps):
    scheduler = DPMSolverMultistepScheduler(
        **TRAILING, prediction_type=TYPES[kind], final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    same(ours(dpm_2m, *table(kind, num_steps), noise()), theirs(scheduler, noise()))


@over_kinds
def test_sde_dpm_solver_pp(kind):
    scheduler = DPMSolverMultistepScheduler(
        **TRAILING,
        prediction_type=TYPES[kind],
        algorithm_type="sde-dpmsolver++",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(20)
    wanted = theirs(scheduler, noise(), variance_noise=step_noise)
    same(ours(dpm_sde, *table(kind, 20), noise()), wanted)


@over_kinds
@pytest.mark.parametrize("num_steps", [8, 20])
def test_unipc(kind, num_steps):
    scheduler = UniPCMultistepScheduler(
        **TRAILING, prediction_type=TYPES[kind], final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    same(ours(unipc, *table(kind, num_steps), noise()), theirs(scheduler, noise()))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("solver", "scheduler"),
    [
        (euler, FlowMatchEulerDiscreteScheduler),
        (ddim, FlowMatchEulerDiscreteScheduler),
        (heun, FlowMatchHeunDiscreteScheduler),
    ],
)
def test_flow(solver, scheduler, shift):
    theirs_ = scheduler(shift=shift)
    theirs_.set_timesteps(20)
    # Their grid ends at a level of a thousand, shifted once in the making and once in the setting.
    t = theirs_.sigmas.double()
    if solver is heun:
        t = torch.cat([t[:1], t[1:-1:2], t[-1:]])
    same(ours(solver, Parameterization(FLOW, "flow"), t, noise()), theirs(theirs_, noise()))


def test_a_shifted_grid_of_the_flow_is_theirs():
    theirs_ = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs_.set_timesteps(sigmas=[(20 - i) / 20 for i in range(20)])
    found = grid(FLOW, "trailing", 20, shift=3.0)
    torch.testing.assert_close(found, theirs_.sigmas.double(), rtol=1e-6, atol=1e-7)


def test_edm_euler():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(20)
    x = wanted = 80 * noise()
    for t in scheduler.timesteps:
        raw = network(scheduler.scale_model_input(wanted, t), 0.0)
        wanted = scheduler.step(raw, t, wanted).prev_sample
    p = Parameterization(EDM, "edm", sigma_data=0.5)

    def denoise(x, t):
        return p.data(network(p.network_input(x, t), 0.0), x, t)

    same(last(euler(EDM, denoise, x, grid(EDM, "karras", 20), step_noise)), wanted)
