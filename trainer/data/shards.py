"""Write tars that are the same byte for byte, index them, and read their members by position."""

import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainer.data.headers import BLOCK_BYTES, cut, read_members, split_name
from trainer.data.publish import file_sha256, published
from trainer.errors import BadData, BadInput
from trainer.place import is_local, local_folder, read_bytes, remote

REPAIR = (
    "Give the `kiln prepare` or `kiln index` command that made the dataset again: it writes what "
    "is missing."
)
_HEX_KEY_DIGITS = 16
_HEX = re.compile(r"[0-9a-fA-F]*")
CAPTION_MEMBERS = ("txt", "json")
"""What a caption is read from, in this order."""
_CAPTIONS = ("caption", "text", "TEXT")


class Sample(NamedTuple):
    """One training sample: what a shard stores under one key."""

    key: str
    """16 lowercase hex digits in what Kiln makes; any text without a dot in foreign datasets."""
    members: Mapping[str, bytes]
    """File extension (without the first dot) -> content: {"jpg": ..., "latent.npy": ...}."""
    columns: Mapping[str, Any] = MappingProxyType({})
    """Extra values for the index; every sample of a shard has the same names."""


class Written(NamedTuple):
    """What `write_shard` wrote, measured before it was published."""

    num_samples: int
    num_bytes: int
    """Size of the tar."""
    sha256: str
    """Hash of the tar."""
    index_num_bytes: int
    """Size of the index."""
    index_sha256: str
    """Hash of the index."""


def write_shard(tar_path: Path, index_path: Path, samples: Iterable[Sample]) -> Written:
    """Write a tar and its index, each atomically, the tar first.

    Equal samples give equal bytes: members go by key, then extension, with a fixed owner, mode
    and time. The samples are consumed one by one, so a generator keeps memory small.

    Args:
        tar_path: Where the tar goes, e.g. `DATASET/shards/00000.tar`.
        index_path: Where its parquet index goes.
        samples: In strictly increasing order of their keys.
    """
    rows: list[dict[str, Any]] = []
    last_key = ""
    with published(tar_path) as partial:
        with partial.open("wb") as file, _open_tar(file) as tar:
            for sample in samples:
                assert sample.key > last_key, f"keys out of order: {last_key}, {sample.key}"
                last_key = sample.key
                rows.append({"key": sample.key, **_add(tar, sample), **sample.columns})
        measured = partial.stat().st_size, file_sha256(partial)
    with published(index_path) as partial:
        pq.write_table(members_table(rows), partial, compression="zstd")
        return Written(len(rows), *measured, partial.stat().st_size, file_sha256(partial))


