"""Append rows to a JSON Lines file so that a kill at any byte loses at most the last row."""

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import BadInput

Row = Mapping[str, Any]


class JsonLines:
    """An append-only file with one writer; a torn last line is cut off when it is opened."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; its folder must exist."""
        self.path = path
        _cut_torn_line(path)
        # Unbuffered: a row is with the kernel when append returns, so kill -9 cannot lose it.
        self._file = path.open("ab", buffering=0)

    def append(self, rows: Iterable[Row]) -> None:
        """Append all rows or, when the disk refuses, none of them.

        Raises:
            OSError: The disk is full; the file still ends with a whole row.
        """
        data = b"".join(_encode(row) for row in rows)
        size_bytes = os.fstat(self._file.fileno()).st_size
        try:
            written_bytes = self._file.write(data)
            if written_bytes != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self._file.truncate(size_bytes)
            raise

    @property
    def closed(self) -> bool:
        """Whether the file was closed."""
        return self._file.closed

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all whole rows; a missing file has none, and a torn last line is not a row.

    Raises:
        BadInput: A line in the middle is not a JSON object.
    """
    if not path.exists():
        return []
    rows = []
    whole_lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(whole_lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise BadInput(
                f"{path}:{number} is {line[:60]!r}, need one JSON object per line. "
                "Remove that line; the others stay valid."
            )
        rows.append(row)
    return rows


def _encode(row: Row) -> bytes:
    finite = {key: None if _is_broken(value) else value for key, value in row.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def _is_broken(value: object) -> bool:
    # NaN is not JSON; a diverged loss is written as null, which every reader understands.
    return isinstance(value, float) and not math.isfinite(value)


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
