"""Load a network's weights from a file in which nothing but tensors may be."""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import BadInput
from trainer.models.locations import locate

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, pickle.PickleError, SafetensorError)


def find_weights(path: str) -> Path:
    """Return the one file of weights in a folder, or in what a hub name stands for.

    Raises:
        BadInput: There is none, or several.
        BadWorld: The model hub did not give it.
    """
    folder = locate(path, also=("*.pth", "*.pt"))
    found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    chosen = [file for file in found if file.suffix == SUFFIXES[0]] or found
    if len(chosen) != 1:
        names = ", ".join(file.name for file in chosen) or "none"
        raise BadInput(
            f"{folder} must hold one file of weights ({', '.join(SUFFIXES)}), and holds: {names}."
        )
    return chosen[0]


def load_weights(net: nn.Module, file: Path, *, unused: Callable[[str], bool]) -> None:
    """Fill a network from a state dict; every name and shape must match.

    Args:
        net: Is changed.
        file: safetensors, or what torch saved; pickled code is refused.
        unused: Says of which names no output depends; they may lack in either.

    Raises:
        BadInput: The file is damaged, holds other things, or is of another network.
    """
    try:
        if file.suffix == SUFFIXES[0]:
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{file} is no state dict of tensors alone ({reason}).") from error
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise BadInput(f"{file} is no state dict of tensors alone.")
    own = {name: value for name, value in net.state_dict().items() if not unused(name)}
    given = {name: value for name, value in state.items() if not unused(name)}
    wrong = sorted(set(own) ^ set(given)) or [
        name for name, value in own.items() if value.shape != given[name].shape
    ]
    if wrong:
        raise BadInput(
            f"{file} belongs to another network than {type(net).__name__}: {len(wrong)} tensors "
            f"differ, {wrong[0]} for one."
        )
    net.load_state_dict(given, strict=False)
