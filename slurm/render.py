"""From a job to its sbatch script: a pure function, pinned by golden files."""

from collections.abc import Iterator, Sequence
from shlex import quote

from slurm.spec import JobSpec
from slurm.words import spans


def sbatch_script(job: JobSpec) -> str:
    """Return the script: what is asked for, the environment, and the command it becomes."""
    header = "\n".join(f"#SBATCH {option}" for option in _options(job))
    lines = "\n".join(_environment(job))
    command = " ".join(map(quote, job.command))
    return f"#!/bin/bash\n{header}\nset -e\n{lines}\nexec {command}\n"


def _options(job: JobSpec) -> Iterator[str]:
    site = job.site
    yield f"--job-name={quote(job.name)}"
    yield f"--comment={quote(job.comment)}"
    yield f"--nodes={job.num_nodes}"
    yield f"--ntasks-per-node={job.tasks_per_node}"
    yield f"--cpus-per-task={job.cpus_per_task}"
    if job.gpus_per_node:
        kind = f"{site.gpu_kind}:" if site.gpu_kind else ""
        yield f"--gpus-per-node={kind}{job.gpus_per_node}"
    if job.exclusive:
        yield "--exclusive"
    if job.exclusive or job.memory_gb is not None:
        yield "--mem=0" if job.memory_gb is None else f"--mem={job.memory_gb}G"
    yield f"--time={job.time_limit_min}"
    if job.begin is not None:
        yield f"--begin={job.begin.isoformat(timespec='seconds')}"
    for option in (
        "partition",
        "account",
        "qos",
        "reservation",
        "licenses",
        "constraint",
    ):
        value: str = getattr(site, option)
        if value:
            yield f"--{option}={quote(value)}"
    if site.exclude:
        yield f"--exclude={','.join(site.exclude)}"
    if job.array:
        throttle = f"%{job.at_once}" if job.at_once else ""
        yield f"--array={ranges(job.array)}{throttle}"
    prefix = "B:" if job.warns == "batch" else ""
    yield f"--signal={prefix}{job.stop_signal}@{job.warn_before_kill_s}"
    # The number stays, so that what waits for the job goes on waiting.
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={quote(str(job.log))}"


def _environment(job: JobSpec) -> Iterator[str]:
    for module in job.site.modules:
        yield f"module load {quote(module)}"
    for name, value in sorted(job.site.env.items()):
        yield f"export {name}={quote(value)}"
    # Python would look into the folder where somebody stood who submitted, first of all.
    yield f"export PYTHONPATH={quote(str(job.code))} PYTHONSAFEPATH=1"
    # Since Slurm 22.05 srun does not take it over from sbatch.
    yield f"export SRUN_CPUS_PER_TASK={job.cpus_per_task}"


def ranges(numbers: Sequence[int]) -> str:
    """Write numbers as sbatch's --array takes them: 0-3,7."""
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans(numbers))
