"""Run the whole way from URLs to an evaluated model as stages, here or as Slurm jobs.

The same line again continues: what is finished is not repeated, and of a dataset only the shards
that are missing or damaged are made again.
"""

import sys
from collections.abc import Sequence

from data_prep.rows import source_files
from slurm.runfile import CODE
from trainer import pipeline_slurm
from trainer.command import run_command
from trainer.config_pipeline import PipelineConfig
from trainer.data.manifest import load_manifest
from trainer.pipeline_local import Here
from trainer.pipeline_stages import (
    Stage,
    absolute,
    composed,
    freeze_pipeline,
    stages_of,
)
from trainer.place import storage
from trainer.runtime.rundir import locked

_OF_A_DATASET = {"dedup", "encode", "train"}


def run(cfg: PipelineConfig) -> int:
    """Refuse what can be known to be wrong; then run the stages, submit them, or print them."""
    cfg = absolute(cfg)
    stages = stages_of(cfg)
    for stage in stages:
        composed(stage)
    is_here = cfg.cluster.kind == "local"
    if cfg.dry_run:
        return _show(stages) if is_here else pipeline_slurm.show(cfg, stages)
    _check_source(cfg)
    if not is_here:
        return pipeline_slurm.submit(cfg, stages)
    with locked(cfg.folder, ".launch.lock", doing="launched"):
        freeze_pipeline(cfg)
        Here(cfg.folder, code=cfg.folder / CODE).run_stages(stages)
    return 0


def _check_source(cfg: PipelineConfig) -> None:
    """Refuse a source, or a dataset, that is not there."""
    if cfg.rows is not None and "prepare" in cfg.stages:
        source_files(cfg.rows)
    elif _OF_A_DATASET & set(cfg.stages):
        with storage(cfg.dataset):
            load_manifest(cfg.dataset)


def _show(stages: Sequence[Stage]) -> int:
    for stage in stages:
        if stage.has_gates:
            sys.stdout.write(f"# {stage.name} begins only if its gates hold\n")
        words = stage.words
        if stage.is_counted:
            most = f"at most {stage.max_tasks}"
            sys.stdout.write(f"# {stage.name}: tasks are counted when its turn comes, {most}\n")
            words = stage.part("N", stage.max_tasks)
        sys.stdout.write(f"kiln {' '.join((stage.name, *words))}\n")
    return 0


def main(argv: Sequence[str]) -> int:
    """`kiln pipeline NAME rows=FILES [cluster=...] [dry_run=true] [key=value ...]`."""
    return run_command(run, PipelineConfig, "pipeline", argv, positional="name")
