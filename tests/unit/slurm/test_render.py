import os
import subprocess
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.render import ranges, sbatch_script
from slurm.spec import JobSpec, Site

GOLDEN = Path(__file__).parents[2] / "golden"
RUN = "/shared/runs/sd2 256"
JOB = JobSpec(
    name="sd2_256",
    comment=f"kiln:{RUN}",
    log=Path(RUN) / "attempts/slurm_%j.log",
    num_nodes=16,
    tasks_per_node=8,
    cpus_per_task=8,
    gpus_per_node=8,
    memory_gb=None,
    exclusive=True,
    time_limit_min=1440,
    warn_before_kill_s=300,
    stop_signal="USR2",
    warns="tasks",
    site=Site(partition="gpu", account="ldm", gpu_kind="a100"),
    code=Path(RUN) / "code",
    command=("/shared/venv/bin/python", "-m", "slurm.batch", RUN),
)
EVERYTHING = replace(
    JOB,
    num_nodes=1,
    tasks_per_node=1,
    gpus_per_node=0,
    memory_gb=64,
    exclusive=False,
    warns="batch",
    stop_signal="USR1",
    array=(0, 1, 2, 7, 9, 10),
    at_once=3,
    site=Site(
        partition="cpu,long",
        account="ldm",
        qos="normal",
        reservation="friday",
        licenses="lustre:2",
        constraint="avx512&ib",
        exclude=("node017", "node018"),
        modules=("cuda/12.8", "gcc"),
        env={"NCCL_SOCKET_IFNAME": "ib0", "WORDS": "it's two"},
    ),
)
CPU = replace(JOB, num_nodes=2, gpus_per_node=0, site=Site())
LATER = replace(JOB, begin=datetime(2026, 12, 1, 3))


@pytest.mark.parametrize(
    ("name", "job"),
    [("gpu", JOB), ("everything", EVERYTHING), ("cpu", CPU), ("later", LATER)],
)
def test_the_script_is_what_was_reviewed(name, job):
    path = GOLDEN / f"{name}.sbatch"
    if "KILN_WRITE_GOLDEN" in os.environ:
        path.write_text(sbatch_script(job))
    assert sbatch_script(job) == path.read_text()


def test_the_environment_and_the_command_arrive_as_they_were_given(tmp_path):
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\nprintf "%s|" "$WORDS" "$PYTHONPATH" "$SRUN_CPUS_PER_TASK" "$@"\n')
    show.chmod(0o755)
    site = Site(env={"WORDS": "it's two; $(touch x)"})
    job = replace(CPU, command=(str(show), "a b", "$HOME", "`id`"), site=site)
    script = sbatch_script(job)
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.split("|")[:-1] == [
        *("it's two; $(touch x)", f"{RUN}/code", "8"),
        *("a b", "$HOME", "`id`"),
    ]


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_exactly_these_numbers(numbers):
    told = []
    for span in ranges(tuple(numbers)).split(","):
        first, _, last = span.partition("-")
        told += range(int(first), int(last or first) + 1) if first else []
    assert told == sorted(numbers)


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password"]
)
def test_no_secret_gets_into_a_script(name):
    with pytest.raises(ValueError, match=f"env has {name}, which looks like a secret"):
        Site(env={name: "x"})


def test_what_no_script_can_hold_is_refused():
    assert Site(env={"NCCL_KEYED": "1", "MONKEY": "2"}).env["MONKEY"] == "2"
    with pytest.raises(ValueError, match="env has 'A B', which no shell takes"):
        Site(env={"A B": "x"})
    with pytest.raises(ValueError, match="more than one line"):
        Site(env={"A": "x\ny"})
    with pytest.raises(ValueError, match="no sbatch script can hold"):
        replace(JOB, name="a\n#SBATCH --uid=0")


def test_a_warning_before_the_start_is_refused_with_a_walltime_that_works():
    with pytest.raises(ValueError, match=r"warn_before_kill_s=600, and .* Try time_limit_min=22"):
        replace(JOB, time_limit_min=11, warn_before_kill_s=600)
    replace(JOB, time_limit_min=22, warn_before_kill_s=600)
