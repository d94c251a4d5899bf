"""Other ways to train the same run: a small grid of them, with the same models as the plan."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from trainer.config import TrainConfig
from trainer.errors import BadInput
from trainer.observe.carbon import Rate
from trainer.plan_memory import (
    CONTEXT_BYTES,
    GIB,
    fits,
    largest_micro_batch,
    memory_of,
    num_ranks,
    with_micro_batch,
)
from trainer.plan_needs import Failures, Needs, predict_needs
from trainer.plan_speed import Speed, accelerator_of, predict_speed

NUM_SHOWN = 5
MOST_DOUBLINGS = 6
"""Of the nodes, when a run is sought that fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way that fits."""

    words: tuple[str, ...]
    """What to type beside what was typed; empty for the run as it is."""
    memory_gib: float
    speed: Speed
    needs: Needs

    @property
    def rank(self) -> tuple[float, float]:
        """Cheapest first: GPU hours, to three digits, then time, then what is typed."""
        return float(f"{self.needs.gpu_hours.mid:.3g}"), self.needs.wall_h.mid


def options(
    cfg: TrainConfig,
    failures: Failures,
    *,
    steps: int,
    carbon: Rate | None = None,
    price: Rate | None = None,
) -> list[Option]:
    """Try the grid; keep what fits, the cheapest first, each outcome once."""
    gpu = accelerator_of(cfg)
    found: dict[tuple[float, float], Option] = {}
    for changed in _grid(cfg):
        if not fits(changed):
            continue
        micros = cfg.batch.global_batch_images // (
            changed.batch.micro_batch_images * num_ranks(changed)
        )
        try:
            speed = predict_speed(changed, accumulation_steps=micros)
        except BadInput:  # several nodes, and nothing is known of their network
            continue
        if speed is None or gpu is None:
            return []
        needs = predict_needs(
            changed, speed, gpu, failures, steps=steps, carbon=carbon, price=price
        )
        if needs is None:
            continue
        option = Option(
            words=words_of(cfg, changed),
            memory_gib=memory_of(changed).device_bytes / GIB,
            speed=speed,
            needs=needs,
        )
        before = found.get(option.rank)
        if before is None or len(option.words) < len(before.words):
            found[option.rank] = option
    return [found[rank] for rank in sorted(found)]


def what_fits(cfg: TrainConfig) -> str:
    """Advise on a run that does not fit, in a sentence.

    The nearest that does is a smaller micro-batch, then recomputing, sharding more, keeping in
    host memory, and more nodes.
    """
    context = memory_of(cfg).runtime_bytes and CONTEXT_BYTES
    if cfg.cluster.device_memory_gib * GIB <= context:
        return (
            f"A CUDA context alone takes {CONTEXT_BYTES / GIB:g} GiB. Try "
            f"cluster.device_memory_gib={ceil(memory_of(cfg).device_bytes / GIB)}, and devices "
            "that have it."
        )
    for changed in _less_memory(cfg):
        micro = largest_micro_batch(changed, at_most=cfg.batch.micro_batch_images)
        if micro is not None:
            return f"Try {' '.join(words_of(cfg, with_micro_batch(changed, micro)))}."
    need_gib = ceil(memory_of(cfg).device_bytes / GIB)
    return (
        "No micro-batch, stage or number of nodes that was tried fits. Try a smaller model, or "
        f"cluster.device_memory_gib={need_gib} where devices have it."
    )


def _less_memory(cfg: TrainConfig) -> Iterator[TrainConfig]:
    engine = cfg.engine
    checkpointing = sorted({engine.activation_checkpointing, True})
    for nodes, offload in product(_more_nodes(cfg), _offloads(cfg)):
        cluster = replace(cfg.cluster, num_nodes=nodes)
        for stage, again in product(_stages(cfg, offload), checkpointing):
            if stage >= engine.zero_stage:
                changed = _with_engine(cfg, stage, checkpointing=again, offload=offload)
                yield replace(changed, cluster=cluster)


def _more_nodes(cfg: TrainConfig) -> list[int]:
    doublings = MOST_DOUBLINGS if cfg.cluster.kind == "slurm" else 0
    return [cfg.cluster.num_nodes * 2**times for times in range(doublings + 1)]


def _offloads(cfg: TrainConfig) -> list[str]:
    """List this way to keep states and those that keep more of them in host memory."""
    ways = ["none", "optimizer", "all"]
    more = ways[ways.index(cfg.engine.offload) :]
    return more if cfg.cluster.device == "cuda" else more[:1]


def words_of(cfg: TrainConfig, changed: TrainConfig) -> tuple[str, ...]:
    """Say what to type to get from one run to another."""
    pairs = (
        ("cluster.num_nodes", cfg.cluster.num_nodes, changed.cluster.num_nodes),
        (
            "batch.micro_batch_images",
            cfg.batch.micro_batch_images,
            changed.batch.micro_batch_images,
        ),
        ("engine.zero_stage", cfg.engine.zero_stage, changed.engine.zero_stage),
        (
            "engine.activation_checkpointing",
            cfg.engine.activation_checkpointing,
            changed.engine.activation_checkpointing,
        ),
        ("engine.offload", cfg.engine.offload, changed.engine.offload),
        ("data.latents", cfg.data.latents, changed.data.latents),
    )
    return tuple(f"{key}={str(new).lower()}" for key, old, new in pairs if old != new)


def _grid(cfg: TrainConfig) -> Iterator[TrainConfig]:
    nodes = cfg.cluster.num_nodes
    counts = {nodes}
    if cfg.cluster.kind == "slurm":
        counts |= {max(1, nodes // 2), 2 * nodes}
    least = (cfg.cluster.slurm.min_nodes or 1) if cfg.cluster.slurm else 1
    kinds = sorted({"encoded", cfg.data.latents})
    for count, stage, again, latents in product(
        sorted(each for each in counts if each >= least),
        _stages(cfg, cfg.engine.offload),
        (False, True),
        kinds,
    ):
        changed = _with_engine(cfg, stage, checkpointing=again)
        changed = replace(
            changed,
            cluster=replace(cfg.cluster, num_nodes=count),
            data=replace(cfg.data, latents=latents),
        )
        per_rank, rest = divmod(cfg.batch.global_batch_images, num_ranks(changed))
        micro = 1
        while not rest and micro <= per_rank:
            if per_rank % micro == 0:
                yield with_micro_batch(changed, micro)
            micro *= 2


def _stages(cfg: TrainConfig, offload: str) -> tuple[int, ...]:
    """List the stages that the rest of the config allows."""
    least = 1 if cfg.engine.precision != "fp32" or offload != "none" else 0
    least = 3 if offload == "all" else least
    most = 2 if cfg.model.kind == "autoencoder_kl" else 3
    return tuple(range(least, (0 if cfg.optim.kind == "adafactor" else most) + 1))


def _with_engine(
    cfg: TrainConfig, stage: int, *, checkpointing: bool, offload: str | None = None
) -> TrainConfig:
    engine = replace(
        cfg.engine,
        zero_stage=stage,  # type: ignore[arg-type]
        activation_checkpointing=checkpointing,
        offload=offload or cfg.engine.offload,  # type: ignore[arg-type]
    )
    return replace(cfg, engine=engine)


def with_stages(cfg: TrainConfig) -> list[tuple[int, TrainConfig]]:
    """Give the run at each stage that the rest of the config allows."""
    again = cfg.engine.activation_checkpointing
    stages = _stages(cfg, cfg.engine.offload)
    return [(stage, _with_engine(cfg, stage, checkpointing=again)) for stage in stages]
