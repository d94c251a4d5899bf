"""Keep jobs alive from a login node: restart at once, without bad nodes, with fewer if need be.

It remembers nothing: what it must know is in the runs' folders, so it may be stopped and started at
any time. It needs no rights but those of the jobs' owner.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import PositiveFloat

from slurm import client
from slurm.attempts import FINAL, Attempt, read_attempts
from slurm.lost import close_lost
from slurm.runfile import append_row, read_rows, read_spec, run_folders
from slurm.seen import TRAIN, stage_of
from slurm.spec import RunSpec
from slurm.suspects import Suspicion, to_leave_out
from trainer.command import run_command
from trainer.errors import BadInput, BadWorld
from trainer.frozen import config
from trainer.runtime.rundir import locked

log = logging.getLogger(__name__)

RECORD = "supervisor.jsonl"
"""In a run's folder: what was done for it."""
_SOON_S = 0.25
"""How often Slurm is asked while a job is about to come back."""
_CREDENTIAL_S = 2
"""A node refuses a job's credential that was made in the second in which the job ended there, or
before, and Slurm then fails the job. This is what its own hold is for."""
_LIFTED_WITHIN_S = 10.0
_REMEMBERED_S = 7 * 24 * 3600.0


@config
class SuperviseConfig:
    """`kiln supervise`."""

    root: Path
    """Folder of runs, or one run."""
    poll_s: PositiveFloat
    """How often Slurm is asked; while a job is about to come back more often."""
    once: bool
    """Look once, do what there is to do, and end: for cron."""


@dataclass(frozen=True)
class Charge:
    """A job that is watched over."""

    job: client.Queued
    folder: Path
    spec: RunSpec | None
    """None of a job that trains nothing: preparing data, say."""
    attempts: Sequence[Attempt]
    """Of this job."""

    @property
    def is_held(self) -> bool:
        """Whether Slurm makes it wait although there may be nodes."""
        return self.job.state == "PENDING" and self.job.reason == "BeginTime"

    @property
    def may_shrink(self) -> bool:
        """Whether it would begin if there were nodes, and could do with fewer."""
        waits = self.job.state == "PENDING" and self.job.reason in {"Resources", "Priority"}
        return waits and self.spec is not None and len(self.spec.node_counts) > 1

    @property
    def will_come_back(self) -> bool:
        """Whether its last attempt has ended, and Slurm has not noticed yet."""
        end = self.attempts[-1].end if self.attempts else None
        return end is not None and end.cause not in FINAL


@dataclass(frozen=True)
class Change:
    """What is to be changed about a job, and why."""

    fields: Mapping[str, str]
    what: str
    words: str


def restart(spec: RunSpec | None, leave_out: Sequence[str]) -> Change:
    """Start a job that comes back now, with all its nodes, and without those."""
    fields = {"StartTime": f"now+{_CREDENTIAL_S}"}
    if spec is not None:
        fields["ExcNodeList"] = ",".join(leave_out)
        if len(spec.node_counts) > 1:
            fields |= _size(spec, spec.node_counts[0])
    without = f" without {', '.join(leave_out)}" if leave_out else ""
    return Change(fields, "lifted", f"starts at once{without}")


def shrink(spec: RunSpec, wanted: int, waited_s: float, num_idle: int) -> Change | None:
    """Take fewer nodes for a job that has waited long enough; None to go on waiting.

    Args:
        spec: Of the job.
        wanted: Nodes that it waits for.
        waited_s: For how long.
        num_idle: Nodes that it could have now.
    """
    fitting = [count for count in spec.node_counts if count <= num_idle and count < wanted]
    if not fitting or waited_s < spec.shrink_after_s:
        return None
    words = f"takes {fitting[0]} nodes instead of {wanted}, after {waited_s / 60:.0f} min"
    return Change(_size(spec, fitting[0]), "shrunk", words)


def _size(spec: RunSpec, num_nodes: int) -> dict[str, str]:
    """Say how large a job is: Slurm takes the most that any of its numbers asks for."""
    ranks = num_nodes * spec.ranks_per_node
    return {
        "NumCPUs": str(ranks * spec.cores_per_rank),
        "NumTasks": str(ranks),
        "NumNodes": str(num_nodes),
    }


