"""A tiny run on painted scenes, made once; the tests that change it take a copy."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers.utils import dynamic_modules_utils
from torch import nn

from tests.tiny_dataset import scenes_dataset
from tests.tiny_run import denoiser_config, encode_dataset, save_run, tiny_encoder_config
from trainer.models.denoisers import build_denoiser


@pytest.fixture(scope="session")
def tiny_encoder_section(tmp_path_factory):
    return tiny_encoder_config(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def tiny_scenes(tmp_path_factory, tiny_encoder_section):
    dataset = scenes_dataset(tmp_path_factory.mktemp("data") / "scenes")
    encode_dataset(dataset, tiny_encoder_section)
    return dataset


@pytest.fixture(scope="session")
def _tiny_run(tmp_path_factory, tiny_scenes, tiny_encoder_section):
    run = tmp_path_factory.mktemp("runs") / "tiny"
    cfg = denoiser_config(run, tiny_scenes, tiny_encoder_section)
    model = build_denoiser(cfg.model, seed=5)
    torch.manual_seed(0)
    nn.init.normal_(model.inner.proj_out.weight, std=0.2)
    return save_run(cfg, run, model)


@pytest.fixture
def tiny_run(_tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(_tiny_run, tmp_path / "run"))


@pytest.fixture
def own_modules(monkeypatch, tmp_path):
    """A folder for this test's pipeline.py, which diffusers copies before it imports it."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
