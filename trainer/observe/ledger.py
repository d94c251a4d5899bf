"""Account for every second and joule of an attempt in exactly one bucket of ledger.jsonl."""

import logging
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.errors import BadInput, BadWorld
from trainer.observe.energy import MEASURED, Meter, Provenance, open_meters, read_by_provenance
from trainer.observe.jsonl import JsonLines, read_rows
from trainer.observe.waiting_time import take_waited
from trainer.place import is_local, local_folder, put_bytes, storage_errors

log = logging.getLogger(__name__)

_LATEST_FLUSH_FRAC, _LATEST_FLUSH_S = 0.01, 600.0
"""The older an attempt, the longer its periods: a kill loses at most a hundredth of it."""
_OF_PART = re.compile(r"(?P<stage>plan|prepare|encode|sample)-(?P<part>\d{4,})\b")
_ENERGY_WINDOW_S = 1.0
"""Joules are read at least this far apart: NVML and RAPL refresh every 20 to 100 ms."""


class Bucket(StrEnum):
    """What an interval of an attempt went into."""

    QUEUE = "queue"
    INIT = "init"
    RESTORE = "restore"
    PRODUCTIVE = "productive"
    DATA_STALL = "data_stall"
    ENCODING = "encoding"
    CHECKPOINT_STALL = "checkpoint_stall"
    EVALUATION = "evaluation"
    DRAIN = "drain"
    LOST_WORK = "lost_work"
    IDLE = "idle"


@dataclass(frozen=True)
class Clock:
    """The two clocks of an account, and its period; tests hand in their own."""

    monotonic_s: Callable[[], float] = time.monotonic
    unix_s: Callable[[], float] = time.time
    flush_every_s: float = 5.0
    """Period of writing at first; what a kill -9 may lose."""


