"""Share work between processes on one folder: a file says who is at what, and goes with its owner.

A claim is a file that only one process can create (O_EXCL), with its host, process id and start.
Its owner renews the file's time stamp every minute. It is stale when its process is gone, or, on
another host, when it was not renewed for fifteen minutes; then the next process takes it over.

Limits: other hosts' claims are judged by the clock, so clocks must agree within ten minutes. Where
the file system has no locks or no O_EXCL between hosts (Lustre without -o flock, NFS 2), or an
owner hangs for fifteen minutes and then goes on, work may be done twice. Its results are published
whole, so that costs time and nothing else.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

RENEW_EVERY_S = 60.0
STALE_AFTER_S = 900.0


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block of the same folder; make the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        with contextlib.suppress(OSError):  # without locks the claims' O_EXCL must do
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Try to claim a piece of work; False: somebody else is at it. The claim goes with the block.

    Args:
        path: Of the claim, a file.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "born_unix_s": _born(os.getpid())}
    with locked_folder(path.parent):
        if _is_stale(path):
            log.warning("%s: its process is gone; its work is taken over", path)
            path.unlink(missing_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(mine, file)
        except FileExistsError:
            got = False
        else:
            got = True
    if not got:
        yield False
        return
    done = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, done), daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        path.unlink(missing_ok=True)


def owner(path: Path) -> str:
    """Say who has a claim."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return f"process {told['pid']} on {told['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _is_stale(path: Path) -> bool:
    try:
        age_s = time.time() - path.stat().st_mtime
        told = json.loads(path.read_text(encoding="utf-8"))
        host, pid, born_unix_s = told["host"], told["pid"], told["born_unix_s"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return True  # cut off: claims are written under the folder's lock
    if host == socket.gethostname():
        born = _born(pid)
        return born is None or abs(born - born_unix_s) > 1
    return bool(age_s > STALE_AFTER_S)


def _born(pid: int) -> float | None:
    """When a process of this host was born; its id alone may be another's by now."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(RENEW_EVERY_S):
        with contextlib.suppress(OSError):
            os.utime(path)
