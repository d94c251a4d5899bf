"""Laws of adapters on a network, and of the list of layers that they can sit on."""

import copy
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.exports import POOLING_UNET, UNET, random_denoiser
from tests.lora_base import BASES, CONVOLUTIONS, LORA, TRANSFORMER, section
from trainer.config import TrainConfig
from trainer.config_lora import LoraConfig
from trainer.errors import BadInput
from trainer.export_lora import write_adapters
from trainer.frozen import compose, freeze
from trainer.models.denoisers import build_denoiser
from trainer.models.layers import layers, num_adapter_parameters
from trainer.models.lora import add_adapters, load_merged

DEEP_UNET = {
    **UNET,
    "block_channels": [8, 16, 24, 16],
    "cross_attention": [True, False, True, False],
    "head_width": [8, 8, 8, 8],
    "layers_per_block": 2,
    "linear_projection": False,
    "text_width": 12,
}


@pytest.fixture(params=BASES)
def data(request):
    return BASES[request.param]


@pytest.fixture
def lora(data):
    return freeze(LoraConfig, {**LORA, "targets": [*LORA["targets"], *CONVOLUTIONS[data["kind"]]]})


@pytest.fixture
def base(data):
    return random_denoiser(section(data)).eval()


def some(data, seed=0):
    """Latents, times, texts and their mask."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 5, data["text_width"], generator=g)
    mask = torch.arange(5)[None] < torch.tensor([5, 3])[:, None]
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([30.0, 800.0]), text, mask


def adapted_copy(base, data, lora, *, is_trained=False, seed=7):
    net = copy.deepcopy(base)
    add_adapters(net, section(data), lora, seed=seed)
    if is_trained:
        generator = torch.Generator().manual_seed(1)
        for param in trainable(net).values():
            param.data.normal_(std=0.2, generator=generator)
    return net


def trainable(net):
    return {name: param for name, param in net.named_parameters() if param.requires_grad}


def is_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("data", [UNET, POOLING_UNET, DEEP_UNET, TRANSFORMER, BASES["unet"]])
def test_the_list_of_layers_is_the_networks(data):
    real = {
        name: (m.weight.shape[1], m.weight.shape[0], *(m.weight.shape[2:3] or [1]))
        for name, m in build_denoiser(section(data)).inner.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }
    listed = {each.name: (each.inputs, each.outputs, each.side) for each in layers(section(data))}
    assert listed == real


def test_at_the_start_it_is_the_base_bit_for_bit(base, data, lora):
    net = adapted_copy(base, data, lora)
    base.requires_grad_(False)  # PyTorch's linear maps add in another order where nothing learns
    found, wanted = net(*some(data)), base(*some(data))
    assert torch.equal(found, wanted)
    assert wanted.std() > 0.01


def test_so_many_numbers_are_trained_as_are_planned(base, data, lora):
    found = trainable(adapted_copy(base, data, lora))
    assert sum(param.numel() for param in found.values()) == num_adapter_parameters(
        section(data), lora
    )
    assert all(".lora_A." in name or ".lora_B." in name for name in found)


def test_adapters_come_from_the_seed_and_from_nothing_else(base, data, lora):
    torch.manual_seed(1)
    one = trainable(adapted_copy(base, data, lora))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert after == torch.rand(1)
    again = trainable(adapted_copy(base, data, lora))
    other = trainable(adapted_copy(base, data, lora, seed=8))
    assert all(torch.equal(again[name], param) for name, param in one.items())
    assert not any(torch.equal(other[name], p) for name, p in one.items() if "lora_A" in name)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_moves_adapters_and_no_bit_of_the_base(base, data, lora, recompute):
    net = adapted_copy(base, data, lora)
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    if recompute:
        net.recompute_activations()
    optimizer = torch.optim.AdamW(trainable(net).values(), lr=1e-2)
    for seed in range(2):  # A moves once B is no zero
        net(*some(data, seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, param in net.named_parameters():
        assert torch.equal(param, before[name]) != param.requires_grad, name


def test_recomputed_activations_change_no_gradient(base, data, lora):
    grads = []
    for recompute in (False, True):
        net = adapted_copy(base, data, lora, is_trained=True).train()
        if recompute:
            net.recompute_activations()
        net(*some(data)).square().mean().backward()
        grads.append({name: param.grad for name, param in trainable(net).items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_merged_computes_what_unmerged_does(base, data, lora):
    net = adapted_copy(base, data, lora, is_trained=True)
    plain = base(*some(data))
    load_merged(base, trainable(net), lora, source="x")
    is_close(base(*some(data)), net(*some(data)))
    assert (base(*some(data)) - plain).abs().max() > 0.01


def test_merged_weights_are_the_sum_to_the_last_bit(base, data, lora):
    net = adapted_copy(base, data, lora, is_trained=True)
    name = next(name for name in trainable(net) if "to_q.lora_A" in name)
    stem = name.removesuffix(".lora_A.default.weight")
    down, up = (trainable(net)[f"{stem}.lora_{x}.default.weight"].double() for x in "AB")
    wanted = dict(base.named_parameters())[f"{stem}.weight"].double() + 4.5 / 3 * (up @ down)
    load_merged(base, trainable(net), lora, source="x")
    assert torch.equal(dict(base.named_parameters())[f"{stem}.weight"], wanted.float())


def test_adapters_of_another_network_are_refused(base, data, lora):
    net = adapted_copy(base, data, lora, is_trained=True)
    wrong = {name.replace("to_q", "to_p"): param for name, param in trainable(net).items()}
    with pytest.raises(BadInput, match=r"weights of runs/x belong to another network.*to_p"):
        load_merged(base, wrong, lora, source="runs/x")
    wider = {n: torch.cat([p, p], 1) if "lora_A" in n else p for n, p in trainable(net).items()}
    with pytest.raises(BadInput, match=r"weights of runs/x belong to another network"):
        load_merged(base, wider, lora, source="runs/x")


def test_the_file_of_adapters_loads_onto_the_base(base, data, lora, tmp_path):
    net = adapted_copy(base, data, lora, is_trained=True)
    write_adapters(tmp_path, trainable(net), section(data), lora)
    if data["kind"] == "unet":
        base.inner.load_lora_adapter(
            tmp_path / "lora", prefix="unet", weight_name="pytorch_lora_weights.safetensors"
        )
    else:  # diffusers' PixArt takes no adapters by itself
        file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
        load_by_peft(base.inner, file, lora)
    is_close(base(*some(data)), net(*some(data)))


def load_by_peft(inner, file, lora):
    told = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    peft.inject_adapter_in_model(told, inner)
    state = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    found = peft.set_peft_model_state_dict(inner, state)
    assert not found.unexpected_keys


def test_a_target_that_is_no_layer_is_refused_with_the_names_that_are(data, base):
    lora = freeze(LoraConfig, {**LORA, "targets": ["to_q", "to_out"]})
    with pytest.raises(BadInput, match=r"lora.targets has to_out, which is no .* of this") as said:
        add_adapters(base, section(data), lora, seed=0)
    for name in ("to_q", "to_out.0", "net.2", "linear_1"):
        assert f" {name}" in str(said.value)


def test_without_peft_it_is_said_how_to_install_it(base, data, lora, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInput, match=r"pip install -e '.\[lora\]'"):
        add_adapters(base, section(data), lora, seed=0)


def test_adapters_need_weights_to_sit_on():
    words = ["data.dataset=x", "lora=attention"]
    with pytest.raises(BadInput, match=r"start_from is null. Give start_from=FOLDER"):
        compose(TrainConfig, "train", words)
    cfg = compose(TrainConfig, "train", [*words, "start_from=x", "lora.rank=2"])
    assert (cfg.lora.rank, cfg.lora.targets[0]) == (2, "to_q")
    first_stage = ["model=autoencoder_small", "objective=reconstruction"]
    with pytest.raises(BadInput, match=r"lora adapts denoisers.*Give lora=null"):
        compose(TrainConfig, "train", [*words, *first_stage])
