"""What a published dataset consists of, and whether its files are all there."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from trainer.data.publish import file_sha256, publish_json
from trainer.data.shards import REPAIR, Sample, write_shard
from trainer.errors import BadInput
from trainer.place import place, read_bytes, remove, sizes_bytes

SCHEMA = 1
MANIFEST = "manifest.json"
ENCODING = "encoding.json"
HEADERS_ONLY = "headers:"
REPAIR_ENCODING = "Give the `kiln encode` command that made the encoding again."

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One published tar and its index."""

    name: str
    """Path of the tar inside its folder: `shards/00000.tar`, or `00000.tar` in an encoding."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """Hash of the tar, or 'headers:' and that of its headers alone, if it was never read whole."""
    count: int
    """Samples in it that are used."""
    index_bytes: int
    """Size of the index."""
    index_sha256: str
    """Hash of the index."""
    at: str | None = None
    """Where a tar lies that `kiln index` found and left there: an absolute path, a URL, or a path
    inside the dataset. Then `name` only gives the shard its number."""

    @property
    def content_sha256(self) -> str | None:
        """Hash of the tar's bytes; None if it is not known."""
        return None if self.sha256.startswith(HEADERS_ONLY) else self.sha256

    @property
    def number(self) -> str:
        """The shard's number as text, e.g. '00000': equal in a dataset and in its encodings."""
        return Path(self.name).stem

    def tar(self, folder: Path) -> Path:
        """Where the tar lies, in a dataset or encoding folder or elsewhere."""
        if self.at is None:
            return folder / self.name
        elsewhere = "://" in self.at or self.at.startswith("/")
        return place(self.at) if elsewhere else folder / self.at

    def index(self, folder: Path) -> Path:
        """Where the index lies."""
        return folder / "index" / f"{self.number}.parquet"


def publish_shard(folder: Path, name: str, samples: Iterable[Sample]) -> ShardEntry | None:
    """Write a tar and its index into a dataset or encoding; None, and no files, without samples.

    Args:
        folder: Dataset or encoding.
        name: Path of the tar inside it; its stem is the shard's number.
        samples: In strictly increasing order of their keys.
    """
    tar, index = folder / name, folder / "index" / f"{Path(name).stem}.parquet"
    written = write_shard(tar, index, samples)
    if written.num_samples == 0:  # an empty shard would only be a trap for readers
        remove(tar)
        remove(index)
        return None
    return ShardEntry(
        name=name,
        bytes=written.num_bytes,
        sha256=written.sha256,
        count=written.num_samples,
        index_bytes=written.index_num_bytes,
        index_sha256=written.index_sha256,
    )


def describe_shard(folder: Path, name: str, count: int) -> ShardEntry:
    """Measure and hash a published tar and its index as they are now."""
    tar, index = folder / name, folder / "index" / f"{Path(name).stem}.parquet"
    return ShardEntry(
        name=name,
        bytes=tar.stat().st_size,
        sha256=file_sha256(tar),
        count=count,
        index_bytes=index.stat().st_size,
        index_sha256=file_sha256(index),
    )


