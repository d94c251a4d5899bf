"""What a run will need: hours with failures and queues, checkpoints, energy, money, data.

Failures are a Poisson process with one rate per GPU; a run loses half a checkpoint interval and a
restart at each (Young 1974, Daly 2006).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, expm1, sqrt

from trainer.config import AutoencoderModelConfig, TrainConfig
from trainer.data.manifest import ShardEntry
from trainer.hardware import Accelerator
from trainer.observe.carbon import Rate
from trainer.plan_memory import GIB, checkpoint_gib, num_ranks
from trainer.plan_speed import PCIE_GB_PER_S, Band, Speed

RESTART_S = 300.0
"""From a failure to the first new step: a node is excluded, ranks start and load; assumed."""
AGREE_S = 0.1
"""What a checkpoint holds training up beside the copy to host memory; assumed."""
QUEUE_S = 3600.0
"""Waiting for the first nodes; assumed, as are the waits between jobs: each the same."""
POWER_SHARE = Band(0.6, 0.8, 1.0)
"""Mean power of a training GPU over its TDP; assumed."""
NODE_SHARE = Band(1.2, 1.4, 1.6)
"""Power of a node over that of its GPUs, where accounts.node_overhead_w is 0: GPUs draw about 70 %
of a server's (Zeus); DGX A100: 6.5 kW for 8 x 400 W."""
MOST_MTTFS = 30.0
"""A checkpoint interval with a restart that is longer than so many mean times between failures
is never survived: one try in e^30 is."""
_S_PER_H = 3600.0


@dataclass(frozen=True, slots=True)
class Failures:
    """How often a GPU ends a run."""

    mttf_gpu_h: float
    words: str
    """Where that is known from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Of a whole run; low, mid and high follow the speed's."""

    total_steps: int
    mttf_h: float
    """Of the whole job."""
    checkpoint_gib: float
    checkpoint_stall_s: float
    """What a step waits while the state is copied."""
    checkpoint_write_s: float
    """Until it is on disk, beside training."""
    best_interval_s: float
    """Young and Daly."""
    best_interval_images: int
    interval_s: float
    """As configured."""
    best_loss_frac: float
    """Of the time, for saving and for failures, at the best interval."""
    loss_frac: float
    """The same as configured."""
    num_jobs: int
    """Slurm jobs one after the other, by their time limit."""
    num_failures: float
    train_h: Band
    """Steps alone."""
    run_h: Band
    """With checkpoints, failures, and the start of each job: nodes are held."""
    wall_h: Band
    """With queues."""
    gpu_hours: Band
    kwh: Band
    """Of the facility: nodes x PUE, from TDP; a model, no measurement."""
    kg_co2e: Band | None
    gpu_cost: Band | None
    energy_cost: Band | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is read."""

    num_samples: int
    total_bytes: int
    epochs: float
    epoch_bytes: int
    """Fetched from where the dataset lies if nodes keep nothing."""
    egress_bytes: float
    """Fetched in the whole run: once per node that keeps all, or every epoch."""
    cache_bytes: float
    """What each node's cache would hold of all it reads."""


def best_interval_s(stall_s: float, mttf_s: float) -> float:
    """Return the time between checkpoints that loses least (Young 1974, with Daly's bound).

    Args:
        stall_s: What a checkpoint holds training up.
        mttf_s: Mean time between failures of the job.
    """
    return min(max(sqrt(2 * stall_s * mttf_s), stall_s), mttf_s)


def stretched(work_s: float, *, interval_s: float, stall_s: float, mttf_s: float) -> float:
    """Return how long work takes with checkpoints, failures, work done again and restarts.

    Daly 2006, equation 13: exact for exponential failures that can also meet a restart.
    """
    segments = work_s / interval_s
    return (
        mttf_s
        * float(_grown(RESTART_S, mttf_s))
        * expm1((interval_s + stall_s) / mttf_s)
        * (segments)
    )


def _grown(restart_s: float, mttf_s: float) -> float:
    return expm1(restart_s / mttf_s) + 1


def predict_needs(
    cfg: TrainConfig,
    speed: Speed,
    gpu: Accelerator,
    failures: Failures,
    *,
    steps: int,
    carbon: Rate | None = None,
    price: Rate | None = None,
) -> Needs | None:
    """Follow a run from its speed to hours, energy and money; None if it never ends.

    Args:
        cfg: Of the run.
        speed: Of its steps.
        gpu: What it runs on.
        failures: How often that fails.
        steps: Of the run.
        carbon: Grams of CO2 per kWh; None is unknown.
        price: Money per kWh; None is unknown.
    """
    if is_endless(cfg, speed, failures, steps=steps):
        return None
    ranks, nodes = num_ranks(cfg), cfg.cluster.num_nodes
    mttf_s = failures.mttf_gpu_h / ranks * _S_PER_H
    size_gib = checkpoint_gib(cfg)
    # Each rank copies its share to host memory while training waits; disks are written beside it.
    stall_s = size_gib * GIB / ranks / (PCIE_GB_PER_S * 1e9) + AGREE_S
    slurm = cfg.cluster.slurm
    write_s = size_gib * GIB / nodes / (slurm.write_mb_per_s * 1e6) if slurm else stall_s
    batch = cfg.batch.global_batch_images
    train_s = speed.step_s.scaled(steps)
    interval_s = configured_interval_s(cfg, speed, steps=steps)
    # A checkpoint counts when it is on disk, so the next may not begin before.
    best_s = max(best_interval_s(stall_s, mttf_s), write_s, speed.step_s.mid)
    best_s = min(best_s, train_s.mid)
    ratio = _overhead(interval_s, stall_s, mttf_s)
    jobs = _num_jobs(cfg, train_s.mid * ratio)
    run_s = Band(*(seconds * ratio + RESTART_S * jobs for seconds in _values(train_s)))
    queue_s = QUEUE_S * jobs if cfg.cluster.kind == "slurm" else 0.0
    run_h = run_s.scaled(1 / _S_PER_H)
    gpu_hours = run_h.scaled(ranks)
    kwh = _kwh(cfg, gpu, run_h)
    rate = cfg.accounts.price_per_gpu_hour
    return Needs(
        total_steps=steps,
        mttf_h=mttf_s / _S_PER_H,
        checkpoint_gib=size_gib,
        checkpoint_stall_s=stall_s,
        checkpoint_write_s=write_s,
        best_interval_s=best_s,
        best_interval_images=max(1, round(best_s / speed.step_s.mid)) * batch,
        interval_s=interval_s,
        best_loss_frac=_lost_frac(best_s, stall_s, mttf_s),
        loss_frac=1 - 1 / ratio,
        num_jobs=jobs,
        num_failures=run_s.mid / mttf_s,
        train_h=train_s.scaled(1 / _S_PER_H),
        run_h=run_h,
        wall_h=Band(*((seconds + queue_s) / _S_PER_H for seconds in _values(run_s))),
        gpu_hours=gpu_hours,
        kwh=kwh,
        kg_co2e=kwh.scaled(carbon.overall_mean() / 1e3) if carbon else None,
        gpu_cost=None if rate is None else gpu_hours.scaled(rate),
        energy_cost=kwh.scaled(price.overall_mean()) if price else None,
    )


