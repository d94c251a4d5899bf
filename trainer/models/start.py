"""Begin with the weights of a diffusers folder: find them, compare the architecture, copy them."""

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

from trainer.config import TransformerConfig, UNetConfig
from trainer.errors import BadInput
from trainer.frozen import freeze, thaw
from trainer.models.denoisers import Denoiser, denoiser_class, diffusers_options
from trainer.models.loading import load_frozen
from trainer.models.locations import locate

_UNET, _TRANSFORMER = UNet2DConditionModel.__name__, PixArtTransformer2DModel.__name__
_PARTS = ("unet", "transformer")
_BASES = {"unet": "unet_tiny", "transformer": "transformer_tiny"}
# Neither decides what a weight means: the one is precision, the other is said per level below.
_NO_MATTER = {"upcast_attention", "attention_head_dim"}
_ANY = 1  # pooled tokens of a UNet that pools, where nothing says how many


def find_denoiser(path: str) -> Path:
    """Return the folder of a denoiser: of a pipeline's the unet or transformer, else itself.

    Raises:
        BadInput: There is no such folder, or no denoiser in it.
    """
    top = locate(path)
    for folder in (*(top / part for part in _PARTS), top):
        if (folder / "config.json").is_file():
            return folder
    raise BadInput(
        f"start_from={path} has no config.json, and no unet or transformer folder with one. Give "
        "a folder that `kiln export` or diffusers' save_pretrained has written."
    )


def model_section(folder: Path) -> UNetConfig | TransformerConfig:
    """Read a diffusers denoiser's architecture as a model section.

    Args:
        folder: The denoiser's own. How many tokens of a caption it pools stands beside it, in an
            export's training.json; elsewhere it is 1, for any.

    Raises:
        BadInput: Kiln builds no such network; the message says what it would need.
    """
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = told.get("_class_name")
    cls: Any = {_UNET: UNet2DConditionModel, _TRANSFORMER: PixArtTransformer2DModel}.get(name)
    if cls is None:
        raise BadInput(f"{folder} holds a {name}. Kiln trains {_UNET} and {_TRANSFORMER}.")
    arguments = {**_defaults(cls), **{key: told[key] for key in told if key[:1] != "_"}}
    fields = _unet_fields(arguments) if cls is UNet2DConditionModel else _pixart_fields(arguments)
    if fields.get("pooled_tokens"):
        fields["pooled_tokens"] = _pooled_tokens(folder)
    fields["num_parameters"] = _num_parameters(folder)
    try:
        section = _freeze(fields)
        ours = {**_defaults(cls), **diffusers_options(section)}
    except BadInput as error:
        raise BadInput(f"{folder} is no network that Kiln builds: {error}") from error
    no_matter = _NO_MATTER
    if not fields.get("pooled_tokens"):
        no_matter = no_matter | {"addition_embed_type_num_heads"}
    other = [
        f"{key}={json.dumps(arguments.get(key))} (Kiln's has {json.dumps(ours.get(key))})"
        for key in sorted(set(ours) | set(arguments))
        if key not in no_matter and _plain(ours.get(key)) != _plain(arguments.get(key))
    ]
    if other:
        raise BadInput(f"{folder} is no network that Kiln builds: {'; '.join(other)}.")
    return section


def model_words(section: UNetConfig | TransformerConfig) -> str:
    """Write a model section as words for `kiln train`."""
    words = [f"model={_BASES[section.kind]}"]
    for key, value in thaw(section).items():
        text = json.dumps(value, separators=(",", ":"))
        if isinstance(value, list):
            words.append(f"'model.{key}={text}'")  # shells have plans for brackets
        elif key != "kind" and (key, value) != ("pooled_tokens", _ANY):
            words.append(f"model.{key}={text}")
    return " ".join(words)


def check_start(path: str, cfg: UNetConfig | TransformerConfig) -> Path:
    """Compare a model section with the folder that it should start from; return the denoiser's.

    Raises:
        BadInput: They differ; the message names each key, and the words that would fit.
    """
    folder = find_denoiser(path)
    check_section(path, cfg, model_section(folder))
    return folder


