"""Recognise content by lists of its MD5 or SHA-256, of millions of entries."""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.errors import BadInput

_MD5_DIGITS, _SHA256_DIGITS = 32, 64


class DeniedContent:
    """Two sorted arrays of hashes, 16 and 32 bytes an entry; equal sets have equal `sha256`."""

    def __init__(self, path: Path) -> None:
        """Read one hash a line, in hex: 32 digits are an MD5, 64 a SHA-256; # begins a comment.

        Raises:
            BadInput: The file cannot be read, or a line is no hash.
        """
        self._md5, self._sha256 = _read(path)

    def __len__(self) -> int:
        """Number of different hashes."""
        return len(self._md5) + len(self._sha256)

    @property
    def sha256(self) -> str:
        """Hash of the set."""
        digest = hashlib.sha256(f"{len(self._md5)} ".encode())
        digest.update(self._md5.data)
        digest.update(self._sha256.data)
        return digest.hexdigest()

    def find(self, content: bytes) -> str | None:
        """Name the hash of `content` that is on the list, e.g. 'md5 900150983cd2...', or None."""
        for name, denied in (("md5", self._md5), ("sha256", self._sha256)):
            if len(denied):
                digest = hashlib.new(name, content, usedforsecurity=False).digest()
                if _has(denied, digest):
                    return f"{name} {digest.hex()}"
        return None


@lru_cache(maxsize=1)
def _load(path: Path, state: tuple[int, int]) -> DeniedContent:
    del state  # another one means other content
    return DeniedContent(path)


def load_denied(place: str) -> DeniedContent:
    """Read a list of hashes, once per process as long as the file stays as it is.

    Raises:
        BadInput: The file cannot be read, or a line is no hash.
    """
    path = Path(place)
    try:
        stat = path.stat()
    except OSError as error:
        raise BadInput(f"policy: denied_content_file={place} cannot be read ({error}).") from error
    return _load(path, (stat.st_mtime_ns, stat.st_size))


def _read(path: Path) -> tuple[NDArray[np.bytes_], NDArray[np.bytes_]]:
    # Growing bytes hold ten million hashes in their 320 MB; Python strings would take a gigabyte.
    md5, sha256 = bytearray(), bytearray()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                text = line.partition("#")[0].strip()
                if text:
                    (md5 if len(text) == _MD5_DIGITS else sha256).extend(_digest(text, number))
    except (OSError, ValueError) as error:
        raise BadInput(f"policy: denied_content_file={path} cannot be read ({error}).") from error
    return _sorted_set(md5, 16), _sorted_set(sha256, 32)


def _digest(text: str, number: int) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(text) not in {_MD5_DIGITS, _SHA256_DIGITS} or 2 * len(digest) != len(text):
        raise ValueError(
            f"line {number} is {text[:80]!r}: need an MD5 of 32 or a SHA-256 of 64 hex digits"
        )
    return digest


def _sorted_set(content: bytearray, num_bytes: int) -> NDArray[np.bytes_]:
    hashes = np.frombuffer(content, f"S{num_bytes}")
    hashes.sort()
    repeated = hashes[1:] == hashes[:-1]
    return hashes if not repeated.any() else hashes[np.r_[True, ~repeated]]


def _has(hashes: NDArray[np.bytes_], digest: bytes) -> bool:
    # Numpy takes the zero bytes at the end for padding, on both sides.
    at = int(np.searchsorted(hashes, np.array(digest, hashes.dtype)))
    return at < len(hashes) and bool(hashes[at] == digest.rstrip(b"\0"))
