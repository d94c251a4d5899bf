"""What a training run may be told about its data: datasets, order, reading."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.frozen import config


@config
class MixedConfig:
    """One more dataset of a mix."""

    dataset: str
    """A published dataset with latents of the same encoders: a folder or a URL."""
    weight: NonNegativeFloat
    """Its share of the samples, relative to `data.weight` and to other weights of the mix."""


@config
class DataConfig:
    """Where the samples come from, in which order, and how they are read."""

    dataset: str
    """A published dataset: a folder or a URL."""
    weight: NonNegativeFloat
    """Its share of the samples where there is a mix; may change in the middle of a run."""
    mix: tuple[MixedConfig, ...]
    """More datasets: [{dataset: FOLDER, weight: 0.5}, ...]; weights may change, datasets not."""
    reader: Literal["kiln", "webdataset"]
    """kiln: exact order and resume; webdataset: tars as they are, resumed only roughly."""
    latents: Literal["encoded", "online"] = "encoded"
    """What denoisers learn from; encoded: what `kiln encode` wrote beside the dataset; online:
    every rank encodes the pictures and captions of its micro-batches, each time anew."""
    epoch_images: PositiveInt | None
    """About how many pictures the tars hold, for reader=webdataset; else null."""
    order: Literal["shards", "ranges"]
    """shards: permute shards, then samples within windows, so that a node needs few shards at a
    time; ranges: permute all samples, one read each, for fast storage."""
    canonical_streams: PositiveInt | None
    """Streams of equal length that ranks share, whatever their number; null is one for each shard,
    at most 64."""
    window_shards: PositiveInt
    """Shards of a stream that are mixed with each other and with those of all other streams."""
    ending: Literal["roll", "drop", "pad"]
    """At the end of an epoch a batch rolls over into the next, is dropped, or is filled up."""
    threads: PositiveInt
    """Batches that a rank reads at the same time; never part of the resume state."""
    prefetch_batches: NonNegativeInt
    """Batches read ahead; never part of the resume state."""
    cache: str | None
    """A folder on the node's own disk, where shards are kept; null: read where they lie."""
    cache_gb: PositiveFloat
    """The cache's bound, in 10^9 bytes; `kiln stream-plan` says what a run needs."""
    max_bad_frac: Annotated[float, Field(ge=0, le=1)]
    """The run stops when a larger share of its samples cannot be read."""

    def __post_init__(self) -> None:
        """Refuse weights of nothing, and a mix for a reader that cannot."""
        if self.weight + sum(other.weight for other in self.mix) <= 0:
            raise ValueError("all weights of data are 0. Give data.weight=1.")
        if (self.reader == "webdataset") != (self.epoch_images is not None):
            need = "needs" if self.reader == "webdataset" else "knows the dataset's size without"
            raise ValueError(
                f"data.reader={self.reader} {need} data.epoch_images, and got "
                f"{self.epoch_images or 'null'}. Give about the number of pictures in the tars "
                "with reader=webdataset, and null with reader=kiln."
            )
        if self.reader == "webdataset" and self.latents == "online":
            raise ValueError(
                "data.latents=online needs captions, and data.reader=webdataset gives pictures "
                "alone. Index the tars (`kiln index`), and give the dataset with data.reader=kiln."
            )
        if self.reader == "webdataset" and self.mix:
            raise ValueError(
                "data.reader=webdataset cannot mix datasets (data.mix). Index the tars "
                "(`kiln index`), or give one dataset."
            )
