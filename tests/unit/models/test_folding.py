"""Laws of folding the latents' normalisation into an autoencoder."""

import pytest
import torch
from diffusers import AutoencoderKL

from trainer.config import AutoencoderConfig
from trainer.models.autoencoders import KlAutoencoder, load_autoencoder
from trainer.models.folding import fold_normalisation

MEAN, STD = torch.tensor([0.5, -2.0, 0.0, 3.0]), torch.tensor([0.2, 1.0, 4.0, 0.7])


@pytest.fixture(params=["with quant convs", "without"])
def autoencoder(request, kl_folder):
    whole = load_autoencoder(AutoencoderConfig(kind="kl", path=str(kl_folder)))
    if request.param == "with quant convs":
        return whole
    torch.manual_seed(1)
    bare = AutoencoderKL.from_config(
        {**whole.net.config, "use_quant_conv": False, "use_post_quant_conv": False}
    )
    return KlAutoencoder(bare.eval())


def test_the_folded_one_decodes_normalised_latents(autoencoder):
    folded = KlAutoencoder(fold_normalisation(autoencoder.net, MEAN, STD))
    torch.manual_seed(0)
    normalised = torch.randn(2, 4, 8, 8)
    wanted = autoencoder.decode(normalised * STD[:, None, None] + MEAN[:, None, None])
    torch.testing.assert_close(folded.decode(normalised), wanted, rtol=1e-5, atol=1e-5)


def test_the_folded_one_encodes_to_normalised_latents(autoencoder):
    folded = KlAutoencoder(fold_normalisation(autoencoder.net, MEAN, STD))
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, logvar = autoencoder.moments(pictures)
    got_mean, got_logvar = folded.moments(pictures)
    mu, std = MEAN[:, None, None], STD[:, None, None]
    torch.testing.assert_close(got_mean, (mean - mu) / std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_logvar, logvar - 2 * std.log(), rtol=1e-5, atol=1e-5)


def test_the_given_one_is_not_changed_and_stock_code_scales_by_one(autoencoder):
    before = {name: value.clone() for name, value in autoencoder.net.state_dict().items()}
    folded = fold_normalisation(autoencoder.net, MEAN, STD)
    for name, value in autoencoder.net.state_dict().items():
        assert torch.equal(value, before[name])
    assert folded.config.scaling_factor == 1.0
    assert folded.config.shift_factor is None
