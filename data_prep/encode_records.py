"""What is there of an encoding: its shards' records, and which of its shards are missing."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_prep.config import EncodeConfig
from trainer.data.manifest import (
    Manifest,
    ShardEntry,
    encoding_folder,
    load_encoding,
)
from trainer.data.null_text import read_null_text
from trainer.data.publish import file_sha256
from trainer.errors import BadInput
from trainer.models.fingerprint import Identity, identify
from trainer.place import NUM_REQUESTS, is_local, read_bytes, remove, sizes_bytes

# Shape suffix: C latent channels.


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums over latents, from which means and standard deviations over a dataset follow."""

    num_values: int
    """Latent numbers per channel."""
    first_C: tuple[float, ...]
    """Per channel: sum of the means."""
    second_C: tuple[float, ...]
    """Per channel: sum of mean^2 + variance, the expected square of a drawn latent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarRecord:
    """Says that a shard is encoded, and from what: `units/00000.json` in an encoding."""

    source_sha256: str
    """Hash of the dataset's tar."""
    shard: ShardEntry
    """What was published."""
    sums: Sums
    """Of its latents."""
    latent_shape: tuple[int, int, int]
    """Channels, rows, columns; of a square picture where there are buckets."""
    buckets: dict[str, int]
    """'WIDTHxHEIGHT' -> pictures encoded at this size."""


def record_path(folder: Path, number: str) -> Path:
    """Where the record of a shard lies in an encoding's folder."""
    return folder / "units" / f"{number}.json"


def finished_record(folder: Path, source: ShardEntry, *, hashes: bool) -> SidecarRecord | None:
    """Return the record of a shard whose sidecar is there, whole and up to date.

    Args:
        folder: The encoding's.
        source: The dataset's shard.
        hashes: Judge the files by their content rather than by their size.
    """
    try:
        content = read_bytes(record_path(folder, source.number))
        record = TypeAdapter(SidecarRecord).validate_json(content)
    except (FileNotFoundError, ValidationError):
        return None
    if record.source_sha256 != source.sha256:
        return None
    tar, index = record.shard.tar(folder), record.shard.index(folder)
    if sizes_bytes([tar, index]) != [record.shard.bytes, record.shard.index_bytes]:
        return None
    if hashes and (file_sha256(tar), file_sha256(index)) != (
        record.shard.sha256,
        record.shard.index_sha256,
    ):
        return None
    return record


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do and what is done already."""

    folder: Path
    """The encoding's."""
    manifest: Manifest
    identity: Identity
    records: dict[str, SidecarRecord]
    """Of the finished shards, by number."""

    @property
    def todo(self) -> list[ShardEntry]:
        """Shards whose sidecar is missing, stale or damaged."""
        return [shard for shard in self.manifest.shards if shard.number not in self.records]

    @property
    def leftovers(self) -> list[str]:
        """Numbers of sidecars whose shard the dataset does not have any more."""
        there = {path.stem for path in record_path(self.folder, "x").parent.glob("*.json")}
        return sorted(there - {shard.number for shard in self.manifest.shards})


def survey(cfg: EncodeConfig, manifest: Manifest) -> Work:
    """Find which shards are encoded by these encoders, with their files intact."""
    identity = identify(cfg.encoders)
    folder = encoding_folder(cfg.dataset, identity.fingerprint)
    hashes = cfg.recheck == "hashes"
    with ThreadPoolExecutor(1 if is_local(folder) else NUM_REQUESTS) as threads:
        found = threads.map(
            lambda shard: finished_record(folder, shard, hashes=hashes), manifest.shards
        )
        pairs = zip(manifest.shards, found, strict=True)
        records = {shard.number: record for shard, record in pairs if record is not None}
    return Work(folder, manifest, identity, records)


def is_current(path: Path, work: Work) -> bool:
    """Whether an encoding.json lists what is there, all of it."""
    if not path.exists():
        return False
    try:
        there = load_encoding(path.parent)
        read_null_text(path.parent, sha256=there.facts.get("null_text_sha256"))
    except BadInput:
        return False
    records = [work.records[shard.number] for shard in work.manifest.shards]
    return there.dataset_fingerprint == work.manifest.shards_fingerprint and there.shards == tuple(
        record.shard for record in records
    )


def retract(folder: Path, number: str) -> None:
    """Remove a sidecar, its record first."""
    remove(record_path(folder, number))
    remove(folder / f"{number}.tar")
    remove(folder / "index" / f"{number}.parquet")
