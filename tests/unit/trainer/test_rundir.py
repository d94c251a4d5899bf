from dataclasses import replace

import pytest

from tests.tiny import tiny_config
from trainer.config_accounts import AccountsConfig
from trainer.errors import BadInput
from trainer.runtime.rundir import attempt_dir, config_changes, freeze_config, locked, new_attempt


def test_a_run_has_one_trainer_at_a_time(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(BadInput, match="is being trained by process"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass


def test_the_layout_may_change_between_attempts_and_the_numbers_may_not(tmp_path):
    assert config_changes(tmp_path, tiny_config()) == []
    freeze_config(tmp_path, tiny_config())
    assert config_changes(tmp_path, tiny_config()) == []
    changed = config_changes(tmp_path, tiny_config(cluster__ranks_per_node=4))
    assert changed == ["cluster.ranks_per_node: 1 -> 4"]
    stated = replace(tiny_config(), accounts=AccountsConfig(grid="DEU"))
    assert config_changes(tmp_path, stated) == ['accounts.grid: null -> "DEU"']
    with pytest.raises(BadInput, match=r"(?s)begun with another.*optim.eps: 1e-08 -> 0.1"):
        freeze_config(tmp_path, tiny_config(optim__eps=0.1))


def test_attempts_count_up(tmp_path):
    assert [new_attempt(tmp_path) for _ in range(3)] == [0, 1, 2]
    assert attempt_dir(tmp_path, 2).is_dir()
