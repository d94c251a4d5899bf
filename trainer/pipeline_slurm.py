"""Submit all jobs of a pipeline to Slurm at once, or none of them."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote

from slurm import chain, client
from slurm.runfile import JOBS, append_row
from trainer import launch
from trainer.config_pipeline import PipelineConfig
from trainer.pipeline_jobs import Job, array_jobs, first_tasks, jobs_of
from trainer.pipeline_stages import PIPELINE, Stage, freeze_pipeline, train_config
from trainer.runtime.rundir import locked

log = logging.getLogger(__name__)

_SUBMITTING = "submitting"
"""A file that is there while jobs are being submitted; else they are half a pipeline."""
_USUAL_ARRAY_SIZE = 1000


def submit(cfg: PipelineConfig, stages: Sequence[Stage]) -> int:
    """Freeze a pipeline and submit what is left of it, unless it is in the queue."""
    folder = cfg.folder
    with locked(folder, ".launch.lock", doing="launched"), launch.slurm_errors():
        marker = folder / PIPELINE / _SUBMITTING
        if marker.exists():
            log.warning("%s: it was submitted in part only, and that is cancelled first", folder)
            client.cancel([job.job_id for job in client.queue() if job.folder == folder])
        elif launch.is_queued(folder):
            return 0
        stages = [stage for stage in stages if not _is_trained(cfg, stage)]
        jobs = list(jobs_of(cfg, stages))
        if not jobs:
            return 0
        for job in (*jobs, *first_tasks(cfg, stages)):
            launch.check_fits(job.spec)
        freeze_pipeline(cfg)
        for stage in stages:
            if stage.name == "train":
                train = train_config(cfg, stage)
                launch.freeze_run(folder, train, *launch.jobs_of(train, cfg.name))
        for job in jobs:
            job.path.write_text(job.script, encoding="utf-8")
        ids = submit_chain([job.path for job in jobs], marker)
        for job, job_id in zip(jobs, ids, strict=True):
            row = {"job_id": job_id, "unix_s": time.time(), "stage": job.name}
            append_row(folder / JOBS, row)
    log.info("%s: submitted as jobs %s. What becomes of it: kiln status", folder, ", ".join(ids))
    return 0


def submit_chain(scripts: Sequence[Path], marker: Path) -> list[str]:
    """Submit jobs, each to begin after the one before it; none begins before all are there.

    Whatever goes wrong, none of them stays; if this process is killed, the marker stays.
    """
    ids: list[str] = []
    marker.touch()
    try:
        for script in scripts:
            ids.append(launch.submit(script, _options(ids[-1:])))
        client.release(ids[0])
    except BaseException:
        client.cancel(ids)
        marker.unlink()
        raise
    marker.unlink()
    return ids


def show(cfg: PipelineConfig, stages: Sequence[Stage]) -> int:
    """Print what would be submitted; touches nothing."""
    lines = list(_lines(cfg, stages))  # refuses all that it can before it prints any
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _lines(cfg: PipelineConfig, stages: Sequence[Stage]) -> Iterator[str]:
    arrays = {stage.name: stage for stage in stages if stage.is_counted}
    names: list[str] = []
    for job in jobs_of(cfg, stages):
        before = [f"${name}" for name in names[-1:]]
        names.append(job.name.replace("-", "_"))
        yield from _shown(job, _options(before), name=names[-1])
        stage = arrays.get(job.name.removesuffix("-coordinator"))
        if stage is not None:
            most = f"at most {stage.max_tasks}"
            yield f"# It counts what there is to do, and submits tasks for that, {most}:"
            tasks = range(stage.max_tasks)
            for array in array_jobs(cfg, stage, tasks, width=len(tasks), most=_USUAL_ARRAY_SIZE):
                yield from _shown(array, chain.after(["$SLURM_JOB_ID"]), name=stage.name)
            yield f"# What waits for ${names[-1]} then waits for ${stage.name}."
            yield ""
    yield f"# scontrol release ${names[0]}"


def _shown(job: Job, options: Sequence[str], *, name: str) -> Iterator[str]:
    yield f"# {name}=$(sbatch --parsable {' '.join(options)} {quote(str(job.path))})"
    yield job.script


def _options(before: Sequence[str]) -> tuple[str, ...]:
    return chain.after(before) or ("--hold",)


def _is_trained(cfg: PipelineConfig, stage: Stage) -> bool:
    """Whether a stage is a training that is done: no node is asked for to say so."""
    return stage.name == "train" and launch.is_done(cfg.folder, train_config(cfg, stage))
