"""Files of named tensors in the safetensors format, written and read in pieces, at any place.

The safetensors package knows local files alone, and needs a second pass to hash one. Here one
pass writes and hashes, and only the bytes that are wanted are read, in few large requests.
Format: https://github.com/huggingface/safetensors
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from trainer.data.publish import file_sha256
from trainer.errors import BadInput
from trainer.place import NUM_REQUESTS, is_local, open_sparsely, remote

CHUNK_BYTES = 4 << 20
"""Hashed and written at a time, without the interpreter's lock."""
GAP_BYTES = 1 << 20
"""So much that nobody asked for is read to save a request."""
BLOCK_BYTES = 16 << 20
"""The most that one request asks for, unless one tensor alone is larger."""
MAX_HEADER_BYTES = 100 << 20
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Want:
    """A range of one flattened tensor, and where it goes."""

    file: Path
    first_byte: int
    target: Tensor
    """Contiguous, on any device; of the dtype in the file."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    first_byte: int

    def range(self, start: int, target: Tensor) -> Want:
        """Ask for the flattened tensor from its element `start` on."""
        return Want(self.file, self.first_byte + start * self.dtype.itemsize, target)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write contiguous CPU tensors; nothing is copied.

    A remote file appears when it is whole; a local one is on disk when this returns.

    Returns:
        The file's size in bytes, and its sha256.
    """
    entries: dict[str, Any] = {}
    place = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    sha256 = hashlib.sha256()
    with _open_for_writing(path) as file:
        for chunk in _chunks(len(header).to_bytes(8, "little") + header, tensors.values()):
            sha256.update(chunk)
            file.write(chunk)
        if is_local(path):
            file.flush()
            os.fsync(file.fileno())
    return 8 + len(header) + place, sha256.hexdigest()


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Read a file's header: name -> where it lies.

    Raises:
        BadInput: It is no such file.
    """
    with open_sparsely(path) as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= MAX_HEADER_BYTES else b""
    try:
        entries = json.loads(text)
        return {
            name: Stored(
                path,
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + size + entry["data_offsets"][0],
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is no safetensors file, or is cut off: {error}") from error


def read_wanted(wants: Iterable[Want]) -> None:
    """Fill every target; ranges that lie near each other share a request."""
    by_file: dict[Path, list[Want]] = {}
    for want in wants:
        by_file.setdefault(want.file, []).append(want)
    blocks = [block for file in by_file.values() for block in _blocks(file)]
    if all(is_local(file) for file in by_file):
        for block in blocks:
            _read_block(block)
        return
    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        list(threads.map(_read_block, blocks))


def sha256_of(path: Path) -> str:
    """Hash a file, wherever it lies."""
    if is_local(path):
        return file_sha256(path)
    sha256 = hashlib.sha256()
    fs, name = remote(path)
    with fs.open(name, "rb", block_size=BLOCK_BYTES, cache_type="readahead") as file:
        while chunk := file.read(BLOCK_BYTES):
            sha256.update(chunk)
    return sha256.hexdigest()


def _blocks(wants: list[Want]) -> Iterator[list[Want]]:
    """Group one file's ranges, in their order, into what one request reads."""
    block: list[Want] = []
    for want in sorted(wants, key=lambda want: want.first_byte):
        far = block and want.first_byte - _end(block[-1]) > GAP_BYTES
        if far or (block and _end(want) - block[0].first_byte > BLOCK_BYTES):
            yield block
            block = []
        block.append(want)
    if block:
        yield block


def _read_block(block: list[Want]) -> None:
    first, end = block[0].first_byte, max(_end(want) for want in block)
    content = torch.empty(end - first, dtype=torch.uint8)
    view = content.numpy().data
    with open_sparsely(block[0].file) as file:
        file.seek(first)
        got = 0
        while got < len(view) and (read := cast(Any, file).readinto(view[got:])):
            got += read
    if got < len(view):
        raise BadInput(
            f"{block[0].file} ends {len(view) - got} bytes too early. Try an earlier checkpoint."
        )
    for want in block:
        place = want.first_byte - first
        source = content[place : place + want.target.nbytes]
        # A view as another dtype needs an aligned start, which files of others need not have.
        want.target.copy_(source.clone().view(want.target.dtype).view_as(want.target))


def _end(want: Want) -> int:
    return want.first_byte + want.target.nbytes


def _chunks(header: bytes, tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors:
        if tensor.numel():
            content = tensor.view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(content), CHUNK_BYTES):
                yield content[start : start + CHUNK_BYTES]


def _open_for_writing(path: Path) -> BinaryIO:
    if is_local(path):
        return path.open("wb")
    fs, name = remote(path)
    return cast(BinaryIO, fs.open(name, "wb"))
