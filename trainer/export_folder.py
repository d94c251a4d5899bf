"""Write a trained denoiser and everything it needs as a diffusers pipeline folder."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import BertModel

from trainer import export_pipeline
from trainer.config import TrainConfig
from trainer.config_diffusion import VpProcessConfig
from trainer.config_first_stage import ReconstructionConfig
from trainer.data.publish import publish_json
from trainer.export_scheduler import NETWORK_STEPS, STOCK_PREDICTIONS, Schedule
from trainer.models.autoencoders import Autoencoder, KlAutoencoder
from trainer.models.denoisers import Denoiser
from trainer.models.folding import fold_normalisation
from trainer.models.text_encoders import TextEncoder

STOCK = "StableDiffusionPipeline"
MODEL_INDEX = "model_index.json"
_PLACES = ("_name_or_path", "name_or_path")  # configs say from where they were loaded


@dataclass(frozen=True, slots=True)
class Parts:
    """What a pipeline is made of, before it is written."""

    cfg: TrainConfig
    schedule: Schedule
    denoiser: Denoiser
    autoencoder: Autoencoder
    text: TextEncoder
    latent_mean_C: torch.Tensor
    latent_std_C: torch.Tensor


def is_stock(cfg: TrainConfig) -> bool:
    """Say whether diffusers' StableDiffusionPipeline does exactly what Kiln's sampler does.

    It gives its encoder and its UNet all tokens and no masks, adds nothing to the time embedding,
    knows first stages with a scale but no mean, tells the UNet the number of the step, and drives
    no scheduler for flows.
    """
    objective, model, text = cfg.objective, cfg.model, cfg.encoders.text
    return (
        not isinstance(objective, ReconstructionConfig)
        and isinstance(objective.process, VpProcessConfig)
        and objective.process.num_levels == NETWORK_STEPS
        and objective.prediction in STOCK_PREDICTIONS
        and model.kind == "unet"
        and model.pooled_tokens == 0
        and (text.kind, text.padding) == ("clip", "max")
        and cfg.encoders.autoencoder.kind == "kl"
    )


def write_pipeline(folder: Path, parts: Parts) -> dict[str, Any]:
    """Write networks, tokenizer, scheduler and model_index.json into an empty folder.

    Returns:
        How the parts fit together, as `trainer.pipeline_folder` reads it.
    """
    cfg, autoencoder, schedule = parts.cfg, parts.autoencoder, parts.schedule
    is_folded = isinstance(autoencoder, KlAutoencoder)
    mean_C, std_C = parts.latent_mean_C, parts.latent_std_C
    net = autoencoder.net  # type: ignore[attr-defined]
    tokenizer = parts.text.tokenizer
    tokenizer.model_max_length = parts.text.max_tokens  # to which stock pipelines pad
    modules = {
        "vae": fold_normalisation(net, mean_C, std_C) if is_folded else net,
        "text_encoder": _with_pooler(parts.text.net),
        "tokenizer": tokenizer,
        "scheduler": schedule.scheduler,
        cfg.model.kind: parts.denoiser.inner,
    }
    for name, module in modules.items():
        module.save_pretrained(folder / name)
        _forget_places(folder / name)
    settings = {
        "max_tokens": cfg.encoders.text.max_tokens,
        "padding": cfg.encoders.text.padding,
        "pooled_tokens": cfg.model.pooled_tokens if cfg.model.kind == "unet" else 0,
        "network_time": [schedule.time_factor, schedule.time_offset],
        "latents_mean": None if is_folded else mean_C.tolist(),
        "latents_std": None if is_folded else std_C.tolist(),
    }
    _write_index(folder, modules, is_stock=is_stock(cfg), settings=settings)
    return settings


def _write_index(
    folder: Path, modules: dict[str, Any], *, is_stock: bool, settings: dict[str, Any]
) -> None:
    index: dict[str, Any] = {
        name: [type(module).__module__.partition(".")[0], type(module).__name__]
        for name, module in modules.items()
    }
    if is_stock:
        absent = ("safety_checker", "feature_extractor", "image_encoder")
        index |= {name: [None, None] for name in absent}
        index |= {"_class_name": STOCK, "requires_safety_checker": False}
    else:
        index |= {"_class_name": ["pipeline", "KilnPipeline"], "settings": settings}
        index |= {name: [None, None] for name in ("unet", "transformer") if name not in modules}
        shutil.copyfile(export_pipeline.__file__, folder / "pipeline.py")
    publish_json(folder / MODEL_INDEX, {**index, "_diffusers_version": diffusers.__version__})


def _with_pooler(net: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    """Give a BertModel the pooler that its class has when it is loaded; zeros, as nothing reads it.

    Without it from_pretrained would draw one at random, and say so.
    """
    if isinstance(net, BertModel) and net.pooler is None:
        net.pooler = BertModel(net.config).pooler
        for parameter in net.pooler.parameters():
            parameter.data.zero_()
    return net


def _forget_places(folder: Path) -> None:
    """Take the paths of this machine out of configs."""
    for path in folder.glob("*config.json"):
        told = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in told.items() if key not in _PLACES}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
