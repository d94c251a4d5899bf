"""Laws of the denoisers."""

from typing import Annotated

import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import Field, TypeAdapter
from torch import nn

from trainer.config import ModelConfig, TransformerConfig, UNetConfig
from trainer.errors import BadInput
from trainer.frozen import compose_dict, freeze
from trainer.models.denoisers import build_denoiser

UNET = {
    "kind": "unet",
    "latent_channels": 4,
    "latent_side": 8,
    "text_width": 16,
    "block_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention": (True, False),
    "head_width": (4, 8),
    "norm_groups": 4,
    "linear_projection": True,
    "pooled_tokens": 8,
    "time_scale_shift": True,
    "num_parameters": 1,
}
TRANSFORMER = {
    "kind": "transformer",
    "latent_channels": 4,
    "latent_side": 8,
    "text_width": 16,
    "patch_side": 2,
    "num_layers": 2,
    "num_heads": 2,
    "head_width": 8,
    "num_parameters": 1,
}


def config(data, **changes):
    cls = UNetConfig if data["kind"] == "unet" else TransformerConfig
    return freeze(cls, data | changes)


kinds = pytest.mark.parametrize("data", [UNET, TRANSFORMER], ids=["unet", "transformer"])


def awake(cfg):
    """A denoiser whose output layer is not zero, so that it has something to say."""
    model = build_denoiser(cfg, seed=1)
    last = model.inner.conv_out if cfg.kind == "unet" else model.inner.proj_out
    torch.manual_seed(0)
    nn.init.normal_(last.weight, std=0.1)
    return model.eval()


def some(batch=2, tokens=5):
    generator = torch.Generator().manual_seed(0)
    return {
        "latents_BCHW": torch.randn(batch, 4, 8, 8, generator=generator),
        "time_B": torch.linspace(10, 900, batch),
        "text_BLD": torch.randn(batch, tokens, 16, generator=generator),
        "text_mask_BL": torch.ones(batch, tokens, dtype=torch.bool),
    }


@kinds
def test_an_untrained_network_predicts_nothing(data):
    with torch.no_grad():
        assert (build_denoiser(config(data))(**some()) == 0).all()


@kinds
@torch.no_grad()
def test_every_input_matters_and_masked_text_does_not(data):
    model, given = awake(config(data)), some()
    base = model(**given)
    assert base.shape == given["latents_BCHW"].shape
    for name in ("latents_BCHW", "time_B", "text_BLD"):
        changed = model(**(given | {name: given[name] + 1}))
        assert (changed - base).abs().max() > 1e-4, name

    longer = dict(given)
    longer["text_BLD"] = torch.cat([given["text_BLD"], torch.full((2, 3, 16), 7.0)], dim=1)
    longer["text_mask_BL"] = torch.cat([given["text_mask_BL"], torch.zeros(2, 3).bool()], dim=1)
    torch.testing.assert_close(model(**longer), base, rtol=1e-4, atol=1e-5)


@kinds
def test_every_parameter_learns(data):
    model = awake(config(data))
    model(**some()).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert silent == []


@kinds
def test_recomputing_activations_changes_no_gradient(data):
    plain, saving = awake(config(data)).train(), awake(config(data)).train()
    saving.recompute_activations()
    for model in (plain, saving):
        model(**some()).square().mean().backward()
    pairs = zip(plain.named_parameters(), saving.parameters(), strict=True)
    for (name, a), b in pairs:
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@kinds
def test_the_inner_network_survives_its_folder(data, tmp_path):
    model = awake(config(data))
    model.inner.save_pretrained(tmp_path)
    again = type(model.inner).from_pretrained(tmp_path, local_files_only=True)
    for name, value in model.inner.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@pytest.mark.parametrize(
    ("data", "changes", "match"),
    [
        (UNET, {"head_width": (4,)}, r"model\.head_width has 1 values for 2"),
        (UNET, {"cross_attention": (True,) * 3}, r"model\.cross_attention has 3 values"),
        (UNET, {"head_width": (3, 8)}, r"model\.head_width=3"),
        (UNET, {"norm_groups": 3}, r"model\.norm_groups=3"),
        (UNET, {"latent_side": 7}, r"cannot be halved 1 times"),
        (TRANSFORMER, {"latent_side": 7}, r"Try model\.patch_side=1"),
    ],
)
def test_impossible_networks_are_refused(data, changes, match):
    with pytest.raises(BadInput, match=match):
        build_denoiser(config(data, **changes))


@pytest.mark.parametrize("name", ["unet_tiny", "transformer_tiny", "unet_sd2", "transformer_xl"])
def test_the_shipped_configs_state_their_size(name):
    composed = compose_dict("train", [f"model={name}", "data.dataset=none"])["model"]
    cfg = TypeAdapter(Annotated[ModelConfig, Field()]).validate_python(composed)
    with torch.device("meta"):
        model = build_denoiser(cfg)
    assert sum(p.numel() for p in model.parameters()) == cfg.num_parameters


def test_unet_sd2_is_stable_diffusion_2s():
    composed = compose_dict("train", ["model=unet_sd2"], require_all=False)["model"]
    with torch.device("meta"):
        ours = build_denoiser(freeze(UNetConfig, composed)).inner
        theirs = UNet2DConditionModel(
            sample_size=64,
            attention_head_dim=[5, 10, 20, 20],
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_pooled_captions_do_not_depend_on_the_padding_of_their_batch():
    cfg = freeze(UNetConfig, UNET)
    model = build_denoiser(cfg, seed=0)
    torch.nn.init.normal_(model.inner.conv_out.weight)
    latents, time = torch.randn(2, cfg.latent_channels, 8, 8), torch.full((2,), 500.0)
    text_BLD, mask_BL = torch.randn(2, 4, cfg.text_width), torch.ones(2, 4).bool()
    wider = torch.nn.functional.pad(text_BLD, (0, 0, 0, 2))
    wider_mask = torch.nn.functional.pad(mask_BL, (0, 2))
    first, second = model(latents, time, text_BLD, mask_BL), model(latents, time, wider, wider_mask)
    torch.testing.assert_close(first, second)
    other = model(latents, time, text_BLD.flip(0), mask_BL)
    assert not torch.allclose(first, other)
