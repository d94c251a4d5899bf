"""Read the newest rows of a long metrics.jsonl, and each attempt's, without reading all of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.observe.evaluations import METRICS, is_evaluation

Row = Mapping[str, Any]

_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Span:
    """The rows of one attempt."""

    first: Row
    last: Row


def newest_row(run: Path) -> Row | None:
    """Return the newest row of training; None when there is none, or no file."""
    try:
        with (run / METRICS).open("rb") as file:
            return _last_before(file, _size_bytes(file))
    except FileNotFoundError:
        return None


def spans(run: Path) -> dict[int, Span]:
    """Return the first and the last row of each attempt's training, by attempt.

    Attempts never fall along the file, so that where one ends is searched by halving.
    """
    found: dict[int, Span] = {}
    try:
        with (run / METRICS).open("rb") as file:
            size_bytes, start = _size_bytes(file), 0
            while (first := _first_from(file, start)) is not None:
                attempt = first[0]["attempt"]
                start = _end_of(attempt, file, start, size_bytes)
                last = _last_before(file, start)
                assert last is not None
                found[attempt] = Span(first[0], last)
    except FileNotFoundError:
        pass
    return found


def _end_of(attempt: int, file: BinaryIO, low: int, high: int) -> int:
    """Return where the first line begins that is of a later attempt, or the end of the file."""
    while low < high:
        middle = (low + high) // 2
        found = _first_from(file, middle)
        if found is None or found[0]["attempt"] > attempt:
            high = middle
        else:
            low = found[1]
    return low


def _first_from(file: BinaryIO, offset: int) -> tuple[Row, int] | None:
    """Return the first row of training that begins at or after an offset, and where it ends."""
    file.seek(max(0, offset - 1))
    if offset:
        file.readline()
    while line := file.readline():
        row = _training_row(line)
        if row is not None:
            return row, file.tell()
    return None


def _last_before(file: BinaryIO, offset: int) -> Row | None:
    """Return the last row of training that ends at or before an offset."""
    end, rest = offset, b""
    while end > 0:
        start = max(0, end - _CHUNK_BYTES)
        file.seek(start)
        first, *lines = (file.read(end - start) + rest).split(b"\n")
        for line in reversed(lines if start else [first, *lines]):
            row = _training_row(line + b"\n")
            if row is not None:
                return row
        end, rest = start, first + b"\n"
    return None


def _training_row(line: bytes) -> Row | None:
    """Read a line; None for a torn one, and for what evaluations gave."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or "attempt" not in row or is_evaluation(row):
        return None
    return row


def _size_bytes(file: BinaryIO) -> int:
    return file.seek(0, 2)
