"""Gather what a run directory and its dataset tell, whether or not the run is finished."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import BadInput
from trainer.observe.columns import Columns, read_metrics
from trainer.observe.evaluations import METRICS, evaluation_rows

NO_ENDINGS: Mapping[int, str] = {}


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What became of the rows that went into the dataset, and where they came from."""

    fingerprint: str
    rows_in: int
    rows_kept: int
    rejected: Mapping[str, int]
    """Reason -> rows."""
    num_shards: int
    bytes: int
    """Of all shards."""
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Story:
    """A run, as far as it has come; what is not there yet is empty."""

    run_dir: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: Columns
    """A row per logged step, in order of steps: of a step done twice, the last."""
    evaluations: Sequence[Mapping[str, Any]] = ()
    """One row per evaluated step, in order of steps."""
    ledger: Sequence[Mapping[str, Any]]
    """The dataset's rows (prepare, encode), then the run's."""
    endings: Mapping[int, str] = field(default_factory=dict)
    """Why attempts of training ended, where a job wrote it down."""
    evaluation: Mapping[str, Any]
    samples: Mapping[str, Any]
    """`reconstructions` and `samples`; see docs of `kiln sample`."""
    dataset: DatasetFacts | None
    versions: Mapping[str, str]

    @property
    def name(self) -> str:
        """What the run is called."""
        return "/".join(self.run_dir.resolve().parts[-2:])


def read_story(
    run_dir: Path,
    *,
    ledger: Sequence[Mapping[str, Any]],
    dataset: DatasetFacts | None,
    versions: Mapping[str, str],
    endings: Mapping[int, str] = NO_ENDINGS,
) -> Story:
    """Read a run directory.

    Args:
        run_dir: The run's.
        ledger: The rows of its account, after those of its dataset's.
        dataset: What became of the rows that went in.
        versions: Of what makes the report.
        endings: Why attempts of training ended.

    Raises:
        BadInput: It is no run directory, or one of its files is damaged.
    """
    config_file = run_dir / "config.yaml"
    if not config_file.exists():
        raise BadInput(
            f"{run_dir} has no config.yaml, so it is no run directory. "
            "Give run= the folder that `kiln train` wrote."
        )
    metrics, evaluated = read_metrics(run_dir / METRICS)
    return Story(
        run_dir=run_dir,
        config=read_config(run_dir),
        plan=_read_json(run_dir / "plan.json"),
        metrics=metrics,
        evaluations=evaluation_rows(run_dir, evaluated),
        ledger=ledger,
        endings=endings,
        evaluation=_read_json(run_dir / "evaluation.json"),
        samples=_read_json(run_dir / "samples" / "index.json"),
        dataset=dataset,
        versions=versions,
    )


def read_config(run_dir: Path) -> Mapping[str, Any]:
    """Read RUN/config.yaml as plain containers, whatever version wrote it."""
    file = run_dir / "config.yaml"
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except yaml.YAMLError as error:
        raise BadInput(f"{file} is not YAML: {error}. `kiln train` writes it anew.") from error
    return loaded if isinstance(loaded, dict) else {}


def _read_json(file: Path) -> Mapping[str, Any]:
    if not file.exists():
        return {}
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        loaded = error
    if not isinstance(loaded, dict):
        raise BadInput(f"{file} is damaged (need a JSON object): delete it and make it again.")
    return loaded