def shards_fingerprint(shards: Iterable[ShardEntry]) -> str:
    """Hash what the shards hold: sha256 over the sorted (name, sha256, count)."""
    lines = sorted(f"{shard.name}\0{shard.sha256}\0{shard.count}\n" for shard in shards)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWeights:
    """A shard of which some samples count less than others: `weights/00000.npy`."""

    removed: dict[int, int]
    """Removal version -> samples that went at it: they are in the tar, no reader gives them out."""
    weighted: int
    """Samples of a weight between 0 and 1."""
    sha256: str
    """Hash of the file."""

    @property
    def rows_removed(self) -> int:
        """Samples that were removed, at whatever version."""
        return sum(self.removed.values())

    def rows_removed_until(self, version: int) -> int:
        """Samples that were removed at a version or before it."""
        return sum(rows for went, rows in self.removed.items() if went <= version)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A dataset: its shards, what became of every input row, and where it came from."""

    shards: tuple[ShardEntry, ...]
    """In order of their names; never an empty shard."""
    rows_in: int
    """Rows of the source."""
    rows_kept: int
    """Samples in all shards, whatever their weight."""
    rejected: dict[str, int]
    """Reason -> rows in quarantine for it."""
    weights: dict[str, RowWeights] = field(default_factory=dict)
    """Shard number -> weights of its samples; in all other shards every sample has weight 1."""
    removal_version: int = 0
    """How many removals of live samples there were; with `shards_fingerprint`, all that the order
    of a run's samples depends on."""
    tombstones_sha256: str | None = None
    """Hash of `tombstones.parquet`, if any sample was ever removed."""
    cluster_weights_sha256: str | None = None
    """Hash of `weights.parquet`, if near-duplicates share one weight."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Source hash, rules and their hash, versions of the tools."""
    schema: int = SCHEMA
    """Version of this layout."""

    @property
    def fingerprint(self) -> str:
        """The dataset's name by content; changes with any byte of any shard and any weight."""
        if not self.weights:
            return self.shards_fingerprint
        lines = sorted(f"{number}\0{some.sha256}\n" for number, some in self.weights.items())
        return hashlib.sha256("".join([self.shards_fingerprint, *lines]).encode()).hexdigest()

    @property
    def shards_fingerprint(self) -> str:
        """The name of the shards alone, which encodings are made from."""
        return shards_fingerprint(self.shards)

    @property
    def rows_removed(self) -> int:
        """Samples that were removed, at whatever version."""
        return sum(some.rows_removed for some in self.weights.values())

    @property
    def rows_weighted(self) -> int:
        """Samples of a weight between 0 and 1."""
        return sum(some.weighted for some in self.weights.values())

    @property
    def rows_live(self) -> int:
        """Samples that readers give out."""
        return self.rows_kept - self.rows_removed

    @property
    def rows_rejected(self) -> int:
        """Rows in quarantine."""
        return sum(self.rejected.values())

    def rows_live_at(self, version: int) -> int:
        """Samples that were live at a removal version: an epoch of a run that began with it."""
        return sum(self.live_counts_at(version))

    def live_counts_at(self, version: int) -> list[int]:
        """Count the samples of each shard that were live at a removal version.

        Raises:
            BadInput: The dataset is an older copy, which does not know that version.
        """
        if version > self.removal_version:
            raise BadInput(
                f"the dataset {self.fingerprint[:12]} has removal version {self.removal_version}, "
                f"and {version} is needed, at which the run began: this is a copy of before a "
                "removal. Give the dataset that the run began with, or a newer copy of it."
            )
        gone = {name: some.rows_removed_until(version) for name, some in self.weights.items()}
        return [shard.count - gone.get(shard.number, 0) for shard in self.shards]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Sidecar tars of latents and text states for the shards of one dataset."""

    fingerprint: str
    """The encoding's name: hash of everything that shapes a latent; also its folder's name."""
    dataset_fingerprint: str
    """The shards that it was made from: the dataset's `shards_fingerprint`."""
    shards: tuple[ShardEntry, ...]
    """One per shard of the dataset, with equal numbers, keys and counts."""
    bucket_counts: dict[str, list[NonNegativeInt]]
    """'WIDTHxHEIGHT' of a picture -> samples of that size in each shard, in the order of `shards`;
    without aspect buckets the square alone."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the encoders were, in words and numbers."""
    schema: int = SCHEMA
    """Version of this layout."""

    @property
    def bucket_totals(self) -> dict[str, int]:
        """'WIDTHxHEIGHT' -> samples of that size in all shards."""
        return {bucket: sum(counts) for bucket, counts in self.bucket_counts.items()}


def save_manifest(dataset: Path, manifest: Manifest) -> None:
    """Write `DATASET/manifest.json`, atomically."""
    publish_json(dataset / MANIFEST, {**asdict(manifest), "fingerprint": manifest.fingerprint})