def configured_interval_s(cfg: TrainConfig, speed: Speed, *, steps: int) -> float:
    """Return the time between checkpoints; a run saves at its end, so no more than all of it."""
    every = max(1, round(cfg.checkpoint.every_images / cfg.batch.global_batch_images))
    return min(every, steps) * speed.step_s.mid


def is_endless(cfg: TrainConfig, speed: Speed, failures: Failures, *, steps: int) -> bool:
    """Say whether failures come so often that a run cannot get from one checkpoint to the next."""
    mttf_s = failures.mttf_gpu_h / num_ranks(cfg) * _S_PER_H
    interval_s = configured_interval_s(cfg, speed, steps=steps)
    return interval_s + RESTART_S > MOST_MTTFS * mttf_s


def _num_jobs(cfg: TrainConfig, run_s: float) -> int:
    """Count the jobs that a run takes: each starts, trains, and saves when it is warned."""
    if cfg.cluster.kind != "slurm":
        return 1
    limit_s = cfg.cluster.time_limit_min * 60.0
    useful_s = limit_s - cfg.cluster.warn_before_kill_s - RESTART_S
    return ceil(run_s / useful_s) if useful_s > 0 else 1


def _overhead(interval_s: float, stall_s: float, mttf_s: float) -> float:
    return stretched(1.0, interval_s=interval_s, stall_s=stall_s, mttf_s=mttf_s)


def _lost_frac(interval_s: float, stall_s: float, mttf_s: float) -> float:
    if interval_s + stall_s > MOST_MTTFS * mttf_s:
        return 1.0
    return 1 - 1 / _overhead(interval_s, stall_s, mttf_s)


def _values(band: Band) -> tuple[float, float, float]:
    return band.low, band.mid, band.high


def _kwh(cfg: TrainConfig, gpu: Accelerator, run_h: Band) -> Band:
    """Multiply hours by watts: shares of the TDP, the rest of the node, and the building."""
    ranks, nodes, accounts = num_ranks(cfg), cfg.cluster.num_nodes, cfg.accounts
    found = []
    for hours, share, node in zip(
        _values(run_h), _values(POWER_SHARE), _values(NODE_SHARE), strict=True
    ):
        watts = gpu.tdp_w * share * ranks
        if accounts.node_overhead_w:
            watts += accounts.node_overhead_w * nodes
        else:
            watts *= node
        found.append(hours * watts * accounts.pue / 1e3)
    return Band(*found)


def predict_data(
    cfg: TrainConfig,
    shards: Sequence[Iterable[ShardEntry]],
    shares: Sequence[float],
    *,
    images: int,
) -> Data:
    """Say what is read of some datasets, from their manifests alone.

    Args:
        cfg: Of the run.
        shards: Of each dataset.
        shares: Of the samples that come from each, together 1.
        images: That are trained on.
    """
    nodes = cfg.cluster.num_nodes
    samples = total = 0
    egress = cache = weighted_epochs = 0.0
    for entries, share in zip(shards, shares, strict=True):
        listed = list(entries)
        count, size = sum(each.count for each in listed), sum(each.bytes for each in listed)
        epochs = images * share / max(count, 1)
        once = cfg.data.order == "shards"
        # Nodes that read the same shards in every epoch share a dataset out; else each reads all.
        per_node = size / nodes if once else float(size)
        keeps = cfg.data.cache is not None and per_node <= cfg.data.cache_gb * 1e9
        egress += size * (1 if once else nodes) * (min(epochs, 1.0) if keeps else epochs)
        cache += per_node
        samples, total = samples + count, total + size
        weighted_epochs += share * epochs
    return Data(
        num_samples=samples,
        total_bytes=total,
        epochs=weighted_epochs,
        epoch_bytes=total,
        egress_bytes=egress,
        cache_bytes=cache,
    )


def image_latent_bytes(cfg: TrainConfig) -> int:
    """Estimate what a sample's latents and text states take on disk: mean, logvar, states, fp16."""
    if isinstance(cfg.model, AutoencoderModelConfig):
        return 0
    model = cfg.model
    latents = 2 * model.latent_channels * model.latent_side**2
    return 2 * (latents + cfg.encoders.text.max_tokens * model.text_width)
