"""What the data commands may be told: frozen dataclasses."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config import EncodersConfig
from trainer.frozen import config

Fraction = Annotated[float, Field(ge=0, le=1)]
Port = Annotated[int, Field(ge=1, le=65535)]


@config
class ColumnsConfig:
    """What the columns of the source parquet are called."""

    url: str
    """Where the picture is."""
    caption: str
    """What it shows."""
    extra: tuple[str, ...]
    """Columns to carry into KEY.json where the source has them."""


@config
class DownloadConfig:
    """How pictures are fetched, and from where they may come."""

    timeout_s: PositiveFloat
    """Longest wait for a connection or for the next bytes."""
    deadline_s: PositiveFloat
    """Longest time for one whole body, however steadily it drips."""
    max_body_bytes: PositiveInt
    """Longer bodies are refused."""
    retries: NonNegativeInt
    """Further attempts after a failure; 0 is polite and enough (failed rows are in quarantine)."""
    user_agent: str
    """Who asks, as sent to every server; say how you can be reached."""
    robots_directives: tuple[str, ...]
    """A picture whose X-Robots-Tag header has one of these is left alone; [] ignores opt-outs."""
    allow_hosts: tuple[str, ...]
    """Hosts (HOST or HOST:PORT) that may have private or loopback addresses; others may not."""
    accept_unreachable: bool
    """Publish a unit none of whose rows could be reached; else the command stops and says so."""


@config
class PrepareConfig:
    """`kiln prepare`."""

    rows: Path
    """The source: a parquet file of URLs and captions, or a folder of such files."""
    dataset: Path
    """Folder to publish into."""
    shard_rows: PositiveInt
    """Distinct rows per unit of work; a unit's kept rows become one shard."""
    image_side_px: PositiveInt
    """Pictures are resized to this side, as resize_mode says."""
    resize_mode: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]
    """As img2dataset names them; keep_ratio makes the shorter side image_side_px."""
    resize_only_if_bigger: bool
    """Leave pictures that are smaller as they are."""
    encode_format: Literal["jpg", "png", "webp"]
    """How stored pictures are encoded."""
    encode_quality: NonNegativeInt | None
    """jpg, webp: quality, 1 to 100; png: compression, 0 to 9; null is 95, and 6 for png."""
    min_image_side_px: NonNegativeInt
    """Pictures with a shorter side are rejected."""
    max_image_pixels: PositiveInt
    """Pictures with more pixels are rejected before they are decoded."""
    max_aspect_ratio: PositiveFloat
    """Pictures whose longer side is more than this many times the shorter one are rejected."""
    columns: ColumnsConfig
    """Names of the source's columns."""
    download: DownloadConfig
    """How pictures are fetched."""
    processes: PositiveInt | None
    """Worker processes; null is one per core."""
    threads: PositiveInt
    """Simultaneous downloads per worker process."""
    recheck: Literal["sizes", "hashes"]
    """How finished shards are judged when the command is given again; hashes reads them all."""
    tdp_w_per_core: NonNegativeFloat
    """Watts of one busy CPU core for the energy model, used only where no counter exists."""

    def __post_init__(self) -> None:
        low, high = (0, 9) if self.encode_format == "png" else (1, 100)
        if self.encode_quality is not None and not low <= self.encode_quality <= high:
            raise ValueError(
                f"encode_quality={self.encode_quality} with encode_format={self.encode_format}: "
                f"need {low} to {high}, or null."
            )

    @property
    def quality(self) -> int:
        """The quality with its default filled in."""
        if self.encode_quality is not None:
            return self.encode_quality
        return 6 if self.encode_format == "png" else 95


@config
class VerifyConfig:
    """`kiln verify`."""

    dataset: Path
    """The dataset to read in full."""


@config
class ServeConfig:
    """`kiln serve`."""

    source: Path
    """A folder that `kiln source` made."""


@config
class FaultsConfig:
    """Shares of the rows that get each fault, so that a pipeline meets them all."""

    missing_frac: Fraction
    """404."""
    truncated_frac: Fraction
    """The connection ends before Content-Length bytes came."""
    cut_frac: Fraction
    """Half the file, with the length of half the file."""
    not_an_image_frac: Fraction
    """An HTML page, with status 200."""
    slow_frac: Fraction
    """No answer for slow_s."""
    redirect_frac: Fraction
    """302 to the real picture; these rows succeed."""
    opt_out_frac: Fraction
    """The picture with the header X-Robots-Tag: noai."""
    duplicate_frac: Fraction
    """Rows that are in the parquet twice, added to num_pictures."""
    slow_s: PositiveFloat
    """How long a slow answer takes; more than download.timeout_s."""


@config
class SourceConfig:
    """`kiln source`."""

    kind: Literal["scenes", "emoji", "folder"]
    """scenes: painted; emoji: from three npm packages; folder: your own pictures and captions."""
    out: Path
    """Folder to make: pictures/, rows.parquet, faults.json, source.json."""
    pictures: Path | None
    """kind=folder: pictures with X.txt beside X.jpg, or a captions.csv (file,caption)."""
    num_pictures: PositiveInt
    """How many at most; scenes paints exactly that many."""
    max_side_px: Annotated[int, Field(ge=32, le=4096)]
    """kind=scenes: the longest side that is painted."""
    two_things_frac: Fraction
    """kind=scenes: share of the pictures that show two things in relation."""
    seed: int
    """Another seed paints other pictures and hurts other rows."""
    port: Port
    """Loopback port in the URLs; if it is taken a free one is chosen."""
    processes: PositiveInt | None
    """Painting processes; null is one per core."""
    faults: FaultsConfig
    """What goes wrong, and how often."""


@config
class EncodeConfig:
    """`kiln encode`."""

    dataset: Path
    """A published dataset; its encodings go beside its shards."""
    encoders: EncodersConfig
    """The models; give `kiln train` the same."""
    batch_images: PositiveInt
    """Pictures per pass through the autoencoder; another number may change the last bit."""
    threads: PositiveInt
    """Batches at the same time, one core each; the number changes no byte."""
    device: Literal["cpu", "cuda"]
    """Where the models run."""
    recheck: Literal["sizes", "hashes"]
    """How finished shards are judged when the command is given again; hashes reads them all."""
    tdp_w_per_core: PositiveFloat
    """Watts of one busy CPU core for the TDP model, used only where no energy counter exists."""