def load_manifest(dataset: Path) -> Manifest:
    """Read `DATASET/manifest.json`.

    Raises:
        BadInput: There is none (the dataset is unfinished), or it is not one.
    """
    path = dataset / MANIFEST
    try:
        manifest = _load(Manifest, path, REPAIR)
    except (FileNotFoundError, NotADirectoryError) as error:
        state = "is unfinished: it has no manifest.json" if dataset.exists() else "is not there"
        raise BadInput(
            f"the dataset {dataset} {state}. `kiln prepare rows=... dataset={dataset}` or "
            f"`kiln index tars=... dataset={dataset}` makes or finishes it."
        ) from error
    kept = sum(shard.count for shard in manifest.shards)
    if kept != manifest.rows_kept or manifest.rows_in != kept + manifest.rows_rejected:
        raise BadInput(
            f"{path} does not add up: {manifest.rows_in} rows in, {manifest.rows_kept} kept "
            f"({kept} in its shards), {manifest.rows_rejected} rejected. {REPAIR}"
        )
    counts = {shard.number: shard.count for shard in manifest.shards}
    for number, some in manifest.weights.items():
        if some.rows_removed + some.weighted > counts.get(number, 0):
            raise BadInput(
                f"{path} does not add up: {some.rows_removed} samples removed and {some.weighted} "
                f"weighted of {counts.get(number, 0)} in shard {number}. {REPAIR}"
            )
        if some.removed and max(some.removed) > manifest.removal_version:
            raise BadInput(
                f"{path} does not add up: samples of shard {number} went at removal version "
                f"{max(some.removed)}, the dataset's is {manifest.removal_version}. {REPAIR}"
            )
    return manifest


def save_encoding(dataset: Path, encoding: Encoding) -> None:
    """Write `DATASET/encodings/<fingerprint>/encoding.json`, atomically."""
    publish_json(encoding_folder(dataset, encoding.fingerprint) / ENCODING, asdict(encoding))


def load_encoding(folder: Path) -> Encoding:
    """Read the `encoding.json` of one encoding's folder.

    Raises:
        BadInput: There is none (the encoding is unfinished), or it does not add up.
    """
    path = folder / ENCODING
    try:
        encoding = _load(Encoding, path, REPAIR_ENCODING)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(
            f"{folder} is no finished encoding: it has no {ENCODING}. {REPAIR_ENCODING}"
        ) from error
    expected = [shard.count for shard in encoding.shards]
    found = [sum(counts) for counts in zip_longest(*encoding.bucket_counts.values(), fillvalue=0)]
    if found != expected:
        raise BadInput(
            f"{path} does not add up: its bucket_counts have {sum(found)} samples in {len(found)} "
            f"shards, need those of its shards one by one, {sum(expected)} in {len(expected)}. "
            f"{REPAIR_ENCODING}"
        )
    return encoding


def encoding_folder(dataset: Path, fingerprint: str) -> Path:
    """Where an encoding lies."""
    return dataset / "encodings" / fingerprint


def list_encodings(dataset: Path) -> list[Encoding]:
    """Read every finished encoding of a dataset, in order of their fingerprints."""
    return [load_encoding(path.parent) for path in sorted(dataset.glob(f"encodings/*/{ENCODING}"))]


def check_files(folder: Path, shards: Sequence[ShardEntry], *, repair: str = REPAIR) -> None:
    """Check that every tar and index is there with the right number of bytes; reads no content.

    Raises:
        BadInput: The first file that is not, with the expected and the found size.
    """
    expected = [
        pair
        for shard in shards
        for pair in ((shard.tar(folder), shard.bytes), (shard.index(folder), shard.index_bytes))
    ]
    found = sizes_bytes([path for path, _ in expected])
    for (path, expected_bytes), found_bytes in zip(expected, found, strict=True):
        if found_bytes is None:
            raise BadInput(f"{path} is not there, the manifest lists it. {repair}")
        if found_bytes != expected_bytes:
            raise BadInput(
                f"{path} does not match the manifest: expected {expected_bytes} bytes, found "
                f"{found_bytes}. {repair}"
            )


def _load(cls: type[T], path: Path, repair: str) -> T:
    try:
        loaded = TypeAdapter(cls).validate_json(read_bytes(path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BadInput(f"{path} is damaged: {where} {problem['msg']}. {repair}") from error
    found = getattr(loaded, "schema", SCHEMA)
    if found != SCHEMA:
        raise BadInput(
            f"{path} has schema {found}, this Kiln reads {SCHEMA}: use the Kiln that wrote it."
        )
    return loaded
