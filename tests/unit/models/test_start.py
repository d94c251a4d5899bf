"""Laws of starting from a diffusers folder."""

import json
import shlex

import pytest
import torch
from safetensors.torch import save_file

from tests.exports import POOLING_UNET, UNET, random_denoiser
from trainer.config import TrainConfig, TransformerConfig, UNetConfig
from trainer.errors import BadInput
from trainer.frozen import compose, freeze, thaw
from trainer.models.denoisers import build_denoiser
from trainer.models.start import check_start, load_start, model_section, model_words

TRANSFORMER = {
    "kind": "transformer",
    "latent_channels": 4,
    "latent_side": 16,
    "text_width": 16,
    "patch_side": 4,
    "num_layers": 1,
    "num_heads": 2,
    "head_width": 8,
    "num_parameters": 1,
}
MODELS = {"unet": UNET, "pooling unet": POOLING_UNET, "transformer": TRANSFORMER}


def section(data, **changes):
    cls = UNetConfig if data["kind"] == "unet" else TransformerConfig
    return freeze(cls, {**data, **changes})


@pytest.fixture(params=MODELS)
def data(request):
    return MODELS[request.param]


def save(data, folder):
    """Save a random network as an export does it, and return it."""
    denoiser = random_denoiser(section(data))
    denoiser.inner.save_pretrained(folder / data["kind"])
    (folder / "training.json").write_text(json.dumps({"model": data}))
    return denoiser


def test_the_architecture_is_read_back(data, tmp_path):
    denoiser = save(data, tmp_path)
    found = model_section(tmp_path / data["kind"])
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert thaw(found) == {**data, "num_parameters": count}


def test_its_words_compose_to_it(data, tmp_path):
    save(data, tmp_path)
    found = model_section(tmp_path / data["kind"])
    words = shlex.split(model_words(found))
    cfg = compose(TrainConfig, "train", ["data.dataset=x", *words])
    assert cfg.model == found


@pytest.mark.parametrize("inside", ["", "kind"])
def test_the_weights_are_the_folders(inside, data, tmp_path):
    saved = save(data, tmp_path)
    fresh = build_denoiser(section(data), seed=77)
    path = tmp_path / data["kind"] if inside else tmp_path
    load_start(fresh, str(path), section(data))
    for name, value in saved.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_differences_are_named_key_by_key_with_the_words_that_fit(tmp_path):
    save(UNET, tmp_path)
    other = section(UNET, block_channels=[8, 32], time_scale_shift=True)
    with pytest.raises(BadInput) as caught:
        check_start(str(tmp_path), other)
    text = str(caught.value)
    assert "model.block_channels=[8, 32], but there it is [8, 16]" in text
    assert "model.time_scale_shift=true, but there it is false" in text
    assert text.count(", but ") == 2
    assert "'model.block_channels=[8,16]'" in text
    with pytest.raises(BadInput, match=r"model\.kind=transformer, but"):
        check_start(str(tmp_path), section(TRANSFORMER))


def test_a_unet_goes_on_at_another_side(tmp_path):
    save(UNET, tmp_path)
    assert check_start(str(tmp_path), section(UNET, latent_side=32)) == tmp_path / "unet"
    save(TRANSFORMER, tmp_path / "other")
    with pytest.raises(BadInput, match=r"model\.latent_side=32"):
        check_start(str(tmp_path / "other"), section(TRANSFORMER, latent_side=32))


def test_a_unet_that_pools_says_elsewhere_how_many_tokens(tmp_path):
    save(POOLING_UNET, tmp_path)
    (tmp_path / "training.json").unlink()
    check_start(str(tmp_path), section(POOLING_UNET))
    assert "pooled_tokens" not in model_words(model_section(tmp_path / "unet"))
    with pytest.raises(BadInput, match=r"model\.pooled_tokens=0"):
        check_start(str(tmp_path), section(POOLING_UNET, pooled_tokens=0))


def test_stable_diffusions_own_unet_is_the_one_in_conf(tmp_path):
    """Its published config.json, without the keys that old files lack, names 8 heads for SD1."""
    told = {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 64,
        "use_linear_projection": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(BadInput, match="no diffusion_pytorch_model"):
        model_section(tmp_path)
    save_file({"x": torch.zeros(3, 5)}, tmp_path / "diffusion_pytorch_model.safetensors")
    cfg = compose(TrainConfig, "train", ["data.dataset=x", "experiment=sd2_512"]).model
    assert check_start(str(tmp_path), cfg) == tmp_path
    told |= {"attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False}
    (tmp_path / "config.json").write_text(json.dumps(told))
    found = model_section(tmp_path)
    assert found.head_width == (40, 80, 160, 160)
    assert found.num_parameters == 15


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"act_fn": "mish"}, r'act_fn="mish" \(Kiln\'s has "silu"\)'),
        ({"transformer_layers_per_block": 2}, "transformer_layers_per_block=2"),
        ({"layers_per_block": [1, 2]}, "layers_per_block"),
        ({"_class_name": "FluxTransformer2DModel"}, "holds a FluxTransformer2DModel"),
    ],
)
def test_networks_that_kiln_does_not_build_are_refused_with_the_reason(change, needle, tmp_path):
    save(UNET, tmp_path)
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadInput, match=needle):
        check_start(str(tmp_path), section(UNET))


def test_a_folder_without_a_denoiser_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no unet or transformer folder"):
        check_start(str(tmp_path), section(UNET))
