from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny_config
from trainer.config import TrainConfig
from trainer.config_accounts import AccountsConfig, stated
from trainer.errors import BadInput
from trainer.frozen import (
    compose,
    compose_dict,
    differences,
    field_help,
    freeze,
    read_yaml,
    thaw,
    write_yaml,
)

DATASET = "data.dataset=somewhere"


def test_yaml_gives_a_config_back_unchanged(tmp_path):
    cfg = compose(TrainConfig, "train", [DATASET])
    write_yaml(cfg, tmp_path / "config.yaml")
    assert read_yaml(TrainConfig, tmp_path / "config.yaml") == cfg


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"config\.yaml is not there; is .* a run directory\?"):
        read_yaml(TrainConfig, tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([DATASET, "sede=3"], "got the key 'sede'.*Did you mean seed"),
        ([DATASET, "batch.micro_batch=3"], "Did you mean batch.micro_batch_images"),
        ([DATASET, "zzz=3"], "Known keys: .*run, seed"),
        ([DATASET, "seed"], "got the argument 'seed', need key=value"),
        ([], "data.dataset has no value; give it: data.dataset="),
        ([DATASET, "seed=many"], "seed='many': Input should be a valid integer"),
        ([DATASET, "seed=-1"], "seed=-1: .*greater than or equal to 0"),
        ([DATASET, "+optim.nesterov=true"], "optim.nesterov is not a key of this config"),
        ([DATASET, "~seed"], "seed is missing; add it"),
        ([DATASET, "objective=fluw"], "fluw"),
        ([DATASET, "engine.precision=bf16", "engine.zero_stage=0"], "Try zero_stage=1"),
        ([DATASET, "engine.offload=optimizer", "engine.zero_stage=0"], "Try zero_stage=1"),
        ([DATASET, "engine.offload=all"], "Try zero_stage=3, or offload=optimizer"),
        ([DATASET, "ema.half_life_images=[]"], "Try half_life_images="),
        ([DATASET, "optim.kind=adafactor"], "Try engine.zero_stage=0"),
        ([DATASET, "cluster.num_nodes=2"], "Try cluster.num_nodes=1"),
        ([DATASET, "accounts.pue=0.5"], "accounts.pue=0.5: .*greater than or equal to 1"),
        ([DATASET, "accounts.grid=DEU", "accounts.hourly=h.csv"], "Set one of them to null"),
        ([DATASET, "model=autoencoder_small"], "Try objective=reconstruction"),
    ],
)
def test_what_is_wrong_is_said_with_its_key_and_a_way_out(overrides, message):
    with pytest.raises(BadInput, match=f"(?s){message}"):
        compose(TrainConfig, "train", overrides)


def test_a_run_from_before_a_section_is_read_with_its_defaults(tmp_path):
    cfg = compose(TrainConfig, "train", [DATASET])
    data = thaw(cfg)
    del data["accounts"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    assert read_yaml(TrainConfig, tmp_path / "config.yaml") == cfg


def test_a_report_may_change_all_that_a_run_assumes():
    changes = compose_dict("report", ["run=x"])["accounts"]
    assert list(changes) == list(compose_dict("train", [DATASET])["accounts"])
    assert not any(changes.values())
    assert stated({}, changes) == AccountsConfig()
    assert stated({"grid": "DEU", "pue": 1.2}, {**changes, "hourly": "h.csv"}) == AccountsConfig(
        hourly=Path("h.csv"), pue=1.2
    )
    assert stated({"hourly": "h.csv"}, {"grid": "DEU"}) == AccountsConfig(grid="DEU")


def test_config_is_frozen():
    with pytest.raises(AttributeError, match="seed"):
        tiny_config().seed = 3  # type: ignore[misc]


def test_differences_name_every_leaf_that_differs():
    before, after = thaw(tiny_config()), thaw(tiny_config(seed=7, optim__eps=1e-6))
    assert list(differences(before, after)) == ["optim.eps: 1e-08 -> 1e-06", "seed: 1 -> 7"]


def test_every_field_is_explained():
    for key, meaning in field_help(TrainConfig):
        if "." in key or key in {"run", "seed", "total_images"}:
            assert meaning, f"{key} has no docstring"


def test_unknown_keys_of_nested_configs_are_refused():
    data = thaw(tiny_config())
    data["ema"]["decay"] = 0.9
    with pytest.raises(BadInput, match=r"ema\.decay is not a key"):
        freeze(TrainConfig, data)
