"""Publish what the encoders made of one shard as a sidecar tar."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.encode_batches import Encoded, to_npy
from data_prep.encode_records import SidecarRecord, Sums, record_path
from trainer.data.manifest import ShardEntry, publish_shard
from trainer.data.publish import publish_json
from trainer.data.shards import Sample

# Shape suffixes: C latent channels, H W rows and columns.


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
