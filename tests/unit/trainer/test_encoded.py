from dataclasses import replace

import pytest

from tests.latents_without_encoders import CHANNELS, SIDE, TEXT_WIDTH, make_dataset
from tests.tiny import tiny_config
from tests.tiny_run import tiny_encoder_config
from trainer.data.manifest import (
    encoding_folder,
    list_encodings,
    load_manifest,
    save_encoding,
)
from trainer.encoded import matching_encoding
from trainer.errors import BadInput
from trainer.models.fingerprint import identify

FITTING = {
    "model__latent_channels": CHANNELS,
    "model__latent_side": SIDE,
    "model__text_width": TEXT_WIDTH,
}


@pytest.fixture
def encoded(tmp_path):
    """A dataset whose encoding bears the fingerprint of real, tiny encoders."""
    dataset = make_dataset(tmp_path)
    frozen = tiny_encoder_config(tmp_path)
    encoding = list_encodings(dataset)[0]
    fingerprint = identify(frozen).fingerprint
    encoding_folder(dataset, "tiny").rename(encoding_folder(dataset, fingerprint))
    save_encoding(dataset, replace(encoding, fingerprint=fingerprint))
    return dataset, frozen


def config(encoded, **changes):
    dataset, encoders = encoded
    cfg = tiny_config(**{**FITTING, "data__dataset": str(dataset), **changes})
    return replace(cfg, encoders=encoders)


def test_latents_of_these_encoders_are_found(encoded):
    cfg = config(encoded)
    found = matching_encoding(cfg, encoded[0], load_manifest(encoded[0]))
    assert found.fingerprint == identify(cfg.encoders).fingerprint


def test_latents_of_other_encoders_are_refused_with_what_is_there(encoded):
    cfg = config(encoded)
    other = replace(cfg, encoders=replace(cfg.encoders, image_side_px=48))
    with pytest.raises(BadInput, match=r"whose fingerprint is .*; there: .*kiln encode"):
        matching_encoding(other, encoded[0], load_manifest(encoded[0]))


def test_latents_of_an_older_state_of_the_dataset_are_refused(encoded):
    manifest = load_manifest(encoded[0])
    smaller = replace(manifest, shards=manifest.shards[:1])
    with pytest.raises(BadInput, match="of an older state of the dataset"):
        matching_encoding(config(encoded), encoded[0], smaller)


@pytest.mark.parametrize(
    ("key", "need"), [("latent_channels", CHANNELS), ("latent_side", SIDE), ("text_width", 16)]
)
def test_a_network_that_does_not_fit_is_refused_with_the_number_that_does(encoded, key, need):
    cfg = config(encoded, **{f"model__{key}": need * 2})
    with pytest.raises(BadInput, match=f"Give model.{key}={need}"):
        matching_encoding(cfg, encoded[0], load_manifest(encoded[0]))
