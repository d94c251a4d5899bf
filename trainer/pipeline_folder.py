"""Read an exported pipeline folder back: all that sampling needs, without a run or a dataset."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import EncodersConfig, TransformerConfig, UNetConfig
from trainer.config_diffusion import DenoisingConfig
from trainer.errors import BadInput
from trainer.frozen import freeze
from trainer.models.autoencoders import Autoencoder, load_autoencoder
from trainer.models.denoisers import Denoiser, build_denoiser
from trainer.models.start import load_start, model_section
from trainer.models.text_encoders import TextEncoder, load_text_encoder

TRAINING, INDEX = "training.json", "model_index.json"


@dataclass(frozen=True)
class PipelineFolder:
    """What `kiln export` wrote of a denoiser, loaded; shapes as in `trainer.sampler`."""

    denoiser: Denoiser
    model: UNetConfig | TransformerConfig
    objective: DenoisingConfig
    encoders: EncodersConfig
    """Those in the folder: its autoencoder may make normalised latents."""
    autoencoder: Autoencoder
    text: TextEncoder
    null_text_LD: Tensor
    """States of the empty caption."""
    latent_mean_C: Tensor
    """Of what the autoencoder makes; zeros where it normalises itself."""
    latent_std_C: Tensor
    latent_shape: tuple[int, int, int]
    training: dict[str, Any]
    """training.json: how the weights came about."""


def is_pipeline_folder(folder: Path) -> bool:
    """Say whether `read_pipeline` would know what to do with it."""
    return (folder / INDEX).is_file() and (folder / TRAINING).is_file()


def read_pipeline(folder: Path) -> PipelineFolder:
    """Load an exported pipeline, on the CPU, in float32.

    Raises:
        BadInput: `kiln export` did not write this folder, or parts of it are missing.
    """
    if not is_pipeline_folder(folder):
        raise BadInput(
            f"{folder} has no {INDEX} and {TRAINING}, so it is no pipeline that `kiln export` "
            "wrote of a denoiser. Give one, or a run directory."
        )
    training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    encoders = _encoders(folder, training)
    text = load_text_encoder(encoders.text)
    model = model_section(folder / training["model"]["kind"])
    denoiser = build_denoiser(model)
    load_start(denoiser, str(folder), model)
    channels, height, width = training["encoding"]["latent_shape"]
    mean, std = (training["settings"][key] for key in ("latents_mean", "latents_std"))
    return PipelineFolder(
        denoiser=denoiser.eval(),
        model=model,
        objective=freeze(DenoisingConfig, training["objective"]),
        encoders=encoders,
        autoencoder=load_autoencoder(encoders.autoencoder),
        text=text,
        null_text_LD=text.encode([""])[0],
        latent_mean_C=torch.zeros(channels) if mean is None else torch.tensor(mean),
        latent_std_C=torch.ones(channels) if std is None else torch.tensor(std),
        latent_shape=(channels, height, width),
        training=training,
    )


def _encoders(folder: Path, training: dict[str, Any]) -> EncodersConfig:
    told = training["encoders"]
    places = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    return freeze(
        EncodersConfig,
        {
            **told,
            "autoencoder": {**told["autoencoder"], "path": str(folder / "vae")},
            "text": {**told["text"], "path": str(folder), **places},
        },
    )