def check_section(
    path: str, cfg: UNetConfig | TransformerConfig, section: UNetConfig | TransformerConfig
) -> None:
    """Compare a model section with that of the weights at `path`.

    Raises:
        BadInput: They differ, as in `check_start`.
    """
    differences = list(_differences(thaw(cfg), thaw(section)))
    if differences:
        raise BadInput(
            f"start_from={path} is another network than the model section:\n  "
            + "\n  ".join(differences)
            + f"\nTo train that network, give: {model_words(section)}"
        )


def load_start(denoiser: Denoiser, path: str, cfg: UNetConfig | TransformerConfig) -> None:
    """Copy the weights of a diffusers folder into a denoiser built from `cfg`.

    Raises:
        BadInput: It is another network, or does not load.
    """
    net = load_frozen(denoiser_class(cfg), check_start(path, cfg), low_cpu_mem_usage=False)
    denoiser.inner.load_state_dict(net.state_dict())


def _differences(have: Mapping[str, Any], need: Mapping[str, Any]) -> Iterator[str]:
    if have["kind"] != need["kind"]:
        yield f"model.kind={have['kind']}, but there it is {need['kind']}"
        return
    skipped = {"num_parameters"}
    if have["kind"] == "unet":
        skipped.add("latent_side")  # a UNet's weights fit any side: 256 px first, 512 px then
    if have.get("pooled_tokens") and need.get("pooled_tokens") == _ANY:
        skipped.add("pooled_tokens")
    for key in have:
        if key not in skipped and have[key] != need[key]:
            yield f"model.{key}={json.dumps(have[key])}, but there it is {json.dumps(need[key])}"


def _unet_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    channels = arguments["block_out_channels"]
    heads = arguments["attention_head_dim"]  # the number of heads, in truth: diffusers' issue 2011
    heads = heads if isinstance(heads, list | tuple) else [heads] * len(channels)
    return {
        "kind": "unet",
        "latent_channels": arguments["in_channels"],
        "latent_side": arguments["sample_size"],
        "text_width": arguments["cross_attention_dim"],
        "block_channels": channels,
        "layers_per_block": arguments["layers_per_block"],
        "cross_attention": [name.startswith("CrossAttn") for name in arguments["down_block_types"]],
        "head_width": [
            width // max(1, count) for width, count in zip(channels, heads, strict=True)
        ],
        "norm_groups": arguments["norm_num_groups"],
        "linear_projection": arguments["use_linear_projection"],
        "pooled_tokens": int(arguments["addition_embed_type"] == "text"),
        "time_scale_shift": arguments["resnet_time_scale_shift"] == "scale_shift",
    }


def _pixart_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "transformer",
        "latent_channels": arguments["in_channels"],
        "latent_side": arguments["sample_size"],
        "text_width": arguments["caption_channels"],
        "patch_side": arguments["patch_size"],
        "num_layers": arguments["num_layers"],
        "num_heads": arguments["num_attention_heads"],
        "head_width": arguments["attention_head_dim"],
    }


def _defaults(cls: Any) -> dict[str, Any]:  # noqa: ANN401 - diffusers is untyped
    parameters = inspect.signature(cls.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _freeze(fields: dict[str, Any]) -> UNetConfig | TransformerConfig:
    if fields["kind"] == "unet":
        return freeze(UNetConfig, fields)
    return freeze(TransformerConfig, fields)


def _pooled_tokens(folder: Path) -> int:
    training = folder.parent / "training.json"
    if not training.is_file():
        return _ANY
    model = json.loads(training.read_text(encoding="utf-8")).get("model", {})
    return int(model.get("pooled_tokens", _ANY))


def _num_parameters(folder: Path) -> int:
    """Count the numbers in all weight files by their headers."""
    total = 0
    name = "diffusion_pytorch_model"
    files = [*folder.glob(f"{name}.safetensors"), *folder.glob(f"{name}-*-of-*.safetensors")]
    if not files:
        raise BadInput(
            f"{folder} has no {name}.safetensors. Load it with diffusers, and save_pretrained it."
        )
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, facts in header.items():
            if name != "__metadata__":
                total += math.prod(facts["shape"])
    return total
