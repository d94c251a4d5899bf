"""What the first rank of each node measures and writes before and when its account opens."""

import pytest

from tests.recorded_gpus import RecordedGpus
from trainer.accounting import idle_w_of, open_ledger
from trainer.config import TrainConfig
from trainer.frozen import compose
from trainer.observe.jsonl import read_rows
from trainer.observe.nvml import NvmlReader
from trainer.runtime.env import RankEnv


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """Of a run on two GPUs, which draw 70 W each."""
    gpus = RecordedGpus("GPU-a", "GPU-b", wants_w=70.0)
    monkeypatch.setattr(NvmlReader, "open", lambda: gpus)
    words = [f"run={tmp_path}", "data.dataset=none", "cluster.device=cuda"]
    return compose(TrainConfig, "train", words)


def env(rank):
    return RankEnv(rank=rank, world=2, local_rank=rank, attempt=0, visible_gpus=None)


def test_the_first_rank_of_a_node_measures_and_writes_what_it_draws_idle(cfg, tmp_path):
    idle_w = idle_w_of(cfg, env(0))
    assert idle_w["counter"] == pytest.approx(140.0, rel=0.1)
    with open_ledger(tmp_path, cfg, env(0), launcher_pid=1, idle_w=idle_w):
        pass
    told = [row["idle_w"] for row in read_rows(tmp_path / "ledger.jsonl") if "idle_w" in row]
    assert told == [idle_w]


def test_the_other_ranks_neither_measure_nor_write(cfg, tmp_path):
    assert idle_w_of(cfg, env(1)) == {}
    assert open_ledger(tmp_path, cfg, env(1), launcher_pid=1, idle_w={}) is None


def test_an_account_without_a_baseline_says_nothing_of_it(cfg, tmp_path):
    with open_ledger(tmp_path, cfg, env(0), launcher_pid=1, idle_w={}):
        pass
    assert not any("idle_w" in row for row in read_rows(tmp_path / "ledger.jsonl"))
