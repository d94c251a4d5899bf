"""Publish a file under its final name only when it is whole and on disk."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.place import is_local, local_folder, put_bytes, remote


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """Give a temporary local path; it becomes `path`, all of it at once, if the block ends well.

    On disk it lies beside `path` and is renamed. For a remote `path` it lies in `local_folder` and
    is put as one object, which nobody sees before it is whole. After an exception nothing is left;
    after a crash only a `.NAME.partial` that the next attempt overwrites.
    """
    folder = path.parent if is_local(path) else local_folder(path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{path.name}.partial"
    try:
        yield partial
        if is_local(path):
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        else:
            fs, name = remote(path)
            fs.put_file(str(partial), name)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if is_local(path):
        sync_folder(folder)
    else:
        partial.unlink()


def publish_bytes(path: Path, data: bytes) -> str:
    """Write `data` to `path`, atomically; return its sha256."""
    if is_local(path):
        with published(path) as partial:
            partial.write_bytes(data)
    else:
        put_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def publish_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write `value` as JSON with sorted keys, atomically; equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    publish_bytes(path, f"{text}\n".encode())


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk: only then is a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
