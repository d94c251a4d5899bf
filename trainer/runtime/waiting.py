"""Tell which collective this rank waits in, from any thread and without disturbing it."""

import json
import sys
import threading
from pathlib import Path

from torch._C import _distributed_c10d as c10d

_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""PyTorch's flight recorders: of NCCL, where it is built in, and of the other backends."""
_LIBRARY = str(Path("torch", "distributed"))


def waits_in() -> tuple[str | None, int]:
    """Return the collective that this rank waits in, or None, and how many it has begun."""
    waiting, begun = None, 0
    for name in _RECORDERS:
        if hasattr(c10d, name):
            record = json.loads(getattr(c10d, name)())
            active, number = _active(record)
            waiting, begun = waiting or active, begun + number
    return waiting or _call(), begun


def _active(record: dict) -> tuple[str | None, int]:  # type: ignore[type-arg]
    """Read what a flight recorder has."""
    begun = sum(
        max(0, int(status["last_enqueued_collective"]))
        for status in record.get("pg_status", {}).values()
    )
    for entry in record.get("entries", ()):
        if not entry["retired"] and entry["state"] != "completed":
            return str(entry["profiling_name"]), begun
    return None, begun


def _call() -> str | None:
    """Find the call into torch.distributed that the main thread is in: starting, say, or ending."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    name = None
    while frame is not None and _LIBRARY in frame.f_code.co_filename:
        # Its decorators call what they wrap `wrapper`.
        name = frame.f_code.co_name if frame.f_code.co_name != "wrapper" else name
        frame = frame.f_back
    return name
