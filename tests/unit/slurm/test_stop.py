import pytest

from slurm.attempts import read_attempts
from slurm.stop import is_training, outcome
from tests.seen_runs import attempt, launched, metrics, queued
from trainer.cli import main
from trainer.observe.evaluations import hold_metrics


def tool(folder, name, does):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("told", "saved", "words"),
    [
        ({"cause": "stopped", "saved": 1212}, 1212, "attempt 0 saved at step 1,212"),
        (
            {"cause": "crashed", "why": "boom"},
            7,
            "attempt 0 crashed (boom); its newest checkpoint is step 7",
        ),
        ({}, 7, "attempt 0 ended without a word; its newest checkpoint is step 7"),
        (
            {"cause": "cancelled", "why": "scancel"},
            0,
            "attempt 0 cancelled (scancel); it has no checkpoint",
        ),
    ],
)
def test_what_became_of_a_run_is_said(tmp_path, told, saved, words):
    run = launched(tmp_path / "a")
    attempt(run, 0, **told)
    assert outcome(read_attempts(run)[0], saved) == words


def test_only_what_trains_is_let_save(tmp_path):
    assert is_training(queued(tmp_path / "a"))
    assert not is_training(queued(tmp_path / "a", job_name="a-encode"))


def test_without_slurm_nothing_can_be_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["stop", str(launched(tmp_path / "a"))]) == 1
    assert "there is no squeue on this machine's PATH" in capsys.readouterr().err


def test_what_is_no_run_is_not_stopped(tmp_path, capsys, monkeypatch):
    tool(tmp_path, "squeue", "true")
    monkeypatch.setenv("PATH", str(tmp_path))
    for given in (tmp_path / "nowhere", tmp_path):
        assert main(["stop", str(given)]) == 2
        assert f"{given} is no folder of a run" in capsys.readouterr().err


def test_what_has_no_job_is_told_from_what_kiln_train_works_on(
    tmp_path, capsys, monkeypatch, caplog
):
    tool(tmp_path, "squeue", "true")  # the queue is empty
    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "here"
    (run / "attempts/000").mkdir(parents=True)
    metrics(run, 0, [1])
    with hold_metrics(run):
        assert main(["stop", str(run)]) == 2
    assert "is trained by `kiln train`, not by a job: Ctrl-C" in capsys.readouterr().err
    caplog.set_level("INFO")
    attempt(launched(tmp_path / "a"), 0, cause="stopped", saved=12)
    assert main(["stop", str(tmp_path / "a")]) == 0
    assert "no job of it is in the queue" in caplog.text
    assert "attempt 0 saved at step 12" in caplog.text
