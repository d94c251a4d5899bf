"""What ended an attempt, from what everybody says of it: a pure function."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slurm.attempts import Cause
from slurm.step import Died, Ended
from trainer.runtime.signals import EXIT_FINAL, EXIT_REQUEUE

EXIT_REFUSED = 2
_CERTAIN, _LIKELY = 1.0, 0.5
_MEANT: Mapping[int, Cause] = {EXIT_REFUSED: "refused", EXIT_FINAL: "superseded"}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known when the ranks are gone."""

    ended: Ended
    """srun's word."""
    error: str | None
    """Of the rank that failed first, with its node."""
    error_code: int
    """What that rank meant to end with; 0 when none failed by itself."""
    stuck: str | None
    """The watchdog's."""
    stuck_nodes: Sequence[str]
    """Nodes of the ranks that held up the others."""
    job: Mapping[str, str]
    """Slurm's word; empty when it does not answer."""
    is_asked_to_stop: bool
    """By `kiln stop`."""
    is_near_walltime: bool
    """So near that Slurm has warned."""


@dataclass(frozen=True)
class Judgement:
    """What ended an attempt."""

    cause: Cause
    why: str
    suspects: Mapping[str, float]
    """Nodes that may be to blame, and how surely, from 0 to 1."""


def judge(told: Evidence) -> Judgement:
    """Name the cause."""
    # srun has the highest code of all ranks, and kills those that do not end by themselves.
    code = told.error_code or told.ended.code
    if code == 0:
        return Judgement("finished", "all images are seen", {})
    # Slurm hides what it is completing; of a job that is requeued nobody asks here.
    is_ended = told.job.get("JobState") in {"CANCELLED", "COMPLETING"}
    if is_ended and not told.is_near_walltime:
        return Judgement("cancelled", "scancel", {})
    if told.stuck is not None:
        return Judgement("stuck", told.stuck, dict.fromkeys(told.stuck_nodes, _CERTAIN))
    if told.ended.code == EXIT_REQUEUE:
        return _stopped(told)
    if code in _MEANT:
        return Judgement(_MEANT[code], told.error or f"code {code}", {})
    return _crashed(told)


def _stopped(told: Evidence) -> Judgement:
    if told.is_asked_to_stop:
        return Judgement("stopped", "`kiln stop` asked for it; saved", {})
    if told.is_near_walltime:
        return Judgement("walltime", "the walltime was about to end; saved", {})
    return Judgement("preempted", "Slurm wanted the nodes back; saved", {})


def _crashed(told: Evidence) -> Judgement:
    died = told.ended.died[0] if told.ended.died else None
    if died is not None and _is_sudden(died):
        return Judgement("crashed", str(died), {died.node: _LIKELY})
    return Judgement("crashed", told.error or str(died or f"code {told.ended.code}"), {})


def _is_sudden(died: Died) -> bool:
    """Whether the tasks died of a signal, and could not say anything."""
    return re.match(r"Exited|Terminated", died.how) is None
