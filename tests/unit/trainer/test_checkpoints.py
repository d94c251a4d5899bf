"""`kiln checkpoints`: every file of every checkpoint is read, and what is wrong is said."""

from dataclasses import replace

import pytest
import torch

from tests.tiny_run import write_checkpoint
from trainer.cli import main
from trainer.runtime.checkpoint import TrainState, read_record
from trainer.runtime.rundir import RECORD, complete

STATE = TrainState(
    step=0, images_seen=0, seed=0, dataset_fingerprint="", encoding_fingerprint="", stream={}
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Three checkpoints, of which the first keeps its averages alone."""
    monkeypatch.setenv("COLUMNS", "200")
    weights = {"weight": torch.nn.Parameter(torch.randn(3, 5))}
    for step in (8, 16, 24):
        state = replace(STATE, step=step, images_seen=100 * step)
        policy = {"keep_last": 2, "keep_ema_every_images": 1}
        assert write_checkpoint(tmp_path / "checkpoints", state, weights, **policy)
    return tmp_path


def lines(capsys):
    """Read the table's rows by step."""
    rows = capsys.readouterr().out.splitlines()[1:]
    return {row.split()[0]: row.rstrip() for row in rows}


def test_the_newest_whole_one_is_named_as_the_one_to_go_on_from(run, capsys):
    assert main(["checkpoints", str(run)]) == 0
    first, second, third = (said := lines(capsys))["8"], said["16"], said["24"]
    assert first.endswith("whole")
    assert "optim" not in first
    assert second.endswith("whole")
    assert "ema, optim, weight" in second
    assert third.endswith("training goes on from here")
    assert "2,400" in third


def test_damage_anywhere_is_found_and_is_an_error(run, capsys):
    newest = complete(run / "checkpoints")[-1]
    file = newest / read_record(newest).files[-1].name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["checkpoints", str(run)]) == 1
    said = lines(capsys)
    assert "sha256" in said["24"]
    assert said["16"].endswith("training goes on from here")
    (newest / RECORD).write_text("{")
    assert main(["checkpoints", str(run)]) == 1
    assert "cut off" in capsys.readouterr().out


def test_a_run_without_checkpoints_is_refused(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err
