"""Bytes that a rank will hold at most, by part: what ZeRO shards, what it copies, activations.

The sums follow DeepSpeed as `trainer.runtime.engine` sets it; `benchmarks/plan.py` compares
them with what real ranks hold. On GPUs nothing was measured: what a CUDA context, NCCL, cuDNN and
a fragmented allocator take on top is assumed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.config import (
    AutoencoderModelConfig,
    TrainConfig,
    TransformerConfig,
    UNetConfig,
)
from trainer.models.costs import Moment, activation_bytes, backward_moments
from trainer.models.layers import layers, num_adapter_parameters

GIB = 2**30
MAX_BUCKET_NUMBERS = 50_000_000
"""Gradients, or weights to be gathered next, that are held at a time; 200 MB in fp32."""
LIVE_PART = 16
"""ZeRO 3 has at most about this part of the weights gathered at a time."""
_FLAT_NUMBERS = 500_000_000
"""Without ZeRO, DeepSpeed copies so many gradients at a time to add them up."""
CONTEXT_BYTES = 1.5 * GIB
"""CUDA context, NCCL's buffers, cuDNN's workspaces; assumed."""
_FRAGMENTED = 0.03
"""Of the activations, what the allocator of a GPU cannot give; assumed."""
_TEMPORARIES: Mapping[tuple[str, bool], float] = {
    ("unet", False): 0.02,
    ("unet", True): 0.12,
    ("transformer", False): 0.003,
    ("transformer", True): 0.025,
}
"""Gradients of activations, as a share of these, by network and checkpointing: measured in bf16
with unet_sd2 and transformer_xl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a rank holds at the moment when it holds most."""

    weights_bytes: float
    """The network in the precision it runs in."""
    gradients_bytes: float
    """Those that are there at that moment."""
    optimizer_bytes: float
    """fp32 master weights, but in ZeRO 0, and moments."""
    ema_bytes: float
    """Averages in fp32."""
    activations_bytes: float
    """What the backward pass still needs of a micro-batch, and its temporaries."""
    buffers_bytes: float
    """Copies for collectives and for the update, and weights that are gathered."""
    snapshot_bytes: float
    """The copy that checkpoints are written from: in host memory, pinned by GPUs."""
    offloaded_bytes: float
    """Of the parts above, what lies in host memory (engine.offload)."""
    runtime_bytes: float
    """What libraries and the allocator of a GPU take; assumed."""
    on_host: bool
    """cluster.device=cpu: all of it is host memory."""

    @property
    def device_bytes(self) -> float:
        """All that lies on the device."""
        parts = (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.ema_bytes
            + self.activations_bytes
            + self.buffers_bytes
            + self.runtime_bytes
            - self.offloaded_bytes
        )
        return parts + self.snapshot_bytes if self.on_host else parts

    @property
    def host_bytes(self) -> float:
        """What a rank of a GPU holds in host memory."""
        return 0.0 if self.on_host else self.snapshot_bytes + self.offloaded_bytes


@dataclass(frozen=True, slots=True)
class _Moment:
    """What comes and goes within a step."""

    gradients_bytes: float
    activations_bytes: float
    buffers_bytes: float

    @property
    def bytes(self) -> float:
        return self.gradients_bytes + self.activations_bytes + self.buffers_bytes


def num_trained(cfg: TrainConfig) -> int:
    """Count the weights that a run trains: all, or LoRA's adapters.

    Raises:
        BadInput: Adapters should sit where the network has no layer.
    """
    if cfg.lora is None:
        return cfg.num_parameters
    return num_adapter_parameters(cfg.model, cfg.lora)


def num_frozen(cfg: TrainConfig) -> int:
    """Count the weights that lie there and are not trained."""
    return 0 if cfg.lora is None else cfg.num_parameters


def num_ranks(cfg: TrainConfig) -> int:
    """Count the ranks of all nodes."""
    return cfg.cluster.num_nodes * cfg.cluster.ranks_per_node


def width_bytes(cfg: TrainConfig) -> int:
    """Return the bytes of a number in the network's precision."""
    return 4 if cfg.engine.precision == "fp32" else 2


def num_averages(cfg: TrainConfig) -> int:
    """Count the moving averages."""
    return len(cfg.ema.half_life_images) + len(cfg.ema.power_sigma_rel)


def state_bytes(cfg: TrainConfig) -> tuple[float, float, float, float]:
    """Return weights, gradients, optimizer and averages per rank: what a run takes in any case.

    Sharding as in ZeRO (Rajbhandari et al. 2020): 1 states, 2 gradients, 3 weights.
    """
    params, ranks, width = num_trained(cfg), num_ranks(cfg), width_bytes(cfg)
    stage = cfg.engine.zero_stage
    weights = (params + num_frozen(cfg)) * width / (ranks if stage >= 3 else 1)
    gradients = params * width / (ranks if stage >= 2 else 1)
    # Without ZeRO fp32 weights are their own masters.
    moments = 4 * moments_per_weight(cfg)
    optimizer = params * moments if stage == 0 else params * (4 + moments) / ranks
    return weights, gradients, optimizer, num_averages(cfg) * 4 * _owned(cfg)


