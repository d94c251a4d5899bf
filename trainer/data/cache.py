"""The node's cache of shards: whole, verified, bounded, shared by the processes of a node."""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from trainer.data.fetch import PATIENCE_S, REMEDY, download
from trainer.data.publish import file_sha256, sync_folder
from trainer.errors import BadData, BadInput, BadWorld
from trainer.place import is_local

log = logging.getLogger(__name__)

_OURS = re.compile(r"[0-9a-f]{32}-(\d+)(\.partial)?")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_WAIT_S = 0.05


@dataclass
class CacheStats:
    """What one `Cache` object has done so far."""

    hits: int = 0
    """Shards that were there, or that another process or thread brought meanwhile."""
    misses: int = 0
    """Shards that had to be fetched."""
    fetched_bytes: int = 0
    evicted: int = 0
    """Shards, and remains of downloads, that were removed to make room."""
    retries: int = 0
    """Requests tried again, and shards fetched once more for their wrong hash."""


class _Entry(NamedTuple):
    last_use_ns: int
    num_bytes: int
    """What it takes when it is whole: a download has its room from the start."""
    path: Path


class Cache:
    """A folder of whole shards, each fetched once for all processes and threads that use it.

    A shard is `NAME` and a download of it `NAME.partial`, where NAME is a hash of the full URL, the
    size and the sha256, and then the size. Who fetches holds a flock on the partial file, which the
    kernel ends with the process; the others wait for it. Room is given under a flock on `lock`.
    Files that are open when they are evicted stay readable, and take space until they are closed.
    """

    def __init__(self, folder: Path, *, max_bytes: int, patience_s: float = PATIENCE_S) -> None:
        """Use `folder`, which is made if it is not there; other files in it are left alone.

        Args:
            folder: On a disk of the node; any number of processes may use it.
            max_bytes: What all shards and downloads in it may take together.
            patience_s: How long a request that fails is tried again.
        """
        self.stats = CacheStats()
        self._folder = folder
        self._max_bytes = max_bytes
        self._patience_s = patience_s
        self._counting = threading.Lock()
        self._bad: dict[str, str] = {}
        with self._errors(), self._giving_room():
            pass

    def open(self, path: Path, *, num_bytes: int, sha256: str | None) -> BinaryIO:
        """Open a shard's whole, verified content, unbuffered; fetch it first if need be.

        The interrupted download of a shard with a hash is continued where it stopped. What is bad
        stays bad for this object: it is not fetched again for every sample.

        Args:
            path: Of the shard, local or remote, as `place` gives it.
            num_bytes: Its size.
            sha256: Its hash; None: nobody knows it, only the size is checked.

        Raises:
            BadData: The shard is not there, or has another size or hash.
            BadInput: It does not fit, the folder cannot be used, or the storage refuses.
            BadWorld: The storage cannot be reached, or the folder's disk is full or broken.
        """
        if num_bytes > self._max_bytes:
            raise BadInput(
                f"{path} has {num_bytes} bytes and data.cache_gb={self._max_bytes / 1e9:g} has no "
                f"room for it. Set data.cache_gb={-(-num_bytes // 10**9)} or more."
            )
        name = _name(path, num_bytes, sha256)
        if name in self._bad:
            raise BadData(self._bad[name])
        try:
            with self._errors():
                return self._open(self._folder / name, path, num_bytes, sha256)
        except BadData as error:
            self._bad[name] = str(error)
            raise

    def _open(self, final: Path, path: Path, num_bytes: int, sha256: str | None) -> BinaryIO:
        partial = final.with_name(f"{final.name}.partial")
        while True:
            with suppress(FileNotFoundError):
                return self._hit(final, num_bytes)
            with self._claimed(partial, final, num_bytes) as handle:
                if handle is None:
                    continue
                try:
                    self._fill(handle, partial, path, num_bytes, sha256)
                except (BadData, OSError):
                    partial.unlink(missing_ok=True)
                    raise
                with suppress(FileNotFoundError):  # somebody emptied the folder by hand
                    content = cast(BinaryIO, partial.open("rb", buffering=0))
                    with self._giving_room():  # or a scan that is under way may see neither name
                        partial.replace(final)
                    sync_folder(self._folder)
                    self._count(misses=1)
                    return content

    def _hit(self, final: Path, num_bytes: int) -> BinaryIO:
        content = cast(BinaryIO, final.open("rb", buffering=0))
        if os.fstat(content.fileno()).st_size != num_bytes:
            content.close()
            final.unlink(missing_ok=True)
            raise FileNotFoundError
        os.utime(content.fileno())
        self._count(hits=1)
        return content

    @contextmanager
    def _claimed(self, partial: Path, final: Path, num_bytes: int) -> Iterator[int | None]:
        """Hold the download of a shard; None: another one had it, look again."""
        handle = self._with_room(partial, final, num_bytes)
        if handle is None:
            yield None
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle if _is_at(handle, partial) else None
        finally:
            # Not by closing alone, as processes that were forked meanwhile have the file as well.
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _with_room(self, partial: Path, final: Path, num_bytes: int) -> int | None:
        """Open a partial file, new ones only where there is room; None if it has become whole."""
        while True:
            with suppress(FileNotFoundError):
                return os.open(partial, os.O_RDWR)
            with self._giving_room():
                if final.exists():
                    return None
                entries = [entry for entry in self._entries() if entry.path != partial]
                excess = sum(entry.num_bytes for entry in entries) + num_bytes - self._max_bytes
                if self._evict(entries, excess) >= excess:
                    return os.open(partial, os.O_RDWR | os.O_CREAT, 0o600)
            time.sleep(_WAIT_S)  # all that is here is being fetched

    def _fill(
        self, handle: int, partial: Path, path: Path, num_bytes: int, sha256: str | None
    ) -> None:
        """Bring a partial file, which this thread holds, to a whole one on disk."""
        # Without a hash, nothing would tell the remains of another content.
        start = 0 if sha256 is None else os.fstat(handle).st_size
        for last_try in (False, True):
            os.ftruncate(handle, start)
            os.lseek(handle, start, os.SEEK_SET)
            download(
                path,
                lambda content: self._write(handle, content),
                start=start,
                num_bytes=num_bytes,
                patience_s=self._patience_s,
                on_retry=lambda: self._count(retries=1),
            )
            got = None if sha256 is None else file_sha256(partial)
            if got == sha256:
                os.fsync(handle)
                return
            if last_try:
                raise BadData(f"{path} has sha256 {got}, need {sha256}. {REMEDY}")
            log.warning("%s has sha256 %s, need %s: fetched once more.", path, got, sha256)
            self._count(retries=1)
            start = 0

    def _write(self, handle: int, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            try:
                rest = rest[os.write(handle, rest) :]
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                with self._giving_room():
                    if not self._evict(self._entries(), len(rest)):
                        raise
        self._count(fetched_bytes=len(content))

    @contextmanager
    def _giving_room(self) -> Iterator[None]:
        """Be the only one that makes, renames and evicts files."""
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _entries(self) -> list[_Entry]:
        entries = []
        with os.scandir(self._folder) as found:
            for file in found:
                ours = _OURS.fullmatch(file.name)
                if ours:
                    with suppress(FileNotFoundError):  # a download that failed
                        used_ns = file.stat().st_mtime_ns
                        entries.append(_Entry(used_ns, int(ours[1]), Path(file.path)))
        return entries

    def _evict(self, entries: list[_Entry], num_bytes: int) -> int:
        """Remove what was used longest ago until `num_bytes` are free; say how many were freed."""
        freed_bytes = 0
        for entry in sorted(entries):
            if freed_bytes >= num_bytes:
                break
            if _remove(entry.path):
                freed_bytes += entry.num_bytes
                self._count(evicted=1)
        return freed_bytes

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, value in more.items():
                setattr(self.stats, name, getattr(self.stats, name) + value)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say what is wrong with the folder; errors of the storage are no `OSError` any more."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise BadWorld(
                    f"the disk of data.cache={self._folder} is full, and no shard there can be "
                    f"removed: {shutil.disk_usage(self._folder).free} bytes are free. Free some "
                    "space, or set data.cache to a folder on a larger disk, with a data.cache_gb "
                    "that it has."
                ) from error
            if error.errno in {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}:
                raise BadWorld(
                    f"data.cache={self._folder} failed: {error}. Set data.cache to a folder on "
                    "another disk, or repair this one; the same command continues."
                ) from error
            raise BadInput(
                f"data.cache={self._folder} cannot be used: {error}. Need a folder on a disk of "
                "this node where this user may write and lock files."
            ) from error


def _name(path: Path, num_bytes: int, sha256: str | None) -> str:
    # The whole URL: shards of different datasets have equal names.
    where = str(path.absolute() if is_local(path) else path)
    key = hashlib.sha256(f"{where}\0{num_bytes}\0{sha256}".encode()).hexdigest()[:32]
    return f"{key}-{num_bytes}"


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Remove a shard, or a download that nobody is at."""
    if path.suffix != ".partial":
        path.unlink(missing_ok=True)
        return True
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(handle, path):
            return False
        path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