class Ledger:
    """The open account of one attempt; a thread writes it out at a period.

    The first one that a task of a Slurm job opens begins with the time of the job in the queue.

    `base` is what happens when nothing else does; a `span` interrupts it (and any span around
    it). So seconds are exclusive: each lies in the innermost bucket that was open.
    """

    def __init__(
        self,
        path: Path,
        *,
        stage: str = "train",
        attempt: int | None = None,
        rank: int = 0,
        node: str | None = None,
        meters: Sequence[Meter] = (),
        started_unix_s: float | None = None,
        clock: Clock = Clock(),
    ) -> None:
        """Open the account in bucket `init`; a predecessor that was killed is closed first.

        Args:
            path: ledger.jsonl; one process at a time writes it.
            stage: What the process does: train, prepare, encode, ...
            attempt: Number of this attempt, from 0; None, or one that the file has already: one
                more than the last in the file.
            rank: Whose time this is.
            node: Where it passes; None: this host's name.
            meters: From `open_meters`, which see; none: joules are 0 with provenance `none`.
            started_unix_s: When the process was born, so that its imports are in `init`. The
                joules that the meters already count are then in, too. None: now.
            clock: What time it is, and when it is time to write.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = JsonLines(path)
        self._meters, self._clock_s = meters, clock.monotonic_s
        self._flush_every_s = clock.flush_every_s
        born_here = started_unix_s is None
        now_s, now_unix_s = clock.monotonic_s(), clock.unix_s()
        born_unix_s = now_unix_s if started_unix_s is None else min(started_unix_s, now_unix_s)
        rows = [row for row in read_rows(path) if (row["stage"], row["rank"]) == (stage, rank)]
        following = 1 + max((row["attempt"] for row in rows), default=-1)
        # Never a number twice: two attempts under one number could not be told apart.
        self.attempt = max(following, attempt or 0)
        waited = take_waited()
        since_unix_s = min(waited.since_unix_s, born_unix_s) if waited else born_unix_s
        if rows and not rows[-1].get("closed", False):
            self._file.append([_killed_row(rows, before_unix_s=since_unix_s)])
        self._labels = {
            "attempt": self.attempt,
            "rank": rank,
            "stage": stage,
            "node": node or socket.gethostname(),
        }
        self._lock = threading.RLock()
        self._stack = [Bucket.INIT]
        self._born_s = self._marked_s = self._period_s = now_s - (now_unix_s - born_unix_s)
        # One wall-clock reading, the rest monotonic: a clock correction must not make seconds.
        self._unix_offset_s = born_unix_s - self._marked_s
        self._seconds: defaultdict[Bucket, float] = defaultdict(float)
        self._unmetered_s: defaultdict[Bucket, float] = defaultdict(float)
        self._joules: defaultdict[tuple[Bucket, Provenance], float] = defaultdict(float)
        self._metered_s = self._marked_s
        self._counted_j = dict(read_by_provenance(meters)) if born_here else {}
        self._step = self._first_step = 0
        self.total_j = self.measured_j = 0.0
        """Joules read so far, of this attempt, and how many of them were measured."""
        if waited:
            begun_unix_s = min(max(waited.until_unix_s, since_unix_s), born_unix_s)
            self._file.append(self._unseen(since_unix_s, begun_unix_s, born_unix_s))
        self._file.append([self._opening(born_unix_s)])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._flush_periodically, daemon=True)
        self._thread.start()

    @contextmanager
    def span(self, bucket: Bucket | str) -> Iterator[None]:
        """Count what happens inside as `bucket`, less the spans inside it."""
        with self._lock:
            self._mark()
            self._stack.append(Bucket(bucket))
        try:
            yield
        finally:
            with self._lock:
                self._mark()
                self._stack.pop()

    def switch(self, bucket: Bucket | str) -> None:
        """Make `bucket` what is counted outside of all spans, from now on."""
        with self._lock:
            self._mark()
            self._stack[0] = Bucket(bucket)

    def reach(self, step: int) -> None:
        """Say that `step` optimizer steps are done."""
        self._step = step

    def resume_at(self, step: int) -> None:
        """Say that the work goes on from `step`: after a restore, or a rollback within the run."""
        with self._lock:
            self.flush()
            self._step = self._first_step = step

    def tell_idle(self, idle_w: Mapping[Provenance, float]) -> None:
        """Write down the watts that its meters showed before there was any work."""
        with self._lock:
            row = self._nothing(self._period_s + self._unix_offset_s)
            self._file.append([{**row, "idle_w": dict(idle_w)}])

    def flush(self) -> None:
        """Write what was counted since the last flush; on a full disk keep it for the next."""
        with self._lock:
            self._mark()
            self._read_joules()
            self._write(closed=False)

    def spent(self) -> dict[str, float]:
        """Give `seconds/STAGE` and `joules/STAGE` of all that the account has so far."""
        self.flush()
        spent: defaultdict[str, float] = defaultdict(float)
        for row in read_rows(self._file.path):
            for kind in ("seconds", "joules"):
                spent[f"{kind}/{row['stage']}"] += row[kind]
        return dict(spent)

    def close(self) -> None:
        """Write the rest and mark the attempt as properly ended; again: does nothing."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            if self._file.closed:
                return
            self._mark()
            self._read_joules()
            self._write(closed=True)
            self._file.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _opening(self, born_unix_s: float) -> dict[str, Any]:
        """Say what is metered, so that what two accounts meter at once can be counted once."""
        devices: defaultdict[str, list[str]] = defaultdict(list)
        for meter in self._meters:
            if meter.device is not None:
                devices[meter.provenance].append(meter.device)
        return {**self._nothing(born_unix_s), "devices": devices}

    def _unseen(
        self, since_unix_s: float, begun_unix_s: float, born_unix_s: float
    ) -> list[dict[str, Any]]:
        """Make the rows of the queue, and of the job before this process, which no meter saw."""
        queue = {"bucket": Bucket.QUEUE.value, "seconds": begun_unix_s - since_unix_s}
        init = {"seconds": born_unix_s - begun_unix_s}
        return [{**self._nothing(since_unix_s), **queue}, {**self._nothing(begun_unix_s), **init}]

    def _nothing(self, unix_s: float) -> dict[str, Any]:
        """Make a row of no seconds, which tells something else."""
        return {
            **self._labels,
            "bucket": Bucket.INIT.value,
            "start_unix_s": round(unix_s, 6),
            "seconds": 0.0,
            "joules": 0.0,
            "provenance": "none",
            "step": 0,
        }

    def _mark(self) -> None:
        now_s = self._clock_s()
        bucket = self._stack[-1]
        self._seconds[bucket] += now_s - self._marked_s
        self._unmetered_s[bucket] += now_s - self._marked_s
        self._marked_s = now_s
        if now_s - self._metered_s >= _ENERGY_WINDOW_S:
            self._read_joules()

    def _read_joules(self) -> None:
        """Share the joules since the last reading out by the seconds since then."""
        window_s = sum(self._unmetered_s.values())
        if window_s <= 0:
            return
        for provenance, total_j in read_by_provenance(self._meters).items():
            new_j = total_j - self._counted_j.get(provenance, 0.0)
            self._counted_j[provenance] = total_j
            self.total_j += new_j
            self.measured_j += new_j if provenance in MEASURED else 0.0
            for bucket, seconds in self._unmetered_s.items():
                self._joules[bucket, provenance] += new_j * seconds / window_s
        self._unmetered_s.clear()
        self._metered_s = self._marked_s

    def _write(self, *, closed: bool) -> None:
        rows = list(self._rows())
        if closed and rows:
            rows[-1]["closed"] = True
        try:
            self._file.append(rows)
        except OSError as error:
            if closed:
                raise
            log.warning("%s: %s; the account is kept until it fits", self._file.path, error)
            return
        self._seconds.clear()
        self._joules.clear()
        self._period_s = self._marked_s
        self._first_step = self._step

    def _rows(self) -> Iterator[dict[str, Any]]:
        start_unix_s = round(self._period_s + self._unix_offset_s, 6)
        steps = {"first_step": self._first_step, "last_step": self._step}
        for bucket, bucket_s in self._seconds.items():
            seconds = bucket_s
            joules = {p: j for (b, p), j in self._joules.items() if b == bucket} or {"none": 0.0}
            # One row per provenance; the seconds stand in the first, so that sums count them once.
            for provenance, joules_j in joules.items():
                yield {
                    **self._labels,
                    "bucket": bucket.value,
                    "start_unix_s": start_unix_s,
                    "seconds": seconds,
                    "joules": joules_j,
                    "provenance": provenance,
                    "step": self._step,
                    **(steps if bucket is Bucket.PRODUCTIVE else {}),
                }
                seconds = 0.0

    def _flush_periodically(self) -> None:
        while not self._stop.wait(self._until_flush_s()):
            self.flush()

    def _until_flush_s(self) -> float:
        age_s = self._clock_s() - self._born_s
        return max(self._flush_every_s, min(age_s * _LATEST_FLUSH_FRAC, _LATEST_FLUSH_S))


