"""A coordinator that comes back, arrays that Slurm must not get whole, and tasks that come back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import client
from slurm.chain import after
from slurm.render import sbatch_script
from slurm.task import WARN_BEFORE_KILL_S
from tests.cluster.jobs import job_of, state, wait_for
from tests.cluster.training import SITE
from tests.tiny_source import write_rows
from trainer.config_pipeline import PipelineConfig
from trainer.coordinator import Coordinator
from trainer.frozen import compose
from trainer.pipeline_stages import freeze_pipeline

pytestmark = pytest.mark.cluster

NUM_UNITS = 1100


def frozen(tmp_path: Path) -> Path:
    """Freeze a pipeline of so many units that Slurm takes no array of all."""
    rows = [(f"http://127.0.0.1:9/{n}.jpg", f"number {n}") for n in range(NUM_UNITS)]
    run = tmp_path / "many"
    told = [
        "name=many",
        f"run={run}",
        f"rows={write_rows(tmp_path / 'rows.parquet', *rows)}",
        "prepare.words=['shard_rows=1']",
        f"prepare.max_tasks={NUM_UNITS}",
        "prepare.units_per_task=1",
    ]
    freeze_pipeline(compose(PipelineConfig, "pipeline", [*told, *SITE]))
    return run


def submit(tmp_path: Path, name: str, *options: str) -> str:
    script = tmp_path / f"{name}.sbatch"
    script.write_text(f"#!/bin/bash\n#SBATCH --job-name={name} --output=/dev/null\nsleep 60\n")
    return client.submit(script, options)


def arrays() -> set[str]:
    return {job.array for job in client.queue() if job.job_name == "many-prepare"}


def test_a_coordinator_that_comes_back_submits_nothing_twice(cluster, tmp_path):
    run = frozen(tmp_path)
    me = submit(tmp_path, "me", "--hold")
    child = submit(tmp_path, "child", *after([me]))
    Coordinator(run, "prepare").submit(me)
    first = arrays()
    assert len(first) == 2
    tasks = [job for job in client.queue() if job.array in first]
    assert len(tasks) == NUM_UNITS
    assert {job.dependency for job in tasks} == {f"afterok:{me}(unfulfilled)"}
    dependency = client.show_job(child)["Dependency"]
    assert me not in dependency.replace("(unfulfilled)", "").split(":")
    assert all(f"afterok:{each}" in dependency for each in first)
    assert "--first=1000 " in (run / "pipeline/prepare_1.sbatch").read_text()

    # It was killed after it had written down what it had submitted ...
    Coordinator(run, "prepare").submit(me)
    assert arrays() == first
    # ... or before.
    client.update(child, Dependency=f"afterok:{me}")
    (run / "pipeline/prepare.json").unlink()
    Coordinator(run, "prepare").submit(me)
    second = arrays()
    assert len(second) == 2
    assert not first & second
    dependency = client.show_job(child)["Dependency"]
    assert all(f"afterok:{each}" in dependency for each in second)

    client.cancel([me])
    wait_for(lambda: not client.queue(), "the end of all that waited for it", 60)
    assert state(child) == "CANCELLED"


def test_a_coordinator_that_cannot_submit_leaves_nothing(cluster, tmp_path):
    run = frozen(tmp_path)
    me = submit(tmp_path, "me", "--hold")
    config = run / "pipeline.yaml"
    text = config.read_text().replace("partition: ''", "partition: nowhere", 1)
    assert "nowhere" in text
    config.write_text(text)
    told = subprocess.run(
        [sys.executable, "-m", "trainer.coordinator", str(run), "prepare"],
        env={**os.environ, "SLURM_JOB_ID": me},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1
    assert "prepare: does not begin: " in told.stderr
    assert "partition train: 4 nodes" in told.stderr
    assert not arrays()
    assert not (run / "pipeline/prepare.json").exists()


COUNTS = """
import os, sys, time
path = sys.argv[1]
open(path, 'a').write('x')
if len(open(path).read()) < 2:
    time.sleep(60)
"""


def start_task(tmp_path: Path) -> str:
    """Submit an array of one whose first attempt takes long."""
    run = tmp_path / "task"
    run.mkdir()
    (run / "count.py").write_text(COUNTS)
    command = (sys.executable, "-m", "slurm.task", "--max-restarts=5")
    job = job_of(
        run,
        log=run / "%A_%a.log",
        num_nodes=1,
        tasks_per_node=1,
        gpus_per_node=0,
        warns="batch",
        warn_before_kill_s=WARN_BEFORE_KILL_S,
        array=(3,),
        command=(*command, sys.executable, str(run / "count.py"), str(run / "count")),
    )
    (run / "task.sbatch").write_text(sbatch_script(job))
    job_id = client.submit(run / "task.sbatch")
    wait_for((run / "count").exists, "the task's first attempt")
    return f"{job_id}_3"


def test_a_task_that_is_warned_comes_back_alone_and_ends(cluster, tmp_path):
    job_id = start_task(tmp_path)
    child = submit(tmp_path, "child", *after([job_id.partition("_")[0]]))
    cluster.slurm("scancel", "--batch", "--signal=USR2", job_id)
    wait_for(lambda: client.show_job(job_id).get("Restarts") == "1", "its return to the queue")
    wait_for(lambda: state(job_id) == "PENDING", "its return to the queue")
    assert state(child) == "PENDING"
    client.update(job_id, StartTime="now+2")  # slurmd refuses it in the second of its end
    wait_for(lambda: state(job_id) == "COMPLETED", "its end")
    assert (tmp_path / "task/count").read_text() == "xx"
    wait_for(lambda: state(child) == "RUNNING", "what waited for it")


def test_a_task_that_is_cancelled_does_not_come_back(cluster, tmp_path):
    job_id = start_task(tmp_path)
    client.cancel([job_id])
    wait_for(lambda: not client.queue(), "its end", 30)
    assert client.show_job(job_id)["JobState"] == "CANCELLED"
    assert client.show_job(job_id)["Restarts"] == "0"