def predict_memory(cfg: TrainConfig, *, accumulation_steps: int = 1) -> Memory:
    """Predict what a rank holds when it holds most.

    An autoencoder's activations are not counted, as its crops are of many sizes, nor frozen
    encoders (data.latents=online).

    Args:
        cfg: Of the run.
        accumulation_steps: Micro-batches in a step.

    Raises:
        BadInput: The numbers of the model section contradict each other.
    """
    weights, _, optimizer, ema = state_bytes(cfg)
    worst = max(_moments(cfg, accumulation_steps), key=lambda moment: moment.bytes)
    on_host, offload = cfg.cluster.device == "cpu", cfg.engine.offload
    offloaded = 0.0
    if not on_host and offload != "none":
        # The averages are of the master weights, and lie beside them.
        offloaded = optimizer + ema + (weights if offload == "all" else 0.0)
    return Memory(
        weights_bytes=weights,
        gradients_bytes=worst.gradients_bytes,
        optimizer_bytes=optimizer,
        ema_bytes=ema,
        activations_bytes=worst.activations_bytes,
        buffers_bytes=worst.buffers_bytes,
        snapshot_bytes=_saved_per_weight(cfg) * 4 * _owned(cfg),
        offloaded_bytes=offloaded,
        runtime_bytes=0.0 if on_host else CONTEXT_BYTES + _FRAGMENTED * worst.activations_bytes,
        on_host=on_host,
    )


def checkpoint_gib(cfg: TrainConfig) -> float:
    """Estimate the size of a checkpoint: weights, moments and the averages, in fp32."""
    return num_trained(cfg) * 4 * _saved_per_weight(cfg) / GIB


def _saved_per_weight(cfg: TrainConfig) -> float:
    return 1 + moments_per_weight(cfg) + num_averages(cfg)


def moments_per_weight(cfg: TrainConfig) -> float:
    """Return how many numbers the optimizer remembers of a weight, in the mean.

    AdamW has two. Adafactor has rows and columns of the last two dimensions, and all of vectors:
    of a 3 x 3 kernel that is two thirds of it, of a 1 x 1 kernel twice as many. Autoencoders are
    taken for 3 x 3 kernels alone, and adapters, which are matrices of low rank, for nothing.
    """
    if cfg.optim.kind == "adamw":
        return 2.0
    if isinstance(cfg.model, AutoencoderModelConfig):
        return 2 / 3
    if cfg.lora is not None:
        return 0.0
    weights = remembered = 0
    for layer in layers(cfg.model):
        size = layer.inputs * layer.outputs
        weights += size * layer.side**2
        is_kernel = layer.side > 1 or _is_small_kernel(cfg.model, layer.name)
        remembered += 2 * size * layer.side if is_kernel else layer.inputs + layer.outputs
    vectors = max(0, cfg.num_parameters - weights)
    return (remembered + vectors) / cfg.num_parameters


def _is_small_kernel(model: UNetConfig | TransformerConfig, name: str) -> bool:
    """Say whether a layer that could be a matrix is a convolution with a kernel of 1 x 1."""
    if model.kind != "unet":
        return False
    ends = (
        ("conv_shortcut",) if model.linear_projection else ("conv_shortcut", "proj_in", "proj_out")
    )
    return name.endswith(ends)


def image_activation_bytes(cfg: TrainConfig) -> int:
    """Count what an image of a micro-batch keeps for the backward pass; 0 for autoencoders."""
    if isinstance(cfg.model, AutoencoderModelConfig):
        return 0
    return activation_bytes(
        cfg.model,
        latent_height=cfg.model.latent_side,
        latent_width=cfg.model.latent_side,
        text_tokens=cfg.encoders.text.max_tokens,
        width_bytes=width_bytes(cfg),
        checkpointing=cfg.engine.activation_checkpointing,
        lora=cfg.lora,
    )


def micro_batches(cfg: TrainConfig) -> list[int]:
    """List the micro-batches that divide the global batch among the ranks, the smallest first."""
    per_rank, rest = divmod(cfg.batch.global_batch_images, num_ranks(cfg))
    if rest or not per_rank:
        return []
    return [micro for micro in range(1, per_rank + 1) if per_rank % micro == 0]


def largest_micro_batch(cfg: TrainConfig, *, at_most: int | None = None) -> int | None:
    """Find the largest micro-batch that fits and divides the global batch; None: none does."""
    for micro in reversed(micro_batches(cfg)):
        if (at_most is None or micro <= at_most) and fits(with_micro_batch(cfg, micro)):
            return micro
    return None


def fits(cfg: TrainConfig) -> bool:
    """Say whether a run whose batch divides fits on its devices."""
    return memory_of(cfg).device_bytes <= cfg.cluster.device_memory_gib * GIB


def memory_of(cfg: TrainConfig) -> Memory:
    """Predict what a rank of a run holds whose batch divides."""
    steps = cfg.batch.global_batch_images // (cfg.batch.micro_batch_images * num_ranks(cfg))
    return predict_memory(cfg, accumulation_steps=steps)


