"""What happened to a run and what will, in sentences: pure functions of its history."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slurm.attempts import Cause
from slurm.history import Chapter
from slurm.lines import wait_words
from slurm.seen import Seen, Word
from slurm.words import clock, short
from trainer.observe.progress import in_words

Event = tuple[float, str]
"""When, and what."""

_SAVED: Mapping[Cause, str] = {
    "walltime": "as its walltime was about to end",
    "preempted": "as Slurm wanted the nodes back",
    "stopped": "as `kiln stop` had asked",
}
_DIED: Mapping[Cause, str] = {
    "crashed": "died",
    "stuck": "was stuck and ended",
    "lost": "was lost",
    "cancelled": "was cancelled",
    "superseded": "gave way to a newer attempt",
    "gave_up": "was the last",
}
_NEVER_BEGAN: Mapping[Cause, str] = {
    "bad_node": "did not start its ranks",
    "refused": "was refused",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the sentences are made of."""

    name: str
    """Of the run, as a user would give it."""
    command: str
    """Whose line continues it."""
    seen: Seen
    word: Word
    chapters: Sequence[Chapter]
    goes_on: bool | None
    """Whether the newest attempt is not over; None when only Slurm could tell."""
    submitted: Sequence[Mapping[str, Any]]
    """Rows of jobs.jsonl about its training."""
    other_jobs: Sequence[Mapping[str, Any]]
    """Rows about the stages of its pipeline."""
    events: Sequence[Mapping[str, Any]]
    """Rows of what was found between the stages of a pipeline."""
    supervised: Sequence[Mapping[str, Any]]
    """Rows of the supervisor's record."""
    losses: Mapping[int, str]
    """What lost work took, in words, by attempt; where nothing is known of it there is none."""
    is_every_step_logged: bool
    saved_step: int
    lost_why: str
    """What Slurm says of the nodes of a newest attempt that ended without a word."""
    job_state: str
    """Of a job that is no longer in the queue, as long as Slurm remembers it."""


def happened(facts: Facts) -> list[Event]:
    """Tell what happened, oldest first."""
    events = [*_submissions(facts), *_changes(facts)]
    events += [(row["unix_s"], f"{row['stage']}: {row['words']}") for row in facts.events]
    for chapter, following in zip(facts.chapters, [*facts.chapters, None][1:], strict=True):
        is_going_on = following is None and facts.goes_on is not False
        if chapter.began_unix_s is not None and not is_going_on:
            events.append((chapter.began_unix_s, _chapter(chapter, following, facts)))
    return sorted(events, key=lambda event: event[0])


def _submissions(facts: Facts) -> Iterator[Event]:
    began = [each.began_unix_s for each in facts.chapters if each.began_unix_s is not None]
    times = [row["unix_s"] for row in facts.submitted]
    for row, until in zip(facts.submitted, [*times, math.inf][1:], strict=True):
        first = min((unix_s for unix_s in began if row["unix_s"] <= unix_s < until), default=None)
        waited = ""
        if first is not None:
            waited = f", and waited {in_words(first - row['unix_s'])} for its nodes"
        yield row["unix_s"], f"submitted as job {row['job_id']}{waited}"
    for row in facts.other_jobs:
        yield row["unix_s"], f"{row['stage']}: submitted as job {row['job_id']}"


def _changes(facts: Facts) -> Iterator[Event]:
    """Tell what the supervisor did, but for lifting a hold, which is told with the attempt."""
    for row in facts.supervised:
        if row["what"] != "lifted":
            yield row["unix_s"], f"`kiln supervise`: job {row['job_id']} {row['words']}"


def _chapter(chapter: Chapter, following: Chapter | None, facts: Facts) -> str:
    where = f" on {short(chapter.nodes)}" if chapter.nodes else ""
    told = f"attempt {chapter.number}{where} went on from step {chapter.from_step:,} and "
    if chapter.from_step == 0:
        told = f"attempt {chapter.number}{where} began with step 0 and "
    parts = [told + ending(chapter, facts.lost_why)]
    parts += lost(chapter, facts.losses.get(chapter.number), is_exact=facts.is_every_step_logged)
    if following is not None:
        parts.append(restarted(chapter, following, facts.supervised))
    return "; ".join(filter(None, parts))


def ending(chapter: Chapter, lost_why: str) -> str:
    """Say how an attempt ended.

    Args:
        chapter: The attempt.
        lost_why: For one that nobody wrote an end of.
    """
    end, step = chapter.end, f"{chapter.reached_step:,}"
    took = f" after {in_words(chapter.lasted_s)}" if chapter.lasted_s is not None else ""
    if end is None:
        if not chapter.job_id:
            return f"ended at step {step}{took}" + (f": {chapter.error}" if chapter.error else "")
        return f"was lost at step {step}{took}: {lost_why}"
    if end.cause == "finished":
        return f"finished at step {max(chapter.reached_step, end.saved_step):,}{took}"
    if end.cause in _SAVED:
        return f"saved at step {end.saved_step:,}{took}, {_SAVED[end.cause]}"
    if end.cause in _NEVER_BEGAN:
        return f"{_NEVER_BEGAN[end.cause]}: {end.why}"
    return f"{_DIED[end.cause]} at step {step}{took}: {end.why}"


