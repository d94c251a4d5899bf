"""Read the numbers of a long metrics.jsonl as columns: a million rows in seconds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json as pj

from trainer.observe.evaluations import is_evaluation
from trainer.observe.jsonl import read_rows

Floats = npt.NDArray[np.float64]
Row = Mapping[str, Any]

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Columns:
    """Numbers of rows, by key; NaN where a row has none."""

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
        found = {key: values[np.isfinite(values)] for key, values in self.by_key.items()}
        return {key: float(values[-1]) for key, values in found.items() if len(values)}


def read_metrics(path: Path) -> tuple[Columns, list[dict[str, Any]]]:
    """Read metrics.jsonl; a missing file has no rows, and a torn last line is none.

    Returns:
        The rows of training that count, in order of steps: of a step done twice, the last. And the
        rows of evaluations, as they were written.

    Raises:
        BadInput: A line in the middle is not a JSON object.
    """
    table = _read_table(path)
    if table is None:
        rows = read_rows(path)
        evaluations = [row for row in rows if is_evaluation(row)]
        training = columns_of([row for row in rows if not is_evaluation(row)])
    else:
        of_evaluation = _has_any(table, [k for k in table.column_names if is_evaluation({k: 0})])
        found = table.filter(pa.array(of_evaluation)).to_pylist()
        evaluations = [{k: v for k, v in row.items() if v is not None} for row in found]
        training = Columns(dict(_numbers(table))).where(~of_evaluation)
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


def _read_table(path: Path) -> Any | None:  # noqa: ANN401 - pyarrow has no types
    """Read whole lines; None where Arrow cannot, so that a slower reader says what is wrong."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    with pa.memory_map(str(path)) as file:
        data = file.read_buffer()
        whole_bytes = _end_of_lines(data)
        if not whole_bytes:
            return None
        options = pj.ReadOptions(block_size=_BLOCK_BYTES)
        try:
            return pj.read_json(pa.BufferReader(data.slice(0, whole_bytes)), read_options=options)
        except pa.ArrowInvalid:
            return None


def _end_of_lines(data: Any) -> int:  # noqa: ANN401 - pyarrow has no types
    end = len(data)
    while end > 0:
        start = max(0, end - 65536)
        newline = data.slice(start, end - start).to_pybytes().rfind(b"\n")
        if newline >= 0:
            return int(start + newline + 1)
        end = start
    return 0


def _has_any(table: Any, keys: Sequence[str]) -> npt.NDArray[np.bool_]:  # noqa: ANN401
    found = np.zeros(table.num_rows, bool)
    for key in keys:
        found |= table[key].is_valid().to_numpy()
    return found


def _numbers(table: Any) -> Iterator[tuple[str, Floats]]:  # noqa: ANN401
    for key in table.column_names:
        kind = table.schema.field(key).type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            yield key, table[key].cast(pa.float64()).to_numpy()


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else np.nan  # type: ignore[arg-type]
