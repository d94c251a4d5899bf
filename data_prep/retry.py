"""Give rows that failed a second try: move them from their units to new ones."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_prep.config import PrepareConfig
from data_prep.plan import Generation, list_units, moved_keys, plan_path, write_generation
from data_prep.publish import UnitRecord, quarantine_path, read_record, record_path
from data_prep.quarantine import (
    Reason,
    count_reasons,
    read_quarantine,
    retried,
    write_quarantine,
)
from trainer.data.publish import publish_json
from trainer.errors import BadInput
from trainer.place import open_sparsely

NEVER = frozenset(
    {
        Reason.OPT_OUT,
        Reason.REMOVED,
        Reason.DENIED_CONTENT,
        Reason.ADDRESS_REFUSED,
        Reason.SCHEME_REFUSED,
        Reason.RETRIED,
    }
)
"""Reasons that another try would not respect, or not change."""
_HTTP = re.compile(r"http_\d{3}")
_KNOWN = ", ".join(sorted({*Reason} - NEVER))


def plan_retry(
    cfg: PrepareConfig, generations: Sequence[Generation]
) -> tuple[list[Generation], int]:
    """Plan a second try of all rows in quarantine for one of `cfg.retry`.

    Returns:
        All generations, and how many rows are tried again.

    Raises:
        BadInput: A reason is not to be retried, or there is none of that name.
    """
    forbidden = sorted(NEVER & set(cfg.retry))
    if forbidden:
        raise BadInput(
            f"retry={','.join(cfg.retry)}: rows with {forbidden[0]} are never tried again. "
            "Give passing failures: timeout, connection, truncated, http_429, http_503, ..."
        )
    unknown = [word for word in cfg.retry if word not in {*Reason} and not _HTTP.fullmatch(word)]
    if unknown:
        raise BadInput(f"retry: {unknown[0]} is no reason. There are http_503 etc. and {_KNOWN}.")
    moved: dict[str, int] = {}
    keys_by_generation: dict[int, list[int]] = {}
    for unit in list_units(generations):
        lines = read_quarantine(quarantine_path(cfg.dataset, unit.name))
        keys = [int(line.key, 16) for line in lines if line.reason in cfg.retry]
        if keys:
            moved[unit.name] = len(keys)
            keys_by_generation.setdefault(unit.generation, []).extend(keys)
    if not moved:
        return list(generations), 0
    tables = [
        _rows_of(plan_path(cfg.dataset, number), np.array(keys, np.uint64))
        for number, keys in keys_by_generation.items()
    ]
    added = write_generation(
        cfg,
        rules_sha256=generations[0].rules_sha256,
        before=generations,
        batches=_batches(pa.concat_tables(tables, promote_options="permissive")),
        moved=moved,
    )
    return [*generations, added], added.rows_in


def _rows_of(path: Path, keys: NDArray[np.uint64]) -> pa.Table:
    wanted = pa.array(keys)
    with open_sparsely(path) as file:
        parquet = pq.ParquetFile(file)
        groups = (parquet.read_row_group(number) for number in range(parquet.num_row_groups))
        return pa.concat_tables(
            group.filter(pc.is_in(group["key"], value_set=wanted)) for group in groups
        )


def _batches(rows: pa.Table) -> Iterator[pa.RecordBatch]:
    full = rows.sort_by("key").append_column("reason", pa.nulls(len(rows), pa.string()))
    yield pa.RecordBatch.from_pylist([], full.schema)
    yield from full.to_batches()


def mark_moved(dataset: Path, generations: Sequence[Generation]) -> None:
    """Mark the rows that moved to a later generation in the quarantine of their former units.

    Units that are not published are passed over: they leave those rows out when they are.
    """
    units = {unit.name: unit for unit in list_units(generations)}
    expected: dict[str, int] = {}
    for plan in generations:
        for name, count in plan.moved.items():
            expected[name] = expected.get(name, 0) + count
    for name, count in expected.items():
        record = read_record(dataset, name)
        if record is not None and record.rejected.get(Reason.RETRIED, 0) != count:
            _mark(dataset, name, record, moved_keys(dataset, units[name]))


def _mark(dataset: Path, name: str, record: UnitRecord, keys: Collection[str]) -> None:
    path = quarantine_path(dataset, name)
    lines = read_quarantine(path)
    rows = [retried(row.key, row.url) if row.key in keys else row for row in lines]
    rows.sort(key=lambda row: (row.key, row.reason, row.detail))
    sha256 = write_quarantine(path, rows)
    marked = replace(record, rejected=count_reasons(rows), quarantine_sha256=sha256)
    publish_json(record_path(dataset, name), asdict(marked))
