"""Slurm's commands as functions: no shell, and Slurm's own words in every error."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.runfile import nth_run

COMMENT = "kiln:"
"""Jobs of Kiln have this and their folder as comment; that is how its commands find them."""

_TIMEOUT_S = 60
# One letter for each field of Queued, behind a character that none of them holds.
_QUEUE_FORMAT = "\x1f".join(("%i", "%A", "%T", "%r", "%k", "%N", "%S", "%D", "%E", "%L", "%j"))


_OF_SWEEP = re.compile(r"(.+)/\+(\d+)")


class SlurmError(RuntimeError):
    """Slurm is not there, or said no."""


@dataclass(frozen=True)
class Queued:
    """A job that Slurm knows, or one task of an array."""

    shown_id: str
    """As people write it: 12, 12_3 or 12_[3-7]."""
    job_id: str
    """Number of this task alone."""
    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Why it waits."""
    comment: str
    """As it was given."""
    nodes: str
    """Where it runs, in Slurm's short form."""
    start: str
    """When it began, or Slurm's estimate: 2026-11-28T12:00:00, or N/A."""
    num_nodes: str
    """How many nodes it has or wants."""
    dependency: str
    """What it waits for."""
    time_left: str
    """Until its walltime ends: D-HH:MM:SS."""
    job_name: str
    """Its name."""

    @property
    def folder(self) -> Path | None:
        """The folder of Kiln's that it works for; a task of a sweep works for that of its run."""
        if not self.comment.startswith(COMMENT):
            return None
        told = self.comment.removeprefix(COMMENT)
        sweep, task = _OF_SWEEP.fullmatch(told), self.shown_id.partition("_")[2]
        if sweep is None:
            return Path(told)
        folder = Path(sweep.group(1))
        return nth_run(folder, int(sweep.group(2)) + int(task)) if task.isdigit() else folder

    @property
    def array(self) -> str:
        """Number of the array that it is a task of, or its own."""
        return self.shown_id.partition("_")[0]


def sweep_comment(folder: Path, first: int) -> str:
    """Return the comment of an array that works for the runs of a sweep, from this one on."""
    return f"{COMMENT}{folder}/+{first}"


def run(*command: str, stdin: str | None = None) -> str:
    """Run one of Slurm's commands and return what it printed.

    Raises:
        SlurmError: It is not there, does not answer, or failed; its own words are in the message.
    """
    try:
        done = subprocess.run(  # noqa: S603 - Slurm's commands, no shell
            command, input=stdin, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no {command[0]} on this machine's PATH. Work on a login node of the "
            "cluster, or load its module, e.g. `module load slurm`."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"`{' '.join(command)}` did not answer within {_TIMEOUT_S} s; is slurmctld down?"
        ) from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"code {done.returncode}"
        raise SlurmError(f"`{' '.join(command)}`: {said}")
    return done.stdout


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a script and return the job's number.

    Raises:
        SlurmError: See `run`.
    """
    told = run("sbatch", "--parsable", *options, str(script))
    number = re.match(r"\d+", told)
    if number is None:
        raise SlurmError(f"sbatch took {script} and said {told!r}, which is no job's number.")
    return number.group()


def queue(*, mine: bool = True) -> list[Queued]:
    """List the jobs that Slurm has, arrays by task."""
    whose = ("--me",) if mine else ()
    told = run("squeue", *whose, "--noheader", "--array", "--format", _QUEUE_FORMAT)
    rows = (line.split("\x1f") for line in told.splitlines())
    return [Queued(*row) for row in rows if len(row) == len(Queued.__dataclass_fields__)]


def show_job(job_id: str) -> dict[str, str]:
    """Return all that Slurm says of one job; empty when it has forgotten it.

    Raises:
        SlurmError: Slurm does not answer.
    """
    try:
        return _fields(run("scontrol", "--oneliner", "show", "job", job_id))
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise


def show_node(node: str) -> dict[str, str]:
    """Return all that Slurm says of a node."""
    return _fields(run("scontrol", "--oneliner", "show", "node", node))


def hostnames(nodes: str) -> tuple[str, ...]:
    """Write Slurm's short form out: node[1-2] -> node1, node2."""
    return tuple(run("scontrol", "show", "hostnames", nodes).split()) if nodes else ()


def update(job_id: str, **fields: str) -> None:
    """Change fields of a job."""
    run("scontrol", "update", f"JobId={job_id}", *(f"{key}={v}" for key, v in fields.items()))


def requeue(job_id: str) -> None:
    """End a job and put it back into the queue, under the same number."""
    run("scontrol", "requeue", job_id)


def release(job_id: str) -> None:
    """Let a job begin that was held."""
    run("scontrol", "release", job_id)


def max_array_size() -> int:
    """Return the number that those of an array's tasks must be below."""
    told = re.search(r"^MaxArraySize\s*=\s*(\d+)", run("scontrol", "show", "config"), re.M)
    return int(told.group(1)) if told else 1001


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs, pending and running ones."""
    if job_ids:
        run("scancel", *job_ids)


def seconds(told: str) -> int | None:
    """Read a span as Slurm writes it, D-HH:MM:SS or a part of that; None for UNLIMITED and such."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", told)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(.*?)(?=\s[A-Za-z][\w/:]*=|\s*$)", line))
