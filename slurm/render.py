"""From a job to its sbatch script: a pure function, pinned by a golden file."""

from shlex import quote

from slurm.spec import JobSpec

EXIT_REQUEUE = 85


def sbatch_script(job: JobSpec) -> str:
    """Return the script; `sbatch` of the same file continues the run."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.num_nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--cpus-per-task={job.threads_per_rank}",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        f"--time={job.time_limit_min}",
        *([f"--partition={job.partition}"] if job.partition else []),
        # To the ranks, not to this script; NCCL may catch USR1, so USR2.
        f"--signal=USR2@{job.warn_before_kill_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={quote(str(job.run))}/attempts/slurm_%j.log",
    ]
    header = "\n".join(f"#SBATCH {option}" for option in options)
    return f"""#!/bin/bash
{header}
set -u
export PYTHONPATH={quote(str(job.code))} OMP_NUM_THREADS={job.threads_per_rank}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# Attempts of a job that is requeued have numbers; trainer/runtime/env.py counts alike.
stuck={quote(str(job.run))}/attempts/$(printf %03d "${{SLURM_RESTART_COUNT:-0}}")/stuck.json
rm -f "$stuck"
srun --kill-on-bad-exit=1 {quote(str(job.python))} -m trainer.worker {quote(str(job.run))}
code=$?
# {EXIT_REQUEUE}: a stop signal came, everything is saved, and the run wants to go on.
# When a rank is stuck, the others leave the file and exit with it too, but srun's code may be that
# of the stuck rank, which Slurm had to kill.
if [ "$code" -eq {EXIT_REQUEUE} ] || [ -e "$stuck" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""
