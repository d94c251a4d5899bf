"""Seconds of a step on accelerators, from their data sheets and two published measurements.

The two: Stable Diffusion 2's UNet on precomputed latents, 8 x A100, 1,100 images/s at 256 px and
290 at 512 px, micro-batch 16, batch 2048 (README and yamls of mosaicml/diffusion; no averages of
weights). They fix two constants. One is the share of the peak at which matrix products run. The
other is the time of a micro-batch that does not grow with its pictures, in multiples of reading
the weights three times: launches, weights, what collectives cannot hide. Everything else - other
devices, more nodes, ZeRO stages, optimizer, averages - follows from hardware numbers and is not
fitted, so a prediction says how wrong it may be.
"""

from dataclasses import dataclass
from functools import cache
from math import sqrt

from trainer.config import AutoencoderModelConfig, TrainConfig, UNetConfig
from trainer.errors import BadInput
from trainer.hardware import ACCELERATORS, Accelerator
from trainer.models.costs import forward_flops, training_flops
from trainer.plan_memory import num_averages, num_frozen, num_ranks, num_trained, width_bytes

CALIBRATED_ON = "a100_80gb"
PUBLISHED_IMAGES_PER_S = {32: 1100.0, 64: 290.0}
"""By side of the latent."""
_PUBLISHED_GPUS = 8
_PUBLISHED_MICRO = 16
_PUBLISHED_BATCH = 2048
_SD2_PARAMETERS = 865_910_724
_SD2 = UNetConfig(
    kind="unet",
    latent_channels=4,
    latent_side=64,
    text_width=1024,
    block_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    cross_attention=(True, True, True, False),
    head_width=(64, 64, 64, 64),
    norm_groups=32,
    linear_projection=True,
    pooled_tokens=0,
    time_scale_shift=False,
    num_parameters=_SD2_PARAMETERS,
)
_TEXT_TOKENS = 77

LINK_SHARE = 0.8
"""Of a link's or a network's bandwidth that collectives reach; assumed."""
MEMORY_SHARE = 0.8
"""Of a memory's bandwidth that the optimizer reaches; assumed."""
HIDDEN_SHARE = 0.5
"""Of the communication that could run beside computation, what does; the band has 0 and 1."""
PCIE_GB_PER_S = 25.0
"""To host memory, in one direction (engine.offload); assumed."""
HOST_GB_PER_S = 25.0
"""Of host memory, for one rank (engine.offload); assumed."""
ONLINE_FACTOR = 1.4
"""Time of a step with data.latents=online over one with latents that are there (published with
the two measurements, for SD2's encoders)."""
_ADAMW_BYTES = 28
"""Per weight: reads weight, gradient and two moments, writes three of them."""
_ADAFACTOR_BYTES = 84
"""Per weight: what torch's passes over weights, gradients and updates read and write."""
_AVERAGE_BYTES = 12


def rounded(value: float) -> str:
    """Write three digits, which say more than is known."""
    return f"{float(f'{value:.3g}'):,.10g}"


@dataclass(frozen=True, slots=True)
class Band:
    """A prediction, and between what it may lie."""

    low: float
    mid: float
    high: float

    def scaled(self, factor: float) -> "Band":
        """Multiply all three."""
        return Band(self.low * factor, self.mid * factor, self.high * factor)

    def __str__(self) -> str:
        """Write all three."""
        return f"{rounded(self.mid)} ({rounded(self.low)} to {rounded(self.high)})"

    def inverse(self, of: float) -> "Band":
        """Divide a number by all three."""
        return Band(of / self.high, of / self.mid, of / self.low)


