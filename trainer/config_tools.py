"""What the commands on a finished run may be told: frozen dataclasses."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config_diffusion import Fraction
from trainer.config_quality import (
    ClipFeaturesConfig,
    EfficientNetConfig,
    InceptionConfig,
)
from trainer.frozen import config

SolverName = Literal[
    "ddpm",
    "ddim",
    "euler_maruyama",
    "predictor_corrector",
    "euler",
    "heun",
    "dpm_2m",
    "dpm_sde",
    "unipc",
    "dopri5",
]

_POWER = r"power_0\.([01][0-9]*|2([0-7][0-9]*)?)"
WeightsName = Annotated[str, Field(pattern=rf"^(ema|raw|half_life_[0-9.e+]+|{_POWER})$")]


@config
class ChurnConfig:
    """Noise that euler and heun add before each step (Karras et al. 2022, algorithm 2)."""

    amount: NonNegativeFloat
    """S_churn, divided over the steps; 0 adds none."""
    min_ratio: NonNegativeFloat
    """S_tmin: only where sigma / alpha is at least this."""
    max_ratio: PositiveFloat
    """S_tmax."""
    noise_scale: PositiveFloat
    """S_noise."""


@config
class SamplingConfig:
    """How pictures are drawn from noise."""

    solver: SolverName
    """ddpm: ancestral. ddim: with eta. euler_maruyama: the reverse SDE; predictor_corrector: with
    Langevin steps. euler, heun (two evaluations a step), dpm_2m (DPM-Solver++), unipc: the ODE;
    dpm_sde: its stochastic sibling. dopri5: the ODE with steps of its own, to a tolerance."""
    num_steps: PositiveInt
    """Steps from noise to picture; dopri5 takes as many as it needs."""
    grid: Literal["uniform", "trailing", "karras", "log_snr"]
    """Where the steps lie: evenly in time (trailing: all steps alike; uniform: to the least time,
    then to 0), evenly in (sigma / alpha)^(1/7), or in log(sigma / alpha)."""
    time_shift: PositiveFloat
    """1 spaces the steps evenly; above 1 spends more near the noise. For uniform and trailing."""
    first_time: Annotated[float, Field(gt=0, le=1)]
    """Where pure noise is put: 1, or just below for solvers that cannot begin there."""
    eta: Fraction
    """Of ddim: share of the noise that is renewed in each step."""
    churn: ChurnConfig
    """Of euler and heun."""
    tolerance: PositiveFloat
    """Of dopri5: error of a step, relative and absolute."""
    guidance_scale: NonNegativeFloat
    """Classifier-free guidance; 1 is none, more follows the caption more closely."""
    guidance_rescale_frac: Fraction
    """How far a guided estimate is brought back to the contrast of the unguided one."""
    guidance_interval: tuple[Fraction, Fraction]
    """Times (low, high] that are guided; 1 is noise, 0 the picture."""
    guidance_split: bool
    """Two passes of a batch instead of one of twice its size: half the memory."""
    negative: str
    """What the pictures should not show; empty for classifier-free guidance as it was trained."""
    seed: NonNegativeInt
    """With the number of a prompt and of its picture it decides the noise."""
    batch_images: PositiveInt
    """Pictures per pass through the network."""

    @property
    def is_adaptive(self) -> bool:
        """Whether the solver takes as many steps as it needs."""
        return self.solver == "dopri5"

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(
                f"guidance_interval=[{low}, {high}] holds no time: the first must be the smaller. "
                "Try [0.0, 1.0]."
            )
        if self.time_shift != 1 and self.grid in {"karras", "log_snr"}:
            raise ValueError(
                f"time_shift={self.time_shift:g} moves evenly spaced times, but grid={self.grid}. "
                "Try time_shift=1 or grid=trailing."
            )
        if self.negative and self.guidance_scale == 1:
            raise ValueError(
                f"negative={self.negative!r} works through guidance, and guidance_scale=1 is none. "
                "Try guidance_scale=4."
            )


@config
class UncertaintyConfig:
    """How much the pictures of a prompt differ, number by number."""

    over: Literal["seeds", "weights"]
    """seeds: other noise. weights: the same noise through the averaged and the raw weights of
    every checkpoint that the run kept."""
    count: Annotated[int, Field(ge=2)]
    """Pictures in the ensemble; of weights, at most as many as there are, the newest first."""


SHORT_KEYS = {
    "solver": "sampling.solver",
    "steps": "sampling.num_steps",
    "grid": "sampling.grid",
    "guidance": "sampling.guidance_scale",
    "negative": "sampling.negative",
    "seed": "sampling.seed",
    "batch": "sampling.batch_images",
}
"""What a sampling key may be called on the command line."""


@config
class SampleConfig:
    """`kiln sample`."""

    run: str
    """Run directory of a trained denoiser, or the folder that `kiln export` wrote of one."""
    weights: WeightsName
    """As in `kiln evaluate`; an exported folder has but one set."""
    prompts: tuple[str, ...]
    """What to draw."""
    prompts_file: str | None
    """A text file with one prompt per line, instead."""
    images_per_prompt: PositiveInt
    """Pictures of each prompt; more later leaves the first ones as they are."""
    out: str | None
    """Folder for the pictures; null is RUN/samples, which the report shows."""
    num_reconstructions: NonNegativeInt
    """Pictures of the dataset to put beside their autoencoder reconstructions."""
    init: str | None
    """A picture to start from instead of noise; its centre square is taken."""
    strength: Annotated[float, Field(gt=0, le=1)]
    """How much of `init` is turned into noise first: the time at which drawing starts."""
    mask: str | None
    """A picture of the same size as `init`: white is painted anew, black stays."""
    uncertainty: UncertaintyConfig | None
    """Also write the variance over an ensemble beside each prompt's first picture."""
    watermark: str | None
    """A text to hide in every picture; 16 bytes at 256 px, in proportion to the area."""
    sampling: SamplingConfig
    """How."""
    device: Literal["cpu", "cuda"]
    """Where the networks run."""
    threads: PositiveInt
    """Batches at the same time, one core each."""
    ranks: PositiveInt
    """Processes on this machine that share the work; no picture depends on it."""
    parts: PositiveInt
    """Commands that share the work, e.g. tasks of a Slurm array; each does every parts-th batch."""
    part: NonNegativeInt
    """Which of them this is, from 0; the one that finds all pictures there writes the grid."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.part >= self.parts:
            raise ValueError(f"part={self.part}, need 0 to parts - 1 = {self.parts - 1}.")
        if self.mask and not self.init:
            raise ValueError("mask= says which part of init= to paint anew. Give init=PICTURE.")
        if self.init and self.sampling.first_time != 1:
            raise ValueError(
                f"sampling.first_time={self.sampling.first_time:g}, but with init= drawing starts "
                "at strength=. Leave sampling.first_time=1.0."
            )


@config
class CurvesConfig:
    """Quality of one checkpoint against how it is sampled."""

    steps: tuple[PositiveInt, ...]
    """Numbers of steps, for each of the solvers."""
    guidance: tuple[NonNegativeFloat, ...]
    """Guidance scales, with `sampling` as it is."""
    solvers: tuple[SolverName, ...]
    """Solvers."""
    num_captions: PositiveInt = 48
    """Captions of each point, the same ones at all."""

    def __post_init__(self) -> None:
        """Refuse curves without points."""
        if not self.guidance and not (self.steps and self.solvers):
            raise ValueError("no points: give guidance=[...], or steps=[...] and solvers=[...].")


@config
class EvaluateConfig:
    """`kiln evaluate`."""

    run: str
    """Run directory of a trained denoiser."""
    checkpoint: Literal["latest", "all"] | NonNegativeInt
    """latest, all that the run still has, or a step. Several commands at once share the work."""
    weights: WeightsName
    """ema: the first of the moving averages, which draw better; raw: as the optimizer left them;
    or the name of another average, of power averages any width: power_0.08."""
    again: bool
    """Also evaluate what has an evaluation of the same settings."""
    num_captions: PositiveInt
    """Held-out captions to draw and score."""
    num_unseen_pairs: NonNegativeInt
    """Further captions with a shape in a colour that training never showed; the harder test."""
    two_things_frac: Fraction
    """Share of the captions with two things in relation; as in the training pictures."""
    validation: str | None
    """Dataset, encoded like the training data, whose pairs measure the loss and whose captions are
    drawn; null: painted scenes that were held out, else the training data."""
    num_loss_pairs: NonNegativeInt
    """Pictures with captions that measure the loss at fixed times and noise; 0 leaves it out."""
    num_loss_times: PositiveInt
    """Times of it, in the middle of as many equally likely parts of the training law."""
    num_pictures: PositiveInt | None
    """Drawn pictures to compare with real ones; null: those of the captions. More of them have
    captions of the reference."""
    reference: str | None
    """Dataset of the real pictures; null: the validation data, else the training data."""
    num_reference: PositiveInt
    """Real pictures, evenly spread over the reference; their features are kept in
    RUN/evaluations/reference."""
    features: Annotated[
        EfficientNetConfig | ClipFeaturesConfig | InceptionConfig | None,
        Field(discriminator="kind"),
    ]
    """Network whose features are compared: Frechet and kernel distance, precision and recall."""
    clip: str | None
    """Folder or hub name of a CLIPModel for the CLIP score; null: that of features, if it is
    one."""
    bootstrap_draws: PositiveInt
    """Half-samples that give an interval."""
    curves: CurvesConfig | None
    """Also draw quality against steps and guidance; null: do not."""
    num_reconstructions: NonNegativeInt
    """Pictures of the dataset to put beside their autoencoder reconstructions."""
    sampling: SamplingConfig
    """How."""
    device: Literal["cpu", "cuda"]
    """Where the networks run."""
    threads: PositiveInt
    """Batches at the same time, one core each."""


@config
class ExportConfig:
    """`kiln export`."""

    run: str
    """Run directory, of a denoiser or of an autoencoder."""
    out: str
    """Folder to write; replaced if an export wrote it before."""
    weights: WeightsName
    """ema: the first of the moving averages, which draw better; raw: as the optimizer left them;
    or the name of another average, of power averages any width: power_0.08."""


@config
class SyncConfig:
    """`kiln sync`."""

    run: str
    """Run directory; or a folder in a dataset's observe/."""


@config
class DashboardConfig:
    """`kiln dashboard`."""

    run: str
    """Run directory: its project gets the workspace, and its metrics choose the charts."""
    entity: str | None
    """W&B user or team; null: the key's own."""
    dry_run: bool
    """Print what would be sent, and send nothing."""


@config
class ReportConfig:
    """`kiln report`."""

    run: str | tuple[str, ...]
    """Run directory, as `kiln train` wrote it; [A,B] compares runs."""
    dataset: str | None
    """Dataset folder; null: the one that each run's config.yaml names."""
    output: str | None
    """The page; null: report.html in the run directory; of several the first's comparison.html."""
    serve: bool = False
    """Serve the page on this machine alone, and renew it while the run goes on; writes no file."""
    port: int = Field(default=0, ge=0, le=65535)
    """To serve on; 0 is any free one."""
    accounts: Mapping[str, str | float | None] = Field(default_factory=dict)
    """What figures assume, instead of the run's own `accounts`, key by key as `kiln train --help`
    explains them; null leaves the run's."""
