import pytest
import torch

from tests.tiny_run import OneRank, WholeTensors
from trainer.errors import BadInput, BadWorld
from trainer.runtime.checkpoint import (
    TrainState,
    complete,
    load,
    newest_valid,
    read_state,
    read_weights,
    save,
)

STATE = TrainState(7, 56, 1, "dataset", "encoding", {"samples": 56})
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5)}


class Loadable(WholeTensors):
    def publish(self):
        pass


def saved(run, weights=WEIGHTS, state=STATE, keep_last=2):
    whole = Loadable(weights)
    shapes = {name: list(value.shape) for name, value in weights.items()}
    return save(
        run / "checkpoints", state, whole, whole, OneRank(), shapes=shapes, keep_last=keep_last
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


def test_only_the_last_ones_stay(tmp_path):
    for step in range(1, 6):
        saved(tmp_path, state=TrainState(step, step * 8, 1, "d", "e", {}))
    names = [folder.name for folder in complete(tmp_path / "checkpoints")]
    assert names == ["step_00000004", "step_00000005"]


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    folder = saved(tmp_path)
    other = Loadable({"a": torch.zeros(2, 3), "c": torch.zeros(4)})
    with pytest.raises(BadInput, match=r"lacks 4 of 4 numbers of weight/c: .*another network"):
        load(folder, other, other)
    longer = Loadable({"b": torch.zeros(9)})
    with pytest.raises(BadInput, match="lacks 4 of 9"):
        load(folder, longer, longer)


def test_saving_a_step_again_replaces_it_whole(tmp_path):
    saved(tmp_path)
    saved(tmp_path, {"a": torch.zeros(2, 3), "b": torch.zeros(5)})
    assert (read_weights(tmp_path, "ema")[0]["b"] == 0).all()


def test_a_full_disk_publishes_nothing_and_the_older_one_stands(tiny_disk):
    saved(tiny_disk)
    big = {"a": torch.zeros(1_000_000)}
    with pytest.raises(BadWorld, match=r"could not save .*same command again"):
        saved(tiny_disk, big, TrainState(8, 64, 1, "d", "e", {}))
    assert newest_valid(tiny_disk / "checkpoints") == complete(tiny_disk / "checkpoints")[-1]
    assert read_weights(tiny_disk, "ema")[1] == STATE
    assert not list((tiny_disk / "checkpoints").glob(".*"))