def members_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Make an index of rows: key, `offset.EXT`, `size.EXT` and more, null where a row has none."""
    # from_pylist alone would keep the columns of the first row only.
    names = sorted({name for row in rows for name in row} - {"key"})
    return pa.table({name: [row.get(name) for row in rows] for name in ("key", *names)})


def _open_tar(file: BinaryIO) -> tarfile.TarFile:
    # Plain USTAR, byte for byte, but for names that USTAR has no room for.
    return tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)


def _add(tar: tarfile.TarFile, sample: Sample) -> dict[str, int]:
    where: dict[str, int] = {}
    for extension in sorted(sample.members):
        content = sample.members[extension]
        info = tarfile.TarInfo(f"{sample.key}.{extension}")
        info.size = len(content)
        info.mode = 0o644  # time and owner are 0 and empty by default
        tar.addfile(info, BytesIO(content))
        blocks = -(-len(content) // BLOCK_BYTES)
        where[f"offset.{extension}"] = tar.offset - blocks * BLOCK_BYTES
        where[f"size.{extension}"] = len(content)
    return where


def read_index(
    path: Path, *, columns: Collection[str] | None = None, repair: str = REPAIR
) -> pa.Table:
    """Read a shard's index: key, `offset.EXT` and `size.EXT` (int64, of the payload), and more.

    Args:
        path: The parquet.
        columns: Read only those of these columns that are there; None is all.
        repair: What to do when it is damaged.
    """
    try:
        file = _mapped(path) if is_local(path) else pa.BufferReader(read_bytes(path))
    except FileNotFoundError as error:
        raise BadInput(f"{path} is not there. {repair}") from error
    return parse_index(file, path, columns=columns, repair=repair)


def parse_index(
    file: Any,  # noqa: ANN401 - pyarrow has no types
    path: Path,
    *,
    columns: Collection[str] | None = None,
    repair: str = REPAIR,
) -> pa.Table:
    """Do what `read_index` does with an opened file, or with bytes; `path` is for errors."""
    try:
        parquet = pq.ParquetFile(pa.BufferReader(file) if isinstance(file, bytes) else file)
        there = parquet.schema_arrow.names
        return parquet.read([name for name in there if columns is None or name in columns])
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path} is no readable parquet file ({error}). {repair}") from error


def _mapped(path: Path) -> Any:  # noqa: ANN401 - pyarrow has no types
    # An empty file cannot be mapped.
    return pa.memory_map(str(path)) if path.stat().st_size else pa.BufferReader(b"")


def key_ids(keys: Sequence[str]) -> NDArray[np.int64]:
    """Give the sample ids of keys.

    Returns:
        ``(len(keys),)``: of a key of 16 hex digits, the number that it is; of any other key,
        the first 64 bits of its BLAKE2b hash.
    """
    digits = "".join(keys)
    if set(map(len, keys)) <= {_HEX_KEY_DIGITS} and _HEX.fullmatch(digits):
        content = bytes.fromhex(digits)
    else:
        content = b"".join(map(_key_bytes, keys))
    return np.frombuffer(content, ">i8").astype(np.int64)


def _key_bytes(key: str) -> bytes:
    if len(key) == _HEX_KEY_DIGITS and _HEX.fullmatch(key):
        return bytes.fromhex(key)
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def scan_tar(path: Path, *, repair: str = REPAIR) -> pa.Table:
    """Build the member part of an index from a tar's headers alone; payloads are not read.

    A remote tar is fetched whole: one request rather than one for each header.

    Raises:
        BadInput: The tar is cut, or none.
    """
    with Blob(path, whole=True, repair=repair) as blob:
        return _scan(blob, repair)


def _scan(blob: "Blob", repair: str) -> pa.Table:
    samples: dict[str, dict[str, Any]] = {}
    for member in read_members(blob, repair=repair):
        if parts := split_name(member.name):
            key, extension = parts
            row = samples.setdefault(key, {"key": key})
            row[f"offset.{extension}"] = member.offset
            row[f"size.{extension}"] = member.num_bytes
    return members_table(list(samples.values()))


class Blob:
    """A file opened for reading by position; safe to read from several threads."""

    def __init__(self, path: Path, *, whole: bool = False, repair: str = REPAIR) -> None:
        """Open `path`.

        Args:
            path: Local or remote.
            whole: Most of it will be read: fetch a remote file at once, to a nameless local one.
                Otherwise every read is a request for a range.
            repair: What to do if it is not there.
        """
        self.path = path
        self._file: BinaryIO | None = None
        try:
            if is_local(path):
                self._file = path.open("rb", buffering=0)
            elif whole:
                self._file = _fetch(path)
            if self._file is None:
                self.num_bytes = path.stat().st_size
            else:
                self.num_bytes = os.fstat(self._file.fileno()).st_size
        except FileNotFoundError as error:
            raise BadInput(f"{path} is not there. {repair}") from error

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Read up to `num_bytes` at `offset`; short only at the end."""
        if self._file is not None:
            return _pread(self._file, offset, num_bytes)
        end = min(offset + num_bytes, self.num_bytes)
        if end <= offset:
            return b""
        fs, name = remote(self.path)
        content: bytes = fs.cat_file(name, start=offset, end=end)
        return content

    def sha256(self) -> str:
        """Hash the content."""
        digest, step = hashlib.sha256(), 1 << 20
        for at in range(0, self.num_bytes, step):
            digest.update(self.read_at(at, step))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "Blob":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _fetch(path: Path) -> BinaryIO:
    # Nameless: a kill leaves nothing behind.
    copy = tempfile.TemporaryFile(dir=local_folder(path.parent), buffering=0)  # noqa: SIM115
    try:
        with path.open("rb") as file:
            shutil.copyfileobj(file, copy, 1 << 20)
    except BaseException:
        copy.close()
        raise
    return copy


