"""Make a W&B workspace of the charts that Kiln's report has, from the same list."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.command import run_command
from trainer.config_tools import DashboardConfig
from trainer.errors import BadInput, BadWorld
from trainer.observe.dashboard import (
    PICTURES,
    X_KEY,
    X_LABEL,
    Panel,
    Section,
    evaluation_section,
    training_sections,
)
from trainer.observe.evaluations import METRICS, evaluation_rows, training_rows
from trainer.observe.jsonl import read_rows
from trainer.observe.sinks import require_key, wandb_target
from trainer.observe.wandb_session import default_entity

log = logging.getLogger(__name__)

_SMOOTHING = 0.9


def main(argv: Sequence[str]) -> int:
    """`kiln dashboard RUN`."""
    return run_command(run, DashboardConfig, "dashboard", argv, positional="run")


def run(cfg: DashboardConfig) -> int:
    """Save the workspace, or print what would be saved."""
    folder = Path(cfg.run)
    project, sections = wandb_target(folder).project, sections_of(folder)
    if cfg.dry_run:
        print_workspace(workspace(sections, project=project, entity=cfg.entity or ""))
        return 0
    require_key()
    made = workspace(sections, project=project, entity=cfg.entity or "")
    try:
        made.entity = cfg.entity or default_entity()
        log.info("%s", made.save().url)
    except Exception as error:
        raise BadWorld(
            f"W&B does not take the workspace ({' '.join(str(error).split())}). Check "
            "WANDB_API_KEY, WANDB_BASE_URL, entity= and the network; dry_run=true needs none."
        ) from error
    return 0


def sections_of(run: Path) -> list[Section]:
    """Choose the charts of a run: those of the report."""
    rows = read_rows(run / METRICS)
    evaluation = evaluation_section(evaluation_rows(run, rows))
    return [*([evaluation] if evaluation else []), *training_sections(training_rows(rows))]


def workspace(sections: Sequence[Section], *, project: str, entity: str) -> Any:  # noqa: ANN401 - wandb_workspaces.Workspace
    """Make the workspace; nothing is sent.

    Raises:
        BadInput: wandb-workspaces is not installed.
    """
    try:
        from wandb_workspaces import workspaces  # noqa: PLC0415 - optional
        from wandb_workspaces.reports.v2 import MediaBrowser  # noqa: PLC0415
    except ImportError as error:
        raise BadInput(
            f"a W&B workspace needs wandb-workspaces, which is not there ({error}). Install it: "
            "pip install -e '.[dashboard]'"
        ) from error
    pictures = MediaBrowser(title="Samples", media_keys=[PICTURES])
    drawn = [("Samples", [pictures])]
    drawn += [(section.name, [_plot(panel) for panel in section.panels]) for section in sections]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Kiln",
        sections=[
            workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in drawn
        ],
        settings=workspaces.WorkspaceSettings(x_axis=X_KEY),
    )


def print_workspace(made: Any) -> None:  # noqa: ANN401 - wandb_workspaces.Workspace
    """Print what W&B would be sent, section by section."""
    for section in made.sections:
        panels = [panel.model_dump(by_alias=True) for panel in section._to_model().panels]
        print(json.dumps({section.name: panels}, indent=1))


def _plot(panel: Panel) -> Any:  # noqa: ANN401 - wandb_workspaces.LinePlot
    from wandb_workspaces.reports.v2 import LinePlot  # noqa: PLC0415

    smoothed = {
        "smoothing_type": "exponentialTimeWeighted",
        "smoothing_factor": _SMOOTHING,
        "smoothing_show_original": True,
    }
    return LinePlot(
        title=panel.title,
        x=X_KEY,
        y=list(panel.keys),
        title_x=X_LABEL,
        title_y=panel.unit or None,
        range_y=(0, None) if panel.from_zero else (None, None),
        **(smoothed if panel.is_noisy else {}),
    )
