"""Rows of a dataset by number: the shards they lie in, opened when first met, and their members."""

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainer.data.cache import Cache
from trainer.data.fetch import read_range
from trainer.data.manifest import MANIFEST, Manifest, RowWeights, ShardEntry, load_manifest
from trainer.data.npy import HEADER_BYTES, npy_header, read_npy
from trainer.data.order import Int64s, Order
from trainer.data.shards import find_caption, key_ids, parse_index, read_index
from trainer.data.tombstones import live_rows, read_row_weights, removed_since
from trainer.errors import BadData, BadInput
from trainer.place import is_local

MAX_OPEN = 512
"""Shards of a dataset that stay open: each needs a file, and its index in memory."""
RELOAD_S = 60.0
"""How often to ask whether samples were removed meanwhile."""
ANY = ""
"""The bucket of everything, where a dataset has no buckets."""


class Place(NamedTuple):
    """Where a sample lies."""

    shard: "OpenShard"
    row: int
    """In the shard."""


class OpenShard:
    """A tar opened for reading by position, and what is known of its rows; safe for threads."""

    def __init__(
        self,
        path: Path,
        file: BinaryIO | None,
        index: pa.Table,
        weights: NDArray[np.float32],
        *,
        removal_version: int,
    ) -> None:
        """Take a shard apart.

        Args:
            path: Of the tar.
            file: The tar, local and opened; None: every read is a request for a range of `path`.
            index: Of the tar.
            weights: Of its rows, as `read_row_weights` gives them.
            removal_version: Rows that were removed later have a number, but are not given out.
        """
        self.path, self.weights = path, weights
        self.gone = removed_since(weights, removal_version)
        self._index, self._file = index, file
        self._live = live_rows(weights, removal_version)
        self._where = {
            name.partition(".")[2]: (_numbers(index, name), _numbers(index, f"size{name[6:]}"))
            for name in index.column_names
            if name.startswith("offset.")
        }
        self.extensions = tuple(self._where)
        if file is not None:  # closed when the last reader lets go of it
            weakref.finalize(self, file.close)

    @cached_property
    def ids(self) -> Int64s:
        """Sample id of each row."""
        return key_ids(self._index["key"].to_pylist())

    def rows_of(self, bucket: str) -> Int64s:
        """List the live rows of a bucket, in order; an index without buckets has only one."""
        return self._by_bucket[bucket] if self._by_bucket else self._live

    @cached_property
    def _by_bucket(self) -> Mapping[str, Int64s]:
        if "bucket" not in self._index.column_names:
            return {}
        buckets = self._index["bucket"].combine_chunks().dictionary_encode()
        numbers = buckets.indices.to_numpy()[self._live]
        names = enumerate(buckets.dictionary.to_pylist())
        return {name: self._live[numbers == number] for number, name in names}

    def key(self, row: int) -> str:
        """Name a row."""
        return str(self._index["key"][row].as_py())

    def size_bytes(self, row: int, extension: str) -> int:
        """Bytes of a member; -1 if the sample has none of that kind."""
        return int(self._where[extension][1][row]) if extension in self._where else -1

    def read(self, row: int, extension: str) -> bytes:
        """Read one member of a sample.

        Raises:
            BadData: The sample has no such member, or the tar ends before it does.
        """
        offset, num_bytes = self._range(row, extension)
        if self._file is None:
            content = read_range(self.path, offset, offset + num_bytes)
        else:
            content = os.pread(self._file.fileno(), num_bytes, offset)
        if len(content) < num_bytes:
            raise self._cut(row, extension, num_bytes, len(content))
        return content

    def caption(self, row: int) -> str:
        """Read the caption of a row; see `find_caption`."""
        there = [name for name in self.extensions if self.size_bytes(row, name) >= 0]
        return find_caption(there, partial(self.read, row), key=self.key(row), path=self.path)

    def read_array(self, row: int, extension: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read a `.npy` member, without a copy where it goes.

        Args:
            row: Of the sample.
            extension: Of the member.
            out: Contiguous; filled and returned if the member is just such an array. Else the
                array that is returned is a new one.

        Raises:
            BadData: As `read`; or the member is no array of numbers.
        """
        if out is not None and self._read_into(row, extension, out):
            return out
        try:
            return read_npy(self.read(row, extension))
        except BadData:
            raise
        except ValueError as error:
            raise BadData(f"{self.name(row, extension)} is no array: {error}.") from error

    def _read_into(self, row: int, extension: str, out: NDArray[Any]) -> bool:
        """Read a member into its place; False if it is not just such an array."""
        offset, num_bytes = self._range(row, extension)
        if num_bytes != HEADER_BYTES + out.nbytes:
            return False
        expected = npy_header(out.dtype.str, out.shape)
        if self._file is None:
            content = self.read(row, extension)
            out[...] = np.frombuffer(content, out.dtype, offset=HEADER_BYTES).reshape(out.shape)
            return content[:HEADER_BYTES] == expected
        header = bytearray(HEADER_BYTES)
        found = os.preadv(self._file.fileno(), [header, out.data], offset)
        return found == num_bytes and header == expected

    def name(self, row: int, extension: str) -> str:
        """Name a member for a message."""
        return f"{self.key(row)}.{extension} in {self.path}"

    def _range(self, row: int, extension: str) -> tuple[int, int]:
        if extension not in self._where or self._where[extension][0][row] < 0:
            raise BadData(f"{self.name(row, extension)} is not there.")
        offsets, sizes = self._where[extension]
        return int(offsets[row]), int(sizes[row])

    def _cut(self, row: int, extension: str, needed: int, found: int) -> BadData:
        return BadData(
            f"{self.name(row, extension)} is cut: it needs {needed} bytes, {found} are there."
        )


class Reader:
    """All shards of one folder, a dataset's or an encoding's; opens them when first met."""

    def __init__(
        self,
        folder: Path,
        entries: tuple[ShardEntry, ...],
        *,
        dataset: Path,
        manifest: Manifest,
        removal_version: int,
        orders: Mapping[str, Order],
        cache: Cache | None = None,
        keys_only: bool = False,
    ) -> None:
        """Take what rows are numbered by.

        Args:
            folder: Where the tars and their indexes lie.
            entries: The tars.
            dataset: Has the rows' weights and removals.
            manifest: Of the dataset.
            removal_version: See `OpenShard`.
            orders: Bucket -> order of its rows.
            cache: Where tars are kept on this node. None: they are read where they lie.
            keys_only: No tar is opened: rows have keys, and nothing of them can be read.
        """
        self.folder, self.entries, self.cache = folder, entries, cache
        self._dataset, self._orders, self._keys_only = dataset, orders, keys_only
        self._version = removal_version
        self._shards_fingerprint = manifest.shards_fingerprint
        self._weights, self.weighted = manifest.weights, manifest.rows_weighted > 0
        self._stamp: tuple[float, int] | None = None
        self._asked_s = time.monotonic()
        self._open: OrderedDict[int, Future[OpenShard]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, bucket: str, rows: Int64s) -> list[Place | BadData]:
        """Find rows of a bucket; shards that cannot be read give the error for each of theirs."""
        order = self._orders[bucket]
        shards = order.shard_of(rows)
        inside = rows - order.ends[shards] + order.counts[shards]
        return [
            self._find(bucket, number, row)
            for number, row in zip(shards.tolist(), inside.tolist(), strict=True)
        ]

    def opened(self, number: int) -> OpenShard:
        """Open a shard by its number, or find it open.

        Raises:
            BadData: It is not there, or not what the manifest says.
        """
        with self._lock:
            self._reload(every_s=RELOAD_S)
            future = self._open.get(number)
            if future is not None:
                self._open.move_to_end(number)
            else:
                mine = self._open[number] = Future()
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
        if future is None:
            future = mine
            try:
                future.set_result(self._open_shard(self.entries[number]))
            except BaseException as error:
                # What the storage lacks it will lack at the next sample: ask once.
                if not isinstance(error, BadData):
                    with self._lock:
                        self._open.pop(number, None)
                future.set_exception(error)
        return future.result()

    def shard_name(self, bucket: str, row: int) -> str:
        """Name the tar of a row."""
        number = int(self._orders[bucket].shard_of(np.array([row]))[0])
        return str(self.entries[number].tar(self.folder))

    def fetch(self, entry: ShardEntry) -> None:
        """Bring a shard into the cache; that it cannot be had is said when its samples are read."""
        assert self.cache is not None
        with suppress(BadData):
            self._cached_index(self.cache, entry).close()
            tar = entry.tar(self.folder)
            self.cache.open(tar, num_bytes=entry.bytes, sha256=entry.content_sha256).close()

    def close(self) -> None:
        """Let go of all files; those being read are closed when that ends."""
        with self._lock:
            self._open.clear()

    def _find(self, bucket: str, number: int, row: int) -> Place | BadData:
        try:
            shard = self.opened(number)
        except BadData as error:
            return error
        return Place(shard, int(shard.rows_of(bucket)[row]))

    def _open_shard(self, entry: ShardEntry) -> OpenShard:
        tar = entry.tar(self.folder)
        index = self._index(entry)
        if index.num_rows != entry.count:
            raise BadData(
                f"{entry.index(self.folder)} has {index.num_rows} rows, the manifest says "
                f"{entry.count}."
            )
        return OpenShard(
            tar,
            self._file(tar, entry),
            index,
            self._row_weights(entry),
            removal_version=self._version,
        )

    def _index(self, entry: ShardEntry) -> pa.Table:
        path = entry.index(self.folder)
        try:
            if self.cache is None:
                return read_index(path)
            with self._cached_index(self.cache, entry) as file:
                return parse_index(file.read(), path)
        except BadData:
            raise
        except BadInput as error:
            raise BadData(str(error)) from error

    def _cached_index(self, cache: Cache, entry: ShardEntry) -> BinaryIO:
        path = entry.index(self.folder)
        return cache.open(path, num_bytes=entry.index_bytes, sha256=entry.index_sha256)

    def _file(self, tar: Path, entry: ShardEntry) -> BinaryIO | None:
        if self._keys_only:
            return None
        if self.cache is not None:
            return self.cache.open(tar, num_bytes=entry.bytes, sha256=entry.content_sha256)
        if not is_local(tar):
            return None
        try:
            return tar.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise BadData(f"{tar} is not there, the manifest lists it.") from error

    def _row_weights(self, entry: ShardEntry) -> NDArray[np.float32]:
        # The encoding's entry and the dataset's have the same number and rows.
        try:
            return read_row_weights(self._dataset, entry, self._weights.get(entry.number))
        except BadInput:
            with self._lock:
                self._reload(every_s=0.0)
            return read_row_weights(self._dataset, entry, self._weights.get(entry.number))

    def _reload(self, *, every_s: float) -> None:
        """Take note of samples that were removed since the manifest was read."""
        if time.monotonic() - self._asked_s < every_s:
            return
        self._asked_s = time.monotonic()
        stamp = _stamp(self._dataset)
        if stamp == self._stamp:
            return
        manifest = load_manifest(self._dataset)
        if manifest.shards_fingerprint != self._shards_fingerprint:
            raise BadInput(
                f"the shards of {self._dataset} were changed while they were being read: the order "
                "of the samples would not continue. Put them back, or begin another run=."
            )
        before: dict[str, RowWeights] = self._weights
        self._stamp = stamp
        self._weights, self.weighted = manifest.weights, manifest.rows_weighted > 0
        for number, entry in enumerate(self.entries):
            if before.get(entry.number) != self._weights.get(entry.number):
                self._open.pop(number, None)


def _numbers(index: pa.Table, name: str) -> Int64s:
    numbers: Int64s = pc.fill_null(index[name].cast(pa.int64()), -1).to_numpy()
    return numbers


def _stamp(dataset: Path) -> tuple[float, int] | None:
    try:
        stat = (dataset / MANIFEST).stat()
    except FileNotFoundError:  # a command that changes the dataset is at work
        return None
    return stat.st_mtime, stat.st_size
