"""Send to W&B what it lacks of a run, or of a data command: metrics and the newest samples."""

import logging
from collections.abc import Sequence
from pathlib import Path

from trainer.command import run_command
from trainer.config_tools import SyncConfig
from trainer.observe.sinks import sync_wandb

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """`kiln sync RUN`."""
    return run_command(run, SyncConfig, "sync", argv, positional="run")


def run(cfg: SyncConfig) -> int:
    """Send it, and say how much it was."""
    lacked = sync_wandb(Path(cfg.run))
    log.info("%s: W&B has every row of its metrics; it lacked %d", cfg.run, lacked)
    return 0
