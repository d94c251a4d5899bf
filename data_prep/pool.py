"""Worker processes for units that stop at once when the command stops, however it stops."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TypeVar

from data_prep.config import PrepareConfig
from data_prep.interrupts import sheltered
from data_prep.plan import Unit
from data_prep.publish import Systemic, UnitRecord, publish_unit, status_path
from trainer.data.publish import publish_json
from trainer.errors import BadInput, BadWorld
from trainer.place import read_bytes, storage_errors

Result = tuple[Unit, UnitRecord | Systemic]
Counts = tuple["Synchronized[int]", "Synchronized[int]"]
T = TypeVar("T")

_REFRESH_S = 0.25
_worker_counts: Counts | None = None  # of this worker process: rows done, rows kept


def run_units(
    units: Iterable[Unit],
    cfg: PrepareConfig,
    rules_sha256: str,
    *,
    num_processes: int,
    on_rows: Callable[[int, int], None],
) -> Iterator[Result]:
    """Publish units in worker processes; yield each one's result as it finishes.

    Args:
        units: What to do; only a few are held in flight.
        cfg: The rules and the place.
        rules_sha256: Hash of the rules, for the records.
        num_processes: Workers.
        on_rows: Told several times a second (rows done, rows kept) since the start.
    """
    # spawn: the parent has threads (progress), which fork would copy in whatever state they are.
    context = multiprocessing.get_context("spawn")
    counts: Counts = (context.Value("q", 0), context.Value("q", 0))
    # Workers hold the reading end: it reports the end of file when this process dies or lets go.
    alive, held = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_start_worker, initargs=(alive, counts)
    )
    waiting: dict[Future[UnitRecord | Systemic], Unit] = {}
    left = iter(units)
    try:
        while True:
            while len(waiting) < 2 * num_processes and (unit := next(left, None)) is not None:
                with sheltered():  # this may start a worker
                    waiting[executor.submit(_publish, unit, cfg, rules_sha256)] = unit
            if not waiting:
                return
            done, _ = wait(waiting, timeout=_REFRESH_S, return_when=FIRST_COMPLETED)
            on_rows(counts[0].value, counts[1].value)
            for future in done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise BadWorld(
            "a worker process died, most likely killed for want of memory. Finished units are "
            f"valid; the same command continues. Use fewer: processes={max(1, num_processes // 2)} "
            f"or threads={max(1, cfg.threads // 2)}."
        ) from error
    finally:
        held.close()
        executor.shutdown(wait=True, cancel_futures=True)
        alive.close()
        for unit in waiting.values():
            _mark_interrupted(unit, cfg.dataset)


def _mark_interrupted(unit: Unit, dataset: Path) -> None:
    """Say in the status of a unit whose worker was stopped that nobody is at it any more."""
    path = status_path(dataset, unit.name)
    with suppress(OSError, BadInput, BadWorld, ValueError), storage_errors(dataset):
        status = json.loads(read_bytes(path))
        if status["state"] == "running":
            publish_json(path, status | {"state": "interrupted"})


def _start_worker(alive: Connection, counts: Counts) -> None:
    global _worker_counts  # noqa: PLW0603 - the only way from an initializer to the tasks
    _worker_counts = counts
    threading.Thread(target=_die_with_parent, args=(alive,), daemon=True).start()


def _die_with_parent(alive: Connection) -> None:
    # An orphan that went on could publish beside the next run of the same command.
    alive.poll(None)
    os._exit(1)


def _publish(unit: Unit, cfg: PrepareConfig, rules_sha256: str) -> UnitRecord | Systemic:
    with storage_errors(cfg.dataset):  # here, where the error is whole; what is sent has no cause
        return publish_unit(unit, cfg, rules_sha256, _count_row)


def _count_row(kept: bool) -> None:
    assert _worker_counts is not None
    done, num_kept = _worker_counts
    with done.get_lock():
        done.value += 1
    if kept:
        with num_kept.get_lock():
            num_kept.value += 1
