import re
import signal
import subprocess
import sys
import time

import pytest

from tests.seen_runs import attempt, launched, metrics, stormy
from trainer.cli import main
from trainer.observe.evaluations import hold_metrics


@pytest.fixture(autouse=True)
def _no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


def local(run):
    (run / "attempts/000").mkdir(parents=True)
    metrics(run, 0, range(1, 8))
    return run


def row(said: str, name: str) -> list[str]:
    (line,) = [line for line in said.splitlines() if line.startswith(f"{name} ")]
    return re.split(r"  +", line.strip())


def test_all_runs_are_shown_from_their_files_and_slurm_is_missed_once(tmp_path, capsys):
    runs = tmp_path / "runs"
    stormy(runs / "stormy")
    attempt(launched(runs / "done"), 0, cause="finished", why="all images are seen", saved=5000)
    launched(runs / "sweep/000")
    with hold_metrics(local(runs / "here")):
        assert main(["status", str(runs)]) == 0
    said = capsys.readouterr().out
    assert row(said, "done") == [
        "done",
        "train",
        "finished",
        "0",
        "5,000/5,000",
        "all images are seen",
    ]
    assert row(said, "here") == ["here", "train", "training", "0", "7", "12.3", "1 min 30 s"]
    assert row(said, "stormy")[2:5] == ["unknown", "2", "1,200/5,000"]
    assert "attempt 1 lost: node2 is down* (Not responding)" in row(said, "stormy")[-1]
    assert row(said, "sweep/000")[2:] == ["unknown", "0/5,000"]
    assert said.count("there is no squeue") == 1


def test_one_run_is_shown_with_its_attempts(tmp_path, capsys):
    run = stormy(tmp_path / "a")
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "newest checkpoint: step 1,100" in said
    lines = [re.split(r"  +", line.strip()) for line in said.splitlines()]
    assert ["0", "12", "node[1,3]"] in [cells[:3] for cells in lines]
    (first,) = [cells for cells in lines if cells[:1] == ["0"]]
    assert first[4:] == ["1 h 10 min", "0", "1,212", "212", "crashed: rank 2 on node3: Killed"]
    assert f"kiln explain {run}" in said


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not there" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["status", str(tmp_path / "empty")]) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_it_is_shown_again_until_interrupted(tmp_path):
    run = local(tmp_path / "runs/a")
    command = [sys.executable, "-m", "trainer.cli", "status", str(tmp_path / "runs"), "watch_s=0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(2)
    metrics(run, 0, [1234])
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "1,234" in said