def _pread(file: BinaryIO, offset: int, num_bytes: int) -> bytes:
    pieces: list[bytes] = []
    while num_bytes > 0:
        piece = os.pread(file.fileno(), num_bytes, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
        num_bytes -= len(piece)
    return b"".join(pieces)


def find_caption(
    extensions: Collection[str], read: Callable[[str], bytes], *, key: str, path: Path
) -> str:
    """Read the caption of a sample: its txt, or else what its json says.

    Bytes of a txt that are no UTF-8 become U+FFFD.

    Args:
        extensions: Of the members that the sample has.
        read: Extension -> content of the member.
        key: Names the sample in the error.
        path: Names the tar.

    Raises:
        BadData: It has neither.
    """
    if "txt" in extensions:
        return read("txt").decode(errors="replace")
    content = read("json") if "json" in extensions else b""
    try:
        facts = json.loads(content)
        texts = (facts[name] for name in _CAPTIONS if isinstance(facts.get(name), str))
        return str(next(texts))
    except (ValueError, AttributeError, StopIteration) as error:
        raise BadData(
            f"{path}: {key} has no caption: need a .txt, or a .json with one of "
            f"{', '.join(_CAPTIONS)}. "
            f"`kiln remove keys=[{_key_bytes(key).hex()}]` takes it out."
        ) from error


class Shard:
    """A tar opened for reading by position; safe to read from several threads."""

    def __init__(
        self, tar_path: Path, index: pa.Table, *, whole: bool = False, repair: str = REPAIR
    ) -> None:
        """Open `tar_path`; `index` is what `read_index` or `scan_tar` gave; `whole` as in Blob."""
        self.path = tar_path
        self.keys: list[str] = index["key"].to_pylist() if index.num_rows else []
        self._repair = repair
        self._where = {
            name.partition(".")[2]: (
                index[name].to_pylist(),
                index[f"size.{name.partition('.')[2]}"].to_pylist(),
            )
            for name in index.column_names
            if name.startswith("offset.")
        }
        self.blob = Blob(tar_path, whole=whole, repair=repair)
        """The tar."""

    def read(self, row: int, extension: str) -> bytes:
        """Read one member of the sample number `row`.

        Raises:
            BadInput: The tar ends before the member does.
            KeyError: No sample of this shard has such a member.
        """
        offsets, sizes = self._where[extension]
        if offsets[row] is None:
            raise KeyError(f"{self.keys[row]}.{extension} is not in {self.path}")
        content = self.blob.read_at(offsets[row], sizes[row])
        if len(content) < sizes[row]:
            raise cut(self.blob, offsets[row] + sizes[row], self._repair)
        return content

    def caption(self, row: int) -> str:
        """Read the caption of the sample number `row`; see `find_caption`."""
        return find_caption(
            self.extensions(row), partial(self.read, row), key=self.keys[row], path=self.path
        )

    def scan(self) -> pa.Table:
        """Do what `scan_tar` does."""
        return _scan(self.blob, self._repair)

    def sha256(self) -> str:
        """Hash the tar."""
        return self.blob.sha256()

    def extensions(self, row: int) -> list[str]:
        """List the members that the sample number `row` has, sorted."""
        return sorted(ext for ext, (offsets, _) in self._where.items() if offsets[row] is not None)

    def close(self) -> None:
        """Close the tar."""
        self.blob.close()

    def __enter__(self) -> "Shard":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
