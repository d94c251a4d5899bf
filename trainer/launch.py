"""Freeze a run for Slurm: config, plan, code and sbatch script; submit it when told to."""

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm.render import sbatch_script
from slurm.spec import JobSpec
from slurm.submit import submit
from trainer.command import run_command
from trainer.config import LaunchConfig, TrainConfig
from trainer.errors import BadInput, BadWorld
from trainer.frozen import freeze, thaw
from trainer.plan import make_plan
from trainer.runtime.rundir import freeze_config, locked

log = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[1]
_PACKAGES = ("trainer", "data_prep", "slurm", "conf")


def run(cfg: LaunchConfig) -> int:
    """Write the run directory and print the script; with submit=true, submit it."""
    if cfg.cluster.kind != "slurm":
        raise BadInput(
            f"cluster.kind={cfg.cluster.kind}: `kiln launch` is for Slurm. Give a cluster= of "
            "kind slurm, such as cluster=a100_80gb, or use `kiln train` on this machine."
        )
    make_plan(cfg)
    folder = Path(cfg.run).resolve()
    fields = thaw(cfg)
    del fields["submit"]
    with locked(folder):
        freeze_config(folder, freeze(TrainConfig, fields))
        (folder / "attempts").mkdir(exist_ok=True)
        snapshot(folder / "code")
        try:
            text = sbatch_script(job_spec(cfg, folder))
        except ValueError as error:
            raise BadInput(f"cluster: {error}") from error
        script = folder / "submit.sbatch"
        script.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    if not cfg.submit:
        log.info("frozen in %s; submit it with submit=true or: sbatch %s", folder, script)
        return 0
    try:
        log.info("submitted as job %d", submit(script))
    except RuntimeError as error:
        raise BadWorld(str(error)) from error
    return 0


def job_spec(cfg: LaunchConfig, folder: Path) -> JobSpec:
    """Translate a run's cluster section."""
    cluster = cfg.cluster
    return JobSpec(
        name=folder.name,
        num_nodes=cluster.num_nodes,
        ranks_per_node=cluster.ranks_per_node,
        gpus_per_node=cluster.ranks_per_node if cluster.device == "cuda" else 0,
        threads_per_rank=cfg.engine.threads_per_rank,
        time_limit_min=cluster.time_limit_min,
        warn_before_kill_s=cluster.warn_before_kill_s,
        partition=cluster.partition,
        python=Path(sys.executable),
        code=folder / "code",
        run=folder,
    )


def snapshot(code: Path) -> None:
    """Copy Kiln's packages, so that later edits change no queued job."""
    if code.exists():
        return
    partial = code.with_name(".code.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in _PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_ROOT / name, partial / name, ignore=ignore)
    partial.rename(code)


def main(argv: Sequence[str]) -> int:
    """`kiln launch [experiment=...] [submit=true] [key=value ...]`."""
    return run_command(run, LaunchConfig, "launch", argv)
