"""Publish what the encoders made of one shard as a sidecar tar, and judge whether it is there."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from data_prep.encode_batches import Encoded, to_npy
from trainer.data.manifest import ShardEntry, publish_shard
from trainer.data.publish import file_sha256, publish_json
from trainer.data.shards import Sample
from trainer.place import read_bytes, sizes_bytes

# Shape suffixes: C latent channels, H W rows and columns.


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


def write_sidecar(
    folder: Path,
    source: ShardEntry,
    samples: Iterable[Encoded],
    *,
    latent_shape: tuple[int, int, int],
) -> SidecarRecord:
    """Publish the sidecar of one shard, its index and then its record.

    Args:
        folder: The encoding's folder.
        source: The dataset's shard.
        samples: All of the shard's, in its order.
        latent_shape: Of a square picture.
    """
    tally = _Tally(latent_shape[0])
    entry = publish_shard(folder, f"{source.number}.tar", tally.count(samples))
    assert entry is not None, "a dataset has no empty shards"
    record = SidecarRecord(
        source_sha256=source.sha256,
        shard=entry,
        sums=tally.sums(),
        latent_shape=latent_shape,
        buckets=dict(sorted(tally.buckets.items())),
    )
    publish_json(record_path(folder, source.number), asdict(record))
    return record


class _Tally:
    """Adds up latents sample by sample, so that batches leave no trace in the sums."""

    def __init__(self, num_channels: int) -> None:
        self._num_values = 0
        self._first_C: NDArray[np.float64] = np.zeros(num_channels)
        self._second_C: NDArray[np.float64] = np.zeros(num_channels)
        self.buckets = Counter[str]()

    def count(self, samples: Iterable[Encoded]) -> Iterator[Sample]:
        """Yield what a tar stores of each."""
        for encoded in samples:
            mean_CHW, logvar_CHW = encoded.moments_2CHW.astype(np.float64)
            self._num_values += mean_CHW[0].size
            self._first_C += mean_CHW.sum((1, 2))
            self._second_C += (mean_CHW**2 + np.exp(logvar_CHW)).sum((1, 2))
            self.buckets[encoded.columns["bucket"]] += 1
            rows, columns = mean_CHW.shape[1:]
            shape = {"latent_rows": rows, "latent_columns": columns}
            members = {"latent.npy": to_npy(encoded.moments_2CHW), "text.npy": encoded.text}
            yield Sample(encoded.key, members, encoded.columns | shape)

    def sums(self) -> Sums:
        return Sums(
            num_values=self._num_values,
            first_C=tuple(self._first_C.tolist()),
            second_C=tuple(self._second_C.tolist()),
        )
