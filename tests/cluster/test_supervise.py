"""What `kiln supervise` adds: restarts at once, without bad nodes, and with fewer if need be."""

import os
import signal
import time

import pytest

from slurm import client
from slurm.attempts import read_attempts
from slurm.runfile import read_rows
from slurm.supervise import RECORD
from tests.cluster.jobs import (
    job_of,
    ranks,
    spec_of,
    state,
    submit,
    supervised,
    wait_ended,
    wait_for,
    wait_running,
)
from trainer.cli import main

pytestmark = pytest.mark.cluster


def test_a_job_starts_again_at_once(cluster, tmp_path):
    run = tmp_path / "run"
    with supervised(tmp_path):
        submit(run)
        for number in range(3):
            os.kill(ranks(wait_running(run, number))[number]["pid"], signal.SIGKILL)
            ended = wait_ended(run, number)
            (run / "saved.json").write_text(f'{{"step": {number + 1}, "images_seen": 1}}')
            again = wait_running(run, number + 1)
            assert again.begin.unix_s - ended.end.unix_s < 20, "Slurm's own hold is two minutes"
    assert {row["what"] for row in read_rows(run / RECORD)} == {"lifted"}


def test_a_node_to_blame_is_left_out_until_too_few_are_left(cluster, tmp_path):
    run = tmp_path / "run"
    with supervised(tmp_path):
        submit(run, spec=spec_of(run, exclude=("node4",)))
        blamed = []
        for number in range(4):
            attempt = wait_running(run, number)
            # Twice a crash of one node: that is enough to leave it out.
            node = blamed[-1] if number % 2 else attempt.begin.nodes[0]
            if number in {0, 2}:
                blamed.append(node)
            victim = next((each for each in ranks(attempt) if each["node"] == node), None)
            if victim is None:
                break
            os.kill(victim["pid"], signal.SIGKILL)
            wait_ended(run, number)
            (run / "saved.json").write_text(f'{{"step": {number + 1}, "images_seen": 1}}')
    last = read_rows(run / RECORD)[-1]["words"]
    assert last.startswith(f"starts at once without node4, {blamed[0]}")
    assert "node4" not in read_attempts(run)[-1].begin.nodes or len(blamed) == 1


def test_a_job_takes_fewer_nodes_when_it_has_waited_enough_and_all_again_later(cluster, tmp_path):
    run = tmp_path / "run"
    busy = (
        "--nodes=2",
        "--exclusive",
        "--partition=high",
        "--output=/dev/null",
        "--wrap=sleep 300",
    )
    other = cluster.slurm("sbatch", "--parsable", *busy).strip()
    wait_for(lambda: state(other) == "RUNNING", "the other job")
    with supervised(tmp_path):
        job = job_of(run, num_nodes=4, exclusive=True, memory_gb=None)
        job_id = submit(run, job, spec_of(run, node_counts=(4, 2), shrink_after_s=3.0))
        attempt = wait_running(run, 0, count=4)
        assert len(attempt.begin.nodes) == 2
        cluster.slurm("scancel", other)
        wait_for(lambda: state(other) == "CANCELLED", "the other job's end")
        cluster.slurm("scancel", "--signal=USR2", job_id)
        assert len(wait_running(run, 1, count=8).begin.nodes) == 4
    words = [row["words"] for row in read_rows(run / RECORD)]
    assert words[0].startswith("takes 2 nodes instead of 4, after ")
    assert words[1] == "starts at once"


def test_one_folder_has_one_supervisor(cluster, tmp_path, capsys):
    with supervised(tmp_path):
        wait_for((tmp_path / ".supervise.lock").exists, "the supervisor")
        time.sleep(1)
        assert main(["supervise", str(tmp_path)]) == 2
        assert "is being supervised by process" in capsys.readouterr().err


def test_once_is_for_cron(cluster, tmp_path):
    run = tmp_path / "run"
    job_id = submit(run)
    os.kill(ranks(wait_running(run))[0]["pid"], signal.SIGKILL)
    wait_ended(run)
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")
    assert main(["supervise", str(tmp_path), "once=true"]) == 0
    wait_running(run, 1)


def test_no_slurm_and_no_folder_are_told_apart(tmp_path, capsys, monkeypatch):
    assert main(["supervise", str(tmp_path / "nowhere")]) == 2
    assert "Give the folder that holds the runs" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["supervise", str(tmp_path), "once=true"]) == 1
    assert "there is no squeue on this machine's PATH" in capsys.readouterr().err


def test_jobs_of_others_are_left_alone(cluster, tmp_path):
    run = tmp_path / "elsewhere" / "run"
    job_id = submit(run)
    os.kill(ranks(wait_running(run))[0]["pid"], signal.SIGKILL)
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")
    (tmp_path / "here").mkdir()
    assert main(["supervise", str(tmp_path / "here"), "once=true"]) == 0
    assert client.show_job(job_id)["Reason"] == "BeginTime"
