"""Publish units through img2dataset's distributors for Ray and Spark clusters."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_prep.config import PrepareConfig
from data_prep.plan import Unit
from data_prep.publish import (
    Systemic,
    UnitRecord,
    publish_unit,
    read_record,
    record_path,
    retract_unit,
    status_path,
)
from trainer.errors import BadInput, BadWorld

Result = tuple[Unit, UnitRecord | Systemic]

_LOOK_EVERY_S = 2.0
_UNITS_PER_SPARK_JOB = 1000  # as img2dataset's subjob_size


def run_distributed(
    units: Iterable[Unit],
    cfg: PrepareConfig,
    rules_sha256: str,
    *,
    num_processes: int,
    on_rows: Callable[[int, int], None],
) -> Iterator[Result]:
    """Publish units on the workers of a Ray or Spark cluster; yield each one as it is found done.

    The cluster is found as Ray and Spark find it (RAY_ADDRESS; an active session), else one is
    started here. All workers must see the dataset under the same name.

    Args:
        units: What to do.
        cfg: The rules and the place; `cfg.distributor` names the cluster's kind.
        rules_sha256: Hash of the rules, for the records.
        num_processes: Workers of a Spark that is started here; Ray takes one per core.
        on_rows: Told the (rows, rows kept) of the units that are done.

    Raises:
        BadInput: The cluster's package is not installed.
        BadWorld: A unit failed on a worker.
    """
    if find_spec(cfg.distributor) is None:
        raise BadInput(
            f"distributor={cfg.distributor}, but the package {cfg.distributor} is not installed: "
            f"pip install {cfg.distributor}, or distributor=processes."
        )
    left = {unit.name: unit for unit in units}
    for name in left:
        retract_unit(cfg.dataset, name)  # so that a record that is there is a new one
    worker = _Worker(cfg, rules_sha256)
    rows, kept = 0, 0
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(_distribute, cfg.distributor, num_processes, worker, [*left.values()])
        is_over = False
        while not is_over:
            # Looked at before the units, so that the last look is after the last unit.
            is_over = bool(wait_for([job], timeout=_LOOK_EVERY_S).done)
            for name in [name for name in left if record_path(cfg.dataset, name).exists()]:
                record = read_record(cfg.dataset, name)
                assert record is not None
                unit = left.pop(name)
                rows, kept = rows + unit.rows, kept + record.rows_kept
                on_rows(rows, kept)
                yield unit, record
        _raise_if_broken(job, cfg.distributor)
    for unit in left.values():
        yield unit, _failure(cfg, unit)


@dataclass(frozen=True)
class _Worker:
    """What a worker of the cluster calls with each unit, in the manner of img2dataset."""

    cfg: PrepareConfig
    rules_sha256: str

    def __call__(self, unit: Unit) -> tuple[bool, Unit]:
        # What went wrong is in the unit's status; an exception would end the other units, too.
        try:
            result = publish_unit(unit, self.cfg, self.rules_sha256, _ignore)
        except Exception:
            return False, unit
        return isinstance(result, UnitRecord), unit


def _ignore(_kept: bool) -> None:
    pass


def _distribute(
    kind: str, num_processes: int, worker: Callable[[Unit], Any], units: Sequence[Unit]
) -> None:
    from img2dataset import distributor  # noqa: PLC0415 - imports Ray where it is installed

    # Spark would start any `python3`, which may be one without Kiln.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # noqa: TID251
    distribute = getattr(distributor, f"{kind}_distributor")
    distribute(num_processes, worker, iter(units), _UNITS_PER_SPARK_JOB, 0)


def _raise_if_broken(job: Future[None], kind: str) -> None:
    error = job.exception()
    if error is not None:
        raise BadWorld(
            f"distributor={kind} failed: {error}. Finished units are valid; see that the cluster "
            "is up, then the same command continues."
        ) from error


def _failure(cfg: PrepareConfig, unit: Unit) -> Systemic:
    """Give what a unit's worker left behind when it published nothing."""
    path = status_path(cfg.dataset, unit.name)
    status: dict[str, Any] = {}
    try:
        status = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
        return TypeAdapter(Systemic).validate_python(status["systemic"])
    except (FileNotFoundError, KeyError, ValidationError) as error:
        why = status.get("error", f"{path} does not say why")
        raise BadWorld(
            f"unit {unit.name} failed on {status.get('host', 'a worker')}: {why}. Finished units "
            "are valid; the same command continues."
        ) from error
