"""The small files of a run's folder by which commands and batch scripts know of each other."""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slurm.spec import Checks, RunSpec

log = logging.getLogger(__name__)

CODE = "code"
"""Kiln, as it was when the run was launched."""
SCRIPT = "submit.sbatch"
"""What sbatch got."""
JOBS = "jobs.jsonl"
"""Which jobs were submitted for it, and when."""
SPEC = "job.json"
"""What the batch script needs to know."""
STOP = "stop.json"
"""`kiln stop` asks the attempt that is going on to be the last one."""
PLAN = "plan.json"
"""What the run takes, as it was planned last."""
EVENTS = "pipeline/events.jsonl"
"""What coordinators found and did between the stages of a pipeline."""
SWEEP = "sweep.json"
"""In the folder of a sweep: the words of each run that differ from the others', by number."""
SAVED = "saved.json"
"""Step and images of the newest checkpoint; the run itself writes it."""


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    """Write a small file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Read such a file; None when it is not there."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a file of JSON lines that has one writer at a time."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of such a file; a missing file has none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_folders(root: Path, *, depth: int = 3) -> Iterator[Path]:
    """Find the folders of runs, without looking into them: a sweep or a pipeline has some in it.

    Folders of others that must not be read are left out.
    """
    if (root / "attempts").is_dir():
        yield root
    elif depth:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            if not folder.name.startswith(".") and folder.name != CODE:
                try:
                    yield from run_folders(folder, depth=depth - 1)
                except OSError as error:
                    log.debug("no runs are looked for in %s: %s", folder, error)


def nth_run(sweep: Path, number: int) -> Path:
    """Return the folder of one run of a sweep."""
    return sweep / f"{number:03d}"


def write_spec(run: Path, spec: RunSpec) -> None:
    """Write what the batch script needs."""
    write_json(run / SPEC, asdict(spec))


def read_spec(run: Path) -> RunSpec | None:
    """Read it back; None when the folder was never launched."""
    found = read_json(run / SPEC)
    if found is None:
        return None
    checks = found.pop("checks")
    return RunSpec(**_tuples(found), checks=Checks(**_tuples(checks)) if checks else None)


def saved_step(run: Path) -> int:
    """Return the step of the newest checkpoint; 0 for none.

    Runs of Kiln before it wrote that down tell it by their folders.
    """
    saved = read_json(run / SAVED)
    if saved is not None:
        return int(saved["step"])
    records = run.glob("checkpoints/step_*/checkpoint.json")
    return max((int(path.parent.name.removeprefix("step_")) for path in records), default=0)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
