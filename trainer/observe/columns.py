"""Read the numbers of a long metrics.jsonl as columns: a million rows in seconds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from trainer.observe.evaluations import is_evaluation
from trainer.observe.jsonl import read_rows

Floats = npt.NDArray[np.float64]
Row = Mapping[str, Any]

_PIECE_BYTES, _BLOCK_BYTES = 64 << 20, 4 << 20
"""What is in memory as text, and what one thread parses of it."""


@dataclass(frozen=True)
class Columns:
    """Numbers of rows, by key; NaN where a row has none, and each key has some number."""

    by_key: Mapping[str, Floats] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.by_key.values()), ()))

    def __getitem__(self, key: str) -> Floats:
        """Return one column; of an unknown key all are NaN."""
        found = self.by_key.get(key)
        return np.full(len(self), np.nan) if found is None else found

    def where(self, chosen: npt.NDArray[np.bool_]) -> "Columns":
        """Keep some rows, and the keys that have a number in them."""
        kept = {key: values[chosen] for key, values in self.by_key.items()}
        return Columns({key: v for key, v in kept.items() if np.isfinite(v).any()})

    def newest(self) -> dict[str, float]:
        """Return the last number of each key."""
        backwards = {key: values[::-1] for key, values in self.by_key.items()}
        return {key: float(v[np.isfinite(v).argmax()]) for key, v in backwards.items()}


def read_metrics(path: Path) -> tuple[Columns, list[dict[str, Any]]]:
    """Read metrics.jsonl; a missing file has no rows, and a torn last line is none.

    Returns:
        The rows of training that count, in order of steps: of a step done twice, the last. And the
        rows of evaluations, as they were written.

    Raises:
        BadInput: A line in the middle is not a JSON object.
    """
    try:
        training, evaluations = _read_fast(path) if path.exists() else (Columns(), [])
    except pa.ArrowException:  # a slower reader can do more, and says which line is wrong
        rows = read_rows(path)
        evaluations = [row for row in rows if is_evaluation(row)]
        training = columns_of([row for row in rows if not is_evaluation(row)])
    return training.where(last_of_each_step(training["step"])), evaluations


def columns_of(rows: Sequence[Row]) -> Columns:
    """Turn rows into columns."""
    keys = dict.fromkeys(key for row in rows for key in row)
    found = {key: np.array([_number(row.get(key)) for row in rows]) for key in keys}
    return Columns({key: v for key, v in found.items() if np.isfinite(v).any()})


def last_of_each_step(steps: Floats) -> npt.NDArray[np.bool_]:
    """Say which rows count: not those at or after a step that was logged again later.

    Args:
        steps: Of the rows of training, in the order they were written.
    """
    later_least = np.minimum.accumulate(np.append(steps[1:], np.inf)[::-1])[::-1]
    return np.asarray(steps < later_least[: len(steps)])


def _read_fast(path: Path) -> tuple[Columns, list[dict[str, Any]]]:
    parts: list[Columns] = []
    evaluations: list[dict[str, Any]] = []
    for lines in _pieces(path):
        table = pj.read_json(
            pa.py_buffer(lines), read_options=pj.ReadOptions(block_size=_BLOCK_BYTES)
        )
        of_evaluation = _has_any(table, [k for k in table.column_names if is_evaluation({k: 0})])
        for idx in np.flatnonzero(of_evaluation).tolist():
            (row,) = table.slice(idx, 1).to_pylist()
            evaluations.append({key: value for key, value in row.items() if value is not None})
        parts.append(Columns(dict(_numbers(table))).where(~of_evaluation))
    return _joined(parts), evaluations


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield whole lines, some megabytes at a time."""
    with path.open("rb") as file:
        rest = b""
        while piece := file.read(_PIECE_BYTES):
            lines, newline, after = piece.rpartition(b"\n")
            if newline:
                yield rest + lines + newline
                rest = after
            else:
                rest += piece


def _joined(parts: Sequence[Columns]) -> Columns:
    keys = dict.fromkeys(key for part in parts for key in part.by_key)
    return Columns({key: np.concatenate([part[key] for part in parts]) for key in keys})


def _has_any(table: Any, keys: Sequence[str]) -> npt.NDArray[np.bool_]:  # noqa: ANN401
    found = np.zeros(table.num_rows, bool)
    for key in keys:
        found |= _array(table[key].is_valid()) > 0
    return found


def _numbers(table: Any) -> Iterator[tuple[str, Floats]]:  # noqa: ANN401
    for key in table.column_names:
        kind = table.schema.field(key).type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            yield key, _array(table[key])


def _array(column: Any) -> Floats:  # noqa: ANN401
    # By DLPack, for to_numpy imports pandas where that is installed: a second.
    filled = pc.fill_null(column.cast(pa.float64()), np.nan)
    return np.concatenate([np.from_dlpack(chunk) for chunk in filled.chunks])


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else np.nan  # type: ignore[arg-type]
