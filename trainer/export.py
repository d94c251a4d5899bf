"""Write a run's weights as a folder that diffusers loads with from_pretrained."""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.begin import load_trained
from trainer.command import run_command
from trainer.config import AutoencoderModelConfig, TrainConfig
from trainer.config_first_stage import ReconstructionConfig
from trainer.config_tools import ExportConfig
from trainer.data.publish import publish_json
from trainer.errors import BadInput
from trainer.export_card import account_figures, training_facts, write_card
from trainer.export_folder import Parts, is_stock, write_pipeline
from trainer.export_lora import write_adapters
from trainer.export_scheduler import make_schedule
from trainer.frozen import read_yaml
from trainer.models.autoencoders import build_autoencoder, load_autoencoder
from trainer.models.denoisers import build_denoiser
from trainer.models.fingerprint import identify
from trainer.models.loading import load_weights
from trainer.models.text_encoders import load_text_encoder, quiet_transformers
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.weights import read_weights

log = logging.getLogger(__name__)

TRAINING = "training.json"


def main(argv: Sequence[str]) -> int:
    """`kiln export RUN out=FOLDER`."""
    return run_command(run, ExportConfig, "export", argv, positional="run")


def run(cfg: ExportConfig) -> int:
    """Write an autoencoder alone, or a denoiser's whole pipeline."""
    run_dir, out = Path(cfg.run), Path(cfg.out)
    _check_target(out)
    trained = read_yaml(TrainConfig, run_dir / "config.yaml")
    weights, state = read_weights(run_dir, cfg.weights)
    if isinstance(trained.model, AutoencoderModelConfig):  # without a discriminator
        weights = {name: each for name, each in weights.items() if name.startswith("inner.")}
    with _published(out) as folder:
        account = account_figures(run_dir, trained, state)
        facts = training_facts(run_dir, trained, state, account, weights=cfg.weights)
        facts["num_parameters"] = sum(weight.numel() for weight in weights.values())
        if isinstance(trained.model, AutoencoderModelConfig):
            autoencoder = build_autoencoder(trained.model)
            load_weights(autoencoder, weights, source=str(run_dir))
            autoencoder.inner.eval().save_pretrained(folder)
            what = type(autoencoder.inner).__name__
        else:
            parts = _load_parts(trained, state, facts, weights, run_dir=run_dir)
            facts["num_parameters"] = sum(each.numel() for each in parts.denoiser.parameters())
            with quiet_transformers():
                facts["settings"] = write_pipeline(folder, parts)
            if trained.lora is not None:
                write_adapters(folder, weights, trained.model, trained.lora)
            stock = is_stock(trained)
            name = out.resolve().name
            write_card(folder, run_dir, facts, account, name=name, is_stock=stock)
            what = "StableDiffusionPipeline" if stock else "pipeline.py, its own pipeline"
        publish_json(folder / TRAINING, facts)
    log.info(
        "%s: %s after %d images, %.1f M parameters trained",
        out,
        what,
        state.images_seen,
        sum(weight.numel() for weight in weights.values()) / 1e6,
    )
    return 0


def _load_parts(
    trained: TrainConfig,
    state: TrainState,
    facts: Mapping[str, Any],
    weights: dict[str, Tensor],
    *,
    run_dir: Path,
) -> Parts:
    assert not isinstance(trained.model, AutoencoderModelConfig)
    assert not isinstance(trained.objective, ReconstructionConfig)
    schedule = make_schedule(trained.objective)
    found = identify(trained.encoders).fingerprint
    if found != state.encoding_fingerprint:
        raise BadInput(
            f"{run_dir} was trained with encoders of fingerprint {state.encoding_fingerprint}, but "
            f"those of its config now have {found}: their files changed. Bring them back, where "
            "encoders.autoencoder.path and encoders.text.path say."
        )
    denoiser = build_denoiser(trained.model)
    load_trained(denoiser, run_dir, trained, weights)
    return Parts(
        cfg=trained,
        schedule=schedule,
        denoiser=denoiser.eval(),
        autoencoder=load_autoencoder(trained.encoders.autoencoder),
        text=load_text_encoder(trained.encoders.text),
        latent_mean_C=torch.tensor(facts["encoding"]["latent_mean"]),
        latent_std_C=torch.tensor(facts["encoding"]["latent_std"]),
    )


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """Give a folder beside `out`; it takes its place if the block ends well, else it goes."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _check_target(out: Path) -> None:
    """Never delete what is no export."""
    if out.is_dir() and any(out.iterdir()) and not (out / TRAINING).exists():
        raise BadInput(
            f"out={out} is a folder with other things in it. Give a new folder, or one that an "
            "export wrote."
        )
    if out.exists() and not out.is_dir():
        raise BadInput(f"out={out} is a file. Give a folder.")