def lost(chapter: Chapter, took: str | None, *, is_exact: bool) -> list[str]:
    """Say how many steps an attempt lost; nothing of one that ended in order.

    Args:
        chapter: The attempt.
        took: What they took, in words, if that is known.
        is_exact: Whether every step was logged; else some more may be lost.
    """
    steps = chapter.lost_steps
    if steps:
        least = "" if is_exact else "at least "
        which_took = f" ({took})" if took else ""
        return [f"{least}{steps:,} step{'s' * (steps > 1)} lost{which_took}"]
    is_death = chapter.end is None or chapter.end.cause in {"crashed", "stuck", "lost"}
    kind = "" if is_exact else "logged "
    return [f"no {kind}step lost"] if is_death and chapter.reached_step else []


def restarted(chapter: Chapter, following: Chapter, supervised: Sequence[Mapping[str, Any]]) -> str:
    """Say how soon the next attempt began, and without which nodes."""
    over_unix_s, began_unix_s = chapter.over_unix_s, following.began_unix_s
    if over_unix_s is None or began_unix_s is None:
        return ""
    gap = in_words(max(0.0, began_unix_s - over_unix_s))
    if not following.job_id:
        return f"continued after {gap}"
    if following.job_id != chapter.job_id:
        return f"continued as job {following.job_id} after {gap}"
    suspects = chapter.end.suspects if chapter.end else {}
    left_out = short(set(suspects) - set(following.nodes))
    without = f" without {left_out}" if left_out else ""
    num_nodes = len(following.nodes)
    resized = f" on {num_nodes} node{'s' * (num_nodes > 1)}"
    resized = resized if num_nodes != len(chapter.nodes) else ""
    lifted = any(
        row["what"] == "lifted" and over_unix_s <= row["unix_s"] <= began_unix_s
        for row in supervised
    )
    by = ", as `kiln supervise` lifted Slurm's hold" if lifted else ""
    return f"restarted in {gap}{without}{resized}{by}"


def ahead(facts: Facts) -> list[str]:
    """Say what goes on now, what comes next, or what has to be done."""
    job = facts.seen.training
    if facts.goes_on:
        return [_goes_on(facts)]
    if job is not None and job.state == "PENDING":
        place, has_begun = facts.word.places.get(job.array), facts.seen.has_job_begun
        return [f"job {job.shown_id} {wait_words(job, place, has_begun=has_begun)}"]
    if job is not None:
        return [f"job {job.shown_id} is {job.state.lower()} on {job.nodes}"]
    if facts.goes_on is None:
        return [f"whether it goes on only Slurm could say: {facts.word.problem}"]
    return list(_to_do(facts))


def _goes_on(facts: Facts) -> str:
    chapter, row = facts.chapters[-1], facts.seen.speed
    where = f" on {short(chapter.nodes)}" if chapter.nodes else ""
    since = f" since {clock(chapter.began_unix_s)}" if chapter.began_unix_s else ""
    told = [f"attempt {chapter.number} runs{where}{since}"]
    if row is None:
        return f"{told[0]}, and has taken no step yet"
    total = f" of {facts.seen.total_steps:,}" if facts.seen.total_steps else ""
    told.append(f"step {row['step']:,}{total}")
    if row.get("speed/images_per_s") is not None:
        told.append(f"{row['speed/images_per_s']:,.1f} images/s")
    if row.get("time/left_s") is not None:
        told.append(f"{in_words(row['time/left_s'])} left")
    return ", ".join(told)


def _to_do(facts: Facts) -> Iterator[str]:
    """Say what somebody has to do about a run that nothing works on."""
    again = f"the same `{facts.command}` line goes on from step {facts.saved_step:,}"
    total = facts.seen.total_steps
    last = facts.chapters[-1] if facts.chapters else None
    cause = last.end.cause if last and last.end else None
    if cause == "finished" or (total is not None and facts.saved_step >= total):
        name = facts.name
        yield f"it is done: kiln sample {name}   kiln evaluate {name}   kiln report run={name}"
    elif last is None:
        yield "no attempt has begun, and no job of it is in the queue; the same line submits it"
    elif cause == "gave_up":
        yield f"nothing happens by itself: `kiln logs {facts.name}` has the errors; then {again}"
    elif cause == "refused":
        yield f"give what the message asks for; then {again}"
    elif cause in {None, "crashed", "stuck", "bad_node", "lost", "preempted", "walltime"}:
        if not facts.seen.is_local:
            is_now = f" (it is {facts.job_state})" if facts.job_state else ""
            yield f"it would have come back, but its job is not in the queue{is_now}"
        yield again
    else:
        yield again
