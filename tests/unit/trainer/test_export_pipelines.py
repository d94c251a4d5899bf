"""Laws of exported pipelines: diffusers draws with them what Kiln draws."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from transformers import BertModel

from tests.exports import (
    CAPTIONS,
    FLOW,
    POOLING_UNET,
    UNET,
    export_config,
    kiln_draws,
    make_run,
    objective,
)
from trainer import export
from trainer.data.null_text import read_null_text
from trainer.errors import BadInput
from trainer.models.loading import load_frozen

STOCK = {"model": UNET, "text": "clip", "padding": "max"}
OWN = {
    "unet that pools captions": {"model": POOLING_UNET},
    "unet with masks": {"model": UNET, "text": "clip"},
    "transformer": {},
    "transformer, padded": {"padding": "max"},
    "tiny autoencoder": {"autoencoder": "tiny", "model": UNET, "text": "clip", "padding": "max"},
}


pytestmark = pytest.mark.usefixtures("own_modules")


def draw(pipeline, noise, output_type, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(CAPTIONS, latents=noise, output_type=output_type, **options).images


def assert_draws_what_kiln_draws(pipeline, run, *, num_steps, scale, **how):
    noise, latents, pictures = kiln_draws(run, num_steps=num_steps, guidance_scale=scale, **how)
    options = {"num_inference_steps": num_steps, "guidance_scale": scale}
    assert latents.std() > 0.3  # no empty comparison
    theirs = draw(pipeline, noise, "latent", **options)
    torch.testing.assert_close(torch.as_tensor(theirs), latents, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(draw(pipeline, noise, "np", **options), pictures, atol=1.1 / 255)


@pytest.mark.parametrize("name", ["vp_eps", "vp_v", "vp_v_zero_snr", "ddpm_eps"])
def test_the_stock_pipeline_draws_what_kiln_draws(name, tmp_path):
    run = make_run(tmp_path / "here", objective=objective(name), **STOCK)
    export.run(export_config(run, tmp_path / "out"))
    assert not (tmp_path / "out" / "pipeline.py").exists()
    (encoding,) = (tmp_path / "here" / "scenes" / "encodings").iterdir()
    assert read_null_text(encoding).shape == (12, 16)  # all tokens are kept, padding too
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert_draws_what_kiln_draws(pipeline, run, num_steps=8, scale=3.0)
    assert_draws_what_kiln_draws(pipeline, run, num_steps=10, scale=1.0)


@pytest.mark.parametrize("name", ["flow", "vp_eps", "vp_v"])
@pytest.mark.parametrize("kind", OWN)
def test_the_pipeline_in_the_folder_draws_what_kiln_draws(kind, name, tmp_path):
    run = make_run(tmp_path / "here", objective=objective(name), **OWN[kind])
    export.run(export_config(run, tmp_path / "out"))
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path / "out", local_files_only=True, trust_remote_code=True
    )
    assert type(pipeline).__name__ == "KilnPipeline"
    assert_draws_what_kiln_draws(pipeline, run, num_steps=8, scale=3.0)
    assert_draws_what_kiln_draws(pipeline, run, num_steps=10, scale=1.0)


CANNOT = {"flow": FLOW, "500 levels": objective("vp_eps", num_levels=500)}
CANNOT["continuous time"] = objective("vp_cosine_v")


@pytest.mark.parametrize("why", CANNOT)
def test_what_the_stock_pipeline_cannot_drive_gets_its_own(why, tmp_path):
    run = make_run(tmp_path / "here", objective=CANNOT[why], **STOCK)
    export.run(export_config(run, tmp_path / "out"))
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path / "out",
        custom_pipeline=str(tmp_path / "out"),
        local_files_only=True,
        trust_remote_code=True,
    )
    assert_draws_what_kiln_draws(pipeline, run, num_steps=10, scale=3.0)


def test_edm_is_drawn_on_its_papers_steps(tmp_path):
    run = make_run(tmp_path / "here", model=POOLING_UNET, objective=objective("edm"))
    export.run(export_config(run, tmp_path / "out"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert_draws_what_kiln_draws(pipeline, run, num_steps=8, scale=3.0, grid="karras")


@pytest.mark.parametrize("name", ["sub_vp_score", "ve_score"])
def test_a_process_that_no_scheduler_knows_is_refused(name, tmp_path):
    run = make_run(tmp_path / "here", objective=objective(name))
    with pytest.raises(BadInput, match="no scheduler in diffusers"):
        export.run(export_config(run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_demos_encoder_and_network_are_drawn_with_and_load_whole(tmp_path):
    model = {**POOLING_UNET, "text_width": 384}
    run = make_run(tmp_path / "here", model=model, text="bert")
    export.run(export_config(run, tmp_path / "out"))
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path / "out", local_files_only=True, trust_remote_code=True
    )
    assert_draws_what_kiln_draws(pipeline, run, num_steps=8, scale=3.0)
    # Nothing is missing, so transformers draws no pooler at random.
    assert load_frozen(BertModel, tmp_path / "out" / "text_encoder").pooler is not None


@pytest.fixture
def folder(tmp_path):
    run = make_run(tmp_path / "here", model=POOLING_UNET)
    export.run(export_config(run, tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def pipeline(folder):
    found = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    found.set_progress_bar_config(disable=True)
    return found


def test_a_generator_decides_the_noise_and_words_decide_the_picture(pipeline):
    def latents(*words, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        few = {"num_inference_steps": 2, "output_type": "latent"}
        return pipeline(*words, generator=generator, **few, **options).images

    drawn = latents("a green square")
    assert drawn.shape == (1, 4, 16, 16)
    assert torch.equal(latents("a green square"), drawn)
    assert not torch.equal(latents("a green square", seed=1), drawn)
    assert not torch.equal(latents("a red circle"), drawn)
    assert not torch.equal(latents("a green square", negative_prompt="a circle"), drawn)
    assert torch.equal(latents("a green square", negative_prompt=[""]), drawn)
    with pytest.raises(ValueError, match="Give one for all, or one for each"):
        latents("a green square", negative_prompt=["a", "b"])


def test_an_export_has_no_pickle_and_no_path_of_this_machine(folder, tmp_path):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model_index.json", "README.md", "training.json", "pipeline.py"} <= names
    weights = {name for name in names if name.endswith(".safetensors")}
    assert {name.partition("/")[0] for name in weights} == {"unet", "vae", "text_encoder"}
    told = {".json", ".md", ".py", ".safetensors", ".txt"}
    assert {"." + name.rpartition(".")[2] for name in names} <= told
    for path in folder.rglob("*"):
        if path.suffix in {".json", ".md", ".py"}:
            assert str(tmp_path) not in path.read_text(), path
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "KilnPipeline"]
