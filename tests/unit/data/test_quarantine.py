import pytest

from trainer.data.quarantine import FEW, Quarantine
from trainer.errors import BadInput
from trainer.observe.jsonl import read_rows


def bad(quarantine, key):
    quarantine.add(dataset="d", shard="0.tar", key=key, why=f"{key} is cut.")


def test_each_bad_sample_is_written_down_once(tmp_path):
    quarantine = Quarantine(tmp_path / "run" / "rank.jsonl", max_bad_frac=1.0)
    assert not (tmp_path / "run").exists()
    quarantine.saw(100)
    for key in ("a", "b", "a"):
        bad(quarantine, key)
    rows = read_rows(tmp_path / "run" / "rank.jsonl")
    assert rows == [
        {"dataset": "d", "shard": "0.tar", "key": key, "why": f"{key} is cut."} for key in "ab"
    ]
    assert (quarantine.num_bad, quarantine.num_seen) == (3, 100)


def test_a_few_never_stop_a_run_and_a_rate_above_the_limit_does(tmp_path):
    quarantine = Quarantine(None, max_bad_frac=0.01)
    quarantine.saw(1)
    for number in range(FEW):
        bad(quarantine, str(number))
    with pytest.raises(BadInput, match=r"11 of 1 samples .* data.max_bad_frac=0.01 .* a is cut"):
        bad(quarantine, "a")
    quarantine.saw(10_000)
    for number in range(88):
        bad(quarantine, str(number))
    bad(quarantine, "z")
    with pytest.raises(BadInput, match="101 of 10001"):
        bad(quarantine, "z")
