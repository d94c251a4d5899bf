from dataclasses import replace

import pytest

from slurm.site import Nodes, advice, misfit
from slurm.spec import Site
from tests.unit.slurm.test_render import JOB

GPU = Nodes("gpu", True, 16, 96, 1_000_000, "gpu:a100:8(S:0-1)", "1-00:00:00")
SMALL = Nodes("gpu", True, 4, 32, 250_000, "gpu:v100:4", "1-00:00:00")
CPU = Nodes("cpu", False, 40, 64, 500_000, "", "infinite")
THERE = (GPU, SMALL, CPU)


@pytest.mark.parametrize(
    ("changes", "wants"),
    [
        ({}, None),
        ({"site": Site()}, None),
        ({"num_nodes": 17}, "17 such nodes"),
        ({"gpus_per_node": 9}, "64 cores (8 ranks x 8) and 9 GPUs on each node"),
        ({"cpus_per_task": 16}, "128 cores (8 ranks x 16) and 8 GPUs on each node"),
        ({"time_limit_min": 1441}, "a walltime of 1441 min"),
        ({"site": Site(partition="gpu", gpu_kind="v100")}, "64 cores (8 ranks x 8) and 8 GPUs"),
        ({"site": Site(partition="cpu")}, "64 cores (8 ranks x 8) and 8 GPUs on each node"),
        ({"site": Site(partition="cpu"), "gpus_per_node": 0, "time_limit_min": 99999}, None),
        ({"site": Site(partition="cpu,gpu")}, None),
        ({"site": Site(partition="elsewhere")}, None),
    ],
)
def test_a_job_that_can_never_begin_is_told_from_one_that_can(changes, wants):
    found = misfit(replace(JOB, **changes), THERE)
    assert found == wants or (wants is not None and found.startswith(wants))


def test_gpus_without_a_kind_are_of_every_kind():
    plain = replace(GPU, gres="gpu:8")
    assert (plain.num_gpus("a100"), plain.num_gpus("")) == (8, 8)
    assert (SMALL.num_gpus("a100"), SMALL.num_gpus("v100")) == (0, 4)


def test_advice_is_empty_where_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert advice() == ""
