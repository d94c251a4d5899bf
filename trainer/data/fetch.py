"""Read ranges of bytes of a file, local or remote, through the passing faults of a storage."""

import os
import random
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPException
from itertools import count
from pathlib import Path

from fsspec.asyn import AsyncFileSystem

from trainer.errors import BadData, BadInput, BadWorld
from trainer.place import explain, is_local, remote

PIECE_BYTES = 4 << 20
NUM_PIECES = 4
"""Requests of one download that are under way at the same time."""
PATIENCE_S = 60.0
"""How long a read is tried again; at least once. What a client does by itself is one try."""
ATTEMPT_S = 120
"""No request takes longer."""

REMEDY = "Copy it again from where it is whole; `kiln verify` names all that is wrong in a dataset."


def read_range(
    path: Path,
    start: int,
    end: int,
    *,
    patience_s: float = PATIENCE_S,
    on_retry: Callable[[], None] | None = None,
) -> bytes:
    """Read the bytes `start` to `end` (exclusive) of a file: all of them, or an error.

    Safe to call from several threads.

    Args:
        path: Local or remote, as `place` gives it.
        start: The first byte.
        end: The byte after the last one.
        patience_s: How long to try again.
        on_retry: Called before every further try.

    Raises:
        BadData: It is not there, or ends before `end`.
        BadInput: The storage refuses to give it, or gives no ranges.
        BadWorld: The storage cannot be reached, or keeps breaking off.
    """
    content = _read_up_to(path, start, end, patience_s, on_retry)
    if len(content) < end - start:
        raise BadData(
            f"{path} is cut: found {start + len(content)} bytes, need at least {end}. {REMEDY}"
        )
    return content


def download(
    path: Path,
    write: Callable[[bytes], None],
    *,
    start: int,
    num_bytes: int,
    patience_s: float = PATIENCE_S,
    on_retry: Callable[[], None] | None = None,
) -> None:
    """Give the bytes of a file of `num_bytes` from `start` on to `write`, piece by piece, in order.

    Needs memory for `NUM_PIECES` pieces of `PIECE_BYTES`.

    Raises:
        BadData: As `read_range`; or the file is longer than `num_bytes`.
        BadInput: As `read_range`.
        BadWorld: As `read_range`.
    """

    def piece(first: int) -> bytes:
        last = min(first + PIECE_BYTES, num_bytes)
        if last < num_bytes:
            return read_range(path, first, last, patience_s=patience_s, on_retry=on_retry)
        # One byte more than there should be: the size is checked without a further request.
        content = _read_up_to(path, first, last + 1, patience_s, on_retry)
        if len(content) != last - first:
            more = "at least " if len(content) > last - first else ""
            raise BadData(
                f"{path} has {more}{first + len(content)} bytes, need {num_bytes}. {REMEDY}"
            )
        return content

    with ThreadPoolExecutor(NUM_PIECES) as threads:
        under_way: deque[Future[bytes]] = deque()
        for first in range(start, num_bytes, PIECE_BYTES):
            if len(under_way) == NUM_PIECES:
                write(under_way.popleft().result())
            under_way.append(threads.submit(piece, first))
        while under_way:
            write(under_way.popleft().result())


def _read_up_to(
    path: Path, start: int, end: int, patience_s: float, on_retry: Callable[[], None] | None
) -> bytes:
    """Read a range that is short only where the file ends."""
    started_s = time.monotonic()
    for attempt in count():
        try:
            content = _request(path, start, end)
            if len(content) > end - start:
                raise BadInput(
                    f"{path}: asked for {end - start} bytes, got {len(content)}: this server "
                    "ignores ranges. Copy the data to a storage that gives ranges of files."
                )
            return content
        except Exception as error:
            verdict = _verdict(path, error)
            if verdict is not None:
                raise verdict from error
            pause_s = min(2.0**attempt / 4, 8) * random.uniform(0.5, 1)  # noqa: S311 - no secret
            elapsed_s = time.monotonic() - started_s
            if attempt > 0 and elapsed_s + pause_s > patience_s:
                raise explain(path, error) or BadWorld(
                    f"{path}: the storage cannot be reached or breaks off ({error!r}); tried "
                    f"{attempt + 1} times in {elapsed_s:.0f} s. When it is back, give the same "
                    "command again: it continues."
                ) from error
            if on_retry is not None:
                on_retry()
            time.sleep(pause_s)
    raise AssertionError


def _request(path: Path, start: int, end: int) -> bytes:
    if is_local(path):
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)
    fs, name = remote(path)
    limit = {"timeout": ATTEMPT_S} if isinstance(fs, AsyncFileSystem) else {}
    try:
        return bytes(fs.cat_file(name, start=start, end=end, **limit))
    except Exception as error:
        if _is_past_the_end(error):
            return b""
        raise


def _is_past_the_end(error: Exception) -> bool:
    answer = getattr(error.__cause__, "response", None) or {}  # as botocore gives it
    code = answer.get("Error", {}).get("Code")
    return getattr(error, "status", None) == 416 or code in {"InvalidRange", "416"}


def _verdict(path: Path, error: Exception) -> Exception | None:
    """Give the error to raise at once; None is a fault that may pass."""
    explained = explain(path, error)
    if isinstance(error, BadInput):
        return error
    if isinstance(explained, BadInput):
        return explained
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return BadData(f"{path} is not there. {REMEDY}")
    status = int(getattr(error, "status", 0))
    if isinstance(error, PermissionError) or (400 <= status < 500 and status not in {408, 429}):
        return BadInput(f"{path} may not be read: {error}. Get the right to, or make it public.")
    passing = explained is not None or isinstance(error, OSError | EOFError | HTTPException)
    return None if passing else error
