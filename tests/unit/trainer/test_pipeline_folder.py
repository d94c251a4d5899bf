"""Laws of reading an export back, and of going on from it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.exports import (
    CAPTIONS,
    EPS,
    FLOW,
    POOLING_UNET,
    UNET,
    V,
    export_config,
    make_run,
    sampling,
)
from tests.tiny_run import encode_dataset, save_run
from trainer import export
from trainer.build import build_model
from trainer.config import AutoencoderConfig, TrainConfig
from trainer.data.manifest import list_encodings
from trainer.errors import BadInput
from trainer.frozen import compose, freeze, read_yaml, thaw
from trainer.models.start import find_denoiser
from trainer.pipeline_folder import read_pipeline
from trainer.sampler import load_sampler

RUNS = {
    "transformer, flow": {"objective": FLOW},
    "pooling unet, v": {"model": POOLING_UNET, "objective": V},
    "stock, eps": {"model": UNET, "text": "clip", "padding": "max", "objective": EPS},
    "tiny autoencoder": {"autoencoder": "tiny"},
}


@pytest.fixture(params=RUNS)
def run(request, tmp_path) -> Path:
    return make_run(tmp_path / "here", **RUNS[request.param])


@pytest.fixture
def folder(run, tmp_path) -> Path:
    export.run(export_config(run, tmp_path / "out"))
    return tmp_path / "out"


def test_what_is_read_back_draws_what_the_run_draws(run, folder):
    sampler, found = load_sampler(run, device="cpu", threads=1), read_pipeline(folder)
    assert found.objective == sampler.cfg.objective
    assert found.latent_shape == sampler.latent_shape
    torch.testing.assert_close(found.null_text_LD, sampler.null_text_LD)
    other = replace(
        sampler,
        model=found.denoiser,
        autoencoder=found.autoencoder,
        text=found.text,
        null_text_LD=found.null_text_LD,
        latent_mean_C=found.latent_mean_C,
        latent_std_C=found.latent_std_C,
    )
    how = sampling(num_steps=4, guidance_scale=3.0)
    wanted = sampler.sample(CAPTIONS, how)
    assert wanted.std() > 5
    assert np.abs(other.sample(CAPTIONS, how).astype(int) - wanted).max() <= 1


def weights_of(folder: Path):
    denoiser = find_denoiser(str(folder))
    return {path.name: path.read_bytes() for path in sorted(denoiser.glob("*.safetensors"))}


def test_there_and_back_without_training_changes_no_bit(run, folder, tmp_path):
    cfg = thaw(read_yaml(TrainConfig, run / "config.yaml"))
    cfg |= {"start_from": str(folder), "seed": 99, "run": str(tmp_path / "again")}
    cfg = freeze(TrainConfig, cfg)
    again = save_run(cfg, tmp_path / "again", build_model(cfg))
    export.run(export_config(again, tmp_path / "out2"))
    assert weights_of(tmp_path / "out2") == weights_of(folder)
    assert "Began with the weights of out" in (tmp_path / "out2" / "README.md").read_text()
    fresh = build_model(cfg, is_fresh=False)
    assert not all(
        torch.equal(a, b)
        for a, b in zip(fresh.parameters(), build_model(cfg).parameters(), strict=True)
    )


def test_latents_of_the_vae_in_the_folder_are_normalised(tmp_path):
    run = make_run(tmp_path / "here")
    export.run(export_config(run, tmp_path / "out"))
    cfg = read_yaml(TrainConfig, run / "config.yaml")
    vae = AutoencoderConfig(kind="kl", path=str(tmp_path / "out" / "vae"))
    before = {encoding.fingerprint for encoding in list_encodings(tmp_path / "here" / "scenes")}
    encode_dataset(tmp_path / "here" / "scenes", replace(cfg.encoders, autoencoder=vae))
    (found,) = (
        encoding
        for encoding in list_encodings(tmp_path / "here" / "scenes")
        if encoding.fingerprint not in before
    )
    np.testing.assert_allclose(found.facts["latent_mean"], 0, atol=0.01)
    np.testing.assert_allclose(found.facts["latent_std"], 1, atol=0.01)


def test_what_kiln_did_not_export_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BadInput, match="no pipeline that `kiln export` wrote"):
        read_pipeline(tmp_path)


def test_an_autoencoder_starts_from_no_denoiser():
    words = ["data.dataset=x", "model=autoencoder_small", "objective=reconstruction"]
    with pytest.raises(BadInput, match="Give start_from=null"):
        compose(TrainConfig, "train", [*words, "start_from=exported"])
