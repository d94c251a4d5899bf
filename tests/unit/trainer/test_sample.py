"""Laws of sampling from a run."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.tiny_dataset import publish, sample
from tests.tiny_run import denoiser_config, save_run
from trainer import sample as command
from trainer.config import AutoencoderModelConfig, TrainConfig
from trainer.config_tools import SampleConfig
from trainer.data.manifest import load_manifest
from trainer.errors import BadInput
from trainer.frozen import compose, freeze, read_yaml, thaw, write_yaml
from trainer.gallery import GAP_PX, TILE_PX, dataset_pictures
from trainer.models.denoisers import build_denoiser
from trainer.sampler import load_sampler

CAPTIONS = ["a small red circle on the left", "a large blue ring at the top", "a green square"]


def config(run, *words):
    few = ["sampling.num_steps=2", "sampling.solver=ddim", "threads=1", "num_reconstructions=3"]
    return compose(SampleConfig, "sample", [f"run={run}", *few, *words])


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def load(run):
    return load_sampler(run, device="cpu", threads=1)


class Knowing(nn.Module):
    """Predicts the velocity that leads to one latent, and remembers what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, x, time_B, text_BLD, mask_BL):
        self.asked.append([text[mask] for text, mask in zip(text_BLD, mask_BL, strict=True)])
        return (x - self.answer) / (time_B / 1000)[:, None, None, None]


def test_a_network_that_knows_the_answer_draws_it(tiny_run):
    sampler = load(tiny_run)
    latent = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16)
    sampler = replace(sampler, model=Knowing(latent))
    drawn = sampler.sample(CAPTIONS[:1], config(tiny_run).sampling)
    wanted = sampler.decode(latent)
    assert drawn.shape == (1, 32, 32, 3)
    assert np.abs(drawn.astype(int) - wanted).max() <= 1


def test_guidance_asks_with_the_caption_and_with_the_empty_one(tiny_run):
    sampler = load(tiny_run)
    knowing = Knowing(torch.zeros(1, 4, 16, 16))
    sampler = replace(sampler, model=knowing)
    sampler.sample(CAPTIONS[:1], config(tiny_run).sampling)
    (states,) = sampler.text.encode(CAPTIONS[:1])
    with_text, without = knowing.asked[0]
    torch.testing.assert_close(with_text, states)
    torch.testing.assert_close(without, sampler.null_text_LD)

    knowing.asked.clear()
    sampler.sample(CAPTIONS[:1], config(tiny_run, "sampling.guidance_scale=1").sampling)
    assert [len(batch) for batch in knowing.asked] == [1, 1]  # steps; none without text


def test_a_picture_depends_on_seed_number_and_caption_and_not_on_the_batch(tiny_run):
    sampler = load(tiny_run)
    plain = config(tiny_run).sampling
    together = sampler.sample(CAPTIONS, plain)
    one_by_one = sampler.sample(CAPTIONS, replace(plain, batch_images=1))
    assert np.abs(together.astype(int) - one_by_one).max() <= 1
    other_seed = sampler.sample(CAPTIONS, replace(plain, seed=1))
    assert (other_seed != together).mean() > 0.5
    same_caption = sampler.sample([CAPTIONS[0]] * 2, plain)
    assert (same_caption[0] != same_caption[1]).mean() > 0.5


def test_progress_counts_every_step_of_every_picture(tiny_run):
    done = []
    sampling = replace(config(tiny_run).sampling, batch_images=2)
    load(tiny_run).sample(CAPTIONS, sampling, on_steps=done.append)
    assert sum(done) == len(CAPTIONS) * sampling.num_steps


def test_the_averages_are_drawn_from_and_the_untrained_network_says_nothing(tiny_run):
    sampler = load(tiny_run)
    assert sampler.model.inner.proj_out.weight.abs().max() > 0
    assert sampler.untrained().model.inner.proj_out.weight.abs().max() == 0
    assert sampler.state.images_seen == 64


def test_the_command_leaves_pictures_a_grid_and_an_index(tiny_run):
    words = ",".join(f'"{caption}"' for caption in CAPTIONS)
    assert command.run(config(tiny_run, f"prompts=[{words}]")) == 0
    folder = tiny_run / "samples"
    index = json.loads((folder / "index.json").read_text())
    assert [entry["caption"] for entry in index["samples"]] == CAPTIONS
    assert all(entry["ok"] is None for entry in index["samples"])
    assert len(index["reconstructions"]) == 3
    names = [entry["picture"] for entry in index["samples"]]
    names += [e[kind] for e in index["reconstructions"] for kind in ("real", "reconstructed")]
    for name in names:
        assert pixels(folder / name).shape == (32, 32, 3)
    label = pixels(folder / "grid.png")[GAP_PX + TILE_PX :]
    assert (label < 128).any()
    rows = (tiny_run / "ledger.jsonl").read_text()
    assert '"stage": "sample"' in rows or '"stage":"sample"' in rows


