"""Who hears what when Slurm ends a job, and what becomes of the job: a truth table, since Slurm's
versions and sites differ."""

import os
import signal
import time

import pytest

from slurm import client
from slurm.attempts import read_attempts
from slurm.runfile import STOP, write_json
from slurm.spec import Checks
from tests.cluster.jobs import (
    heard,
    ranks,
    shorten,
    spec_of,
    state,
    submit,
    wait_ended,
    wait_for,
    wait_running,
)

pytestmark = pytest.mark.cluster


def preempt(cluster):
    script = (
        "--nodes=4",
        "--exclusive",
        "--partition=high",
        "--time=1",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )
    cluster.slurm("sbatch", *script)


@pytest.fixture
def user_signal(cluster):
    """The cluster of a site that tells the batch script, instead of the tasks, of a preemption."""
    before = cluster.conf.read_text()
    cluster.conf.write_text(before + "SlurmctldParameters=preempt_send_user_signal\n")
    cluster.slurm("scontrol", "reconfigure")
    yield cluster
    cluster.conf.write_text(before)
    cluster.slurm("scontrol", "reconfigure")


def test_ranks_find_each_other_and_all_of_them_end_it(cluster, tmp_path, monkeypatch):
    run = tmp_path / "a run"
    monkeypatch.setenv("RANK", "0")  # as in a shell that some launcher started
    job_id = submit(run)
    attempt = wait_running(run)
    told = ranks(attempt)
    assert [each["SLURM_PROCID"] for each in told] == ["0", "1", "2", "3"]
    assert [each["node"] for each in told] == [attempt.begin.nodes[n // 2] for n in range(4)]
    assert {each["MASTER_ADDR"] for each in told} == {"127.0.0.1"}
    assert len({each["MASTER_PORT"] for each in told}) == 1
    assert told[0]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert not any("RANK" in each for each in told)
    (run / "finish").touch()
    assert wait_ended(run).end.cause == "finished"
    wait_for(lambda: state(job_id) == "COMPLETED", "the job's end")


@pytest.mark.parametrize("site", ["cluster", "user_signal"])
def test_preemption(site, request, tmp_path):
    cluster, run = request.getfixturevalue(site), tmp_path / "run"
    job_id = submit(run)
    wait_running(run)
    preempt(cluster)
    attempt = wait_ended(run)
    words = {"cluster": {"SIGCONT", "SIGTERM"}, "user_signal": {"SIGUSR2"}}[site]
    assert all(words <= each for each in heard(attempt)), heard(attempt)
    assert attempt.end.cause == "preempted"
    assert attempt.end.saved_step > 0
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")


def test_walltime(cluster, tmp_path):
    run = tmp_path / "run"
    job_id = submit(run)
    wait_running(run)
    shorten(job_id)
    attempt = wait_ended(run)
    assert all({"SIGCONT", "SIGUSR2"} <= each for each in heard(attempt)), heard(attempt)
    assert attempt.end.cause == "walltime"
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")
    assert client.show_job(job_id)["Reason"] == "BeginTime"


def test_scancel_saves_and_does_not_come_back(cluster, tmp_path):
    run = tmp_path / "run"
    job_id = submit(run)
    wait_running(run)
    cluster.slurm("scancel", job_id)
    attempt = wait_ended(run)
    assert all("SIGTERM" in each for each in heard(attempt))
    assert attempt.end.cause == "cancelled"
    wait_for(lambda: state(job_id) == "CANCELLED", "the job's end")


def test_asked_to_stop_it_saves_and_does_not_come_back(cluster, tmp_path):
    run = tmp_path / "run"
    job_id = submit(run)
    wait_running(run)
    write_json(run / STOP, {"unix_s": time.time()})
    cluster.slurm("scancel", "--signal=USR2", job_id)
    attempt = wait_ended(run)
    assert all("SIGUSR2" in each for each in heard(attempt))
    assert (attempt.end.cause, attempt.end.saved_step > 0) == ("stopped", True)
    wait_for(lambda: state(job_id) == "FAILED", "the job's end")


def test_a_killed_rank_is_named_and_the_job_comes_back(cluster, tmp_path):
    run = tmp_path / "run"
    job_id = submit(run)
    third = ranks(wait_running(run))[2]
    os.kill(third["pid"], signal.SIGKILL)
    attempt = wait_ended(run)
    assert attempt.end.cause == "crashed"
    assert attempt.end.why == f"rank 2 on {third['node']}: Killed"
    assert attempt.end.suspects == {third["node"]: 0.5}
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")


def test_what_waits_for_a_job_goes_on_waiting_while_that_comes_back(cluster, tmp_path):
    run = tmp_path / "run"
    job_id = submit(run)
    after = (
        "--dependency",
        f"afterok:{job_id}",
        "--kill-on-invalid-dep=yes",
        "--output=/dev/null",
        "--wrap=true",
    )
    child = cluster.slurm("sbatch", "--parsable", *after).strip()
    os.kill(ranks(wait_running(run))[0]["pid"], signal.SIGKILL)
    wait_ended(run)
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")
    assert state(child) == "PENDING"
    (run / "finish").touch()
    client.update(job_id, StartTime="now+2")
    wait_for(lambda: state(child) == "COMPLETED", "the end of what waited")


def nvidia_smi(folder, monkeypatch, does):
    """Put a driver's tool before ranks' eyes that has fallen over, or hangs, on node1."""
    tool = folder / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" = node1 ] && {does}\n'
        '[ "$1" = --query-gpu=uuid ] && printf "a\\nb\\n"\nexit 0\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return Checks(folders=("/tmp",), min_free_gb=0, max_clock_skew_s=5, timeout_s=60, gpus=2)


def test_a_bad_node_is_found_before_ranks_start_and_left_out(cluster, tmp_path, monkeypatch):
    run = tmp_path / "run"
    checks = nvidia_smi(tmp_path, monkeypatch, "exit 9")
    job_id = submit(run, spec=spec_of(run, checks=checks))
    attempt = wait_ended(run)
    assert attempt.end.cause == "bad_node"
    assert attempt.end.why.startswith("node1 nvidia-smi does not work")
    assert not ranks(attempt)
    wait_for(lambda: client.show_job(job_id).get("ExcNodeList") == "node1", "the exclusion")
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")
    client.update(job_id, StartTime="now+2")
    assert "node1" not in wait_running(run, 1).begin.nodes


@pytest.mark.parametrize("times", [1, 2])
def test_a_node_is_blamed_for_not_meeting_others_twice(times, cluster, tmp_path):
    run, tried = tmp_path / "run", tmp_path / "tried"
    checks = Checks(folders=(), min_free_gb=0, max_clock_skew_s=5, timeout_s=60, gpus=0)
    fails = (
        "[ $SLURM_PROCID = 1 ] && exit 0\n"
        f"echo $MASTER_PORT >> '{tried}'; [ $(wc -l < '{tried}') -gt {times} ] || exit 7"
    )
    submit(run, spec=spec_of(run, checks=checks, meet=("sh", "-c", fails)))
    if times == 1:
        wait_running(run)
        (run / "finish").touch()
    end = wait_ended(run).end
    assert end.cause == ("finished" if times == 1 else "bad_node")
    assert len(set(tried.read_text().split())) == 2
    if times == 2:
        assert end.why.startswith("the nodes cannot add numbers together (rank 0 on node")
        assert end.why.endswith("Exited with exit code 7); see all_reduce_again_*.log")
        assert list(end.suspects.values()) == [0.5]


def test_nodes_that_do_not_meet_in_time_are_told_and_none_is_to_blame(cluster, tmp_path):
    run = tmp_path / "run"
    checks = Checks(folders=(), min_free_gb=0, max_clock_skew_s=5, timeout_s=3, gpus=0)
    job_id = submit(run, spec=spec_of(run, checks=checks, meet=("sleep", "60")))
    end = wait_ended(run).end
    assert (end.cause, end.suspects) == ("bad_node", {})
    assert end.why.startswith("the nodes did not add numbers together within 3 s")
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")


def test_told_to_stop_before_ranks_start_no_node_is_to_blame(cluster, tmp_path, monkeypatch):
    run = tmp_path / "run"
    checks = nvidia_smi(tmp_path, monkeypatch, "sleep 30")
    job_id = submit(run, spec=spec_of(run, checks=checks))
    wait_for(lambda: list(run.glob("attempts/000/preflight/node_*")), "the good node's answer")
    preempt(cluster)
    end = wait_ended(run).end
    assert (end.cause, end.suspects) == ("preempted", {})
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")


def test_a_job_that_gets_nowhere_ends(cluster, tmp_path):
    run = tmp_path / "run"
    job_id = submit(run)
    (run / "fail").touch()
    for number in range(2):
        assert wait_ended(run, number).end.cause == "crashed"
        wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")
        client.update(job_id, StartTime="now+2")
    end = wait_ended(run, 2).end
    assert end.cause == "gave_up"
    assert "3 attempts in a row saved nothing beyond step 0" in end.why
    wait_for(lambda: state(job_id) == "FAILED", "the job's end")
    assert client.show_job(job_id)["ExitCode"] == "93:0"


@pytest.mark.parametrize("which", [0, 1])
def test_a_dead_node(cluster, tmp_path, which):
    """Its slurmd is killed; what that had started goes on, as an orphan."""
    run = tmp_path / "run"
    job_id = submit(run)
    attempt = wait_running(run)
    node = attempt.begin.nodes[which]
    orphan = next(each for each in ranks(attempt) if each["node"] == node)
    cluster.kill_node(node)
    wait_for(lambda: state(job_id) == "PENDING", "the job in the queue")
    client.update(job_id, StartTime="now+2")
    again = wait_running(run, 1)
    assert node not in again.begin.nodes
    end = read_attempts(run)[0].end
    assert end.cause == "lost"
    assert end.suspects == {node: 1.0}
    assert end.why.startswith(f"{node} is down")
    os.kill(orphan["pid"], signal.SIGKILL)
    time.sleep(1)
    assert read_attempts(run)[1].end is None
    assert state(job_id) == "RUNNING"