@dataclass(frozen=True, slots=True)
class Doubt:
    """One reason for a prediction to be wrong, and by how much of it."""

    reason: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of a step, in seconds where nothing else is said."""

    compute_s: float
    """Matrix products, forward and backward, those that are made again too."""
    fixed_s: float
    """What each micro-batch takes whatever its size."""
    exchange_s: float
    """All communication, hidden or not."""
    exposed_s: float
    """Of it, what is not hidden."""
    update_s: float
    """Optimizer and averages."""
    encoding_s: float
    """Frozen encoders (data.latents=online)."""
    step_s: Band
    images_per_s: Band
    mfu_frac: Band
    """Model FLOPs per second over the peak of all devices; recomputed ones do not count."""
    doubts: tuple[Doubt, ...]


@cache
def constants() -> tuple[float, float]:
    """Solve the two published measurements for the two constants.

    Returns:
        Share of the peak at which matrix products run; times that three readings of the weights
        are spent per micro-batch.
    """
    gpu = ACCELERATORS[CALIBRATED_ON]
    micros = _PUBLISHED_BATCH // (_PUBLISHED_GPUS * _PUBLISHED_MICRO)
    bytes_ = _ADAMW_BYTES * _SD2_PARAMETERS / _PUBLISHED_GPUS
    update_s = _update_s(gpu, bytes_)
    seconds, flops = [], []
    for side, images_per_s in PUBLISHED_IMAGES_PER_S.items():
        seconds.append((_PUBLISHED_BATCH / images_per_s - update_s) / micros)
        flops.append(_PUBLISHED_MICRO * 3.0 * _sd2_forward(side))
    flops_per_s = (flops[1] - flops[0]) / (seconds[1] - seconds[0])
    fixed_s = seconds[0] - flops[0] / flops_per_s
    readings = fixed_s / _reading_s(gpu, weights=_SD2_PARAMETERS, width=2)
    return flops_per_s / (gpu.half_tflops * 1e12), readings


def _sd2_forward(side: int) -> int:
    sides = {"latent_height": side, "latent_width": side}
    return forward_flops(_SD2, **sides, text_tokens=_TEXT_TOKENS)


def predict_speed(cfg: TrainConfig, *, accumulation_steps: int) -> Speed | None:
    """Predict a step; None for CPUs, unknown devices and autoencoders.

    Raises:
        BadInput: There is no such accelerator, or it cannot compute in this precision.
    """
    gpu = accelerator_of(cfg)
    if gpu is None or isinstance(cfg.model, AutoencoderModelConfig):
        return None
    peak = _peak_flops(gpu, cfg)
    share, readings = constants()
    micro, width = cfg.batch.micro_batch_images, width_bytes(cfg)
    image_flops = _image_flops(cfg)
    again = 4 / 3 if cfg.engine.activation_checkpointing else 1.0
    one_s = micro * image_flops * again / (peak * share)
    compute_s = accumulation_steps * one_s
    weights = num_trained(cfg) + num_frozen(cfg)
    fixed_s = accumulation_steps * readings * _reading_s(gpu, weights=weights, width=width)
    exchange_s, can_hide_s = _exchange_s(cfg, gpu, accumulation_steps)
    backward_s = compute_s * 2 / 3
    if cfg.engine.zero_stage in {0, 1}:  # gradients are added up behind the last micro-batch
        backward_s /= accumulation_steps
    hideable_s = min(can_hide_s, backward_s if cfg.engine.zero_stage < 3 else compute_s)
    owned = num_trained(cfg) / (num_ranks(cfg) if cfg.engine.zero_stage else 1)
    averaged = num_averages(cfg) * num_trained(cfg) / num_ranks(cfg)
    per_weight = _ADAMW_BYTES if cfg.optim.kind == "adamw" else _ADAFACTOR_BYTES
    bytes_ = per_weight * owned + _AVERAGE_BYTES * averaged
    update_s = _update_s(gpu, bytes_)
    if cfg.engine.offload != "none":
        moved = 2 * owned * width / (PCIE_GB_PER_S * 1e9)
        update_s = moved + bytes_ / (HOST_GB_PER_S * 1e9)
    alone_s = compute_s + fixed_s + update_s
    encoding_s = (ONLINE_FACTOR - 1) * alone_s if cfg.data.latents == "online" else 0.0
    alone_s += encoding_s
    exposed_s = exchange_s - HIDDEN_SHARE * hideable_s
    step_s = alone_s + exposed_s
    reasons = _doubts(cfg, hideable_s=hideable_s, step_s=step_s)
    off = 1 + sqrt(sum(doubt.share**2 for doubt in reasons))
    band = Band(step_s / off, step_s, step_s * off)
    images_per_s = band.inverse(cfg.batch.global_batch_images)
    return Speed(
        compute_s=compute_s,
        fixed_s=fixed_s,
        exchange_s=exchange_s,
        exposed_s=exposed_s,
        update_s=update_s,
        encoding_s=encoding_s,
        step_s=band,
        images_per_s=images_per_s,
        mfu_frac=images_per_s.scaled(image_flops / (peak * num_ranks(cfg))),
        doubts=reasons,
    )


def accelerator_of(cfg: TrainConfig) -> Accelerator | None:
    """Return the device of the cluster, if it is told.

    Raises:
        BadInput: There is no such accelerator.
    """
    name = cfg.cluster.accelerator
    if name is None or cfg.cluster.device == "cpu":
        return None
    if name not in ACCELERATORS:
        raise BadInput(f"cluster.accelerator={name} is none of {', '.join(ACCELERATORS)}.")
    return ACCELERATORS[name]


def network_gb_per_s(cfg: TrainConfig, gpu: Accelerator) -> float | None:
    """Return a node's bandwidth to others in one direction: as told, or the reference system's."""
    if cfg.cluster.network_gb_per_s is not None:
        return cfg.cluster.network_gb_per_s
    share = gpu.network_gb_per_s
    return None if share is None else share * cfg.cluster.ranks_per_node


def _image_flops(cfg: TrainConfig) -> int:
    assert not isinstance(cfg.model, AutoencoderModelConfig)
    return training_flops(
        cfg.model,
        latent_height=cfg.model.latent_side,
        latent_width=cfg.model.latent_side,
        text_tokens=cfg.encoders.text.max_tokens,
        lora=cfg.lora,
    )


def _peak_flops(gpu: Accelerator, cfg: TrainConfig) -> float:
    if cfg.engine.precision == "fp32":
        return gpu.fp32_tflops * 1e12
    if cfg.engine.precision == "bf16" and not gpu.has_bf16:
        raise BadInput(
            f"engine.precision=bf16, which cluster.accelerator={cfg.cluster.accelerator} does not "
            "compute. Give engine.precision=fp16."
        )
    return gpu.half_tflops * 1e12


def _reading_s(gpu: Accelerator, *, weights: float, width: int) -> float:
    """Read all weights for the forward pass and twice for the backward pass."""
    return 3 * weights * width / (gpu.memory_gb_per_s * 1e9)


def _update_s(gpu: Accelerator, bytes_: float) -> float:
    return bytes_ / (MEMORY_SHARE * gpu.memory_gb_per_s * 1e9)


def _exchange_s(cfg: TrainConfig, gpu: Accelerator, accumulation_steps: int) -> tuple[float, float]:
    """Return the seconds of a step's collectives, and of those that can run beside computation.

    A collective that gathers or scatters V bytes over N ranks in rings takes V (N - 1) / N over
    the slower of a device's link and its node's network.
    """
    ranks, nodes = num_ranks(cfg), cfg.cluster.num_nodes
    if ranks == 1:
        return 0.0, 0.0
    # Where links depend on the partner, PCIe is the least that there is.
    slowest = gpu.link_gb_per_s or PCIE_GB_PER_S
    if nodes > 1:
        network = network_gb_per_s(cfg, gpu)
        if network is None:
            raise BadInput(
                f"cluster.num_nodes={nodes}, and nothing is known of the network between nodes of "
                f"{gpu.name}. Give cluster.network_gb_per_s, per node in one direction, for "
                "example 25 for 200 Gb/s."
            )
        slowest = min(slowest, network)
    bytes_ = num_trained(cfg) * width_bytes(cfg) * (ranks - 1) / ranks
    one_s = bytes_ / (LINK_SHARE * slowest * 1e9)
    match cfg.engine.zero_stage:
        case 0 | 1:  # scatter gradients; gather them, or the new weights
            return 2 * one_s, one_s
        case 2:
            scattered_s = accumulation_steps * one_s
            return scattered_s + one_s, scattered_s
        case _:
            # Weights are gathered for the forward and for the backward pass.
            all_s = accumulation_steps * 3 * one_s
            return all_s, all_s


def _doubts(cfg: TrainConfig, *, hideable_s: float, step_s: float) -> tuple[Doubt, ...]:
    low, high = sorted(_published_mfu(side) for side in PUBLISHED_IMAGES_PER_S)
    spread = (high - low) / (high + low)
    found = [Doubt("the two published measurements lie so far from their mean", spread)]
    if hideable_s > 0:
        share = max(HIDDEN_SHARE, 1 - HIDDEN_SHARE) * hideable_s / step_s
        found.append(Doubt("none or all of the communication that can be hidden is", share))
    if cfg.cluster.num_nodes > 1:
        found.append(Doubt("networks share, congest and wait for stragglers; assumed", 0.1))
    if not (cfg.cluster.accelerator or "").startswith("a100"):
        found.append(Doubt("another accelerator than the measured A100; assumed", 0.25))
    if cfg.model.kind != "unet":
        found.append(Doubt("another network than the measured UNet; assumed", 0.25))
    if cfg.engine.precision == "fp32":
        found.append(Doubt("fp32, where the measured runs had half precision; assumed", 0.25))
    if cfg.data.latents == "online":
        found.append(Doubt("encoders that run beside training; assumed", 0.15))
    if cfg.engine.offload != "none":
        found.append(Doubt("speed of host memory and PCIe; assumed", 0.3))
    return tuple(found)


def _published_mfu(side: int) -> float:
    gpu = ACCELERATORS[CALIBRATED_ON]
    flops_per_s = PUBLISHED_IMAGES_PER_S[side] / _PUBLISHED_GPUS * 3 * _sd2_forward(side)
    return flops_per_s / (gpu.half_tflops * 1e12)
