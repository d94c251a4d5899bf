"""Every named encoder, model, objective and feature network composes into a valid config."""

from pathlib import Path

import pytest

import conf
from data_prep.config import EncodeConfig
from trainer.config import TrainConfig
from trainer.config_tools import EvaluateConfig
from trainer.frozen import compose

CONF = Path(conf.__file__).parent


def names(group):
    found = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    assert found, group
    return found


@pytest.mark.parametrize("group", ["autoencoder", "text"])
def test_encoders_are_the_same_for_encoding_and_training(group):
    for name in names(group):
        encode = compose(EncodeConfig, "encode", ["dataset=x", f"{group}={name}"])
        train = compose(TrainConfig, "train", ["data.dataset=x", f"{group}={name}"])
        assert encode.encoders == train.encoders


@pytest.mark.parametrize("name", names("objective"))
def test_objectives_compose(name):
    autoencoder = ["model=autoencoder_small"] if name == "reconstruction" else []
    words = ["data.dataset=x", f"objective={name}", *autoencoder]
    assert compose(TrainConfig, "train", words).objective


@pytest.mark.parametrize("name", names("features"))
def test_networks_for_features_compose(name):
    path = ["features.path=x"] if name in {"clip", "inception"} else []
    cfg = compose(EvaluateConfig, "evaluate", ["run=x", f"features={name}", *path])
    assert (cfg.features.kind if cfg.features else "none") == name


@pytest.mark.parametrize(
    "word",
    [f"{group}={name}" for group in ("feature_loss", "discriminator") for name in names(group)],
)
def test_parts_of_the_objective_of_an_autoencoder_compose(word):
    words = ["data.dataset=x", "model=autoencoder_small", "objective=reconstruction", word]
    path = ["objective.features.path=x"] if word == "feature_loss=vgg16" else []
    found = compose(TrainConfig, "train", [*words, *path]).objective
    assert found.features or found.discriminator
