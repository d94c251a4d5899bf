import json
import shutil
import socket
import time

import pytest

from slurm.client import SlurmError
from slurm.preflight import Answer, asking, judge_answers, main, problems_here, read_answers
from slurm.rendezvous import address, free_port
from slurm.spec import Checks

HERE = "127.0.0.1"


def checks(**changes):
    plain = {"folders": (), "min_free_gb": 0.0, "max_clock_skew_s": 5.0, "timeout_s": 9, "gpus": 0}
    return Checks(**{**plain, **changes})


def test_a_good_node_answers_and_has_no_problems(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    folder, asked_unix_s = tmp_path / "preflight", time.time()
    with asking(folder, checks(folders=(str(tmp_path),)), HERE):
        assert main([str(folder)]) == 0
    answers = read_answers(folder)
    assert answers["node1"].problems == []
    bad = judge_answers(
        ["node1", "node2"],
        answers,
        asked_unix_s=asked_unix_s,
        heard_unix_s=time.time(),
        max_clock_skew_s=5,
    )
    assert list(bad) == ["node2"]
    assert "gave no answer" in bad["node2"]


@pytest.mark.parametrize(
    ("off_s", "bad"), [(0, False), (-4, False), (4, False), (7, True), (-7, True)]
)
def test_a_clock_that_is_off_is_a_problem(off_s, bad):
    answers = {"node1": Answer("node1", 1000.0 + off_s, ())}
    found = judge_answers(
        ["node1"], answers, asked_unix_s=1000, heard_unix_s=1000, max_clock_skew_s=5
    )
    assert bool(found) == bad
    if bad:
        assert found["node1"] == "its clock is 7 s off"


def test_problems_say_what_was_found_and_what_is_needed(tmp_path):
    with socket.create_server((HERE, 0)) as server:
        port = server.getsockname()[1]
        assert list(problems_here(checks(), HERE, port)) == []
        (told,) = problems_here(checks(folders=(str(tmp_path),), min_free_gb=1e9), HERE, port)
        assert "cluster.slurm.preflight.min_free_gb=1e+09" in told
        (told,) = problems_here(checks(folders=("/nowhere",)), HERE, port)
        assert told.startswith("/nowhere cannot be looked at")
    (told,) = problems_here(checks(), HERE, port)
    assert f"cannot reach the first node at {HERE}:{port}" in told


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ('[ "$1" = --query-gpu=uuid ] && printf "a\\nb\\n"; exit 0', None),
        ('[ "$1" = --query-gpu=uuid ] && printf "a\\n"; exit 0', "1 GPUs are there, need 2"),
        ('printf "41, a\\n42, b\\n"', "process 41 computes on one"),
        ("exit 9", "nvidia-smi does not work"),
    ],
)
def test_gpus_must_be_there_and_idle(tmp_path, monkeypatch, script, told):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with socket.create_server((HERE, 0)) as server:
        found = list(problems_here(checks(gpus=2), HERE, server.getsockname()[1]))
    assert (told is None and not found) or told in found[0]


def test_a_node_without_nvidia_smi_is_bad(tmp_path, monkeypatch):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has it")
    with socket.create_server((HERE, 0)) as server:
        (told,) = problems_here(checks(gpus=2), HERE, server.getsockname()[1])
    assert "nvidia-smi does not work" in told


def test_ranks_meet_at_a_name_that_resolves():
    node = {"NodeAddr": "10.0.0.7", "NodeHostName": "host7"}
    assert address("node7", node, lambda _: True) == "10.0.0.7"
    assert address("node7", node, lambda name: name == "node7") == "node7"
    assert address("node7", node, lambda name: name == "host7") == "host7"
    assert address("localhost", {}) == "localhost"
    with pytest.raises(SlurmError, match=r"no name of node node7 \(10.0.0.7, node7, host7\)"):
        address("node7", node, lambda _: False)


def test_the_question_is_on_disk_before_any_node_asks(tmp_path):
    with asking(tmp_path / "p", checks(gpus=8), "node1"):
        question = json.loads((tmp_path / "p/question.json").read_text())
    assert (question["address"], question["checks"]["gpus"]) == ("node1", 8)


def test_ranks_meet_where_nobody_listens():
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as two:
        taken = [one.getsockname()[1], two.getsockname()[1]]
        with pytest.raises(SlurmError, match=rf"all ports from {taken[0]} to {taken[1]}"):
            free_port(taken)
        with socket.create_server(("", 0)) as closed_soon:
            left = closed_soon.getsockname()[1]
        assert free_port([*taken, left]) == left
