"""What a training run may be told: frozen dataclasses and the rules between their values."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config_accounts import AccountsConfig
from trainer.config_cluster import ClusterConfig
from trainer.config_data import DataConfig
from trainer.config_diffusion import DenoisingConfig
from trainer.config_engine import (
    CheckpointConfig,
    EmaConfig,
    EngineConfig,
    OptimConfig,
    RollbackConfig,
    WatchdogConfig,
)
from trainer.config_first_stage import ReconstructionConfig, check_sides
from trainer.config_lora import LoraConfig
from trainer.config_start import StartConfig
from trainer.frozen import config


@config
class AutoencoderConfig:
    """Which pictures <-> latents model to load."""

    kind: Literal["kl", "tiny"]
    """kl: diffusers AutoencoderKL (mean and logvar); tiny: AutoencoderTiny (no logvar)."""
    path: str
    """A diffusers folder, a hub name, or package:NAME/FOLDER inside an installed package."""


@config
class TextEncoderConfig:
    """Which captions -> states model to load, through transformers."""

    kind: Literal["bert", "clip", "t5"]
    """The family: which class reads the weights and how padding is masked."""
    path: str
    """A transformers folder, a hub name, or package:NAME/FOLDER inside an installed package."""
    subfolder: str
    """Folder of the weights inside `path`; empty for the top ('text_encoder' in SD folders)."""
    tokenizer_subfolder: str
    """Folder of the tokenizer inside `path`; empty for the top ('tokenizer' in SD folders)."""
    max_tokens: PositiveInt
    """Longer captions are cut here, special tokens included."""
    padding: Literal["none", "max"] = "none"
    """max: captions are padded to `max_tokens` before the encoder, unmasked, and all states are
    kept, as Stable Diffusion does it; none: no padding enters the encoder."""


@config
class BucketsConfig:
    """Encode each picture at the size, of nearly equal area, that is nearest to its shape."""

    max_aspect: Annotated[float, Field(gt=1, le=8)]
    """Longest side over shortest of any bucket; more elongated pictures are cropped to it."""
    step_px: PositiveInt
    """The buckets' sides are multiples of this; must be one of the autoencoder's downscale."""


@config
class EncodersConfig:
    """Everything a latent depends on besides the picture; its hash is the encodings' name."""

    autoencoder: AutoencoderConfig
    """The first stage."""
    text: TextEncoderConfig
    """The caption encoder."""
    image_side_px: PositiveInt
    """Pictures are resized (shorter side) and centre-cropped to this square before encoding."""
    buckets: BucketsConfig | None = None
    """Sizes other than the square, each of at most its area, e.g. {max_aspect: 2, step_px: 64};
    null is the square alone."""

    def __post_init__(self) -> None:
        if self.buckets is not None and self.image_side_px % self.buckets.step_px:
            step_px = self.buckets.step_px
            fitting = max(step_px, self.image_side_px // step_px * step_px)
            raise ValueError(
                f"image_side_px={self.image_side_px} is no multiple of buckets.step_px={step_px}. "
                f"Try image_side_px={fitting}."
            )


@config
class UNetConfig:
    """diffusers UNet2DConditionModel."""

    kind: Literal["unet"]
    """Selects this class."""
    latent_channels: PositiveInt
    """Channels of a latent; must equal the autoencoder's."""
    latent_side: PositiveInt
    """Rows and columns of a latent."""
    text_width: PositiveInt
    """Width of a text state; must equal the text encoder's."""
    block_channels: tuple[PositiveInt, ...]
    """Width of each resolution level."""
    layers_per_block: PositiveInt
    """Residual blocks per level."""
    cross_attention: tuple[bool, ...]
    """Whether each level attends to the text."""
    head_width: tuple[PositiveInt, ...]
    """Width of one attention head per level."""
    norm_groups: PositiveInt
    """Groups of the group norms."""
    linear_projection: bool
    """Linear instead of convolutional projections around attention (SD2: true)."""
    pooled_tokens: NonNegativeInt
    """Pool each caption, padded to this many tokens, into the time embedding; 0 for not."""
    time_scale_shift: bool
    """Time and pooled text scale and shift the residual blocks (as in ADM) instead of adding."""
    num_parameters: PositiveInt
    """Stated so that plans need no torch; a test compares it with the real model."""


@config
class TransformerConfig:
    """diffusers PixArtTransformer2DModel: patches, adaptive norms, cross-attention to the text."""

    kind: Literal["transformer"]
    """Selects this class."""
    latent_channels: PositiveInt
    """Channels of a latent; must equal the autoencoder's."""
    latent_side: PositiveInt
    """Rows and columns of a latent."""
    text_width: PositiveInt
    """Width of a text state; must equal the text encoder's."""
    patch_side: PositiveInt
    """Rows and columns of latent per token."""
    num_layers: PositiveInt
    """Blocks."""
    num_heads: PositiveInt
    """Attention heads per block."""
    head_width: PositiveInt
    """Width of one head; heads x width is the width of a token."""
    num_parameters: PositiveInt
    """Stated so that plans need no torch; a test compares it with the real model."""


@config
class AutoencoderModelConfig:
    """diffusers AutoencoderKL as the model in training."""

    kind: Literal["autoencoder_kl"]
    """Selects this class."""
    latent_channels: PositiveInt
    """Channels of a latent."""
    block_channels: tuple[PositiveInt, ...]
    """Width of each resolution level; every level but the last halves the side."""
    layers_per_block: PositiveInt
    """Residual blocks per level."""
    norm_groups: PositiveInt
    """Groups of the group norms."""
    mid_attention: bool
    """Self-attention at the lowest resolution."""
    num_parameters: PositiveInt
    """Stated so that plans need no torch; a test compares it with the real model."""


RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]


