"""Laws of the first stages."""

import pytest
import torch
from safetensors.torch import save_file

from trainer.config import AutoencoderConfig, AutoencoderModelConfig
from trainer.errors import BadInput
from trainer.frozen import compose_dict, freeze
from trainer.models.autoencoders import build_autoencoder, load_autoencoder
from trainer.models.loading import load_weights


def small_model(**changes):
    data = {
        "kind": "autoencoder_kl",
        "latent_channels": 4,
        "block_channels": (8, 16),
        "layers_per_block": 1,
        "norm_groups": 4,
        "mid_attention": False,
        "num_parameters": 1,
    }
    return freeze(AutoencoderModelConfig, data | changes)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_latents_and_pictures_have_the_stated_shapes(kind, kl_folder, tiny_folder):
    folder = {"kl": kl_folder, "tiny": tiny_folder}[kind]
    autoencoder = load_autoencoder(AutoencoderConfig(kind=kind, path=str(folder)))
    pictures = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, logvar = autoencoder.moments(pictures)
    side = 16 // autoencoder.downscale
    assert mean.shape == logvar.shape == (3, autoencoder.latent_channels, side, side)
    assert autoencoder.decode(mean).shape == pictures.shape
    assert not mean.requires_grad


def test_a_tiny_autoencoder_has_no_variance(tiny_folder):
    autoencoder = load_autoencoder(AutoencoderConfig(kind="tiny", path=str(tiny_folder)))
    _, logvar = autoencoder.moments(torch.zeros(1, 3, 8, 8))
    assert (logvar.exp() < 1e-12).all()


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_a_folder_of_something_else_is_refused(kind, not_weights):
    with pytest.raises(BadInput, match="save_pretrained"):
        load_autoencoder(AutoencoderConfig(kind=kind, path=str(not_weights)))


def test_what_was_trained_loads_as_what_was_saved(tmp_path):
    trained = build_autoencoder(small_model(), seed=3)
    trained.inner.save_pretrained(tmp_path)
    loaded = load_autoencoder(AutoencoderConfig(kind="kl", path=str(tmp_path)))
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, _ = loaded.moments(pictures)
    with torch.no_grad():
        decoded, trained_mean, _ = trained.eval()(pictures, torch.zeros_like(mean))
    torch.testing.assert_close(mean, trained_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.decode(mean), decoded, rtol=1e-5, atol=1e-5)


def test_missing_weights_are_noticed(tmp_path):
    model = build_autoencoder(small_model()).inner
    model.save_pretrained(tmp_path)
    weights = dict(model.named_parameters())
    del weights["decoder.conv_in.weight"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BadInput, match=r"lacks 1 weights .* decoder\.conv_in\.weight"):
        load_autoencoder(AutoencoderConfig(kind="kl", path=str(tmp_path)))


def test_the_seed_alone_decides_the_first_weights():
    before = torch.random.get_rng_state()
    a, b, c = (build_autoencoder(small_model(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    assert torch.equal(before, torch.random.get_rng_state())


def test_weights_of_another_network_are_refused():
    model = build_autoencoder(small_model())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = build_autoencoder(small_model(latent_channels=8))
    with pytest.raises(BadInput, match="belong to another network"):
        load_weights(other, weights, source="runs/x")
    del weights["inner.decoder.conv_in.weight"]
    with pytest.raises(BadInput, match=r"1 tensors differ, inner\.decoder\.conv_in\.weight"):
        load_weights(model, weights, source="runs/x")


def test_the_shipped_config_states_its_size():
    composed = compose_dict("train", ["model=autoencoder_small"], require_all=False)["model"]
    cfg = freeze(AutoencoderModelConfig, composed)
    assert sum(p.numel() for p in build_autoencoder(cfg).parameters()) == cfg.num_parameters
