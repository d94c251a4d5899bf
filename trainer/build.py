"""From a frozen config to the objects of a run."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.begin import begin_with, hold_base
from trainer.config import AutoencoderModelConfig, TrainConfig
from trainer.config_diffusion import (
    DenoisingConfig,
    ExplodingProcessConfig,
    FlowProcessConfig,
    ProcessConfig,
    SubVpProcessConfig,
    TimesConfig,
    VpProcessConfig,
)
from trainer.config_engine import OptimConfig
from trainer.config_first_stage import ReconstructionConfig
from trainer.data.manifest import encoding_folder
from trainer.data.null_text import read_null_text
from trainer.data.opening import Dataset
from trainer.data.publish import publish_json
from trainer.datasets import find_datasets
from trainer.diffusion.objective import Weight, denoising_loss, score_matching_loss
from trainer.diffusion.parameterization import Parameterization
from trainer.diffusion.process import Process
from trainer.diffusion.processes import (
    Edm,
    RectifiedFlow,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    VpTable,
)
from trainer.diffusion.times import log_normal_times, logit_normal_times, uniform_times
from trainer.encoded import check_encoders
from trainer.feed import Feed, open_feed
from trainer.loop import Encode, Objective, Parts, Progress
from trainer.model_flops import flops_counter
from trainer.models.autoencoders import build_autoencoder
from trainer.models.denoisers import build_denoiser
from trainer.models.lora import add_adapters
from trainer.objectives import LatentObjective, Loss, ReconstructionObjective
from trainer.online import open_online
from trainer.plan import Plan
from trainer.quality.perceptual import load_perceptual
from trainer.runtime.checkpoint import TrainState, load, read_state, verify
from trainer.runtime.comm import Comm
from trainer.runtime.ema import Ema, decays
from trainer.runtime.engine import Engine, deepspeed_config
from trainer.runtime.guard import Guard
from trainer.runtime.rundir import complete, step_folder, step_of
from trainer.runtime.snapshot import live_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A run, assembled."""

    cfg: TrainConfig
    plan: Plan
    comm: Comm
    engine: Engine
    ema: Ema
    guard: Guard
    objective: Objective
    feed: Feed
    shapes: dict[str, list[int]]
    """Full shape of every trained parameter."""
    fingerprints: tuple[str, str]
    """Of the dataset, and of its encoding ('' for pictures)."""
    encode: Encode | None = None
    """What makes latents of micro-batches where none were written before."""

    def parts(self) -> Parts:
        """Give the loop what it needs."""
        return Parts(
            plan=self.plan,
            total_images=self.cfg.total_images,
            engine=self.engine,
            ema=self.ema,
            guard=self.guard,
            objective=self.objective,
            read=self.feed.batches,
            advance=self.feed.advance,
            learning_rate=learning_rate(self.cfg.optim, self.cfg.total_images),
            comm=self.comm,
            flops=flops_counter(self.cfg),
            encode=self.encode,
        )


def build(cfg: TrainConfig, plan: Plan, comm: Comm, trained: TrainState | None) -> Built:
    """Assemble a run on this rank, at its beginning; `restore` brings it further.

    Args:
        cfg: Of the run.
        plan: Of the run.
        comm: All ranks build together.
        trained: Where its checkpoint stands, if there is one.
    """
    datasets = find_datasets(cfg)
    hold_base(cfg, comm)
    model = build_model(cfg, is_fresh=trained is None)
    objective: Objective
    encode: Encode | None = None
    if isinstance(cfg.model, AutoencoderModelConfig):
        objective, encoding = build_reconstruction(cfg, comm.device), ""
    else:
        objective, encode, encoding = _second_stage(
            cfg, datasets[0], comm, has_begun=trained is not None
        )
    if trained is not None:
        check_encoders(trained.encoding_fingerprint, encoding)
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    engine = Engine(model.to(comm.device), cfg, plan, comm)
    if comm.rank == 0:
        publish_json(Path(cfg.run) / "deepspeed.json", deepspeed_config(cfg, plan))
    return Built(
        cfg=cfg,
        plan=plan,
        comm=comm,
        engine=engine,
        ema=Ema(engine.fragments, decays(cfg.ema)),
        guard=Guard(cfg.rollback, trained.losses if trained else ()),
        objective=objective,
        feed=open_feed(cfg, datasets, comm, trained.stream if trained else None),
        shapes=shapes,
        fingerprints=(datasets[0].manifest.fingerprint if datasets else "", encoding),
        encode=encode,
    )


def find_checkpoint(root: Path, comm: Comm) -> Path | None:
    """Find the newest valid checkpoint; the ranks share the hashing, and all get the same one."""
    before = math.inf
    while True:
        there = [step_of(folder) for folder in complete(root)] if comm.rank == 0 else []
        newest = max((step for step in there if step < before), default=-1)
        step = int(comm.from_rank_0(float(newest)))
        if step < 0:
            return None
        folder = step_folder(root, step)
        problem = verify(folder, part=comm.rank, parts=comm.world)
        if not comm.sum([float(problem is not None)])[0]:
            return folder
        if problem is not None:
            log.warning("%s cannot be used: %s; trying the one before it", folder, problem)
        before = step


def restore(built: Built, folder: Path | None) -> Progress:
    """Load a checkpoint, if there is one; say where training stands.

    Raises:
        BadInput: The checkpoint is of another network, or was trained on other data.
    """
    if folder is None:
        return Progress(built.feed.begin(None))
    fragments = built.engine.fragments
    stream = built.feed.begin(read_state(folder).stream)
    record = load(folder, live_tensors(fragments, built.ema), built.shapes)
    fragments.publish()
    fragments.set_scalars(record.scalars)
    return Progress(stream, record.state.step, record.state.images_seen)


