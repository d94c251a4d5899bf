"""What a run's plan said beside what was measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from slurm.runfile import PLAN, read_json
from trainer.errors import BadInput
from trainer.observe.evaluations import METRICS
from trainer.observe.jsonl import read_rows
from trainer.plan_speed import rounded

_RATE = "speed/images_per_s"


@dataclass(frozen=True, slots=True)
class Pair:
    """One quantity, planned and measured; None is unknown."""

    name: str
    unit: str
    planned: float | None
    measured: float | None
    between: tuple[float, float] | None = None
    """Where the plan thought it would lie."""

    @property
    def ratio(self) -> float | None:
        """Measured over planned."""
        if not self.planned or self.measured is None:
            return None
        return self.measured / self.planned


def compare(run: Path, console: Console | None = None) -> int:
    """Print planned beside measured.

    Raises:
        BadInput: There is no such run, its plan had no predictions, or it took no step.
    """
    console = console or Console()
    table = Table("", "planned", "measured", "measured / planned", box=None, pad_edge=False)
    for pair in pairs(run):
        planned = _words(pair.planned)
        if pair.between:
            planned += f" ({rounded(pair.between[0])} to {rounded(pair.between[1])})"
        name = f"{pair.name} ({pair.unit})" if pair.unit else pair.name
        table.add_row(name, planned, _words(pair.measured), _words(pair.ratio))
    console.print(table, highlight=False)
    return 0


def pairs(run: Path) -> list[Pair]:
    """Read a run's plan and its metrics.

    Raises:
        BadInput: As `compare`.
    """
    plan = read_json(run / PLAN)
    if plan is None:
        raise BadInput(f"compare={run} has no {PLAN}. Give the folder of a run that was trained.")
    if "predicted" not in plan:
        raise BadInput(
            f"{run / PLAN} has no predictions: the run began with an older Kiln, or its log says "
            "why nothing was predicted. Its next attempt writes them if it can."
        )
    rows = [row for row in read_rows(run / METRICS) if _RATE in row]
    if not rows:
        raise BadInput(f"{run} has logged no step yet. Compare it when it has.")
    return list(_pairs(plan["predicted"], rows, _wall_h(rows)))


def _pairs(
    said: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], wall_h: float | None
) -> Iterator[Pair]:
    low, mid, high = said.get("images_per_s") or (None, None, None)
    between = None if low is None or high is None else (low, high)
    yield Pair("images/s", "", mid, _median(rows, _RATE), between)
    yield Pair("MFU", "frac", said.get("mfu_frac"), _median(rows, "speed/mfu_frac"))
    memory = [row["memory/peak_gib"] for row in rows if row.get("memory/peak_gib") is not None]
    tensors_gib, peak_gib = said.get("tensors_gib"), max(memory, default=None)
    if said.get("on_host"):  # CPUs: nothing counts tensors apart from the process
        yield Pair("tensors of a rank", "GiB", tensors_gib, None)
        yield Pair("process of a rank, libraries too", "GiB", None, peak_gib)
    else:
        yield Pair("tensors of a rank", "GiB", tensors_gib, peak_gib)
    yield Pair("energy", "J/image", said.get("j_per_image"), _median(rows, "energy/j_per_image"))
    yield Pair("wall time so far", "h", said.get("wall_h"), wall_h)


def _wall_h(rows: Sequence[Mapping[str, Any]]) -> float | None:
    times = [row["time_unix_s"] for row in rows if "time_unix_s" in row]
    return (max(times) - min(times)) / 3600 if len(times) > 1 else None


def _median(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Of the later half: a run is slow while it begins."""
    found = [row[key] for row in rows if row.get(key) is not None]
    return median(found[len(found) // 2 :]) if found else None


def _words(value: float | None) -> str:
    return "unknown" if value is None else rounded(value)
