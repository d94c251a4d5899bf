import dataclasses
import errno
import random
import time
from contextlib import suppress

import pytest
import torch

from tests.forked import CONTEXT
from tests.s3_server import BUCKET, S3Server, needs_s3
from tests.tiny import tiny_config
from tests.tiny_run import OneRank, WholeTensors, write_checkpoint
from trainer.errors import BadInput
from trainer.place import place
from trainer.runtime import saver as saver_module
from trainer.runtime.checkpoint import (
    LATEST,
    TrainState,
    load,
    newest_valid,
    read_record,
    read_state,
    verify,
)
from trainer.runtime.rundir import RECORD, complete, step_of
from trainer.runtime.saver import FENCE, Saver, Superseded
from trainer.runtime.snapshot import Snapshot, live_tensors
from trainer.runtime.weights import read_weights

STATE = TrainState(7, 56, 1, "dataset", "encoding", {"samples": 56}, [0.5, 0.25])
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5)}


def at(step):
    return TrainState(step, step * 8, 1, "d", "e", {})


def saved(run, weights=WEIGHTS, state=STATE, **policy):
    assert write_checkpoint(run / "checkpoints", state, weights, **policy)
    return complete(run / "checkpoints")[-1]


def open_saver(root, whole=None, **policy):
    whole = whole or WholeTensors(WEIGHTS)
    return Saver(
        root,
        Snapshot(whole, whole),
        OneRank(),
        dataclasses.replace(tiny_config().checkpoint, **policy),
        attempt=3,
        shapes=whole.shapes,
        averages=["ema"],
    )


def test_what_was_saved_is_read_back(tmp_path):
    folder = saved(tmp_path)
    assert read_state(folder) == STATE
    weights, state = read_weights(tmp_path, "ema")
    assert state == STATE
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)
    raw, state = read_weights(tmp_path, "raw")
    assert state == STATE
    assert all(
        (raw[name] == 0).all() and raw[name].shape == WEIGHTS[name].shape for name in WEIGHTS
    )


def test_averages_are_read_where_nothing_else_is_left(tmp_path):
    folder = saved(tmp_path)
    for file in read_record(folder).of({"weight", "optim"}):
        (folder / file.name).unlink()
    assert torch.equal(read_weights(tmp_path, "ema")[0]["a"], WEIGHTS["a"])
    assert verify(folder, {"ema"}) is None
    assert "is missing" in str(verify(folder))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    folder = saved(tmp_path)
    for other, problem in [
        ({"a": torch.zeros(2, 3), "b": torch.zeros(9)}, "its b is 5, this one's is 9"),
        ({"a": torch.zeros(2, 3)}, "its b is 5, this one's is absent"),
        (WEIGHTS | {"c": torch.zeros(())}, "its c is absent, this one's is a number"),
    ]:
        whole = WholeTensors(other)
        with pytest.raises(BadInput, match=f"another network: {problem}.*start_from="):
            load(folder, live_tensors(whole, whole), whole.shapes)
    momentum = {"optim": {"momentum/a@0": torch.zeros(6)}}
    with pytest.raises(BadInput, match=r"lacks 6 of 6 numbers of optim momentum/a.*optim\.\*"):
        load(folder, momentum, WholeTensors(WEIGHTS).shapes)


def test_only_what_the_policy_keeps_stays(tmp_path):
    for step in range(1, 11):
        saved(
            tmp_path,
            state=at(step),
            keep_last=2,
            keep_every_images=32,
            keep_ema_every_images=24,
        )
    kinds = {step_of(f): read_record(f).kinds for f in complete(tmp_path / "checkpoints")}
    whole = {"weight", "ema", "optim"}
    assert kinds == {3: {"ema"}, 4: whole, 6: {"ema"}, 8: whole, 9: whole, 10: whole}
    for folder in complete(tmp_path / "checkpoints"):
        record = read_record(folder)
        assert {path.name for path in folder.iterdir()} == {f.name for f in record.files} | {RECORD}
        assert read_weights(tmp_path, "ema", checkpoint=folder)[1].step == step_of(folder)
    (tmp_path / "checkpoints/step_00000010" / RECORD).unlink()
    assert step_of(newest_valid(tmp_path / "checkpoints")) == 9


def test_the_best_one_stays(tmp_path):
    root = tmp_path / "checkpoints"
    saver = open_saver(root, keep_last=1)
    saver._best = lambda: 16
    for step in range(1, 6):
        saver.save(at(step))
    assert saver.finish()
    assert [step_of(folder) for folder in complete(root)] == [2, 5]


def test_saving_a_step_again_replaces_it_whole(tmp_path):
    folder = saved(tmp_path)
    before = {path.name for path in folder.iterdir()}
    saved(tmp_path, {"a": torch.zeros(2, 3), "b": torch.zeros(5)})
    assert {path.name for path in folder.iterdir()} & before == {RECORD}
    assert (read_weights(tmp_path, "ema")[0]["b"] == 0).all()


