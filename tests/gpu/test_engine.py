"""The runtime on a GPU with NCCL gives what it gives on a CPU with gloo."""

import pytest

from tests.multiproc.toys import STEPS, assert_equal, interrupted, run_toy
from trainer.runtime.compiled import build_cpu_op

pytestmark = pytest.mark.gpu
CUDA = {"cluster.device": "cuda"}
SHARDING = (1, 2, 3)
"""The stages for half precision and offload."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Losses of the toy on a CPU, in fp32."""
    build_cpu_op()
    return run_toy(tmp_path_factory.mktemp("cpu"), 0, 1)


@pytest.mark.parametrize("stage", [0, *SHARDING])
def test_losses_in_fp32_are_those_of_a_cpu(tmp_path, expected, stage):
    assert run_toy(tmp_path, stage, 1, **CUDA) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", SHARDING)
def test_losses_in_half_precision_are_near_them(tmp_path, expected, stage, precision):
    losses = run_toy(tmp_path, stage, 1, **CUDA, **{"engine.precision": precision})
    assert losses == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("stage", SHARDING)
@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path, stage, offload):
    settings = {**CUDA, "engine.precision": "bf16", "engine.offload": offload}
    whole = tmp_path / "whole"
    losses = run_toy(whole, stage, 1, **settings)
    assert len(losses) == STEPS
    run = interrupted(whole, tmp_path / "again", 2)
    assert run_toy(run, stage, 1, **settings) == losses[2:]
    assert_equal(run, whole, exact=True)


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(tmp_path):
    whole = tmp_path / "whole"
    losses = run_toy(whole, 1, 1, **CUDA)
    run = interrupted(whole, tmp_path / "cpu", 2)
    assert run_toy(run, 0, 1) == pytest.approx(losses[2:], rel=1e-4)
