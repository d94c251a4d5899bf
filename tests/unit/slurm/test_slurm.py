import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from slurm.submit import submit

from slurm.render import sbatch_script
from slurm.spec import JobSpec
from trainer.cli import main

GOLDEN = Path(__file__).parents[2] / "golden"
JOB = JobSpec(
    name="sd2_256",
    num_nodes=16,
    ranks_per_node=8,
    gpus_per_node=8,
    threads_per_rank=8,
    time_limit_min=1440,
    warn_before_kill_s=300,
    partition="a100",
    python=Path("/shared/venv/bin/python"),
    code=Path("/shared/runs/sd2 256/code"),
    run=Path("/shared/runs/sd2 256"),
)


@pytest.mark.parametrize(
    ("name", "job"),
    [("gpu", JOB), ("cpu", replace(JOB, gpus_per_node=0, partition="", num_nodes=2))],
)
def test_the_script_is_what_was_reviewed(name, job):
    path = GOLDEN / f"{name}.sbatch"
    if "KILN_WRITE_GOLDEN" in os.environ:
        path.write_text(sbatch_script(job))
    assert sbatch_script(job) == path.read_text()


@pytest.mark.parametrize(
    ("srun", "requeued"),
    [("exit 0", False), ("exit 1", False), ("exit 85", True), ('touch "$MARK"; exit 137', True)],
)
def test_a_job_comes_back_when_its_ranks_say_so_even_if_slurm_had_to_kill_one(
    tmp_path, monkeypatch, srun, requeued
):
    mark = tmp_path / "run/attempts/002/stuck.json"
    mark.parent.mkdir(parents=True)
    mark.touch()  # of an earlier job
    for name, does in (("srun", srun), ("scontrol", f'echo "$@" >>{tmp_path}/said')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    script = sbatch_script(replace(JOB, run=tmp_path / "run"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_RESTART_COUNT": "2"}
    for key, value in {**slurm, "MARK": str(mark)}.items():
        monkeypatch.setenv(key, value)
    subprocess.run(["bash", "-c", script], check=False)
    assert ("requeue 7" in (tmp_path / "said").read_text()) == requeued


def test_a_warning_before_the_start_is_refused():
    with pytest.raises(ValueError, match=r"warn_before_kill_s=600 is not below .* Try 60"):
        replace(JOB, time_limit_min=10, warn_before_kill_s=600)


def test_sbatch_missing_and_refusing_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no sbatch on this machine"):
        submit(tmp_path / "submit.sbatch")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    with pytest.raises(RuntimeError, match="invalid partition"):
        submit(tmp_path / "submit.sbatch")
    sbatch.write_text("#!/bin/sh\necho '1234;kiln'\n")
    assert submit(tmp_path / "submit.sbatch") == 1234


LAUNCH = ["launch", "experiment=sd2_256", "data.dataset=laion"]


def test_launch_freezes_config_code_and_script_and_touches_nothing_else(tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*LAUNCH, f"run={run}"]) == 0
    assert "#SBATCH --gpus-per-node=8" in capsys.readouterr().out
    assert (run / "code/trainer/worker.py").exists()
    assert "run:" in (run / "config.yaml").read_text()
    # The same command again changes nothing; other numbers are another run.
    assert main([*LAUNCH, f"run={run}"]) == 0
    assert main([*LAUNCH, f"run={run}", "seed=5"]) == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["cluster=local"], 2, "`kiln launch` is for Slurm"),
        (["cluster.warn_before_kill_s=99999"], 2, "cluster: warn_before_kill_s=99999"),
        (["batch.global_batch_images=2000"], 2, "Try "),
        (["engine.zero_stage=0", "cluster.device_memory_gib=8"], 2, "GiB per rank"),
    ],
)
def test_what_cannot_run_is_refused_before_the_queue(tmp_path, capsys, words, code, message):
    assert main([*LAUNCH, f"run={tmp_path / 'run'}", "engine.precision=fp32", *words]) == code
    assert message in capsys.readouterr().err


def test_without_slurm_submit_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*LAUNCH, f"run={tmp_path / 'run'}", "submit=true"]) == 1
    assert "no sbatch on this machine" in capsys.readouterr().err
