"""What a training run will take: arithmetic on its frozen config, before any device is touched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from trainer.command import run_command
from trainer.config import TrainConfig
from trainer.errors import BadInput
from trainer.models.layers import num_adapter_parameters
from trainer.observe.carbon import grid_of

_GIB = 2**30


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
    """Per rank: fp32 master weights, two AdamW moments and the EMA."""


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
    num_ranks = cfg.cluster.num_nodes * cfg.cluster.ranks_per_node
    batch, micro = cfg.batch.global_batch_images, cfg.batch.micro_batch_images
    per_pass = micro * num_ranks
    accumulation_steps, rest = divmod(batch, per_pass)
    if rest or not accumulation_steps:
        below, above = max(accumulation_steps, 1) * per_pass, (accumulation_steps + 1) * per_pass
        advice = f"{below} or {above}" if below != above else f"{below}"
        raise BadInput(
            f"batch.global_batch_images={batch} is not a multiple of "
            f"batch.micro_batch_images x ranks = {micro} x {num_ranks} = {per_pass}. Try {advice}."
        )
    weights, states = (bytes_ / _GIB for bytes_ in _bytes_per_rank(cfg, num_ranks))
    if weights + states > cfg.cluster.device_memory_gib:
        raise BadInput(
            f"weights, gradients, optimizer and EMA take {weights + states:.1f} GiB per rank at "
            f"engine.zero_stage={cfg.engine.zero_stage} on {num_ranks} ranks, "
            f"cluster.device_memory_gib={cfg.cluster.device_memory_gib:g}. Try a higher "
            "engine.zero_stage, more ranks or a smaller model."
        )
    return Plan(
        num_ranks=num_ranks,
        accumulation_steps=accumulation_steps,
        images_per_step=batch,
        total_steps=step + max(0, -(-(cfg.total_images - images_seen) // batch)),
        checkpoint_every_steps=max(1, round(cfg.checkpoint.every_images / batch)),
        weights_gib=weights,
        states_gib=states,
    )


def _bytes_per_rank(cfg: TrainConfig, num_ranks: int) -> tuple[float, float]:
    """Sharding as in ZeRO (Rajbhandari et al. 2020): 1 states, 2 gradients, 3 weights."""
    params, stage = num_trained(cfg), cfg.engine.zero_stage
    width = 2 if cfg.engine.precision == "bf16" else 4
    weights = (params + _num_frozen(cfg)) * width / (num_ranks if stage >= 3 else 1)
    gradients = params * width / (num_ranks if stage >= 2 else 1)
    # Without ZeRO fp32 weights are their own masters.
    numbers = 2 if (stage, width) == (0, 4) else 3
    master_and_moments = params * 4 * numbers / (num_ranks if stage >= 1 else 1)
    ema = params * 4 / num_ranks
    return weights + gradients, master_and_moments + ema


def num_trained(cfg: TrainConfig) -> int:
    """Count the weights that a run trains: all, or LoRA's adapters.

    Raises:
        BadInput: Adapters should sit where the network has no layer.
    """
    if cfg.lora is None:
        return cfg.num_parameters
    return num_adapter_parameters(cfg.model, cfg.lora)


def _num_frozen(cfg: TrainConfig) -> int:
    return 0 if cfg.lora is None else cfg.num_parameters


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
    yield (
        "memory per rank",
        f"{plan.weights_gib:,.2f} GiB weights and gradients + {plan.states_gib:,.2f} GiB optimizer "
        f"and EMA of {cluster.device_memory_gib:g} GiB; activations are not counted"
        + (", nor are the frozen encoders (data.latents=online)" if is_online else ""),
    )


def checkpoint_gib(cfg: TrainConfig) -> float:
    """Estimate the size of a checkpoint: weights, two moments and an average, in fp32."""
    return num_trained(cfg) * 16 / _GIB


def show(cfg: TrainConfig) -> int:
    """Print the plan of a run."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for what, how_much in rows(cfg, make_plan(cfg)):
        table.add_row(what, how_much)
    Console().print(table)
    return 0


def main(argv: Sequence[str]) -> int:
    """`kiln plan [experiment=...] [key=value ...]`."""
    return run_command(show, TrainConfig, "train", argv, name="plan")
