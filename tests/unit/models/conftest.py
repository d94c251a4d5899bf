"""Folders of tiny encoders, made once."""

import json

import pytest

from tests import tiny_encoders


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return tiny_encoders.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    return tiny_encoders.save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def kl_folder(tmp_path_factory):
    return tiny_encoders.save_kl(tmp_path_factory.mktemp("kl"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return tiny_encoders.save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def not_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return tmp_path
