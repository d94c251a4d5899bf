"""Submit a training run to Slurm, frozen; the same command again continues it."""

import logging
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import distributions
from pathlib import Path

from slurm import client
from slurm.attempts import attempt_folders
from slurm.render import sbatch_script
from slurm.runfile import CODE, JOBS, PLAN, SCRIPT, append_row, read_json, write_json, write_spec
from slurm.site import advice, misfit, site_nodes
from slurm.spec import Checks, JobSpec, RunSpec, Site
from trainer.begin_time import Planned, plan_begin
from trainer.command import run_command
from trainer.config import LaunchConfig, TrainConfig
from trainer.config_cluster import ContainerConfig, SlurmConfig
from trainer.datasets import dataset_places, find_datasets
from trainer.errors import BadInput, BadWorld
from trainer.frozen import freeze, thaw
from trainer.place import storage
from trainer.plan import make_plan
from trainer.plan_forecast import check_run, in_short, predictions
from trainer.plan_memory import checkpoint_gib
from trainer.runtime.local import ALLOCATOR_ENV
from trainer.runtime.rundir import SAVED, freeze_config, locked

log = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[1]
_PACKAGES = ("trainer", "data_prep", "slurm", "conf")
_RANK_ENV = {
    "DEEPSPEED_TIMEOUT": "30",
    "NCCL_DEBUG": "WARN",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
_MB_PER_GIB = 2**30 / 1e6


def run(cfg: LaunchConfig) -> int:
    """Freeze the run and submit it, unless it is in the queue or done; or print what would be."""
    if cfg.at_once is not None:
        raise BadInput(f"at_once={cfg.at_once} is for sweeps. Add -m, or leave it out.")
    train = train_config(cfg, Path(cfg.run).resolve())
    job, spec = jobs_of(train, cfg.name)
    folder = Path(train.run)
    if cfg.dry_run:
        planned = planned_begin(cfg, job, [folder])
        told = f"# {planned.words}\n" if planned.words else ""
        told += f"# plan: {in_short(train)}\n# sbatch {train.run}/{SCRIPT}\n"
        sys.stdout.write(told + sbatch_script(planned.job))
        return 0
    check_datasets(train)
    check_fits(job)
    with locked(folder, ".launch.lock", doing="launched"):
        if is_done(folder, train) or is_queued(folder):
            return 0
        planned = planned_begin(cfg, job, [folder])
        freeze_run(folder, train, planned.job, spec)
        job_id = submit(folder / SCRIPT)
        append_row(folder / JOBS, {"job_id": job_id, "unix_s": time.time()})
    log.info("%s: submitted as job %s. What becomes of it: kiln status", folder, job_id)
    if planned.words:
        log.info("%s: %s", folder, planned.words)
    return 0


def planned_begin(cfg: LaunchConfig, job: JobSpec, folders: Iterable[Path]) -> Planned:
    """Give a job the begin that its launch line asks for.

    Args:
        cfg: The line.
        job: Without a begin.
        folders: Of its runs.
    """
    has_begun = any(attempt_folders(folder) for folder in folders)
    return plan_begin(job, cfg.start, cfg.accounts, now_unix_s=time.time(), has_begun=has_begun)


def train_config(cfg: LaunchConfig, folder: Path) -> TrainConfig:
    """Return the run that is launched, in a folder."""
    fields = thaw(cfg)
    for name in ("name", "dry_run", "at_once", "start"):
        del fields[name]
    return freeze(TrainConfig, fields | {"run": str(folder)})


def is_queued(folder: Path) -> bool:
    """Say which job works for a folder, if one does."""
    with slurm_errors():
        there = [job for job in client.queue() if job.folder == folder]
    for job in there:
        log.info("%s: job %s is %s already", folder, job.shown_id, job.state.lower())
    return bool(there)


def is_done(folder: Path, cfg: TrainConfig) -> bool:
    """Say so if a run has seen all its images."""
    saved = read_json(folder / SAVED)
    if saved is None or saved["images_seen"] < cfg.total_images:
        return False
    log.info("%s: nothing to do, all %d steps are done", folder, saved["step"])
    return True


def check_datasets(cfg: TrainConfig) -> None:
    """Refuse data that is not there."""
    for where in dataset_places(cfg.data):
        with storage(where):
            find_datasets(cfg)


def freeze_run(folder: Path, cfg: TrainConfig, job: JobSpec, spec: RunSpec) -> None:
    """Write everything that the job will read; edits of the repository do not reach it."""
    freeze_task(folder, cfg, spec)
    snapshot(folder)
    (folder / SCRIPT).write_text(sbatch_script(job), encoding="utf-8")


def freeze_task(folder: Path, cfg: TrainConfig, spec: RunSpec) -> None:
    """Write what the batch script and the ranks of a run will read, but for the code."""
    freeze_config(folder, cfg)
    saved = read_json(folder / SAVED) or {"step": 0, "images_seen": 0}
    plan = make_plan(cfg, step=saved["step"], images_seen=saved["images_seen"])
    write_json(folder / PLAN, asdict(plan) | {"predicted": predictions(cfg)})
    (folder / "attempts").mkdir(exist_ok=True)
    write_spec(folder, spec)


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Give a script to sbatch; return the job's number.

    Raises:
        BadWorld: There is no Slurm here, or it refused; what the site has is told besides.
    """
    try:
        return client.submit(script, options)
    except client.SlurmError as error:
        raise BadWorld(f"{error}{advice()}") from error


def check_fits(job: JobSpec) -> None:
    """Refuse a job that Slurm would queue for ever.

    Raises:
        BadInput: The site has no such nodes; what it has is told.
        BadWorld: Slurm does not say.
    """
    with slurm_errors():
        wants = misfit(job, site_nodes())
    if wants is not None:
        where = f"partition {job.site.partition}" if job.site.partition else "its partition"
        raise BadInput(
            f"the job {job.name} wants {wants}, which {where} has not. Change cluster.num_nodes, "
            "ranks_per_node, time_limit_min, engine.threads_per_rank or slurm.partition."
            f"{advice()}"
        )


@contextmanager
def slurm_errors() -> Iterator[None]:
    """Turn what Slurm says no to into an error for the user."""
    try:
        yield
    except client.SlurmError as error:
        raise BadWorld(str(error)) from error


def jobs_of(cfg: TrainConfig, name: str, *, home: Path | None = None) -> tuple[JobSpec, RunSpec]:
    """Translate a run into its job, and into what the job's batch script needs.

    Args:
        cfg: The run.
        name: Of the job.
        home: The folder that has the code, and the run in it; by default the run's own.

    Raises:
        BadInput: It cannot be a Slurm job, with what to change.
    """
    cluster, slurm, folder = cfg.cluster, cfg.cluster.slurm, Path(cfg.run)
    if cluster.kind != "slurm" or slurm is None:
        raise BadInput(
            f"cluster.kind={cluster.kind}: `kiln launch` is for Slurm. Give a cluster= of kind "
            "slurm, such as cluster=example, or use `kiln train` on this machine."
        )
    check_run(cfg)
    _check_time_to_save(cfg, slurm)
    gpus = cluster.ranks_per_node if cluster.device == "cuda" else 0
    try:
        job = JobSpec(
            name=name,
            comment=f"{client.COMMENT}{folder}",
            log=folder / "attempts" / "slurm_%j.log",
            num_nodes=cluster.num_nodes,
            tasks_per_node=cluster.ranks_per_node,
            cpus_per_task=cfg.engine.threads_per_rank + cfg.data.threads,
            gpus_per_node=gpus,
            memory_gb=slurm.memory_gb,
            exclusive=slurm.exclusive,
            time_limit_min=cluster.time_limit_min,
            warn_before_kill_s=cluster.warn_before_kill_s,
            stop_signal=slurm.stop_signal,
            warns="tasks",
            site=site_of(slurm),
            code=(home or folder) / CODE,
            command=(sys.executable, "-m", "slurm.batch", str(folder)),
        )
    except ValueError as error:
        raise BadInput(f"cluster: {str(error).replace('Try ', 'Try cluster.')}") from error
    options, prefix, python = _inside(slurm.container, home or folder)
    spec = RunSpec(
        ranks_per_node=cluster.ranks_per_node,
        cores_per_rank=job.cpus_per_task,
        node_counts=node_counts(cfg, slurm),
        exclude=slurm.exclude,
        worker=(*prefix, python, "-m", "trainer.worker", str(folder)),
        meet=(*prefix, python, "-m", "trainer.runtime.meet", cluster.device),
        srun=options,
        env={
            **_RANK_ENV,
            **(ALLOCATOR_ENV if cluster.device == "cpu" else {}),
            "OMP_NUM_THREADS": str(cfg.engine.threads_per_rank),
        },
        max_restarts=slurm.max_restarts,
        no_progress_attempts=slurm.no_progress_attempts,
        warn_before_kill_s=cluster.warn_before_kill_s,
        stop_signal=slurm.stop_signal,
        shrink_after_s=60 * slurm.shrink_after_min,
        checks=_checks(slurm, gpus),
    )
    return job, spec


def site_of(slurm: SlurmConfig) -> Site:
    """Translate what a site is asked for."""
    return Site(
        partition=slurm.partition,
        account=slurm.account,
        qos=slurm.qos,
        reservation=slurm.reservation,
        licenses=slurm.licenses,
        constraint=slurm.constraint,
        exclude=slurm.exclude,
        gpu_kind=slurm.gpu_kind,
        modules=slurm.modules,
        env=slurm.env,
    )


def node_counts(cfg: TrainConfig, slurm: SlurmConfig) -> tuple[int, ...]:
    """List with how many nodes a run can go on at the same global batch, the most first."""
    least = slurm.min_nodes or cfg.cluster.num_nodes
    found = []
    for num_nodes in range(cfg.cluster.num_nodes, least - 1, -1):
        try:
            make_plan(replace(cfg, cluster=replace(cfg.cluster, num_nodes=num_nodes)))
        except BadInput:
            continue
        found.append(num_nodes)
    return tuple(found)


def _check_time_to_save(cfg: TrainConfig, slurm: SlurmConfig) -> None:
    """Refuse a warning that comes too late for a checkpoint."""
    num_mb = checkpoint_gib(cfg) * _MB_PER_GIB / cfg.cluster.num_nodes
    need_s = round(2 * num_mb / slurm.write_mb_per_s) + 1
    if cfg.cluster.warn_before_kill_s < need_s:
        raise BadInput(
            f"cluster.warn_before_kill_s={cfg.cluster.warn_before_kill_s} is too short for a "
            f"checkpoint: {num_mb:,.0f} MB from each node at cluster.slurm.write_mb_per_s="
            f"{slurm.write_mb_per_s:g}, and as long again for the steps before. "
            f"Try cluster.warn_before_kill_s={need_s}."
        )


def _inside(
    container: ContainerConfig | None, folder: Path
) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Return srun's options, the words before a rank's command, and its interpreter."""
    if container is None:
        return (), (), sys.executable
    mounts = ",".join((f"{folder}:{folder}", *container.mounts))
    if container.kind == "pyxis":
        options = (f"--container-image={container.image}", f"--container-mounts={mounts}")
        return options, (), container.python
    return (), ("apptainer", "exec", "--nv", "--bind", mounts, container.image), container.python


def _checks(slurm: SlurmConfig, gpus: int) -> Checks | None:
    told = slurm.preflight
    if told is None:
        return None
    return Checks(
        folders=tuple(map(str, told.folders)),
        min_free_gb=told.min_free_gb,
        max_clock_skew_s=told.max_clock_skew_s,
        timeout_s=told.timeout_s,
        gpus=gpus,
    )


def snapshot(folder: Path) -> None:
    """Copy Kiln's packages into a folder, and list the versions of all others."""
    code = folder / CODE
    if code.exists():
        return
    partial = folder / ".code.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name in _PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_ROOT / name, partial / name, ignore=ignore)
    versions = sorted({f"{each.name}=={each.version}" for each in distributions()})
    lines = [f"# Python {sys.version.split()[0]} at {sys.executable}", *versions]
    (folder / "environment.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.rename(code)


def main(argv: Sequence[str]) -> int:
    """`kiln launch NAME [experiment=...] [cluster=...] [dry_run=true] [key=value ...]`."""
    return run_command(run, LaunchConfig, "launch", argv, positional="name")
