"""Save and end a run; of a sweep or a pipeline, all its jobs. Launching it again continues it.

A job that trains is told to save and not to come back; all others are cancelled, which lets go of
nothing that was finished.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from slurm import client
from slurm.attempts import Attempt, attempt_folders, read_attempt
from slurm.client import Queued
from slurm.config import StopConfig
from slurm.runfile import STOP, read_spec, run_folders, saved_step, write_json
from slurm.seen import TRAIN, find, find_run, is_trained, stage_of
from trainer.command import run_command
from trainer.errors import BadInput, BadWorld

log = logging.getLogger(__name__)

_POLL_S = 1.0


class Stopper:
    """Ends the jobs of a folder, and what of them comes back meanwhile."""

    def __init__(self, root: Path, *, now: bool) -> None:
        """Take the folder; `now` cancels also what would save."""
        self._root, self._now = root, now
        self._said: set[str] = set()

    def jobs(self) -> list[Queued]:
        """List the jobs that work for the folder, or for what lies below it."""
        found = [(job, job.folder) for job in client.queue()]
        return [job for job, folder in found if folder and folder.is_relative_to(self._root)]

    def step(self, jobs: Sequence[Queued]) -> None:
        """Do to each job what ends it; again: does no harm."""
        running = [job for job in jobs if job.state == "RUNNING"]
        saving = [] if self._now else [job for job in running if is_training(job)]
        self._cancel([job for job in jobs if job.state == "PENDING"], "--state=PENDING")
        self._cancel([job for job in running if job not in saving])
        for job in saving:
            self._tell(job)

    def _cancel(self, jobs: Sequence[Queued], *options: str) -> None:
        if jobs:
            client.run("scancel", *options, *(job.shown_id for job in jobs))
        for job in jobs:
            self._say_once(f"{job.job_name}: job {job.shown_id} is cancelled")

    def _tell(self, job: Queued) -> None:
        """Tell the ranks of a job to save and to end it, once they can hear it."""
        assert job.folder is not None
        attempt, spec = newest_attempt(job.folder), read_spec(job.folder)
        if attempt is None or spec is None or attempt.begin.job_id != job.job_id:
            return
        num_ranks = spec.ranks_per_node * len(attempt.begin.nodes)
        # Before its first heartbeat a rank dies of the signal, and its node becomes suspect.
        if sum(1 for _ in attempt.folder.glob("beats/*")) < num_ranks:
            self._say_once(f"{job.job_name}: job {job.shown_id} is told as soon as it can hear")
            return
        told = (
            f"{job.job_name}: job {job.shown_id}, attempt {attempt.number}, is told to save and end"
        )
        if told not in self._said:
            write_json(job.folder / STOP, {"unix_s": time.time()})
            client.run("scancel", f"--signal={spec.stop_signal}", job.shown_id)
        self._say_once(told)

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.info("%s", what)


def is_training(job: Queued) -> bool:
    """Whether a job saves when it is told to."""
    return job.folder is not None and stage_of(job, job.folder) == TRAIN


def newest_attempt(run: Path) -> Attempt | None:
    """Read the newest attempt of a run, if a job made it."""
    folders = attempt_folders(run)
    return read_attempt(folders[-1]) if folders else None


def outcome(attempt: Attempt | None, newest_step: int) -> str:
    """Say what became of a run.

    Args:
        attempt: Its newest one.
        newest_step: That of its newest checkpoint.
    """
    kept = (
        f"its newest checkpoint is step {newest_step:,}" if newest_step else "it has no checkpoint"
    )
    if attempt is None:
        return f"nothing had begun; {kept}"
    if attempt.end is None:
        return f"attempt {attempt.number} ended without a word; {kept}"
    if attempt.end.cause == "stopped":
        return f"attempt {attempt.number} saved at step {attempt.end.saved_step:,}"
    return f"attempt {attempt.number} {attempt.end.cause} ({attempt.end.why}); {kept}"


def run(cfg: StopConfig) -> int:
    """End all jobs and wait for what is being saved."""
    found = find(cfg.run)
    root = (found if found.is_dir() else find_run(found)).resolve()
    stopper = Stopper(root, now=cfg.now)
    try:
        jobs = stopper.jobs()
        if not jobs:
            _check_has_runs(found)
            log.info("%s: no job of it is in the queue", found)
        folders = sorted({job.folder for job in jobs if job.folder}) or list(run_folders(root))
        _wait(stopper, jobs, cfg.wait_s, found)
    except client.SlurmError as error:
        raise BadWorld(str(error)) from error
    for folder in folders:
        log.info("%s: %s", folder, outcome(newest_attempt(folder), saved_step(folder)))
    log.info("The same line that submitted it goes on from there.")
    return 0


def _wait(stopper: Stopper, jobs: Sequence[Queued], wait_s: float, name: Path) -> None:
    deadline_s = time.monotonic() + wait_s
    while jobs:
        if time.monotonic() > deadline_s:
            raise BadWorld(
                f"job {', '.join(job.shown_id for job in jobs)} has not ended within "
                f"wait_s={wait_s:g}, and may still save; `kiln status {name}` shows it. The same "
                f"command waits on; `kiln stop {name} now=true` does not let it save."
            )
        stopper.step(jobs)
        time.sleep(_POLL_S)
        jobs = stopper.jobs()


def _check_has_runs(root: Path) -> None:
    """Refuse what no job works for, now or before."""
    if not any(run_folders(root)):
        find_run(root)
    if newest_attempt(root) is None and is_trained(root):
        raise BadInput(
            f"{root} is trained by `kiln train`, not by a job: Ctrl-C in its terminal stops it, "
            "and it saves first."
        )


def main(argv: Sequence[str]) -> int:
    """`kiln stop RUN [now=true]`."""
    return run_command(run, StopConfig, "stop", argv, positional="run")
