"""Publish a file under its final name only when it is whole and on disk."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block ends normally.

    After an exception nothing is left; after a crash only a `.NAME.partial` that the next
    attempt overwrites.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def publish_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, atomically."""
    with published(path) as partial:
        partial.write_bytes(data)


def publish_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write `value` as JSON with sorted keys, atomically; equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    publish_bytes(path, f"{text}\n".encode())


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder that holds the name is on disk.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