def _killed_row(rows: Sequence[dict[str, Any]], *, before_unix_s: float) -> dict[str, Any]:
    """Close an attempt that never wrote its end: it did at most one more period, all of it lost."""
    starts = sorted({row["start_unix_s"] for row in rows if row["attempt"] == rows[-1]["attempt"]})
    last_s = sum(row["seconds"] for row in rows if row["start_unix_s"] == starts[-1])
    end_unix_s = starts[-1] + last_s
    period_s = max(last_s, starts[-1] - starts[-2] if len(starts) > 1 else 0.0)
    labels = {key: rows[-1].get(key) for key in ("attempt", "rank", "stage", "node", "step")}
    return {
        **labels,
        "bucket": Bucket.LOST_WORK.value,
        "start_unix_s": end_unix_s,
        "seconds": max(0.0, min(period_s, before_unix_s - end_unix_s)),
        "joules": 0.0,
        "provenance": "none",
        "closed": True,
    }


@contextmanager
def accounted(
    folder: Path, *, stage: str, tdp_w_per_core: float, part: int | None = None
) -> Iterator[Ledger]:
    """Count the seconds and joules of a command without steps into the account of a dataset.

    Args:
        folder: A dataset.
        stage: prepare, encode, ...
        tdp_w_per_core: For the model where there is no energy counter.
        part: Which task of an array this is; parts write files of their own, as ranks.

    Yields:
        The open account.
    """
    meters = open_meters(tdp_w_per_core=tdp_w_per_core)
    path = _account_path(folder, stage, part)
    rank = part or 0
    attempt = next_attempt(folder, stage, rank)
    ledger = Ledger(path, stage=stage, attempt=attempt, rank=rank, meters=meters)
    ledger.switch("productive")
    try:
        yield ledger
    finally:
        try:
            ledger.close()
            if not is_local(folder):
                with storage_errors(folder):
                    put_bytes(folder / "ledger" / path.name, path.read_bytes())
        except (OSError, BadInput, BadWorld) as error:
            # A full disk has its own message; the account must not hide it.
            log.warning("%s: this command is not in the account (%s)", folder, error)


def next_attempt(folder: Path, stage: str, rank: int) -> int:
    """Number an attempt after those of this part on other machines, and of a stage in one part.

    The files of other parts are left closed: there may be thousands, and as many who ask.
    """
    attempts = []
    for path in _account_files(folder):
        found = _OF_PART.match(path.name)
        if found is None or (found["stage"], int(found["part"])) == (stage, rank):
            own = (row for row in read_rows(path) if (row["stage"], row["rank"]) == (stage, rank))
            attempts += [row["attempt"] for row in own]
    return 1 + max(attempts, default=-1)


def _account_path(folder: Path, stage: str, part: int | None) -> Path:
    """Where this machine writes; nothing can be appended to an object, so each has its own file.

    It stays here after it was published: what a kill kept from being so is in the next one.
    """
    prefix = "" if part is None else f"{stage}-{part:04d}"
    if is_local(folder):
        return folder / (f"ledger/{prefix}.jsonl" if prefix else "ledger.jsonl")
    own = local_folder(folder) / "ledger"
    own.mkdir(exist_ok=True)
    name = f"{prefix}{'-' if prefix else ''}{socket.gethostname()}"
    return min(own.glob(f"{name}-*.jsonl"), default=own / f"{name}-{time.time_ns()}.jsonl")


def read_account(dataset: Path) -> list[dict[str, Any]]:
    """Read the rows of a dataset's ledger, or of its ledgers from several machines."""
    return [row for path in _account_files(dataset) for row in read_rows(path)]


def _account_files(dataset: Path) -> list[Path]:
    return sorted(dataset.glob("ledger*.jsonl")) + sorted(dataset.glob("ledger/*.jsonl"))
