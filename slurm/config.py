"""What the commands that show and stop jobs may be told: frozen dataclasses."""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from trainer.frozen import config


@config
class StatusConfig:
    """`kiln status`."""

    root: Path
    """Folder of runs, with sweeps and pipelines in it, or one run."""
    watch_s: PositiveFloat | None
    """Show it anew so often, until Ctrl-C; null shows it once."""


@config
class LogsConfig:
    """`kiln logs`."""

    run: Path
    """Folder of a run."""
    rank: NonNegativeInt | Literal["batch"] | None
    """Whose log; batch is the job's own script. null: rank 0, or batch where no rank has begun."""
    attempt: NonNegativeInt | None
    """Which attempt; null is the newest."""
    follow: bool
    """Go on with what is added, also by later attempts, until the job has ended."""
    lines: PositiveInt | None
    """Begin with the last lines alone; null is all of them."""


@config
class ExplainConfig:
    """`kiln explain`."""

    run: Path
    """Folder of a run."""


@config
class StopConfig:
    """`kiln stop`."""

    run: Path
    """Folder of a run, of a sweep or of a pipeline."""
    now: bool
    """Cancel instead: what was not saved is lost."""
    wait_s: PositiveFloat
    """How long to wait for what is being saved."""
