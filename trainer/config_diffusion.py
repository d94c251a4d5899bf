"""What a denoiser's objective may be told: process, prediction, times and weights."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from trainer.frozen import config

Fraction = Annotated[float, Field(ge=0, le=1)]


@config
class FlowProcessConfig:
    """Rectified flow (Liu et al. 2022): straight paths from data to noise."""

    kind: Literal["flow"]
    """Selects this process."""

    num_levels = None
    ends_in_noise = True


@config
class VpProcessConfig:
    """Variance preserving (Ho et al. 2020; Song et al. 2021)."""

    kind: Literal["vp"]
    """Selects this process."""
    betas: Literal["linear", "scaled_linear", "cosine"]
    """How the betas rise; scaled_linear is Stable Diffusion's, cosine needs no first and last."""
    num_levels: PositiveInt | None
    """Discrete noise levels (1000 in Stable Diffusion); null for continuous time."""
    beta_start: PositiveFloat
    """First beta of a thousand."""
    beta_end: PositiveFloat
    """Last beta."""
    zero_terminal_snr: bool
    """Shift the schedule so that it ends in pure noise (Lin et al. 2024)."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing of the data is left at t = 1."""
        return self.zero_terminal_snr or (self.betas == "cosine" and self.num_levels is None)


@config
class SubVpProcessConfig:
    """Sub-VP (Song et al. 2021): less variance than VP on the way; continuous time."""

    kind: Literal["sub_vp"]
    """Selects this process."""
    beta_start: PositiveFloat
    """First beta of a thousand."""
    beta_end: PositiveFloat
    """Last beta."""

    num_levels = None
    ends_in_noise = False


@config
class ExplodingProcessConfig:
    """Variance exploding: ve rises geometrically (Song et al. 2021), edm evenly (Karras 2022)."""

    kind: Literal["ve", "edm"]
    """Selects this process, and how the noise rises."""
    sigma_min: PositiveFloat
    """Least noise worth visiting, in units of the normalised latents."""
    sigma_max: PositiveFloat
    """Most noise."""

    num_levels = None
    ends_in_noise = False

    def __post_init__(self) -> None:
        """Refuse an empty range."""
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"process.sigma_min={self.sigma_min:g} is not below "
                f"process.sigma_max={self.sigma_max:g}. Try sigma_min=0.002 and sigma_max=80."
            )


ProcessConfig = Annotated[
    FlowProcessConfig | VpProcessConfig | SubVpProcessConfig | ExplodingProcessConfig,
    Field(discriminator="kind"),
]


@config
class TimesConfig:
    """Which times are trained, and how often."""

    kind: Literal["uniform", "logit_normal", "log_normal"]
    """uniform: all alike, or all levels; logit_normal: logit(t) is normal (Esser et al. 2024);
    log_normal: log(sigma / alpha) is normal (Karras et al. 2022)."""
    mean: float
    """Of the normal law; more is noisier."""
    std: PositiveFloat
    """Its standard deviation."""
    shift: PositiveFloat
    """Above 1 moves times towards the noise, as large pictures need; not for log_normal."""


@config
class WeightConfig:
    """How much each noise level counts."""

    kind: Literal["uniform", "min_snr", "soft_min_snr", "p2", "sigmoid", "edm"]
    """uniform: 1 on what is predicted; the others are functions of the signal-to-noise ratio, and
    mean the same objective whatever is predicted (trainer/diffusion/objective.py)."""
    gamma: PositiveFloat
    """Of min_snr (5 in its paper), soft_min_snr (4) and p2 (1)."""
    k: PositiveFloat
    """Of p2 (1)."""
    bias: float
    """Of sigmoid; more weight on clean levels where it is higher."""


@config
class DenoisingConfig:
    """Diffusion: predict something of the data and the noise from a mixture of both."""

    kind: Literal["denoising"]
    """Selects this objective."""
    process: ProcessConfig
    """How data turns into noise."""
    prediction: Literal["eps", "x0", "v", "flow", "score", "edm"]
    """What the network predicts: noise, data, alpha eps - sigma x0, eps - x0, the score, or EDM's
    preconditioned mixture."""
    sigma_data: PositiveFloat
    """Standard deviation of the data, for edm; latents are normalised to 1."""
    times: TimesConfig
    """Which times are trained."""
    loss: Literal["squared_error", "score_matching", "likelihood"]
    """squared_error: of what is predicted; score_matching: of the score, times sigma^2; likelihood:
    the same times g^2, which bounds the negative log-likelihood."""
    weight: WeightConfig
    """Of the noise levels, for squared_error."""
    caption_dropout: Fraction
    """Share of captions replaced by the empty one, for classifier-free guidance."""

    def __post_init__(self) -> None:
        """Refuse what cannot be learned or sampled."""
        if self.process.ends_in_noise and self.prediction in {"eps", "score"}:
            raise ValueError(
                f"objective.prediction={self.prediction} says nothing of the data in pure noise, "
                f"where objective.process.kind={self.process.kind} ends. Try "
                "objective.prediction=v (or flow)."
            )
        if self.process.num_levels is not None and self.times.kind != "uniform":
            raise ValueError(
                f"objective.times.kind={self.times.kind} needs continuous time, but "
                f"objective.process.num_levels={self.process.num_levels}. Try "
                "objective.process.num_levels=null or objective.times.kind=uniform."
            )
        if self.loss != "squared_error" and self.weight.kind != "uniform":
            raise ValueError(
                f"objective.loss={self.loss} has its own weights, but objective.weight.kind="
                f"{self.weight.kind}. Try objective.weight.kind=uniform."
            )
        if self.loss == "likelihood" and self.process.ends_in_noise:
            raise ValueError(
                f"objective.loss=likelihood weighs with g^2, which is infinite where "
                f"objective.process.kind={self.process.kind} ends. Try "
                "objective.loss=score_matching."
            )
        if self.times.kind == "log_normal" and self.times.shift != 1:
            raise ValueError(
                f"objective.times.shift={self.times.shift:g} is not used by log_normal times. Try "
                "objective.times.shift=1 and another objective.times.mean."
            )
