"""Write a run's adapters alone, as a file that diffusers loads onto the network they sit on."""

import json
from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import ModelConfig
from trainer.config_lora import LoraConfig
from trainer.models.layers import adapted
from trainer.models.lora import diffusers_adapters

FOLDER = "lora"


def write_adapters(
    folder: Path, adapters: Mapping[str, Tensor], model: ModelConfig, lora: LoraConfig
) -> None:
    """Write FOLDER/lora/pytorch_lora_weights.safetensors, for `pipeline.load_lora_weights`.

    Args:
        folder: Of the export, whose own network has the adapters merged in already.
        adapters: By the names that they have in training.
        model: Section of the network.
        lora: Which they are; without alpha beside the tensors, diffusers would take the rank.
    """
    told = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": [layer.name for layer in adapted(model, lora)],
    }
    words = json.dumps({f"{model.kind}.{key}": value for key, value in told.items()})
    (folder / FOLDER).mkdir()
    save_file(
        diffusers_adapters(adapters, prefix=model.kind),
        folder / FOLDER / LORA_WEIGHT_NAME_SAFE,
        metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: words},
    )
