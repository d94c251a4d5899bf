"""What the commands on a finished run may be told: frozen dataclasses."""

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config import Fraction
from trainer.frozen import config


@config
class SamplingConfig:
    """How pictures are drawn from noise."""

    solver: Literal["ddim", "heun"]
    """ddim: one network evaluation a step (Euler for flows); heun: two, second order."""
    num_steps: PositiveInt
    """Steps from noise to picture."""
    time_shift: PositiveFloat
    """1 spaces the steps evenly; above 1 spends more of them near the noise."""
    guidance_scale: NonNegativeFloat
    """Classifier-free guidance; 1 is none, more follows the caption more closely."""
    guidance_rescale_frac: Fraction
    """How far a guided estimate is brought back to the contrast of the unguided one."""
    guidance_interval: tuple[Fraction, Fraction]
    """Times (low, high] that are guided; 1 is noise, 0 the picture."""
    seed: NonNegativeInt
    """With the caption's number it decides the first noise."""
    batch_images: PositiveInt
    """Pictures per pass through the network."""

    def __post_init__(self) -> None:
        """Refuse an empty interval."""
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(
                f"guidance_interval=[{low}, {high}] holds no time: the first must be the smaller. "
                "Try [0.0, 1.0]."
            )


@config
class SampleConfig:
    """`kiln sample`."""

    run: str
    """Run directory of a trained denoiser."""
    captions: tuple[str, ...]
    """What to draw."""
    captions_file: str | None
    """A text file with one caption per line, instead."""
    to: str | None
    """Folder for the pictures, replaced; null is RUN/samples, which the report shows."""
    num_reconstructions: NonNegativeInt
    """Pictures of the dataset to put beside their autoencoder reconstructions."""
    sampling: SamplingConfig
    """How."""
    device: Literal["cpu", "cuda"]
    """Where the networks run."""
    threads: PositiveInt
    """Batches at the same time, one core each."""


@config
class EvaluateConfig:
    """`kiln evaluate`."""

    run: str
    """Run directory of a trained denoiser."""
    num_captions: PositiveInt
    """Held-out captions to draw and score."""
    num_unseen_pairs: NonNegativeInt
    """Further captions with a shape in a colour that training never showed; the harder test."""
    two_things_frac: Fraction
    """Share of the captions with two things in relation; as in the training pictures."""
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
    to: str
    """Folder to write; replaced if an export wrote it before."""
