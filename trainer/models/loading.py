"""Load pretrained diffusers and transformers modules from folders, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.errors import BadInput


def load_frozen(cls: Any, folder: Path, **options: Any) -> Any:  # noqa: ANN401 - untyped libraries
    """Load a module for inference from a local folder; the hub is never asked.

    Raises:
        BadInput: The folder holds no such module, or weights are missing from it.
    """
    try:
        module, info = cls.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, use_safetensors=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(
            f"{folder} does not load as {cls.__name__} ({reason}). Give a folder that its "
            "save_pretrained has written, with config.json and .safetensors weights."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadInput(
            f"{folder} lacks {len(missing)} weights of {cls.__name__}, {missing[0]} for one. "
            "Give the folder of the matching model."
        )
    return module.float().eval().requires_grad_(False)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy named weights into a model's parameters; every name and shape must match.

    Raises:
        BadInput: They belong to another network.
    """
    own = dict(model.named_parameters())
    wrong = sorted(set(own) ^ set(weights)) or [
        name for name, parameter in own.items() if parameter.shape != weights[name].shape
    ]
    if wrong:
        raise BadInput(
            f"the weights of {source} belong to another network: {len(wrong)} tensors differ, "
            f"{wrong[0]} for one. Give the model section that it was trained with."
        )
    for name, parameter in own.items():
        parameter.data.copy_(weights[name])
