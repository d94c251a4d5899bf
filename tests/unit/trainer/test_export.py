"""Laws of the export."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel

from tests.tiny_run import save_run
from trainer import export
from trainer.config import AutoencoderConfig, TrainConfig
from trainer.config_tools import ExportConfig
from trainer.errors import BadInput
from trainer.frozen import compose, freeze, thaw
from trainer.models.autoencoders import build_autoencoder, load_autoencoder
from trainer.sampler import load_sampler


def config(run, to):
    return ExportConfig(run=str(run), to=str(to))


def test_a_denoiser_loads_in_diffusers_with_the_averaged_weights(tiny_run, tmp_path):
    to = tmp_path / "out"
    assert export.run(config(tiny_run, to)) == 0
    theirs = PixArtTransformer2DModel.from_pretrained(
        to, local_files_only=True, low_cpu_mem_usage=False
    )
    ours = load_sampler(tiny_run, device="cpu", threads=1).model.inner
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    facts = json.loads((to / "training.json").read_text())
    assert facts["images_seen"] == 64
    assert facts["mean_loss_of_last_rows"] == pytest.approx(sum(1 / n for n in range(1, 9)) / 8)
    assert facts["encoding"]["latent_shape"] == [4, 16, 16]  # what the network's input means


@pytest.fixture
def autoencoder_run(tmp_path, tiny_scenes):
    overrides = ["model=autoencoder_small", "objective=reconstruction"]
    cfg = thaw(compose(TrainConfig, "train", [f"data.dataset={tiny_scenes}", *overrides]))
    cfg["model"] |= {"block_channels": [8, 16], "norm_groups": 4}
    cfg = freeze(TrainConfig, cfg)
    model = build_autoencoder(cfg.model, seed=9)
    return save_run(cfg, tmp_path / "autoencoder", model), model


def test_an_autoencoder_becomes_a_first_stage(autoencoder_run, tmp_path):
    run, model = autoencoder_run
    to = tmp_path / "first_stage"
    export.run(config(run, to))
    theirs = AutoencoderKL.from_pretrained(to, local_files_only=True, low_cpu_mem_usage=False)
    for name, value in model.inner.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    loaded = load_autoencoder(AutoencoderConfig(kind="kl", path=str(to)))
    assert loaded.latent_channels == 4


def test_an_export_is_replaced_and_nothing_else_is(tiny_run, tmp_path):
    to = tmp_path / "out"
    export.run(config(tiny_run, to))
    (to / "stale").write_text("x")
    export.run(config(tiny_run, to))
    assert not (to / "stale").exists()

    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(BadInput, match="other things in it"):
        export.run(config(tiny_run, other))
    assert (other / "thesis.txt").exists()

    with pytest.raises(BadInput, match="is a file"):
        export.run(config(tiny_run, other / "thesis.txt"))


def test_a_run_without_a_checkpoint_is_refused(tiny_run, tmp_path):
    for record in (tiny_run / "checkpoints").glob("*/*.json"):
        record.unlink()
    with pytest.raises(BadInput, match="no complete checkpoint"):
        export.run(config(tiny_run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
