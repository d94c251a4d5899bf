"""List the members of a tar from its headers alone: USTAR, GNU and pax, any length of name."""

import re
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from trainer.errors import BadData

BLOCK_BYTES = 512
_MOST_EXTENDED_BYTES = 1 << 20
"""Longest long name or pax header; real ones have some hundred bytes."""
_WITHOUT_CONTENT = frozenset(
    {
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
    }
)
_EXTENDED = frozenset({tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE})
_PASSED_OVER = frozenset({tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE})
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=\n]+)=")
# Name, size, checksum, type, and the prefix of a long name.
_FIELDS = struct.Struct("100s24x12s12x8sc188x155s12x")
_OCTAL = re.compile(rb" *[0-7]+[ \0]*")
# A sample's key is what comes before the first dot of the file's name, as in `webdataset`.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_METADATA = re.compile(r"__[^/]*__($|/)")


class Readable(Protocol):
    """What `Blob` is to this module."""

    path: Path
    num_bytes: int

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Read up to `num_bytes` at `offset`; short only at the end."""


class Digest(Protocol):
    """What hashlib gives."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    """As stored; bytes that are no UTF-8 are written as \\xff."""
    offset: int
    """Of its content."""
    num_bytes: int
    """Of its content."""


def read_members(file: Readable, *, repair: str, digest: Digest | None = None) -> Iterator[Member]:
    """Yield the regular files of a tar in their order.

    Args:
        file: The tar; only its headers are read.
        repair: What to do about an error.
        digest: Is fed every header with its place.

    Raises:
        BadData: It is cut, compressed, or no tar, or it has sparse files.
    """
    at, extended = 0, dict[str, str]()
    while True:
        block = _read(file, at, BLOCK_BYTES, repair, digest)
        if not block.strip(b"\0"):
            return
        header = _parse(file, at, block, repair)
        payload = at + BLOCK_BYTES
        num_bytes = _size(header, extended)
        at = payload + -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if file.num_bytes < at:
            raise cut(file, at, repair)
        if header.type in _EXTENDED:
            if num_bytes > _MOST_EXTENDED_BYTES:
                raise _no_header(file, payload, f"a name of {num_bytes} bytes", repair)
            content = _read(file, payload, num_bytes, repair, digest)
            extended |= _extended(header.type, content)
        elif header.type not in _PASSED_OVER:
            sparse = any(key.startswith("GNU.sparse") for key in extended)
            if sparse or header.type == tarfile.GNUTYPE_SPARSE:
                raise _no_header(file, payload - BLOCK_BYTES, "a sparse file", repair)
            if header.type in tarfile.REGULAR_TYPES:
                yield Member(extended.get("path", header.name), payload, num_bytes)
            extended = {}


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and extension, as `webdataset` does.

    None: it is no sample's file: it has no extension, is hidden, or is metadata (`__x__`).

    `dir.v1/000.latent.npy` is ('dir.v1/000', 'latent.npy').
    """
    found = None if _METADATA.match(name) else _NAME.fullmatch(name)
    return (found[1], found[2]) if found else None


def cut(file: Readable, needed_bytes: int, repair: str) -> BadData:
    """Say that a tar ends too early."""
    return BadData(
        f"{file.path} is cut: expected at least {needed_bytes} bytes, found {file.num_bytes}. "
        f"{repair}"
    )


def _read(file: Readable, at: int, num_bytes: int, repair: str, digest: Digest | None) -> bytes:
    content = file.read_at(at, num_bytes)
    if len(content) < num_bytes:
        raise cut(file, at + num_bytes + BLOCK_BYTES, repair)
    if digest is not None:
        digest.update(at.to_bytes(8, "big") + content)
    return content


class _Header(NamedTuple):
    name: str
    type: bytes
    num_bytes: int


def _parse(file: Readable, at: int, header: bytes, repair: str) -> _Header:
    if plain := _parse_plain(header):
        return plain
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        what = "it is compressed: unpack it" if header.startswith(b"\x1f\x8b") else str(error)
        raise _no_header(file, at, what, repair) from error
    if info.size < 0:
        raise _no_header(file, at, f"a file of {info.size} bytes", repair)
    return _Header(info.name, info.type, info.size)


def _parse_plain(header: bytes) -> _Header | None:
    """Read the header of a regular file with a short ASCII name, as most are, in less time."""
    padded, size, checksum, kind, prefix = _FIELDS.unpack(header)
    name = padded.rstrip(b"\0")
    if kind != tarfile.REGTYPE or prefix[0] or not name.isascii() or b"\0" in name:
        return None
    if not _OCTAL.fullmatch(size) or not _OCTAL.fullmatch(checksum):
        return None
    # The checksum counts its own eight bytes as spaces.
    if int(checksum.strip(b" \0"), 8) != sum(header) - sum(checksum) + 8 * ord(" "):
        return None
    return _Header(name.decode(), kind, int(size.strip(b" \0"), 8))


def _no_header(file: Readable, at: int, what: str, repair: str) -> BadData:
    return BadData(f"{file.path}: byte {at} is no tar header that Kiln reads ({what}). {repair}")


def _size(header: _Header, extended: dict[str, str]) -> int:
    """Bytes that follow the header; links and folders have none, whatever they say."""
    if header.type in _WITHOUT_CONTENT:
        return 0
    size = extended.get("size", "") if header.type in tarfile.REGULAR_TYPES else ""
    return int(size) if size.isdecimal() else header.num_bytes


def _extended(kind: bytes, content: bytes) -> dict[str, str]:
    """Read what a long name or a pax header says of the file that follows."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.split(b"\0")[0].decode("utf-8", "backslashreplace")}
    records, at = {}, 0
    while (found := _PAX_RECORD.match(content, at)) and int(found[1]) > len(found[0]):
        value = content[found.end() : at + int(found[1]) - 1]
        records[found[2].decode(errors="replace")] = value.decode("utf-8", "backslashreplace")
        at += int(found[1])
    return records