ModelConfig = Annotated[
    UNetConfig | TransformerConfig | AutoencoderModelConfig, Field(discriminator="kind")
]


ObjectiveConfig = Annotated[DenoisingConfig | ReconstructionConfig, Field(discriminator="kind")]


@config
class BatchConfig:
    """How many images make one optimizer step, and how they are cut up."""

    global_batch_images: PositiveInt
    """Images per optimizer step, over all ranks."""
    micro_batch_images: PositiveInt
    """Images per forward pass on one rank; the only number that memory cares about."""


@config
class LoggingConfig:
    """What is told while training."""

    every_steps: PositiveInt
    """Steps between rows of metrics.jsonl."""
    wandb: Literal["auto", "offline", "online", "off"]
    """auto: online when a key is set, offline otherwise."""
    wandb_project: str
    """W&B project name."""
    quiet: bool
    """No progress bar; warnings and errors only."""
    tdp_w_per_core: PositiveFloat
    """Watts of one busy CPU core for the TDP model, used only where no energy counter exists."""


@config
class TrainConfig:
    """One training run."""

    run: str
    """Run directory; the same command with the same directory resumes."""
    seed: NonNegativeInt
    """Keys the order of the data and every random draw of a sample."""
    total_images: PositiveInt
    """Images to train on, counted over all ranks and epochs."""
    data: DataConfig
    encoders: EncodersConfig
    model: ModelConfig
    objective: ObjectiveConfig
    start_from: str | None = None
    """A diffusers folder (or its unet or transformer folder), or another run, whose averages are
    taken: the first weights of a fresh run's denoiser; null draws them from the seed."""
    lora: LoraConfig | None = None
    """Train adapters alone, on the weights of `start_from`, which stay as they are and must stay
    where they are; null trains all weights."""
    batch: BatchConfig
    optim: OptimConfig
    ema: EmaConfig
    engine: EngineConfig
    cluster: ClusterConfig
    checkpoint: CheckpointConfig
    rollback: RollbackConfig
    watchdog: WatchdogConfig
    logging: LoggingConfig
    accounts: AccountsConfig = AccountsConfig()

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        trains_autoencoder = self.model.kind == "autoencoder_kl"
        if trains_autoencoder != (self.objective.kind == "reconstruction"):
            need = "reconstruction" if trains_autoencoder else "flow or vp_v"
            raise ValueError(
                f"model.kind={self.model.kind} cannot be trained with "
                f"objective.kind={self.objective.kind}. Try objective={need}."
            )
        if self.model.kind == "autoencoder_kl" and self.objective.kind == "reconstruction":
            self._check_first_stage(self.model, self.objective)
        pooled = self.model.pooled_tokens if self.model.kind == "unet" else 0
        if 0 < pooled < self.encoders.text.max_tokens:
            raise ValueError(
                f"model.pooled_tokens={pooled} is less than encoders.text.max_tokens="
                f"{self.encoders.text.max_tokens}: longer captions would be cut. Make them equal."
            )
        if self.data.reader == "webdataset" and not trains_autoencoder:
            raise ValueError(
                f"data.reader=webdataset gives pictures, and model.kind={self.model.kind} is "
                "trained on latents. Index the tars (`kiln index`), encode the dataset (`kiln "
                "encode`), and give it with data.reader=kiln."
            )
        if self.data.latents == "online":
            self._check_online()
        self._check_lora()
        if self.optim.kind == "adafactor" and self.engine.zero_stage != 0:
            raise ValueError(
                f"optim.kind=adafactor with engine.zero_stage={self.engine.zero_stage}: it keeps "
                "rows and columns of whole tensors, and shards have none. Try engine.zero_stage=0."
            )
        if self.cluster.kind == "local" and self.cluster.num_nodes != 1:
            raise ValueError(
                f"cluster.num_nodes={self.cluster.num_nodes} needs cluster.kind=slurm; "
                "a local run has one node. Try cluster.num_nodes=1."
            )

    def _check_lora(self) -> None:
        if self.lora is None:
            return
        if self.model.kind == "autoencoder_kl":
            raise ValueError(
                f"lora adapts denoisers, and model.kind={self.model.kind} is none. Give lora=null."
            )
        if self.start_from is None:
            raise ValueError(
                "lora adapts weights that are there, and start_from is null. Give "
                "start_from=FOLDER, of diffusers or another run, or lora=null."
            )

    def _check_first_stage(
        self, model: AutoencoderModelConfig, objective: ReconstructionConfig
    ) -> None:
        if self.start_from is not None:
            raise ValueError(
                f"start_from={self.start_from} is for denoisers, and model.kind="
                f"{model.kind} is none. Give start_from=null."
            )
        check_sides(
            objective,
            image_side_px=self.encoders.image_side_px,
            downscale=2 ** (len(model.block_channels) - 1),
        )
        ranks = self.cluster.num_nodes * self.cluster.ranks_per_node
        if self.engine.zero_stage == 3 and ranks > 1 and objective.mixes_sides:
            raise ValueError(
                "engine.zero_stage=3 gathers weights in every forward pass, so that all ranks "
                f"must make equally many; with objective.whole_frac={objective.whole_frac:g} some "
                "make a second one for whole pictures. Try engine.zero_stage=2, or "
                "objective.whole_frac=0."
            )

    def _check_online(self) -> None:
        if self.model.kind == "autoencoder_kl":
            raise ValueError(
                f"data.latents=online is for denoisers: model.kind={self.model.kind} is trained on "
                "pictures themselves. Give data.latents=encoded, the default."
            )
        if self.encoders.buckets is not None:
            raise ValueError(
                "encoders.buckets needs the shapes of all pictures before the order of the samples "
                "is fixed, and with data.latents=online nobody has looked at them. Encode the "
                "dataset (`kiln encode`) and give data.latents=encoded, or encoders.buckets=null."
            )

    @property
    def reads_latents(self) -> bool:
        """Whether latents are read, and not pictures."""
        return self.model.kind != "autoencoder_kl" and self.data.latents == "encoded"

    @property
    def num_parameters(self) -> int:
        """How many weights the network has: the model's, and a discriminator's."""
        total, objective = self.model.num_parameters, self.objective
        if isinstance(objective, ReconstructionConfig) and objective.discriminator is not None:
            total += objective.discriminator.num_parameters
        return total


@config
class LaunchConfig(TrainConfig):
    """`kiln launch`: a run, and what its job is called."""

    name: RunName
    """Of the run and of its job."""
    dry_run: bool
    """Print what would be submitted, and touch nothing."""
    at_once: PositiveInt | None
    """Of a sweep: most of its runs that are trained at the same time; null is no limit."""
    start: StartConfig


@config
class DemoConfig:
    """`kiln demo`."""

    data: str
    """scenes (painted here), emoji (real pictures from npm packages), or a folder of your own."""
    out: str | None
    """Folder for everything the demo makes; null is demo/ and the name of the data."""
    num_pictures: PositiveInt
    """Pictures in the source."""
    image_side_px: PositiveInt
    """Side of the square pictures that are learned."""
    shard_rows: PositiveInt
    """Rows per shard."""
    first_stage: str | None
    """A name in conf/autoencoder; null is the one trained on such pictures."""
    total_images: PositiveInt
    """Images to train on; this is the demo's time."""
    train: tuple[str, ...]
    """More key=value words for `kiln train`."""
    evaluate: tuple[str, ...]
    """More key=value words for `kiln evaluate`."""