def with_micro_batch(cfg: TrainConfig, micro: int) -> TrainConfig:
    """Return the run with another micro-batch."""
    return replace(cfg, batch=replace(cfg.batch, micro_batch_images=micro))


def with_global_batch(cfg: TrainConfig, images: int) -> TrainConfig:
    """Return the run with another global batch."""
    return replace(cfg, batch=replace(cfg.batch, global_batch_images=images))


def _owned(cfg: TrainConfig) -> float:
    """Count the weights whose averages and moments a rank keeps and saves."""
    params, ranks = num_trained(cfg), num_ranks(cfg)
    if cfg.engine.zero_stage or cfg.lora or isinstance(cfg.model, AutoencoderModelConfig):
        return params / ranks
    # Without ZeRO whole tensors are dealt out.
    largest = max(layer.inputs * layer.outputs * layer.side**2 for layer in layers(cfg.model))
    return max(params / ranks, min(largest, params))


def _moments(cfg: TrainConfig, accumulation_steps: int) -> Iterator[_Moment]:
    """Follow a step: backward, the exchange of gradients, the update."""
    params, ranks, width = num_trained(cfg), num_ranks(cfg), width_bytes(cfg)
    stage, whole, share = cfg.engine.zero_stage, params * width, params / ranks
    bucket = min(cfg.num_parameters, MAX_BUCKET_NUMBERS)
    # With overlap_comm, on GPUs, one bucket is filled while the other is reduced.
    buckets = bucket * width * (1 if cfg.cluster.device == "cpu" else 2)
    if cfg.cluster.device == "cpu" and width < 4 and ranks > 1:
        buckets += bucket * 4  # gloo adds in fp32
    # The update takes this rank's gradients in one piece, and in fp32.
    updated = share * (4 if width == 4 else width + 4)
    kept = accumulation_steps > 1
    at_once = (
        cfg.cluster.device == "cpu"
        and (cfg.engine.precision, cfg.engine.offload) == ("fp32", "none")
        and params <= bucket
    )
    match stage:
        case 0:
            for moment in _backward(cfg):
                there = whole if kept else min(moment.num_gradients, params) * width
                yield _Moment(there, _activations(cfg, moment), 0.0)
            yield _Moment(whole, 0.0, 0.0 if ranks == 1 else min(params, _FLAT_NUMBERS) * width)
            if cfg.optim.kind == "adafactor":  # torch makes all updates before it adds one
                yield _Moment(whole, 0.0, params * 4.0)
        case 1:
            for moment in _backward(cfg):
                there = whole if kept else min(moment.num_gradients, params) * width
                yield _Moment(there, _activations(cfg, moment), 0.0 if at_once else buckets)
            # All at once, what is sent and what comes lie beside the gradients.
            yield _Moment(whole, 0.0, 2 * whole if at_once else buckets)
            yield _Moment(share * width, 0.0, updated)
        case 2:
            # gloo adds fp32 up in the bucket itself; all else is copied from there.
            is_in_place = cfg.cluster.device == "cpu" and width == 4
            copied = 0.0 if is_in_place else min(params, bucket) * float(width)
            before = share * width if kept else 0.0
            for moment in _backward(cfg):
                exchanged = moment.num_gradients > bucket
                sharded = before + exchanged * share * width
                yield _Moment(sharded, _activations(cfg, moment), buckets + exchanged * copied)
            sharded = before + (params > bucket) * share * width
            yield _Moment(sharded, 0.0, buckets + copied)
            yield _Moment(before + share * width, 0.0, buckets)
            yield _Moment(share * width, 0.0, updated)
        case _:
            live = min(cfg.num_parameters // LIVE_PART, MAX_BUCKET_NUMBERS) * width
            gathered = 0 if ranks == 1 else 2 * live
            for moment in _backward(cfg):
                yield _Moment(share * width, _activations(cfg, moment), live + gathered)
            yield _Moment(share * width, 0.0, live + updated)


def _activations(cfg: TrainConfig, moment: Moment) -> float:
    assert not isinstance(cfg.model, AutoencoderModelConfig)
    share = _TEMPORARIES[cfg.model.kind, cfg.engine.activation_checkpointing]
    latents = 2 * cfg.model.latent_channels * cfg.model.latent_side**2
    text = cfg.encoders.text.max_tokens * cfg.model.text_width
    # As it is read, and as captions were dropped and noise was added; in fp32.
    batch_bytes = 2 * 4 * (latents + text)
    return cfg.batch.micro_batch_images * (moment.kept_bytes * (1 + share) + batch_bytes)


def _backward(cfg: TrainConfig) -> Sequence[Moment]:
    if isinstance(cfg.model, AutoencoderModelConfig):
        return []
    if cfg.lora is not None:
        # Adapters are small: where their gradients come does not matter.
        return [Moment(kept_bytes=image_activation_bytes(cfg), num_gradients=num_trained(cfg))]
    return backward_moments(
        cfg.model,
        latent_height=cfg.model.latent_side,
        latent_width=cfg.model.latent_side,
        text_tokens=cfg.encoders.text.max_tokens,
        width_bytes=width_bytes(cfg),
        checkpointing=cfg.engine.activation_checkpointing,
    )
