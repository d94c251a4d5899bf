"""From the stages of a pipeline to Slurm jobs: pure functions, pinned by golden files."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm import client
from slurm.chain import split
from slurm.render import sbatch_script
from slurm.runfile import CODE, SCRIPT
from slurm.spec import JobSpec
from slurm.task import TASK, WARN_BEFORE_KILL_S
from trainer import launch
from trainer.config_pipeline import CoordinatorConfig, PipelineConfig, StageConfig
from trainer.errors import BadInput
from trainer.pipeline_stages import PIPELINE, Stage, train_config


@dataclass(frozen=True)
class Job:
    """A script for sbatch."""

    name: str
    path: Path
    spec: JobSpec

    @property
    def script(self) -> str:
        """What sbatch gets."""
        return sbatch_script(self.spec)


def jobs_of(cfg: PipelineConfig, stages: Sequence[Stage]) -> Iterator[Job]:
    """Give the jobs that are submitted at once, each to begin after the one before it.

    A stage whose tasks have to be counted is represented by its coordinator, which submits them.
    """
    for stage in stages:
        if stage.has_gates or stage.is_counted:
            yield coordinator_job(cfg, stage)
        if isinstance(stage.config, StageConfig):
            if not stage.is_counted:
                yield _job(cfg, stage.name, stage.config, _command(cfg, stage))
        else:
            spec, _ = launch.jobs_of(train_config(cfg, stage), cfg.name)
            yield Job(stage.name, cfg.folder / SCRIPT, spec)


def first_tasks(cfg: PipelineConfig, stages: Sequence[Stage]) -> Iterator[Job]:
    """Give one task of each stage whose tasks will be counted: what all of them will ask for."""
    for stage in stages:
        if stage.is_counted:
            yield from array_jobs(cfg, stage, (0,), width=1, most=1)


def array_jobs(
    cfg: PipelineConfig, stage: Stage, tasks: Sequence[int], *, width: int, most: int
) -> Iterator[Job]:
    """Give a stage's tasks as arrays that Slurm takes.

    Args:
        cfg: The pipeline.
        stage: Whose tasks.
        tasks: Which of its parts have something to do.
        width: How many parts there are.
        most: Numbers in an array must be below this.
    """
    assert isinstance(stage.config, StageConfig)
    for number, (first, numbers) in enumerate(split(tasks, most)):
        command = _command(cfg, stage, stage.part(TASK, width), first=first)
        name = stage.name if number == 0 else f"{stage.name}_{number}"
        yield _job(cfg, stage.name, stage.config, command, array=numbers, file=name)


def coordinator_job(cfg: PipelineConfig, stage: Stage) -> Job:
    """Give the job that goes before a stage."""
    name = f"{stage.name}-coordinator"
    command = ("trainer.coordinator", str(cfg.folder), stage.name)
    return _job(cfg, name, cfg.coordinator, _returning(cfg, command))


def job_name(cfg: PipelineConfig, stage: str) -> str:
    """Return what a stage's jobs are called."""
    return f"{cfg.name}-{stage}"


def _command(
    cfg: PipelineConfig, stage: Stage, words: Sequence[str] | None = None, *, first: int = 0
) -> tuple[str, ...]:
    return _returning(cfg, ("trainer.cli", stage.name, *(words or stage.words)), first=first)


def _returning(cfg: PipelineConfig, module: Sequence[str], *, first: int = 0) -> tuple[str, ...]:
    """Wrap a command so that its job comes back when it is stopped."""
    assert cfg.cluster.slurm is not None
    return (
        *(sys.executable, "-m", "slurm.task"),
        f"--max-restarts={cfg.cluster.slurm.max_restarts}",
        *([f"--first={first}"] if first else []),
        *(sys.executable, "-m", *module),
    )


def _job(
    cfg: PipelineConfig,
    name: str,
    takes: StageConfig | CoordinatorConfig,
    command: tuple[str, ...],
    *,
    array: tuple[int, ...] = (),
    file: str | None = None,
) -> Job:
    slurm = cfg.cluster.slurm
    assert slurm is not None
    folder = cfg.folder / PIPELINE
    cpus, gpus = (takes.cpus, takes.gpus) if isinstance(takes, StageConfig) else (1, 0)
    try:
        spec = JobSpec(
            name=job_name(cfg, name),
            comment=f"{client.COMMENT}{cfg.folder}",
            log=folder / "logs" / f"{name}_{'%A_%a' if array else '%j'}.log",
            num_nodes=1,
            tasks_per_node=1,
            cpus_per_task=cpus or 1,
            gpus_per_node=gpus,
            memory_gb=takes.memory_gb,
            exclusive=False,
            time_limit_min=takes.time_limit_min,
            warn_before_kill_s=WARN_BEFORE_KILL_S,
            stop_signal=slurm.stop_signal,
            warns="batch",
            site=replace(launch.site_of(slurm), partition=takes.partition or slurm.partition),
            code=cfg.folder / CODE,
            command=command,
            array=array,
        )
    except ValueError as error:
        raise BadInput(f"{name.removesuffix('-coordinator')}: {error}") from error
    return Job(name, folder / f"{file or name}.sbatch", spec)