def build_model(cfg: TrainConfig, *, is_fresh: bool = True) -> nn.Module:
    """Make the network, equal on all ranks: from the seed, or a fresh run's as `start_from` says.

    With `lora` it is at every start what `start_from` says, with new adapters.

    Raises:
        BadInput: The weights to start from are of another network.
    """
    if isinstance(cfg.model, AutoencoderModelConfig):
        assert isinstance(cfg.objective, ReconstructionConfig)
        model: nn.Module = build_autoencoder(
            cfg.model, seed=cfg.seed, discriminator=cfg.objective.discriminator
        )
    else:
        model = denoiser = build_denoiser(cfg.model, seed=cfg.seed)
        if cfg.start_from is not None and (is_fresh or cfg.lora is not None):
            begin_with(denoiser, cfg)
        if cfg.lora is not None:
            add_adapters(denoiser, cfg.model, cfg.lora, seed=cfg.seed)
    if cfg.engine.activation_checkpointing:
        model.recompute_activations()  # type: ignore[operator]
    return model


def build_parameterization(cfg: DenoisingConfig) -> Parameterization:
    """Make the diffusion process, and what the network predicts on it."""
    return Parameterization(_process(cfg.process), cfg.prediction, cfg.sigma_data)


def build_loss(cfg: DenoisingConfig) -> Loss:
    """Make the loss of a batch of latents."""
    parameterization = build_parameterization(cfg)
    if cfg.loss == "squared_error":
        weight = Weight(cfg.weight.kind, cfg.weight.gamma, cfg.weight.k, cfg.weight.bias)
        return partial(denoising_loss, parameterization, weight=weight)
    weighted = cfg.loss == "likelihood"
    return partial(score_matching_loss, parameterization, likelihood_weighting=weighted)


def build_reconstruction(cfg: TrainConfig, device: torch.device) -> ReconstructionObjective:
    """Make the objective of an autoencoder; the network of a feature loss lies on `device`.

    Raises:
        BadInput: That network is not there, or its weights are another's.
        BadWorld: The model hub did not give them.
    """
    assert isinstance(cfg.objective, ReconstructionConfig)
    assert isinstance(cfg.model, AutoencoderModelConfig)
    features = cfg.objective.features
    return ReconstructionObjective(
        cfg.objective,
        seed=cfg.seed,
        latent_channels=cfg.model.latent_channels,
        pixels_per_latent=2 ** (len(cfg.model.block_channels) - 1),
        distance=None if features is None else load_perceptual(features, device),
    )


def training_times(cfg: TimesConfig, process: Process) -> Callable[[Tensor], Tensor]:
    """Return uniform draws -> times."""
    match cfg.kind:
        case "uniform":
            return partial(uniform_times, process, shift=cfg.shift)
        case "logit_normal":
            return partial(logit_normal_times, mean=cfg.mean, std=cfg.std, shift=cfg.shift)
        case "log_normal":
            return partial(log_normal_times, process, mean=cfg.mean, std=cfg.std)


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


def _process(cfg: ProcessConfig) -> Process:
    match cfg:
        case FlowProcessConfig():
            return RectifiedFlow()
        case VpProcessConfig():
            return _preserving(cfg)
        case SubVpProcessConfig():
            return SubVariancePreserving(cfg.beta_start, cfg.beta_end)
        case ExplodingProcessConfig():
            exploding = VarianceExploding if cfg.kind == "ve" else Edm
            return exploding(cfg.sigma_min, cfg.sigma_max)


def _preserving(cfg: VpProcessConfig) -> Process:
    betas = (cfg.betas, cfg.beta_start, cfg.beta_end)
    if cfg.num_levels is None:
        return VariancePreserving(*betas, zero_terminal_snr=cfg.zero_terminal_snr)
    return VpTable(*betas, num_levels=cfg.num_levels, zero_terminal_snr=cfg.zero_terminal_snr)


def _second_stage(
    cfg: TrainConfig, dataset: Dataset, comm: Comm, *, has_begun: bool
) -> tuple[Objective, Encode | None, str]:
    """Make the objective, the encoder if there is one, and the fingerprint of all encoders."""
    assert isinstance(cfg.objective, DenoisingConfig)
    encode: Encode | None = None
    if dataset.encoding is None:
        online = open_online(cfg, dataset, comm, has_begun=has_begun)
        encode, fingerprint, (mean, std) = online.encode, online.fingerprint, online.statistics
        null_text_LD = online.null_text_LD
    else:
        fingerprint, facts = dataset.encoding.fingerprint, dataset.encoding.facts
        mean, std = facts["latent_mean"], facts["latent_std"]
        null_text = read_null_text(encoding_folder(dataset.folder, fingerprint))
        null_text_LD = torch.from_numpy(null_text).float().to(comm.device)
    objective = LatentObjective(
        build_loss(cfg.objective),
        training_times(cfg.objective.times, build_parameterization(cfg.objective).process),
        seed=cfg.seed,
        latent_mean_C=torch.tensor(mean, device=comm.device),
        latent_std_C=torch.tensor(std, device=comm.device),
        null_text_LD=null_text_LD,
        caption_dropout=cfg.objective.caption_dropout,
    )
    return objective, encode, fingerprint
