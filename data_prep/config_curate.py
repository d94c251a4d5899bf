"""What the commands that curate a published dataset may be told: frozen dataclasses."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from trainer.frozen import config
from trainer.place import Place


@config
class RemoveConfig:
    """`kiln remove`; it raises the dataset's removal version if anything live goes."""

    dataset: Place
    """A published dataset; its tars stay as they are."""
    keys: tuple[str, ...]
    """Samples by key, 16 hex digits each."""
    urls: tuple[str, ...]
    """Samples by URL, whatever their captions."""
    sha256: tuple[str, ...]
    """Samples by the hash of the stored picture, or of the file that was downloaded."""
    file: Path | None
    """A list of such keys, URLs and hashes, one a line; lines that begin with # are passed over."""
    why: str
    """Reason to record, e.g. 'request 17 of the rights holder'."""
    proof: Path | None
    """JSON file to write the proof to; it is printed in any case."""
    dry_run: bool
    """Only say what would be removed."""


@config
class DedupConfig:
    """`kiln dedup`."""

    dataset: Place
    """A published dataset; its tars stay as they are."""
    against: tuple[Place, ...]
    """Other published datasets: what is in one of them is a duplicate here. They do not change."""
    max_distance: Annotated[int, Field(ge=0, le=12)]
    """Pictures whose 64-bit perceptual hashes differ in at most so many bits are near-duplicates.
    Of a hundred million unrelated pictures chance alone joins 200 pairs at 4 bits, a million at
    8 bits."""
    outcome: Literal["remove", "weight"]
    """remove: one sample of each cluster stays; weight: all stay, each with 1 / cluster size."""
    keep: Literal["largest", "oldest"]
    """Which one stays. largest: most pixels (of the original, if known), then longest caption,
    then smallest key; oldest: the first in order of shards."""
    memory_gb: PositiveFloat
    """Memory for the search; what does not fit is spilled to scratch."""
    scratch: Path | None
    """Local folder to spill to; null is the system's temporary folder."""
    processes: PositiveInt | None
    """Threads of the search; null is one per core."""
    report_clusters: PositiveInt
    """The page dedup.html shows so many of the largest clusters as pictures."""
    dry_run: bool
    """Only write the page and say what would happen."""

    def __post_init__(self) -> None:
        if self.against and self.outcome == "weight":
            raise ValueError(
                "outcome=weight with against: samples of other datasets do not change, so a weight "
                "cannot be shared with them. Give outcome=remove, or no against."
            )


@config
class StatsConfig:
    """`kiln stats`."""

    dataset: Place
    """A published dataset; only its indexes and records are read, no tar."""
    top: PositiveInt
    """How many hosts, top-level domains and languages are listed."""
    out: Path | None
    """The page; null is stats.html in the dataset. The same numbers go beside it as .json."""
