"""What the data commands may be told: frozen dataclasses."""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_prep.config_scorers import ScorersConfig
from trainer.config import EncodersConfig
from trainer.frozen import config
from trainer.place import Place, is_local, local_folder

Fraction = Annotated[float, Field(ge=0, le=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Byte = Annotated[int, Field(ge=0, le=255)]
PictureFormat = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif"]
ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]


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
class CaptionsConfig:
    """How captions are cleaned; the original is kept in KEY.json where that changes it."""

    unescape_html: bool
    """Write the characters that HTML entities (&amp;) stand for."""
    drop_urls: bool
    """Take web addresses out."""
    max_chars: PositiveInt
    """Longer captions are cut, between words if there are any."""


@config
class DownloadConfig:
    """How pictures are fetched, and from where they may come."""

    timeout_s: PositiveFloat
    """Longest wait for a connection or for the next bytes."""
    deadline_s: PositiveFloat
    """Longest time on the network for one row: connections, redirects, further attempts, body."""
    max_body_bytes: PositiveInt
    """Longer bodies are refused."""
    retries: NonNegativeInt
    """Further attempts after failures that may pass: no connection, 429, 500, 502, 503, 504."""
    max_wait_s: NonNegativeFloat
    """Longest wait for a host that asks for one (Retry-After); rows of one that asks for more fail
    with its answer."""
    host_connections: PositiveInt | None
    """Simultaneous connections to one host, all processes and parts together, but at least one for
    each; null is no limit. Hosts in allow_hosts have none."""
    host_requests_per_s: PositiveFloat | None
    """Requests per second to one host, all processes and parts together; null is no limit."""
    user_agent: Annotated[str, Field(pattern=r"^[!-~]([ -~]*[!-~])?$")]
    """Who asks, as sent to every server; say how you can be reached. Its first word, up to '/', is
    the name that robots.txt may speak to."""
    robots_txt: bool
    """Leave alone what a host's robots.txt disallows."""
    tdm: bool
    """Leave alone what is reserved from text and data mining (TDMRep: header, file, meta tag)."""
    robots_directives: tuple[str, ...]
    """A picture whose X-Robots-Tag header has one of these is left alone (none: as noindex);
    [] ignores the header."""
    allow_hosts: tuple[str, ...]
    """Hosts (HOST or HOST:PORT) that may have private or loopback addresses; others may not."""
    max_failed_frac: Fraction
    """A unit of which more rows than this fail for reasons of the network or the tools stops the
    command; nothing of it is published."""
    accept_unreachable: bool
    """Publish such units too."""


@config
class PrepareConfig:
    """`kiln prepare`."""

    rows: str
    """The source: parquet, csv or jsonl files of URLs and captions; a file, folder, glob or URL."""
    dataset: Place
    """Folder or URL to publish into, e.g. s3://bucket/name; credentials are the environment's."""
    policy: str
    """Which rows are downloaded: 'plain', 'relaion', or a policy file of your own."""
    shard_rows: PositiveInt
    """Rows per unit of work; a unit's kept rows become one shard."""
    parts: PositiveInt
    """Commands that share the work, e.g. tasks of a Slurm array; each does every parts-th unit."""
    part: NonNegativeInt
    """Which of them this is, from 0, e.g. $SLURM_ARRAY_TASK_ID."""
    plan_memory_gb: PositiveFloat
    """Memory for reading and sorting the source; what does not fit is spilled to scratch."""
    scratch: Path | None
    """Local folder for intermediate files; null is one beside the dataset, or under the system's
    temporary folder for a dataset at a URL."""
    image_side_px: PositiveInt
    """Pictures are resized to this side, as resize_mode says."""
    resize_mode: ResizeMode
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
    formats: Annotated[tuple[PictureFormat, ...], Field(min_length=1)]
    """Formats of downloaded pictures that are let in; each more is a decoder more to attack."""
    background_rgb: tuple[Byte, Byte, Byte]
    """Colour behind transparent pixels, and of the bars of resize_mode=border."""
    min_std: NonNegativeFloat
    """Pictures of which no colour (0 to 255) has a standard deviation like this or greater are
    rejected as blank; 0 keeps all."""
    captions: CaptionsConfig
    """How captions are cleaned."""
    columns: ColumnsConfig
    """Names of the source's columns."""
    download: DownloadConfig
    """How pictures are fetched."""
    scorers: ScorersConfig
    """Models that look at every picture before it is published."""
    distributor: Literal["processes", "ray", "pyspark"]
    """Who runs the units: processes of this machine, or img2dataset's distributor for a cluster."""
    processes: PositiveInt | None
    """Worker processes; null is one per core."""
    threads: PositiveInt
    """Simultaneous downloads per worker process."""
    recheck: Literal["sizes", "hashes"]
    """How finished shards are judged when the command is given again; hashes reads them all."""
    retry: tuple[str, ...]
    """Reasons of the quarantine for which rows are tried once more, e.g. [timeout,connection]."""
    wandb: Literal["auto", "offline", "online", "off"]
    """Numbers to W&B as well; auto: online when a key is set, else offline in the dataset."""
    wandb_project: str
    """W&B project."""
    tdp_w_per_core: NonNegativeFloat
    """Watts of one busy CPU core for the energy model, used only where no counter exists."""

    def __post_init__(self) -> None:
        low, high = (0, 9) if self.encode_format == "png" else (1, 100)
        if self.encode_quality is not None and not low <= self.encode_quality <= high:
            raise ValueError(
                f"encode_quality={self.encode_quality} with encode_format={self.encode_format}: "
                f"need {low} to {high}, or null."
            )

        if self.part >= self.parts:
            raise ValueError(f"part={self.part}, need 0 to parts - 1 = {self.parts - 1}.")
        if self.retry and self.parts > 1:
            raise ValueError("retry plans new units for all: give it with parts=1.")

    @property
    def num_processes(self) -> int:
        """The worker processes with their default filled in."""
        return self.processes or len(os.sched_getaffinity(0))

    @property
    def scratch_folder(self) -> Path:
        """This command's own folder for intermediate files, which it removes at the end."""
        if self.scratch is not None:
            name = hashlib.sha256(str(self.dataset).encode()).hexdigest()[:16]
            folder = self.scratch / f"kiln-{name}"
        else:
            near = self.dataset if is_local(self.dataset) else local_folder(self.dataset)
            folder = near / ".work"
        return folder if self.parts == 1 else folder / f"part-{self.part:04d}"

    @property
    def quality(self) -> int:
        """The quality with its default filled in."""
        if self.encode_quality is not None:
            return self.encode_quality
        return 6 if self.encode_format == "png" else 95


@config
class VerifyConfig:
    """`kiln verify`."""

    dataset: Place
    """The dataset to read in full, a folder or a URL."""


@config
class IndexConfig:
    """`kiln index`."""

    tars: str
    """Which tars: a folder, a glob, or a path or URL with braces: s3://bucket/{00000..00099}.tar.
    The dataset has these and no others; more of them next time only add shards."""
    dataset: Place
    """Folder or URL to make, for indexes and a manifest; the tars stay where they are."""
    keys: Literal["as_is", "by_tar"]
    """as_is: a sample's key is its name in the tar; by_tar: its shard's number and a slash before
    it, where other tars have the same names. The key is what `kiln remove` and all randomness of
    training know a sample by."""
    hash: bool
    """Read every tar in full, and record its hash; else that of its headers."""
    skip_bytes: NonNegativeInt
    """Of remote tars: contents of at least so many bytes are skipped with a new request; smaller
    ones are read along, as requests cost time and money, too. 0 reads headers alone."""
    threads: PositiveInt
    """Tars at the same time."""
    accept_broken: bool
    """Make the dataset without the tars that are cut, missing or none."""


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

    dataset: Place
    """A published dataset, a folder or a URL; its encodings go beside its shards."""
    encoders: EncodersConfig
    """The models; give `kiln train` the same."""
    batch_images: PositiveInt
    """Pictures per pass through the autoencoder; another number may change the last bit."""
    batch_tokens: PositiveInt
    """Tokens per pass through the text encoder; another number may change the last bit."""
    threads: PositiveInt
    """Batches at the same time, one core each; the number changes no byte."""
    decode_threads: PositiveInt
    """Threads that read and decode pictures ahead of the encoders; changes no byte either."""
    device: Literal["cpu", "cuda"]
    """Where the models run."""
    probe_s: NonNegativeFloat
    """Seconds for measuring the encoders first, and printing what a cache costs; 0 is none."""
    dry_run: bool
    """Measure, print what the cache would cost and save, and stop."""
    parts: PositiveInt
    """Commands that share the work, e.g. tasks of a Slurm array; each does every parts-th shard."""
    part: NonNegativeInt
    """Which of them this is, from 0, e.g. $SLURM_ARRAY_TASK_ID."""
    recheck: Literal["sizes", "hashes"]
    """How finished shards are judged when the command is given again; hashes reads them all."""
    wandb: Literal["auto", "offline", "online", "off"]
    """Numbers to W&B as well; auto: online when a key is set, else offline in the dataset."""
    wandb_project: str
    """W&B project."""
    tdp_w_per_core: PositiveFloat
    """Watts of one busy CPU core for the TDP model, used only where no energy counter exists."""

    def __post_init__(self) -> None:
        if self.part >= self.parts:
            raise ValueError(f"part={self.part}, need 0 to parts - 1 = {self.parts - 1}.")