def test_latest_names_the_newest_complete_one(tmp_path):
    for step in (1, 2):
        folder = saved(tmp_path, state=at(step))
        assert (tmp_path / "checkpoints" / LATEST).read_text() == folder.name


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    slow = saver_module.write_tensors

    def slowly(path, tensors):
        time.sleep(0.2)
        return slow(path, tensors)

    monkeypatch.setattr(saver_module, "write_tensors", slowly)
    whole = WholeTensors(WEIGHTS)
    root = tmp_path / "checkpoints"
    saver = open_saver(root, whole)
    started_s = time.monotonic()
    saver.save(at(1))
    # What training changes meanwhile must not be in it.
    whole.averages["ema"][0] += 100
    assert time.monotonic() - started_s < 0.2
    while not complete(root):
        saver.poll()
        time.sleep(0.01)
    assert torch.equal(read_weights(tmp_path, "ema")[0]["a"], WEIGHTS["a"])
    saver._snapshot.put_back()
    assert torch.equal(whole.averages["ema"][0].view(2, 3), WEIGHTS["a"])


def test_a_full_disk_is_told_and_survived_and_the_older_one_stands(tiny_disk, caplog):
    root = tiny_disk / "checkpoints"
    saved(tiny_disk)
    assert not write_checkpoint(root, at(8), {"a": torch.zeros(1_000_000)})
    assert "rank 0 could not save a checkpoint" in caplog.text
    assert "Training goes on; older ones stand" in caplog.text
    assert newest_valid(root) == complete(root)[-1]
    assert read_weights(tiny_disk, "ema")[1] == STATE
    # What was written of it is gone, so that there is room for the next.
    assert saved(tiny_disk, state=at(9)).name == "step_00000009"


def test_an_error_that_is_not_the_storages_is_not_hidden(tmp_path, monkeypatch):
    def broken(path, tensors):
        raise ZeroDivisionError

    monkeypatch.setattr(saver_module, "write_tensors", broken)
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path / "checkpoints", at(1), WEIGHTS)


def test_an_attempt_that_was_superseded_publishes_nothing(tmp_path):
    root = tmp_path / "checkpoints"
    orphan = open_saver(root)
    orphan.save(at(1))
    assert orphan.finish()
    heir = open_saver(root)
    heir.save(at(2))
    orphan.save(at(3))
    with pytest.raises(Superseded, match="another attempt writes to"):
        orphan.finish()
    assert heir.finish()
    assert [step_of(folder) for folder in complete(root)] == [1, 2]
    assert (root / FENCE).exists()


def test_the_next_attempt_sweeps_what_was_half_written(tmp_path):
    root = tmp_path / "checkpoints"
    folder = saved(tmp_path)
    (folder / "weight_00000.0badf00d.safetensors").write_bytes(b"half")
    other = root / "step_00000099"
    other.mkdir()
    (other / "weight_00000.0badf00d.safetensors").write_bytes(b"half")
    damaged = root / "step_00000003"
    damaged.mkdir()
    (damaged / RECORD).write_text("{")
    open_saver(root)
    assert not other.exists()
    assert len(list(folder.iterdir())) == 4
    assert damaged.exists(), "a record that cannot be read is for people to look at"


def test_kill_9_at_ten_random_moments_leaves_the_newest_valid_checkpoint(tmp_path):
    """Each time a process saves step after step; what it said was saved must be there."""
    root, rng, reached = tmp_path / "checkpoints", random.Random(0), 0
    for _ in range(10):
        told, tell = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=save_on_and_on, args=(root, reached, tell))
        process.start()
        tell.close()
        assert told.recv() == reached
        time.sleep(rng.uniform(0.02, 0.25))
        process.kill()
        process.join()
        with suppress(EOFError):
            while True:
                reached = told.recv()
        newest = newest_valid(root)
        assert (step_of(newest) if newest else 0) >= reached
        if newest:
            reached = step_of(newest)
            assert (read_weights(tmp_path, "ema")[0]["a"] == reached).all()
    assert reached > 0


def save_on_and_on(root, step, tell):
    """Save step after step, and tell each that is saved."""
    whole = WholeTensors({"a": torch.zeros(300_000)})
    saver = open_saver(root, whole)
    tell.send(step)
    while True:
        step += 1
        whole.averages["ema"][0].fill_(step)
        saver.save(at(step))
        assert saver.finish()
        tell.send(step)


@pytest.fixture
def s3(tmp_path, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    server = S3Server(tmp_path / "s3")
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr("trainer.place._PATIENT", {"mode": "standard", "max_attempts": 2})
    yield server
    server.close()


@needs_s3
@pytest.mark.e2e
def test_checkpoints_at_a_url_survive_a_lost_server(s3, caplog):
    root = place(f"s3://{BUCKET}/run/checkpoints")
    saver = open_saver(root)
    saver.save(at(1))
    assert saver.finish()
    s3.kill()
    saver.save(at(2))
    assert not saver.finish()
    assert "cannot be reached" in caplog.text
    s3.start()
    s3.wait()
    saver.save(at(3))
    assert saver.finish()
    assert [step_of(folder) for folder in complete(root)] == [1, 3]
    assert verify(complete(root)[-1]) is None
    whole = WholeTensors({name: torch.full_like(value, 9) for name, value in WEIGHTS.items()})
    assert load(complete(root)[-1], live_tensors(whole, whole), whole.shapes).state == at(3)
    assert torch.equal(whole.averages["ema"][1], WEIGHTS["b"])


def test_a_rank_that_cannot_write_stops_nobody(tmp_path, monkeypatch):
    def full(path, tensors):
        raise OSError(errno.ENOSPC, "No space left on device")

    root = tmp_path / "checkpoints"
    saver = open_saver(root)
    with monkeypatch.context() as patch:
        patch.setattr(saver_module, "write_tensors", full)
        saver.save(at(1))
        assert not saver.finish()
    saver.save(at(2))
    assert saver.finish()
