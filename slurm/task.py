"""Run one command as a Slurm job that comes back: stopped in time, and requeued for the rest.

For commands that go on where they were stopped when they are given again. A job whose command
fails by itself does not come back.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

from slurm import client
from slurm.words import from_slurm
from trainer.observe.waiting_time import Waited, hand_over

log = logging.getLogger(__name__)

TASK = "{task}"
"""In part={task}: the task's number in all arrays of its stage."""
WARN_BEFORE_KILL_S = 60
"""When the command is told to stop; it finishes no unit that it has begun."""
_GRACE_S = 45.0
_REQUEUED_WITHIN_S = 300.0
_POLL_S = 0.2


class Task:
    """A command and the signals that reach it."""

    def __init__(self) -> None:
        """Install the handlers: Slurm's warning, and the TERM of preemption and of an end."""
        self.heard: list[str] = []
        self._told_s: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.heard.append(signal.Signals(number).name)

    def run(self, command: Sequence[str], env: Mapping[str, str]) -> int:
        """Return the command's exit code; when a signal came it was told to stop, once."""
        log.info("$ %s", " ".join(command))
        process = subprocess.Popen(command, env=env)  # noqa: S603 - our own command, no shell
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(_POLL_S)
                return code if code >= 0 else 128 - code
            if self.heard and self._told_s is None:
                self._told_s = time.monotonic()
                log.info("%s: stopping", self.heard[0])
                process.send_signal(signal.SIGINT)
            if self._told_s is not None and time.monotonic() - self._told_s > _GRACE_S:
                process.kill()

    def come_back(self, job_id: str) -> None:
        """Put the job back into the queue, and wait to be ended for it.

        Raises:
            client.SlurmError: Slurm does not want to.
        """
        before = len(self.heard)
        client.requeue(job_id)
        deadline_s = time.monotonic() + _REQUEUED_WITHIN_S
        while len(self.heard) == before and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)


def job_name(env: Mapping[str, str]) -> str:
    """Return the number by which this job alone is requeued.

    The last task of an array has the array's own number as SLURM_JOB_ID, which means all of it.
    """
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def filled_in(command: Sequence[str], first: int, env: Mapping[str, str]) -> tuple[str, ...]:
    """Write this task's number into its command."""
    number = first + int(env.get("SLURM_ARRAY_TASK_ID", "0"))
    return tuple(f"part={number}" if word == f"part={TASK}" else word for word in command)


def waited(env: Mapping[str, str]) -> dict[str, str]:
    """Tell the command how long its job was in the queue; nothing where Slurm does not say."""
    job: Mapping[str, str] = {}
    with suppress(client.SlurmError, KeyError):
        job = client.show_job(job_name(env))
    since, until = (from_slurm(job.get(name, "")) for name in ("EligibleTime", "StartTime"))
    return {} if since is None or until is None else hand_over(Waited(since, until))


def may_come_back(job: Mapping[str, str]) -> bool:
    """Whether Slurm still lets a job run; one that it ends is cancelled, or comes back by itself.

    To requeue one that somebody has just cancelled would undo that.
    """
    return job.get("JobState") == "RUNNING"


def main(argv: Sequence[str]) -> int:
    """`python -m slurm.task --max-restarts=N --first=N COMMAND ...` in an sbatch script."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    told = parser.parse_args(argv)
    task, env = Task(), dict(os.environ)
    code = task.run(filled_in(told.command, told.first, env), env | waited(env))
    if code == 0 or not task.heard:
        return code
    restarts = int(env.get("SLURM_RESTART_COUNT", "0"))
    if restarts >= told.max_restarts:
        log.error(
            "stopped by %s after %d restarts, and cluster.slurm.max_restarts=%d: not again",
            task.heard[0],
            restarts,
            told.max_restarts,
        )
        return code
    try:
        if may_come_back(client.show_job(job_name(env))):
            task.come_back(job_name(env))
    except client.SlurmError as error:
        log.error("could not be requeued: %s", error)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
