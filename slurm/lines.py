"""What a row of `kiln status` says: pure functions of what was seen."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slurm.client import Queued
from slurm.places import Place
from slurm.seen import STAGES, TRAIN, Seen, Word, stage_of
from slurm.words import clock, from_slurm
from trainer.observe.progress import in_words


@dataclass(frozen=True, kw_only=True)
class Line:
    """A run, or another stage of a pipeline, as a row of the table."""

    run: str
    stage: str
    job: str
    state: str
    attempt: str = ""
    step: str = ""
    images_per_s: str = ""
    left: str = ""
    says: str


def lines(seen: Seen, word: Word, name: str) -> Iterator[Line]:
    """Put a folder into words: its stages that have jobs, and its training."""
    stages: dict[str, list[Queued]] = {}
    for job in seen.jobs:
        stages.setdefault(stage_of(job, seen.folder), []).append(job)
    if seen.num_attempts or not stages:
        stages.setdefault(TRAIN, [])
    for stage in sorted(stages, key=_order):
        if stage == TRAIN:
            yield _training_line(seen, word, name)
        else:
            yield _stage_line(stage, stages[stage], word, name)


def _order(stage: str) -> tuple[int, bool]:
    """Put stages in their order, and before each its coordinator."""
    return STAGES.index(stage.removesuffix("-coordinator")), not stage.endswith("-coordinator")


def _stage_line(stage: str, jobs: Sequence[Queued], word: Word, name: str) -> Line:
    states = [job.state.lower() for job in jobs]
    counts = {state: states.count(state) for state in states}
    told = ", ".join(state if len(jobs) == 1 else f"{n} {state}" for state, n in counts.items())
    arrays = dict.fromkeys(job.array for job in jobs)
    waiting = next((job for job in jobs if job.state == "PENDING"), None)
    place = word.places.get(waiting.array) if waiting else None
    says = wait_words(waiting, place, has_begun=True) if waiting else ""
    return Line(run=name, stage=stage, job=",".join(arrays), state=told, says=says)


def _training_line(seen: Seen, word: Word, name: str) -> Line:
    job, row = seen.training, seen.speed
    speed, left_s = (row.get("speed/images_per_s"), row.get("time/left_s")) if row else (None, None)
    of = f"/{seen.total_steps:,}" if seen.total_steps else ""
    return Line(
        run=name,
        stage=TRAIN,
        job=job.shown_id if job else "",
        state=state(seen, word),
        attempt=str(seen.num_attempts - 1) if seen.num_attempts else "",
        step=f"{seen.step:,}{of}",
        images_per_s="" if speed is None else f"{speed:,.1f}",
        left="" if left_s is None else in_words(left_s),
        says=says(seen, word),
    )


def state(seen: Seen, word: Word) -> str:
    """Say in a word how a training is."""
    if seen.training is not None:
        return seen.training.state.lower()
    if seen.newest is not None and seen.newest.end is not None:
        return seen.newest.end.cause
    if seen.is_local:
        is_done = seen.total_steps is not None and seen.step >= seen.total_steps
        return "training" if seen.is_trained else "finished" if is_done else "not running"
    if word.problem is not None:
        return "unknown"
    return "lost" if seen.newest else "not in the queue"


def says(seen: Seen, word: Word) -> str:
    """Say what a training waits for, where it runs, or why it ended; and the error before that."""
    job, newest, told = seen.training, seen.newest, []
    if job is not None and job.state == "PENDING":
        place = word.places.get(job.array)
        told.append(wait_words(job, place, has_begun=seen.has_job_begun))
        if newest is not None and newest.end is None:
            told.append(f"attempt {newest.number} was lost")
    elif job is not None:
        told.append(f"on {job.nodes}" if seen.speed else f"starting on {job.nodes}")
    elif newest is not None and newest.end is None and word.problem is None:
        told.append(f"no word from attempt {newest.number}, and no job in the queue")
    elif not seen.num_attempts and seen.event is not None:
        told.append(f"{seen.event['stage']}: {seen.event['words']}")
    if seen.last_end is not None:
        number, end = seen.last_end
        is_state = job is None and newest is not None and end is newest.end
        told.append(end.why if is_state else f"attempt {number} {end.cause}: {end.why}")
    return "; ".join(filter(None, (*told, seen.error)))


def wait_words(job: Queued, place: Place | None, *, has_begun: bool) -> str:
    """Say what a job waits for.

    Args:
        job: One that is pending.
        place: Where it stands, if it waits for nodes.
        has_begun: Whether it has, before; only its launch line can make it wait until then.
    """
    start_unix_s = from_slurm(job.start)
    if job.reason.startswith("Dependency"):
        after = dict.fromkeys(re.findall(r":(\d+(?:_\d+)?)", job.dependency))
        never = " and never begins" if job.reason == "DependencyNeverSatisfied" else ""
        return f"waits for job {', '.join(after) or job.dependency}{never}"
    if job.reason.startswith("JobHeld"):
        return f"is held; `scontrol release {job.shown_id}` lets it go"
    if job.reason == "BeginTime":
        until = f" until {clock(start_unix_s)}" if start_unix_s else ""
        if not has_begun:
            return f"waits{until} to begin"
        return f"is held by Slurm after its last end{until}; `kiln supervise` lifts that"
    is_in_line = job.reason in {"Resources", "Priority", "None"}
    told = [f"waits for {'nodes' if is_in_line else job.reason}"]
    if place is not None:
        told.append(f"{place.position} of {place.of} in {place.partition}")
    if start_unix_s is not None:
        told.append(f"Slurm's estimate: {clock(start_unix_s)}")
    return ", ".join(told)
