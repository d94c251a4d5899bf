"""Index a tar that somebody else wrote, from its headers: where each sample's members lie."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa

from trainer.data.headers import Member, Readable, read_members, split_name
from trainer.data.manifest import HEADERS_ONLY
from trainer.data.shards import members_table
from trainer.errors import BadData

PICTURES = ("jpg", "png", "webp")
"""Extensions of what a sample shows; an index has others of the same formats as these."""
_SAME_FORMAT = {"jpeg": "jpg", "jpe": "jpg"}
_CAPTIONS = ("txt", "json")
SKIP_BYTES = 1 << 18
_MOST_EXTENSIONS = 64
_LEAST_READ_BYTES = 1 << 14
_MOST_READ_BYTES = 1 << 22

Found = dict[str, Member]


class Left(NamedTuple):
    """A sample that is left out."""

    key: str
    reason: str
    """'missing_picture', 'missing_caption' or 'duplicate'."""
    detail: str
    """Its members."""


class Scan(NamedTuple):
    """What the headers of a tar say."""

    index: pa.Table
    """Key, `offset.EXT` and `size.EXT` of the samples that can be used, in order of keys."""
    left: list[Left]
    """The other samples, in order of the tar."""
    sha256: str
    """'headers:' and the hash of all headers with their places: it changes with any of them."""


class Window:
    """Reads a file by position with few requests, where most of what lies between is skipped."""

    def __init__(self, file: Readable, *, skip_bytes: int = SKIP_BYTES) -> None:
        """Read from `file`.

        Args:
            file: The tar.
            skip_bytes: What is at least so far from the last read begins a new, small one. What
                is nearer is read with what lies before it, in requests that grow: asking costs
                time and money, too.
        """
        self.path, self.num_bytes = file.path, file.num_bytes
        self.num_requests = self.num_read_bytes = 0
        self._file, self._skip_bytes = file, skip_bytes
        self._start, self._content = 0, b""
        self._read_bytes = _LEAST_READ_BYTES // 2

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Read up to `num_bytes` at `offset`; short only at the end."""
        end = self._start + len(self._content)
        if not self._start <= offset <= min(offset + num_bytes, self.num_bytes) <= end:
            far = offset - end >= self._skip_bytes
            step = _LEAST_READ_BYTES if far else min(2 * self._read_bytes, _MOST_READ_BYTES)
            self._start, self._read_bytes = offset, step
            self._content = self._file.read_at(offset, max(num_bytes, step))
            self.num_requests += 1
            self.num_read_bytes += len(self._content)
        at = offset - self._start
        return self._content[at : at + num_bytes]


def scan_foreign(file: Readable, *, repair: str) -> Scan:
    """Index a tar of any WebDataset.

    A sample is a run of members with one key: the name up to the first dot of its last part.
    Extensions are lowered, jpeg becomes jpg. It is left out if it has no picture or neither txt
    nor json, or if its key was there before in this tar.

    Raises:
        BadData: The tar is cut, or none; or its names are no samples'.
    """
    digest = hashlib.sha256(file.num_bytes.to_bytes(8, "big"))
    found: dict[str, Found] = {}
    left: list[Left] = []
    extensions = {"jpg"}
    for key, members in _groups(read_members(file, repair=repair, digest=digest)):
        reason = "duplicate" if key in found else _missing(members)
        if reason:
            left.append(Left(key, reason, " ".join(member.name for member in members.values())))
            continue
        found[key] = members
        extensions |= set(members)
        if len(extensions) > _MOST_EXTENSIONS:
            raise BadData(
                f"{file.path} has members of more than {_MOST_EXTENSIONS} kinds, e.g. "
                f"{', '.join(sorted(extensions)[:3])}: the key of a sample ends at the first dot "
                f"of its name, and the rest is the kind. Name its members KEY.jpg, KEY.txt. "
                f"{repair}"
            )
    rows = [{"key": key, **_where(found[key])} for key in sorted(found)]
    return Scan(members_table(rows), left, HEADERS_ONLY + digest.hexdigest())


def with_prefix(index: pa.Table, number: str) -> pa.Table:
    """Put a shard's number and a slash before the keys of its index."""
    keys = [f"{number}/{key}" for key in index["key"].to_pylist()]
    return index.set_column(0, "key", pa.array(keys))


def _groups(members: Iterable[Member]) -> Iterator[tuple[str, Found]]:
    key, found = "", Found()
    for member in members:
        if parts := split_name(member.name):
            extension = parts[1].lower()
            extension = _SAME_FORMAT.get(extension, extension)
            if found and (parts[0] != key or extension in found):
                yield key, found
                found = {}
            key = parts[0]
            found[extension] = member
    if found:
        yield key, found


def _missing(members: Found) -> str | None:
    if not any(ext in members and members[ext].num_bytes for ext in PICTURES):
        return "missing_picture"
    return None if any(ext in members for ext in _CAPTIONS) else "missing_caption"


def _where(members: Found) -> dict[str, int]:
    return {
        f"{what}.{extension}": number
        for extension, member in members.items()
        for what, number in (("offset", member.offset), ("size", member.num_bytes))
    }
