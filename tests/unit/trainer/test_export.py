"""Laws of the export."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel

from tests.exports import export_config, make_run
from tests.tiny_run import save_run
from trainer import export
from trainer.config import AutoencoderConfig, TrainConfig
from trainer.errors import BadInput
from trainer.frozen import compose, freeze, read_yaml, thaw
from trainer.models.autoencoders import build_autoencoder, load_autoencoder
from trainer.runtime.weights import read_weights


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_denoiser_loads_in_diffusers_with_the_weights_that_were_asked_for(
    weights, tiny_run, tmp_path
):
    out = tmp_path / "out"
    assert export.run(export_config(tiny_run, out, weights=weights)) == 0
    theirs = PixArtTransformer2DModel.from_pretrained(
        out / "transformer", local_files_only=True, low_cpu_mem_usage=False
    )
    wanted, _ = read_weights(tiny_run, weights)
    assert {f"inner.{name}" for name in theirs.state_dict()} == set(wanted)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, wanted[f"inner.{name}"])
    facts = json.loads((out / "training.json").read_text())
    assert facts["images_seen"] == 64
    assert facts["mean_loss_of_last_rows"] == pytest.approx(sum(1 / n for n in range(1, 9)) / 8)
    assert facts["encoding"]["latent_shape"] == [4, 16, 16]  # what the network's input means


@pytest.fixture(params=[[], ["discriminator=patch_small"]], ids=["alone", "discriminator"])
def autoencoder_run(request, tmp_path, tiny_scenes):
    overrides = ["model=autoencoder_small", "objective=reconstruction", *request.param]
    cfg = thaw(compose(TrainConfig, "train", [f"data.dataset={tiny_scenes}", *overrides]))
    cfg["model"] |= {"block_channels": [8, 16], "norm_groups": 4}
    cfg = freeze(TrainConfig, cfg)
    discriminator = cfg.objective.discriminator
    model = build_autoencoder(cfg.model, seed=9, discriminator=discriminator)
    return save_run(cfg, tmp_path / "autoencoder", model), model


def test_an_autoencoder_becomes_a_first_stage(autoencoder_run, tmp_path):
    run, model = autoencoder_run
    out = tmp_path / "first_stage"
    export.run(export_config(run, out))
    theirs = AutoencoderKL.from_pretrained(out, local_files_only=True, low_cpu_mem_usage=False)
    for name, value in model.inner.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    loaded = load_autoencoder(AutoencoderConfig(kind="kl", path=str(out)))
    assert loaded.latent_channels == 4
    facts = json.loads((out / "training.json").read_text())
    assert facts["num_parameters"] == sum(p.numel() for p in model.inner.parameters())


def test_the_vae_of_an_export_is_a_first_stage_of_normalised_latents(tiny_run, tmp_path):
    out = tmp_path / "out"
    export.run(export_config(tiny_run, out))
    facts = json.loads((out / "training.json").read_text())["encoding"]
    mean, std = (torch.tensor(facts[f"latent_{x}"])[:, None, None] for x in ("mean", "std"))
    folded = load_autoencoder(AutoencoderConfig(kind="kl", path=str(out / "vae")))
    given = load_autoencoder(read_yaml(TrainConfig, tiny_run / "config.yaml").encoders.autoencoder)
    torch.manual_seed(0)
    normalised = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(
        folded.decode(normalised), given.decode(normalised * std + mean), rtol=1e-5, atol=1e-5
    )


def test_an_export_is_replaced_and_nothing_else_is(tiny_run, tmp_path):
    out = tmp_path / "out"
    export.run(export_config(tiny_run, out))
    (out / "stale").write_text("x")
    export.run(export_config(tiny_run, out))
    assert not (out / "stale").exists()

    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(BadInput, match="other things in it"):
        export.run(export_config(tiny_run, other))
    assert (other / "thesis.txt").exists()

    with pytest.raises(BadInput, match="is a file"):
        export.run(export_config(tiny_run, other / "thesis.txt"))


def test_a_run_without_a_checkpoint_is_refused(tiny_run, tmp_path):
    for record in (tiny_run / "checkpoints").glob("*/*.json"):
        record.unlink()
    with pytest.raises(BadInput, match="no complete checkpoint"):
        export.run(export_config(tiny_run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_encoders_that_changed_since_are_refused_and_the_old_export_stands(tmp_path):
    run = make_run(tmp_path / "here")
    out = tmp_path / "out"
    export.run(export_config(run, out))
    before = (out / "model_index.json").read_bytes()
    weights = tmp_path / "here" / "encoders" / "t5" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BadInput, match="their files changed"):
        export.run(export_config(run, out))
    assert (out / "model_index.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"here", "out"}
