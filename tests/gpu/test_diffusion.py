"""The diffusion mathematics gives on a GPU what it gives on a CPU."""

import pytest
import torch

from tests.gaussians import PROCESSES, draws, last, normals
from trainer.diffusion import philox
from trainer.diffusion.objective import Weight, denoising_loss
from trainer.diffusion.parameterization import Parameterization
from trainer.diffusion.solvers import SOLVERS
from trainer.diffusion.times import grid

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def test_draws_are_the_same_numbers():
    ids = torch.arange(1000)
    for device in ("cpu", CUDA):
        words = philox.words(3, ids.to(device), ids.to(device), counts={philox.NOISE: 64})[
            philox.NOISE
        ]
        drawn = philox.normals(3, ids.to(device), ids.to(device), purpose=0, shape=(4, 8, 8))
        if device == "cpu":
            wanted = words, drawn
    assert torch.equal(words.cpu(), wanted[0])
    torch.testing.assert_close(drawn.cpu(), wanted[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_end_where_they_do_on_a_cpu(solver, name):
    process = PROCESSES[name]
    first = 0.999 if solver in {"euler_maruyama", "predictor_corrector"} else 1.0
    x, t = normals(4, 3, 8, 8, dtype=torch.float32), grid(process, "log_snr", 9, first=first)
    draw = draws(x)
    here = last(SOLVERS[solver](process, lambda x, t: torch.tanh(x), x, t, draw))
    moved = SOLVERS[solver](
        process, lambda x, t: torch.tanh(x), x.to(CUDA), t, lambda k: draw(k).to(CUDA)
    )
    torch.testing.assert_close(last(moved).cpu(), here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PROCESSES)
def test_losses_are_the_same_numbers(name):
    x0, noise = normals(2, 6, 4, 8, 8, dtype=torch.float32)
    t_B = torch.linspace(0.03, 0.97, 6)
    p = Parameterization(PROCESSES[name], "v")

    def loss(device):
        on = [value.to(device) for value in (x0, noise, t_B)]
        return denoising_loss(p, lambda x, t: torch.tanh(x), *on, weight=Weight("min_snr")).cpu()

    torch.testing.assert_close(loss(CUDA), loss("cpu"), rtol=1e-4, atol=1e-5)
