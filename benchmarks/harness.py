"""Measure cases in turn, and write the rows and claims of a benchmark as JSON."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured quantity of one system in one case."""

    case: str
    """What was asked, e.g. '1 GiB of tars, 2 workers'."""
    system: str
    """Who answered, e.g. 'kiln' or 'webdataset'."""
    metric: str
    unit: str
    median: float
    min: float
    max: float
    repetitions: int
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package -> version, of what the system is made of."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence that the numbers must bear out."""

    text: str
    measured: float
    target: float
    holds: bool


@dataclass(frozen=True, kw_only=True)
class Case:
    """What `measure` runs; it returns the metric's value, so it decides what is timed."""

    case: str
    system: str
    metric: str
    unit: str
    run: Callable[[], float]
    packages: Sequence[str] = ()


def measure(cases: Sequence[Case], *, repetitions: int = 5, warmups: int = 1) -> list[Row]:
    """Run all cases in turn, round after round, so that a slow minute of the machine hits all.

    Args:
        cases: In the order of their rows.
        repetitions: Rounds that count; the row has their median, least and most.
        warmups: Rounds before, which do not count.
    """
    values: list[list[float]] = [[] for _ in cases]
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=(warmups + repetitions) * len(cases))
        for round_idx in range(warmups + repetitions):
            for idx, case in enumerate(cases):
                value = case.run()
                if round_idx >= warmups:
                    values[idx].append(value)
                progress.advance(task)
    return [_row(case, found) for case, found in zip(cases, values, strict=True)]


def row_of(values: Sequence[float], *, case: str, system: str, metric: str, unit: str) -> Row:
    """Make a row of what was measured in some rounds."""
    return Row(
        case=case,
        system=system,
        metric=metric,
        unit=unit,
        median=statistics.median(values),
        min=min(values),
        max=max(values),
        repetitions=len(values),
    )


def seconds(action: Callable[[], object]) -> Callable[[], float]:
    """Turn an action into one that returns how long it took."""

    def timed() -> float:
        started_s = time.perf_counter()
        action()
        return time.perf_counter() - started_s

    return timed


def claim_at_least(text: str, *, measured: float, target: float) -> Claim:
    """State that a number reaches a target."""
    return Claim(text=text, measured=measured, target=target, holds=measured >= target)


def claim_at_most(text: str, *, measured: float, target: float) -> Claim:
    """State that a number stays below a target."""
    return Claim(text=text, measured=measured, target=target, holds=measured <= target)


def machine() -> dict[str, str | int | float]:
    """Describe this machine as far as speed depends on it; nothing that names it."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def write_result(
    name: str,
    *,
    question: str,
    rows: Sequence[Row],
    claims: Sequence[Claim] = (),
    folder: Path = RESULTS,
) -> Path:
    """Write `results/NAME.json`, which `benchmarks.render` turns into a page.

    Args:
        name: The benchmark's module name.
        question: One sentence: what it asks.
        rows: From `measure`, or made by hand.
        claims: What the rows show.
        folder: Where results lie.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    result = {
        "question": question,
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
        "claims": [asdict(claim) for claim in claims],
    }
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return file


def _row(case: Case, values: Sequence[float]) -> Row:
    row = row_of(values, case=case.case, system=case.system, metric=case.metric, unit=case.unit)
    return replace(row, versions={package: version(package) for package in case.packages})


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?"
    )
