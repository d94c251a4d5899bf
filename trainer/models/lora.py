"""LoRA on a denoiser: adapters put in through peft, and taken into the weights again.

Hu et al. 2021: a layer computes W x + alpha / rank B (A x). B starts at zero, so that the network
begins as the one it adapts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.config_lora import LoraConfig
from trainer.errors import BadInput
from trainer.models.denoisers import Denoiser
from trainer.models.layers import adapted
from trainer.models.loading import load_weights

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(denoiser: Denoiser, model: ModelConfig, lora: LoraConfig, *, seed: int) -> None:
    """Freeze a denoiser's weights and put trainable adapters beside them.

    Args:
        denoiser: Changed in place: an adapted layer's own weight is `NAME.base_layer.weight` then.
        model: Its section.
        lora: Which adapters.
        seed: Draws A, whatever the state of the global generator.

    Raises:
        BadInput: peft is not installed, or a target is no layer.
    """
    try:
        import peft  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise BadInput(
            "lora needs the package peft, which is not there. Install it: pip install -e '.[lora]'."
        ) from error
    names = [layer.name for layer in adapted(model, lora)]
    told = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # nothing in it needs a whole number
        target_modules=names,
    )
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(told, denoiser.inner)


def load_merged(
    denoiser: Denoiser, adapters: Mapping[str, Tensor], lora: LoraConfig, *, source: str
) -> None:
    """Add alpha / rank B A to the weights of the network that the adapters were trained on.

    Args:
        denoiser: With that network's weights, and no adapters.
        adapters: By the names that they have in it when they train.
        lora: Which they are.
        source: Where they are from.

    Raises:
        BadInput: They belong to another network.
    """
    merged = {name: param.data for name, param in denoiser.named_parameters()}
    for name, down in adapters.items():
        if name.endswith(_A):
            stem = name.removesuffix(_A)
            weight, up = merged.get(f"{stem}.weight"), adapters[stem + _B]
            # In float64, so that it is rounded once. A convolution's B has a kernel of 1 x 1.
            change = up.double().flatten(1) @ down.double().flatten(1) * (lora.alpha / lora.rank)
            if weight is not None and weight.numel() == change.numel():
                change = (weight + change.view_as(weight)).to(weight.dtype)
            merged[f"{stem}.weight"] = change
    load_weights(denoiser, merged, source=source)


def diffusers_adapters(adapters: Mapping[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """Name a run's adapters as diffusers does in a file of its own."""
    return {
        name.replace("inner.", f"{prefix}.", 1).replace(".default.weight", ".weight"): tensor
        for name, tensor in adapters.items()
    }
