"""Commands that show and stop jobs, on a real Slurm without accounting."""

import json
import os
import signal
import subprocess
import sys

import pytest

from slurm import client
from slurm.attempts import read_attempts
from slurm.runfile import read_json
from tests.cluster.jobs import ROOT, ranks, state, submit, wait_ended, wait_for, wait_running
from tests.cluster.training import SITE, newest_step, publish, words
from trainer.cli import main

pytestmark = pytest.mark.cluster


def told(capsys, *command) -> str:
    capsys.readouterr()
    assert main([str(word) for word in command]) == 0
    return capsys.readouterr().out


def test_a_job_is_seen_from_the_queue_to_its_end(cluster, tmp_path, capsys):
    run = tmp_path / "runs/night"
    busy = cluster.slurm(
        "sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 90"
    ).strip()
    wait_for(lambda: state(busy) == "RUNNING", "the other job")
    job_id = submit(run)
    wait_for(lambda: client.show_job(job_id)["Reason"] == "Resources", "the place in the queue")
    row = " ".join(told(capsys, "status", run.parent).splitlines()[1].split())
    assert row.startswith(f"night train {job_id} pending ")
    assert "waits for nodes, 1 of 1 in train" in row
    assert f"job {job_id} waits for nodes" in told(capsys, "explain", run)

    command = [sys.executable, "-m", "trainer.cli", "logs", str(run), "-f"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as follower:
        cluster.slurm("scancel", busy)
        first = wait_running(run)
        said = told(capsys, "status", run.parent)
        assert "running" in said
        assert f"starting on {client.show_job(job_id)['NodeList']}" in said
        killed = ranks(first)[2]
        os.kill(killed["pid"], signal.SIGKILL)
        wait_ended(run)
        wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")
        assert "is held by Slurm after its last end until " in told(capsys, "status", run.parent)
        client.update(job_id, StartTime="now", ExcNodeList=killed["node"])
        wait_running(run, 1)
        killed_rank = f"rank 2 on {killed['node']}: Killed"
        assert f"attempt 0 crashed: {killed_rank}" in told(capsys, "status", run)
        (run / "finish").touch()
        wait_for(lambda: state(job_id) == "COMPLETED", "the end")
        _, followed = follower.communicate(timeout=20)
    assert follower.returncode == 0
    attempts = [f"==> {run}/attempts/{number:03d}/rank_00000.log" for number in range(2)]
    assert [line for line in followed.splitlines() if line in attempts] == attempts
    assert "the attempt has ended, finished" in followed
    logs = told(capsys, "logs", run, "rank=batch")
    for words_of_script in ("attempt 0: on node", "attempt 0: crashed: ", "attempt 1: on node"):
        assert words_of_script in logs
    died, finished, now = told(capsys, "explain", run).splitlines()
    assert f"{killed_rank}; " in died
    assert f" without {killed['node']}" in died
    assert "attempt 1 on node" in finished
    assert " and finished at step " in finished
    assert "it is done" in now


def test_a_dead_node_is_named_before_the_next_attempt_begins(cluster, tmp_path, capsys):
    run = tmp_path / "run"
    job_id = submit(run)
    node = wait_running(run).begin.nodes[1]
    cluster.kill_node(node)
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")
    assert "attempt 0 was lost" in told(capsys, "status", run)
    said = told(capsys, "explain", run)
    assert f"was lost at step 0: {node} is down" in said


def test_a_sweep_is_an_array_that_stops_and_goes_on(cluster, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "runs/night"
    line = ["launch", "-m", "night", *words(publish(tmp_path), folder, "seed=0,1"), *SITE]
    line += ["cluster.num_nodes=1", "cluster.slurm.preflight=null", "total_images=4800"]
    line += ["batch.global_batch_images=32", "batch.micro_batch_images=8"]
    assert main(line) == 0
    assert read_json(folder / "sweep.json") == {"000": ["seed=0"], "001": ["seed=1"]}
    runs = [folder / "000", folder / "001"]
    seeds = [f"seed: {n}\n" in (run / "config.yaml").read_text() for n, run in enumerate(runs)]
    assert seeds == [True, True]
    assert main(line) == 0
    assert caplog.text.count("is in the queue already") == 2
    wait_for(lambda: all(newest_step(run) > 5 for run in runs), "steps of both runs")
    said = told(capsys, "status", tmp_path / "runs")
    assert said.count("running") == 2
    assert said.count("/150 ") == 2

    assert main(["stop", str(folder)]) == 0
    ends = [read_attempts(run)[-1].end for run in runs]
    assert [end.cause for end in ends] == ["stopped", "stopped"]
    for run, end in zip(runs, ends, strict=True):
        assert f"{run}: attempt 0 saved at step {end.saved_step:,}" in caplog.text
        assert (run / f"attempts/slurm_{read_attempts(run)[0].begin.job_id}.log").stat().st_size
    assert client.queue() == []

    assert main(line) == 0
    last = [json.loads((run / "jobs.jsonl").read_text().splitlines()[-1]) for run in runs]
    assert len({row["job_id"].split("_")[0] for row in last}) == 1
    for run in runs:
        assert wait_ended(run, 1).end.cause == "finished"
        assert newest_step(run) == 150
    wait_for(lambda: client.queue() == [], "the end of the array")
    assert main(line) == 0
    assert caplog.text.count("nothing to do, all 150 steps are done") == 2
    assert client.queue() == []


def test_what_waits_is_cancelled_and_what_may_not_save_too(cluster, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    runs = tmp_path / "runs"
    job_id = submit(runs / "night")
    wait_running(runs / "night")
    cluster.slurm("scontrol", "requeue", job_id)
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")
    other = submit(runs / "day")
    wait_running(runs / "day")
    assert main(["stop", str(runs / "day"), "wait_s=2"]) == 1  # these ranks have no heartbeat
    assert f"job {other} has not ended within wait_s=2" in capsys.readouterr().err
    assert main(["stop", str(runs), "now=true"]) == 0
    assert client.queue() == []
    assert (state(job_id), state(other)) == ("CANCELLED", "CANCELLED")
    assert "day: attempt 0 cancelled (scancel)" in caplog.text
    assert main(["stop", str(runs)]) == 0
    assert "no job of it is in the queue" in caplog.text
