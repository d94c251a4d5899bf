"""From a frozen config to the objects of a run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.config import (
    AutoencoderModelConfig,
    FlowConfig,
    OptimConfig,
    ReconstructionConfig,
    TrainConfig,
    VpConfig,
)
from trainer.data.manifest import encoding_folder, load_manifest
from trainer.data.null_text import read_null_text
from trainer.data.sources import LatentSource, PictureSource, Source
from trainer.data.stream import micro_batches
from trainer.diffusion.process import Process, RectifiedFlow, VpScaledLinear
from trainer.encoded import matching_encoding
from trainer.errors import BadInput
from trainer.loop import Objective, Parts, Progress
from trainer.models.autoencoders import build_autoencoder
from trainer.models.denoisers import build_denoiser
from trainer.objectives import LatentObjective, ReconstructionObjective
from trainer.place import place
from trainer.plan import Plan
from trainer.runtime.checkpoint import load, newest_valid, read_state
from trainer.runtime.comm import Comm
from trainer.runtime.ema import Ema
from trainer.runtime.engine import Engine


@dataclass(frozen=True)
class Built:
    """A run, assembled; `start` binds it to where training stands."""

    cfg: TrainConfig
    plan: Plan
    comm: Comm
    engine: Engine
    ema: Ema
    objective: Objective
    source: Source
    shapes: dict[str, list[int]]
    """Full shape of every trained parameter."""
    fingerprints: tuple[str, str]
    """Of the dataset, and of its encoding ('' for pictures)."""

    def start(self, progress: Progress) -> Parts:
        """Begin reading where `progress` stands."""
        batches = micro_batches(
            self.source,
            images_seen=progress.images_seen,
            seed=self.cfg.seed,
            rank=self.comm.rank,
            world=self.comm.world,
            global_batch_images=self.cfg.batch.global_batch_images,
            micro_batch_images=self.cfg.batch.micro_batch_images,
            prefetch_batches=self.cfg.data.prefetch_batches,
        )
        return Parts(
            plan=self.plan,
            engine=self.engine,
            ema=self.ema,
            objective=self.objective,
            batches=batches,
            learning_rate=learning_rate(self.cfg.optim, self.cfg.total_images),
            comm=self.comm,
        )


def build(cfg: TrainConfig, plan: Plan, comm: Comm) -> Built:
    """Assemble a run on this rank, at its beginning; `restore` brings it further."""
    manifest = load_manifest(place(cfg.data.dataset))
    model = build_model(cfg)
    if isinstance(cfg.model, AutoencoderModelConfig):
        objective, source, encoding = *_first_stage(cfg, comm), ""
    else:
        objective, source, encoding = _second_stage(cfg, comm)
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    engine = Engine(model.to(comm.device), cfg, plan, comm)
    ema = Ema(
        engine.fragments,
        half_life_images=cfg.ema.half_life_images,
        warmup_ratio=cfg.ema.warmup_ratio,
    )
    return Built(
        cfg=cfg,
        plan=plan,
        comm=comm,
        engine=engine,
        ema=ema,
        objective=objective,
        source=source,
        shapes=shapes,
        fingerprints=(manifest.fingerprint, encoding),
    )


def restore(built: Built, run: Path, progress: Progress) -> None:
    """Load the newest valid checkpoint, if there is one, and move `progress` to it.

    Raises:
        BadInput: The checkpoint was trained on other data.
    """
    comm, root = built.comm, run / "checkpoints"
    # Rank 0 alone re-hashes; all load the one it found.
    folder = newest_valid(root) if comm.rank == 0 else None
    step = int(comm.from_rank_0(float(read_state(folder).step if folder else -1)))
    if step < 0:
        return
    folder = root / f"step_{step:08d}"
    trained_on = read_state(folder)
    was = (trained_on.dataset_fingerprint, trained_on.encoding_fingerprint)
    if was != built.fingerprints:
        raise BadInput(
            f"{folder} was trained on dataset and encoding {was}, data.dataset now has "
            f"{built.fingerprints}: the order of the samples would not continue. Give the dataset "
            "it was trained on, or another run=."
        )
    state = load(folder, built.engine.fragments, built.ema)
    progress.step, progress.images_seen = state.step, state.images_seen


def build_model(cfg: TrainConfig) -> nn.Module:
    """Make the network, freshly initialised from the seed, equal on all ranks."""
    if isinstance(cfg.model, AutoencoderModelConfig):
        model: nn.Module = build_autoencoder(cfg.model, seed=cfg.seed)
    else:
        model = build_denoiser(cfg.model, seed=cfg.seed)
    if cfg.engine.activation_checkpointing:
        model.recompute_activations()  # type: ignore[operator]
    return model


def build_process(cfg: FlowConfig | VpConfig) -> Process:
    """Make the diffusion process and its parameterization."""
    match cfg:
        case FlowConfig():
            return RectifiedFlow(logit_mean=cfg.logit_mean, logit_std=cfg.logit_std)
        case VpConfig():
            return VpScaledLinear(
                prediction=cfg.prediction,
                num_steps=cfg.num_steps,
                beta_start=cfg.beta_start,
                beta_end=cfg.beta_end,
            )


def learning_rate(cfg: OptimConfig, total_images: int) -> Callable[[int], float]:
    """Return images seen -> rate: a linear rise, then the decay to zero at `total_images`."""

    def rate(images_seen: int) -> float:
        rise = min(1.0, (images_seen + 1) / max(cfg.warmup_images, 1))
        done = (images_seen - cfg.warmup_images) / max(total_images - cfg.warmup_images, 1)
        done = min(max(done, 0.0), 1.0)
        fall = {
            "none": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[cfg.decay]
        return cfg.learning_rate * rise * fall

    return rate


def _first_stage(cfg: TrainConfig, comm: Comm) -> tuple[Objective, Source]:
    assert isinstance(cfg.objective, ReconstructionConfig)
    assert isinstance(cfg.model, AutoencoderModelConfig)
    dataset, side_px = place(cfg.data.dataset), cfg.encoders.image_side_px
    objective = ReconstructionObjective(
        seed=cfg.seed,
        latent_channels=cfg.model.latent_channels,
        pixels_per_latent=2 ** (len(cfg.model.block_channels) - 1),
        absolute_weight=cfg.objective.absolute_weight,
        kl_weight=cfg.objective.kl_weight,
        crop_side_px=cfg.objective.crop_side_px,
        whole_frac=cfg.objective.whole_frac,
    )
    source = PictureSource(dataset, load_manifest(dataset), side_px=side_px, device=comm.device)
    return objective, source


def _second_stage(cfg: TrainConfig, comm: Comm) -> tuple[Objective, Source, str]:
    assert isinstance(cfg.objective, FlowConfig | VpConfig)
    dataset = place(cfg.data.dataset)
    encoding = matching_encoding(cfg, load_manifest(dataset))

    def numbers(values: list[float]) -> Tensor:
        return torch.tensor(values, device=comm.device)

    null_text_LD = read_null_text(encoding_folder(dataset, encoding.fingerprint))
    objective = LatentObjective(
        build_process(cfg.objective),
        seed=cfg.seed,
        latent_mean_C=numbers(encoding.facts["latent_mean"]),
        latent_std_C=numbers(encoding.facts["latent_std"]),
        null_text_LD=torch.from_numpy(null_text_LD).float().to(comm.device),
        caption_dropout=cfg.objective.caption_dropout,
    )
    source = LatentSource(dataset, encoding, device=comm.device)
    return objective, source, encoding.fingerprint
