"""What the runtime may be told: optimizer, averages, engine, checkpoints, and help in need."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config_diffusion import Fraction
from trainer.frozen import config
from trainer.place import Place


@config
class OptimConfig:
    """The optimizer and its schedule, counted in images."""

    kind: Literal["adamw", "adafactor"]
    """adamw; adafactor keeps rows and columns of the second moment instead of the two moments,
    through torch, and needs whole tensors: engine.zero_stage=0."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction]
    """AdamW's decay rates."""
    eps: PositiveFloat
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat
    """Decoupled weight decay."""
    clip_grad_norm: PositiveFloat
    """Gradients are scaled down to this global norm."""
    warmup_images: NonNegativeInt
    """The rate rises linearly over this many images."""
    decay: Literal["none", "cosine", "linear"]
    """How it falls from there to zero at `total_images`."""


@config
class EmaConfig:
    """Moving averages of the weights, in fp32, on each rank's own fragment."""

    half_life_images: tuple[PositiveFloat, ...]
    """Images after which a weight's share has halved, for each traditional average."""
    warmup_ratio: Fraction
    """Early in training their half life is at most this share of the images seen (EDM2)."""
    power_sigma_rel: tuple[Annotated[float, Field(gt=0, lt=0.28)], ...]
    """Relative widths of power-function averages (Karras et al. 2024, section 3); from two of them
    in kept checkpoints the average of any width can be made afterwards."""

    def __post_init__(self) -> None:
        if not self.half_life_images and not self.power_sigma_rel:
            raise ValueError(
                "half_life_images and power_sigma_rel are both empty, and pictures are drawn with "
                "the first average. Try half_life_images=[2000]."
            )


@config
class EngineConfig:
    """DeepSpeed, and how the network computes."""

    zero_stage: Literal[0, 1, 2, 3]
    """0 replicates; 1 shards optimizer states, 2 also gradients, 3 also weights."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Arithmetic of the network; the optimizer and the averages are always fp32. fp16 scales the
    loss, and skips a step in which a gradient overflows."""
    offload: Literal["none", "optimizer", "all"]
    """What lies in host memory: optimizer states (stages 1 to 3), or also weights (stage 3)."""
    activation_checkpointing: bool
    """Recompute activations in the backward pass to save memory."""
    channels_last: bool
    """Lay pictures out with their channels innermost, which convolutions on GPUs prefer."""
    compile: bool
    """torch.compile of each block that repeats: fused kernels, for minutes at the start."""
    attention: Literal["auto", "math", "flash", "efficient", "cudnn"]
    """Kernel of scaled dot-product attention; auto lets PyTorch choose among them."""
    threads_per_rank: PositiveInt
    """CPU threads of one rank."""

    def __post_init__(self) -> None:
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(
                f"precision={self.precision} with zero_stage=0: the fp32 master weights lie in "
                "shards. Try zero_stage=1."
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError(
                "offload=optimizer moves the shards of zero_stage 1 to 3, and zero_stage=0 has "
                "none. Try zero_stage=1."
            )
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f"offload=all moves the shards of weights, and zero_stage={self.zero_stage} has "
                "none. Try zero_stage=3, or offload=optimizer."
            )


@config
class CheckpointConfig:
    """When to save, where, and what to keep."""

    folder: Place | None
    """Folder or URL for the checkpoints; null is RUN/checkpoints."""
    every_images: PositiveInt
    """Save after this many images; also at a stop signal and at the end."""
    keep_last: PositiveInt
    """So many of the newest stay."""
    keep_every_images: PositiveInt | None
    """Of every so many images one stays for good; null keeps none."""
    keep_ema_every_images: PositiveInt | None
    """Of every so many images the averages of one stay for good, a fraction of its size."""
    keep_best: str | None
    """A score of `kiln evaluate`, e.g. eval/all or -eval/fd for one that should be small: the best
    checkpoint so far stays too."""


@config
class RollbackConfig:
    """What to do when the loss or a gradient is not finite, or leaps."""

    max_tries: NonNegativeInt
    """Rollbacks without a checkpoint between them before the run stops; 0 stops at once."""
    spike_sigmas: PositiveFloat | None
    """A loss so many robust standard deviations above the median of the last steps is a spike;
    null never says so."""
    window_steps: Annotated[int, Field(ge=16)]
    """How many steps the median is taken over; until there are that many nothing is a spike."""


@config
class WatchdogConfig:
    """When a run counts as stuck, and which ranks as slow."""

    timeout_s: PositiveFloat
    """A step that takes longer ends the attempt, with the stacks of all ranks in their logs and
    exit code 85: start it again."""
    first_step_timeout_s: PositiveFloat
    """The same for what may take its time: loading and compiling until the first step is done,
    saving, going back to an earlier state."""
    slow_rank_ratio: Annotated[float, Field(gt=1)]
    """A rank whose own time per step, waiting for data and the forward pass, is more than this many
    times the median of all is named as slow."""
