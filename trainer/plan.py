"""What a training run will take: arithmetic on its frozen config, before any device is touched."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.errors import BadInput
from trainer.observe.carbon import grid_of
from trainer.plan_memory import (
    GIB,
    checkpoint_gib,
    fits,
    largest_micro_batch,
    micro_batches,
    num_ranks,
    num_trained,
    predict_memory,
    state_bytes,
    with_global_batch,
    with_micro_batch,
)
from trainer.plan_options import what_fits


@dataclass(frozen=True)
class Plan:
    """Derived numbers of a run."""

    num_ranks: int
    accumulation_steps: int
    images_per_step: int
    total_steps: int
    checkpoint_every_steps: int
    weights_gib: float
    """Per rank: the network in the precision it runs in, and its gradients."""
    states_gib: float
    """Per rank: optimizer states and the averages."""


def make_plan(cfg: TrainConfig, *, step: int = 0, images_seen: int = 0) -> Plan:
    """Derive a run's numbers, or refuse it with values that would work.

    Args:
        cfg: Of the run.
        step: Where it stands; steps before may have had another size.
        images_seen: Images of the steps before.

    Raises:
        BadInput: The batch does not divide, weights and optimizer cannot fit on the device, or
            there is no such grid.
    """
    if cfg.accounts.grid is not None:
        grid_of(cfg.accounts.grid)
    ranks = num_ranks(cfg)
    batch, micro = cfg.batch.global_batch_images, cfg.batch.micro_batch_images
    per_pass = micro * ranks
    accumulation_steps, rest = divmod(batch, per_pass)
    if rest or not accumulation_steps:
        raise BadInput(
            f"batch.global_batch_images={batch} is not a multiple of "
            f"batch.micro_batch_images x ranks = {micro} x {ranks} = {per_pass}. "
            f"Try {' or '.join(_batches_that_divide(cfg))}."
        )
    weights, gradients, optimizer, ema = state_bytes(cfg)
    states = optimizer + ema
    if cfg.cluster.device == "cuda" and cfg.engine.offload != "none":
        states = 0.0
    if weights + gradients + states > cfg.cluster.device_memory_gib * GIB:
        raise BadInput(
            "weights, gradients, optimizer and EMA take "
            f"{(weights + gradients + states) / GIB:.1f} GiB per rank at "
            f"engine.zero_stage={cfg.engine.zero_stage} on {ranks} ranks, "
            f"cluster.device_memory_gib={cfg.cluster.device_memory_gib:g}. {what_fits(cfg)}"
        )
    return Plan(
        num_ranks=ranks,
        accumulation_steps=accumulation_steps,
        images_per_step=batch,
        total_steps=step + max(0, -(-(cfg.total_images - images_seen) // batch)),
        checkpoint_every_steps=max(1, round(cfg.checkpoint.every_images / batch)),
        weights_gib=(weights + gradients) / GIB,
        states_gib=states / GIB,
    )


def _batches_that_divide(cfg: TrainConfig) -> list[str]:
    """List what to type: a smaller micro-batch, and global batches; where they can, they fit."""
    per_pass = cfg.batch.micro_batch_images * num_ranks(cfg)
    passes = cfg.batch.global_batch_images // per_pass
    tried = [
        ("global", times * per_pass, with_global_batch(cfg, times * per_pass))
        for times in range(max(passes, 1), passes + 2)
    ]
    smaller = [each for each in micro_batches(cfg) if each < cfg.batch.micro_batch_images]
    if smaller:
        micro = largest_micro_batch(cfg, at_most=smaller[-1]) or smaller[-1]
        tried.insert(0, ("micro", micro, with_micro_batch(cfg, micro)))
    fitting = [each for each in tried if fits(each[2])]
    return [f"batch.{which}_batch_images={images}" for which, images, _ in fitting or tried]


def _model_words(cfg: TrainConfig) -> str:
    words = f"{cfg.model.kind}, {cfg.num_parameters / 1e6:,.1f} M parameters"
    if cfg.lora is None:
        return words
    return f"{words}, frozen; {num_trained(cfg) / 1e6:,.2f} M in adapters of rank {cfg.lora.rank}"


def rows(cfg: TrainConfig, plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the plan as (what, how much) for a table."""
    cluster, batch = cfg.cluster, cfg.batch
    is_online = cfg.data.latents == "online"
    yield "model", _model_words(cfg)
    yield (
        "ranks",
        f"{plan.num_ranks} on {cluster.num_nodes} node(s), {cluster.device}",
    )
    yield (
        "images per step",
        f"{plan.images_per_step:,} = {batch.micro_batch_images} x {plan.num_ranks} ranks "
        f"x {plan.accumulation_steps} accumulated",
    )
    yield "steps", f"{plan.total_steps:,} for {cfg.total_images:,} images"
    yield (
        "checkpoint",
        f"every {plan.checkpoint_every_steps:,} steps, {checkpoint_gib(cfg):,.2f} GiB",
    )
    memory = predict_memory(cfg, accumulation_steps=plan.accumulation_steps)
    yield (
        "memory per rank",
        f"{memory.device_bytes / GIB:,.2f} GiB at most of {cluster.device_memory_gib:g} GiB"
        + ("; frozen encoders are not counted (data.latents=online)" if is_online else "")
        + ("; activations are not counted" if cfg.model.kind == "autoencoder_kl" else ""),
    )