def test_fewer_samples_leave_no_old_pictures(tiny_run):
    command.run(config(tiny_run, 'prompts=["a ring","a star"]'))
    command.run(config(tiny_run, 'prompts=["a ring"]'))
    assert len(list((tiny_run / "samples").glob("sample_*.png"))) == 1


def test_captions_come_from_a_file_or_from_the_evaluation(tiny_run, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a ring\n\n  a star \n")
    assert command.read_prompts(config(tiny_run, f"prompts_file={file}")) == ["a ring", "a star"]
    (tiny_run / "captions.txt").write_text("a cross\n")
    assert command.read_prompts(config(tiny_run)) == ["a cross"]


def test_no_captions_or_twice_are_refused(tiny_run, tmp_path):
    with pytest.raises(BadInput, match="prompts_file="):
        command.read_prompts(config(tiny_run))
    with pytest.raises(BadInput, match="Give one of them"):
        command.read_prompts(config(tiny_run, "prompts=[a]", "prompts_file=x"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(BadInput, match="Write one per line"):
        command.read_prompts(config(tiny_run, f"prompts_file={tmp_path / 'empty.txt'}"))


def test_an_interval_without_times_is_refused(tiny_run):
    with pytest.raises(BadInput, match=r"Try \[0\.0, 1\.0\]"):
        config(tiny_run, "sampling.guidance_interval=[0.5,0.5]")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match="a run directory"):
        load(tmp_path)


def test_a_run_without_a_checkpoint_is_refused(tiny_run):
    shutil.rmtree(tiny_run / "checkpoints")
    with pytest.raises(BadInput, match="no complete checkpoint"):
        load(tiny_run)


def test_an_autoencoders_run_is_refused(tiny_run):
    cfg = read_yaml(TrainConfig, tiny_run / "config.yaml")
    data = thaw(cfg)
    data["model"] = {
        "kind": "autoencoder_kl",
        "latent_channels": 4,
        "block_channels": [8, 16],
        "layers_per_block": 1,
        "norm_groups": 4,
        "mid_attention": False,
        "num_parameters": 1,
    }
    freeze(AutoencoderModelConfig, data["model"])
    objective = compose(TrainConfig, "train", ["objective=reconstruction", *AE]).objective
    data["objective"] = thaw(objective)
    write_yaml(freeze(TrainConfig, data), tiny_run / "config.yaml")
    with pytest.raises(BadInput, match="kiln export"):
        load(tiny_run)


AE = ["model=autoencoder_small", "data.dataset=x"]


def test_latents_of_other_encoders_are_refused(tiny_run):
    cfg = read_yaml(TrainConfig, tiny_run / "config.yaml")
    data = thaw(cfg)
    data["encoders"]["image_side_px"] = 16
    write_yaml(freeze(TrainConfig, data), tiny_run / "config.yaml")
    with pytest.raises(BadInput, match="fingerprint"):
        load(tiny_run)


def test_weights_of_another_network_are_refused(tmp_path, tiny_scenes, tiny_encoder_section):
    run = tmp_path / "run"
    cfg = denoiser_config(run, tiny_scenes, tiny_encoder_section)
    bigger = denoiser_config(run, tiny_scenes, tiny_encoder_section, model__num_layers=2)
    save_run(cfg, run, build_denoiser(bigger.model))
    with pytest.raises(BadInput, match="another network"):
        load(run)


def test_a_missing_gpu_is_said(tiny_run):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BadInput, match="Try device=cpu"):
        load_sampler(tiny_run, device="cuda", threads=1)


def test_a_dataset_shows_no_more_than_it_has(tmp_path):
    dataset = publish(tmp_path, [[sample(0), sample(1)]])
    found = dataset_pictures(dataset, load_manifest(dataset), 5, side_px=8)
    assert len(found) == 2
    assert found[0][1].shape == (8, 8, 3)


def test_an_adaptive_solver_says_what_it_took_and_claims_no_steps(tiny_run, caplog):
    words = ("sampling.solver=dopri5", "sampling.tolerance=0.1", 'prompts=["a green square"]')
    with caplog.at_level("INFO"):
        assert command.run(config(tiny_run, *words)) == 0
    assert "1 pictures took" in caplog.text
    assert "evaluations each" in caplog.text
    told = json.loads((tiny_run / "samples/sample_0000.json").read_text())
    assert (told["solver"], told["steps"]) == ("dopri5", None)