class Supervisor:
    """Looks after all jobs of a folder."""

    def __init__(self, root: Path) -> None:
        """Take the folder."""
        self._root = root

    def look(self) -> list[Charge]:
        """Do what there is to do, and return the jobs that there are."""
        charges = list(self._charges(client.queue()))
        for charge in charges:
            if charge.is_held:
                self._lift(charge)
            elif charge.may_shrink and charge.spec is not None:
                told, wanted = client.show_job(charge.job.shown_id), int(charge.job.num_nodes)
                change = shrink(charge.spec, wanted, _waited_s(told), num_nodes(told, "idle"))
                if change is not None:
                    self._do(charge, change)
        return charges

    def _charges(self, queue: Sequence[client.Queued]) -> Iterator[Charge]:
        for job in queue:
            folder = job.folder
            if folder is not None and folder.is_relative_to(self._root):
                own = [each for each in read_attempts(folder) if each.begin.job_id == job.job_id]
                spec = read_spec(folder) if stage_of(job, folder) == TRAIN else None
                yield Charge(job, folder, spec, own)

    def _lift(self, charge: Charge) -> None:
        told = client.show_job(charge.job.shown_id)
        # That has never begun waits because somebody wants it to.
        if told.get("Restarts", "0") == "0" or _is_lifted(charge):
            return
        close_lost(charge.attempts)
        spec = charge.spec
        leave_out = self._leave_out(spec, num_nodes(told, "all")) if spec else ()
        self._do(charge, restart(spec, leave_out))

    def _leave_out(self, spec: RunSpec, num_there: int) -> tuple[str, ...]:
        now_unix_s = time.time()
        suspicions = [
            Suspicion(node, attempt.end.unix_s, weight)
            for folder in run_folders(self._root)
            for attempt in read_attempts(folder)
            if attempt.end is not None and now_unix_s - attempt.end.unix_s < _REMEMBERED_S
            for node, weight in attempt.end.suspects.items()
        ]
        spare = num_there - len(spec.exclude) - spec.node_counts[0]
        suspects = [n for n in to_leave_out(suspicions, now_unix_s) if n not in spec.exclude]
        return (*spec.exclude, *suspects[: max(0, spare)])

    def _do(self, charge: Charge, change: Change) -> None:
        try:
            client.update(charge.job.shown_id, **change.fields)
        except client.SlurmError as error:
            log.warning("%s: %s", charge.folder.name, error)
            return
        row = {"unix_s": time.time(), "job_id": charge.job.job_id, "what": change.what}
        append_row(charge.folder / RECORD, {**row, "words": change.words})
        log.info("%s: job %s %s", charge.folder.name, charge.job.shown_id, change.words)


def _is_lifted(charge: Charge) -> bool:
    """Whether that was just done, and Slurm is about to start the job."""
    rows = read_rows(charge.folder / RECORD)
    last_unix_s = max((r["unix_s"] for r in rows if r["job_id"] == charge.job.job_id), default=0.0)
    return time.time() - last_unix_s < _LIFTED_WITHIN_S


def num_nodes(job: Mapping[str, str], state: str) -> int:
    """Count the nodes of a job's partition, all or those that are idle."""
    only = () if state == "all" else (f"--states={state}",)
    partition = f"--partition={job['Partition']}"
    told = client.run("sinfo", "--noheader", partition, *only, "--format=%D")
    return sum(map(int, told.split()))


def _waited_s(job: Mapping[str, str]) -> float:
    """How long a job could have begun already; Slurm's times are local and without zone."""
    try:
        return time.time() - datetime.fromisoformat(job["EligibleTime"]).timestamp()
    except (KeyError, ValueError):
        return 0.0


def run(cfg: SuperviseConfig) -> int:
    """Watch until interrupted."""
    root = cfg.root.resolve()
    if not root.is_dir():
        raise BadInput(f"root={cfg.root} is not there. Give the folder that holds the runs.")
    supervisor = Supervisor(root)
    with locked(root, ".supervise.lock", doing="supervised"):
        log.info("supervising the jobs of %s; stop with Ctrl-C, which stops no job", root)
        while True:
            soon = False
            try:
                soon = any(charge.will_come_back for charge in supervisor.look())
            except client.SlurmError as error:
                if cfg.once:
                    raise BadWorld(str(error)) from error
                log.warning("%s; asking again", error)
            if cfg.once:
                return 0
            time.sleep(_SOON_S if soon else cfg.poll_s)


def main(argv: Sequence[str]) -> int:
    """`kiln supervise [ROOT] [once=true] [key=value ...]`."""
    return run_command(run, SuperviseConfig, "supervise", argv, positional="root")
