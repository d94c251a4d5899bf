"""Read the source parquet, give every row its stable id, and cut the rows into units."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.config import ColumnsConfig, PrepareConfig
from trainer.data.publish import file_sha256
from trainer.errors import BadInput


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """One row of the source. Rows sort by key; equal keys by everything else they carry."""

    key: str
    """Stable id: `row_key` of the URL and the caption."""
    extra_json: str
    """The extra columns as JSON with sorted keys, without nulls."""
    url: str
    """Empty if the source has none."""
    caption: str
    """Empty if the source has none."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of work that is done or not done; its kept rows become one shard."""

    number: int
    """From 0; the name of its files."""
    rows: tuple[Row, ...]
    """Sorted; equal rows are in the same unit."""

    @property
    def name(self) -> str:
        """The number as the files have it."""
        return f"{self.number:05d}"

    def input_sha256(self, rules_sha256: str) -> str:
        """Hash everything that decides what this unit publishes, besides the network."""
        digest = hashlib.sha256(rules_sha256.encode())
        for row in self.rows:
            digest.update(json.dumps([row.key, row.extra_json, row.url, row.caption]).encode())
        return digest.hexdigest()


def row_key(url: str, caption: str) -> str:
    """Give the 64-bit stable id of a row as 16 hex digits."""
    text = f"{url}\0{caption}".encode(errors="replace")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def source_files(rows: Path) -> list[Path]:
    """List the parquet files of a source, in order of their names."""
    if not rows.exists():
        raise BadInput(
            f"rows={rows} is not there. Give a parquet file with URLs and captions, or a folder of "
            "them; `kiln source kind=scenes out=...` makes one to try."
        )
    files = sorted(rows.glob("*.parquet")) if rows.is_dir() else [rows]
    if not files:
        raise BadInput(f"rows={rows} is a folder without *.parquet files.")
    return files


def read_units(cfg: PrepareConfig) -> list[Unit]:
    """Read the source and cut it into units.

    Membership depends on the rows alone: not on their order, nor on how they are split into files.
    """
    rows = [row for path in source_files(cfg.rows) for row in _read_rows(path, cfg.columns)]
    if not rows:
        raise BadInput(f"rows={cfg.rows} has no rows: nothing to download. Give another file.")
    return cut(rows, cfg.shard_rows)


def cut(rows: Sequence[Row], shard_rows: int) -> list[Unit]:
    """Sort rows and cut them after every `shard_rows` distinct keys."""
    units: list[list[Row]] = []
    num_distinct, last_key = 0, ""
    for row in sorted(rows):
        if row.key != last_key:
            if num_distinct % shard_rows == 0:
                units.append([])
            num_distinct, last_key = num_distinct + 1, row.key
        units[-1].append(row)
    return [Unit(number, tuple(members)) for number, members in enumerate(units)]


def source_sha256(cfg: PrepareConfig) -> list[str]:
    """Hash the source's files, sorted by hash."""
    return sorted(file_sha256(path) for path in source_files(cfg.rows))


def _read_rows(path: Path, columns: ColumnsConfig) -> list[Row]:
    try:
        present = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path} is no readable parquet file: {error}") from error
    for key in ("url", "caption"):
        name = getattr(columns, key)
        if name not in present:
            raise BadInput(
                f"{path} has no column '{name}'; it has {', '.join(present) or 'none'}. "
                f"Name the right one with columns.{key}=..."
            )
    extra = [name for name in columns.extra if name in present]
    table = pq.read_table(path, columns=[columns.url, columns.caption, *extra])
    # to_pylist of single columns: a row's dict of all columns would take ten times the memory.
    urls, captions = (_texts(table[name]) for name in (columns.url, columns.caption))
    extras = [table[name].to_pylist() for name in extra]
    return [
        Row(row_key(url, text), _extra_json(extra, values), url, text)
        for url, text, *values in zip(urls, captions, *extras, strict=True)
    ]


def _texts(column: pa.ChunkedArray) -> list[str]:
    return ["" if value is None else str(value).strip() for value in column.to_pylist()]


def _extra_json(names: Sequence[str], values: Sequence[Any]) -> str:
    present = {
        name: value
        for name, value in zip(names, values, strict=True)
        if value is not None and value == value  # noqa: PLR0124 - NaN is no JSON
    }
    return json.dumps(present, sort_keys=True, ensure_ascii=False, default=str)
