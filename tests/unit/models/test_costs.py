"""Laws of what an image costs: PyTorch counts and keeps the same for the real networks."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn

import conf
from tests.real_costs import (
    attend_as_cpus,
    attend_as_gpus,
    build,
    counted_flops,
    inputs,
    kept_bytes,
)
from trainer.config import AutoencoderModelConfig, ModelConfig, TransformerConfig, UNetConfig
from trainer.config_lora import LoraConfig
from trainer.errors import BadInput
from trainer.frozen import compose_dict, freeze
from trainer.models.costs import activation_bytes, forward_flops, training_flops
from trainer.models.networks import run
from trainer.models.tape import Tape

SHIPPED = sorted(path.stem for path in (Path(conf.__file__).parent / "model").glob("*.yaml"))
DENOISERS = [name for name in SHIPPED if not name.startswith("autoencoder")]
SMALL = ["autoencoder_small", "transformer_tiny", "unet_tiny"]


@cache
def shipped(name):
    composed = compose_dict("train", [f"model={name}", "data.dataset=none"])["model"]
    return TypeAdapter(ModelConfig).validate_python(composed)


@cache
def shipped_net(name):
    return build(shipped(name))


def sides(height, width, tokens):
    return {"latent_height": height, "latent_width": width, "text_tokens": tokens}


def lora(*targets, rank=8):
    return freeze(LoraConfig, {"rank": rank, "alpha": 8, "targets": targets})


@pytest.mark.parametrize(("side", "gmac"), [(64, 402.1), (32, 90.5)])
def test_stable_diffusion_2_costs_what_is_known_of_it(side, gmac):
    flops = forward_flops(shipped("unet_sd2"), **sides(side, side, 77))
    assert flops / 2e9 == pytest.approx(gmac, abs=0.05)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("size", [(32, 16, 77), (17, 11, 120)])
def test_forward_passes_of_all_shipped_networks_are_what_pytorch_counts(name, size):
    cfg = shipped(name)
    found = counted_flops(shipped_net(name), inputs(cfg, 1, *size))
    assert forward_flops(cfg, **sides(*size)) == found
    assert training_flops(cfg, **sides(*size)) == 3 * found


numbers = st.integers


@st.composite
def unets(draw):
    levels = draw(numbers(1, 3))
    heads = draw(st.lists(numbers(1, 3), min_size=levels, max_size=levels))
    widths = draw(st.lists(st.sampled_from([4, 8]), min_size=levels, max_size=levels))
    return UNetConfig(
        kind="unet",
        latent_channels=draw(numbers(1, 5)),
        latent_side=8,
        text_width=draw(st.sampled_from([8, 20, 192])),
        block_channels=tuple(h * w for h, w in zip(heads, widths, strict=True)),
        layers_per_block=draw(numbers(1, 2)),
        cross_attention=tuple(draw(st.lists(st.booleans(), min_size=levels, max_size=levels))),
        head_width=tuple(widths),
        norm_groups=draw(st.sampled_from([1, 2, 4])),
        linear_projection=draw(st.booleans()),
        pooled_tokens=draw(st.sampled_from([0, 8])),
        time_scale_shift=draw(st.booleans()),
        num_parameters=1,
    )


@st.composite
def transformers(draw):
    return TransformerConfig(
        kind="transformer",
        latent_channels=draw(numbers(1, 5)),
        latent_side=8,
        text_width=draw(numbers(1, 20)),
        patch_side=draw(numbers(1, 2)),
        num_layers=draw(numbers(1, 3)),
        num_heads=draw(numbers(1, 3)),
        head_width=draw(st.sampled_from([8, 16])),
        num_parameters=1,
    )


@st.composite
def autoencoders(draw):
    return AutoencoderModelConfig(
        kind="autoencoder_kl",
        latent_channels=draw(numbers(1, 5)),
        block_channels=tuple(draw(st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3))),
        layers_per_block=draw(numbers(1, 2)),
        norm_groups=draw(st.sampled_from([1, 2, 4])),
        mid_attention=draw(st.booleans()),
        num_parameters=1,
    )


networks = st.one_of(unets(), transformers(), autoencoders())
ways = st.one_of(
    st.tuples(networks, st.just(False)),
    st.tuples(st.one_of(unets(), transformers()), st.just(True)),
)
# Below, the lowest level has one pixel, of which a norm of one channel refuses to be trained.
sizes = st.tuples(numbers(5, 21), numbers(5, 21), numbers(1, 12))


@settings(max_examples=15)
@given(cfg=networks, size=sizes)
def test_any_network_is_run_layer_by_layer_as_diffusers_runs_it(cfg, size):
    net, ran, tape = build(cfg), [], Tape()
    for name, module in net.inner.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            shape = (*module.weight.shape[1::-1], *(module.weight.shape[2:3] or [1]))
            module.register_forward_hook(lambda *_, layer=(name, *shape): ran.append(layer))
    found = counted_flops(net, inputs(cfg, 1, *size))
    run(cfg, tape, *size)
    assert [(each.name, each.inputs, each.outputs, each.side) for each in tape.layers] == ran
    assert forward_flops(cfg, **sides(*size)) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_activations_of_all_shipped_networks_are_what_autograd_keeps(
    name, recomputes, dtype, monkeypatch
):
    cfg = shipped(name)
    side = cfg.latent_side if name in DENOISERS else 16
    attend_as_gpus(monkeypatch)
    found = kept_bytes(
        build(cfg, dtype=dtype),
        lambda batch: inputs(cfg, batch, side, side, 77),
        recomputes=recomputes,
    )
    planned = activation_bytes(
        cfg, **sides(side, side, 77), width_bytes=dtype.itemsize, checkpointing=recomputes
    )
    assert planned == pytest.approx(found, rel=0.005)


@settings(max_examples=15)
@given(way=ways, size=sizes)
def test_activations_of_any_network_are_nearly_what_autograd_keeps(way, size):
    cfg, recomputes = way
    with pytest.MonkeyPatch.context() as patch:
        attend_as_cpus(patch)
        found = kept_bytes(
            build(cfg), lambda batch: inputs(cfg, batch, *size), recomputes=recomputes
        )
    planned = activation_bytes(cfg, **sides(*size), width_bytes=4, checkpointing=recomputes)
    # In a network of some kilobytes a few numbers that do not grow with it are more than 1 %.
    assert planned == pytest.approx(found, rel=0.01, abs=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_cpus_keep_the_same(name, dtype):
    cfg = shipped(name)
    net = build(cfg, dtype=dtype, device="cpu")
    found = kept_bytes(net, lambda batch: inputs(cfg, batch, 8, 8, 20, "cpu"))
    planned = activation_bytes(
        cfg, **sides(8, 8, 20), width_bytes=dtype.itemsize, checkpointing=False
    )
    assert planned == pytest.approx(found, rel=0.01)


ADAPTED = [
    ("unet_tiny", ["to_q", "to_k", "to_v", "to_out.0"]),
    ("unet_tiny", ["to_q", "ff.net.2"]),
    ("unet_tiny", ["conv1", "k_proj"]),
    ("transformer_tiny", ["to_q", "to_k", "to_v", "to_out.0"]),
    ("transformer_tiny", ["pos_embed.proj"]),
    ("transformer_tiny", ["proj_out", "linear_1"]),
]


@pytest.mark.parametrize(("name", "targets"), ADAPTED)
def test_training_adapters_costs_what_pytorch_counts(name, targets):
    cfg, told = shipped(name), lora(*targets)
    found = counted_flops(build(cfg, lora=told), inputs(cfg, 1, 16, 16, 77), is_training=True)
    planned = training_flops(cfg, **sides(16, 16, 77), lora=told)
    assert planned == found
    assert planned < training_flops(cfg, **sides(16, 16, 77))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(("name", "targets"), ADAPTED)
def test_activations_of_adapters_are_what_autograd_keeps(name, targets, recomputes, monkeypatch):
    cfg, told = shipped(name), lora(*targets)
    attend_as_gpus(monkeypatch)
    found = kept_bytes(
        build(cfg, lora=told),
        lambda batch: inputs(cfg, batch, 16, 16, 77),
        recomputes=recomputes,
    )
    planned = activation_bytes(
        cfg, **sides(16, 16, 77), width_bytes=4, checkpointing=recomputes, lora=told
    )
    assert planned == pytest.approx(found, rel=0.005)


def test_networks_that_cannot_be_have_no_costs():
    cfg = shipped("unet_sd2")
    with pytest.raises(BadInput, match=r"lora.targets has nothing"):
        training_flops(cfg, **sides(8, 8, 4), lora=lora("nothing"))
    bad = replace(cfg, head_width=(64,))
    with pytest.raises(BadInput, match=r"model\.head_width has 1 values for 4"):
        forward_flops(bad, **sides(8, 8, 4))
