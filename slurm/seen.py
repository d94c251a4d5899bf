"""What is known of runs: the word of their files, and Slurm's, which is asked once for all."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from slurm import client
from slurm.attempts import Attempt, End, attempt_folders, read_attempt
from slurm.client import Queued
from slurm.history import error_in
from slurm.places import Place, ask_places, waits_for_nodes
from slurm.runfile import EVENTS, PLAN, read_json, run_folders
from trainer.errors import BadInput
from trainer.observe.evaluations import is_held
from trainer.observe.jsonl import read_rows
from trainer.observe.tail import Row, newest_row

RUNS = Path("runs")
"""Where `kiln launch NAME` puts runs."""
TRAIN = "train"
STAGES = ("prepare", "dedup", "encode", TRAIN, "evaluate", "sample", "export", "report")
"""Of a pipeline, in their order."""
_STAGE = re.compile(rf"-((?:{'|'.join(STAGES)})(?:-coordinator)?)$")
"""How names of a pipeline's jobs end, but for that of its training."""
_NO_PLACES: Mapping[str, Place] = {}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A run, a pipeline or a sweep that waits: what its folder tells, and its jobs."""

    folder: Path
    jobs: tuple[Queued, ...]
    """Those in Slurm's queue."""
    num_attempts: int
    newest: Attempt | None
    """The newest attempt, where a job made it."""
    before: End | None
    """What ended the attempt before that."""
    row: Row | None
    """Newest row of its metrics."""
    total_steps: int | None
    """Of its plan."""
    is_trained: bool
    """By `kiln train`, right now."""
    error: str | None
    """What ended the newest attempt of `kiln train`, if a rank could say it."""
    event: Row | None
    """What was found last between the stages of a pipeline."""

    @property
    def training(self) -> Queued | None:
        """Its training's job, if that is in the queue."""
        return next((job for job in self.jobs if stage_of(job, self.folder) == TRAIN), None)

    @property
    def has_job_begun(self) -> bool:
        """Whether that job has begun before, and is to come back."""
        job = self.training
        return (
            job is not None and self.newest is not None and self.newest.begin.job_id == job.job_id
        )

    @property
    def is_local(self) -> bool:
        """Whether `kiln train` started its newest attempt, not a job."""
        return self.num_attempts > 0 and self.newest is None and not self.jobs

    @property
    def last_end(self) -> tuple[int, End] | None:
        """Number and end of the last attempt that has ended."""
        if self.newest is not None and self.newest.end is not None:
            return self.newest.number, self.newest.end
        return (self.num_attempts - 2, self.before) if self.before is not None else None

    @property
    def step(self) -> int:
        """The step that it has reached, or goes on from."""
        saved = 0
        if self.newest is not None:
            end = self.newest.end
            saved = max(self.newest.begin.saved_step, end.saved_step if end else 0)
        if self.row is None or (self.newest and self.row["attempt"] != self.newest.number):
            return saved
        return max(saved, int(self.row["step"]))

    @property
    def speed(self) -> Row | None:
        """The newest row, if it tells how fast the present attempt is."""
        if self.row is None or self.row["attempt"] != self.num_attempts - 1:
            return None
        is_over = self.newest.end is not None if self.newest else not self.is_trained
        return None if is_over else self.row


@dataclass(frozen=True, kw_only=True)
class Word:
    """What Slurm says."""

    jobs: Mapping[Path, tuple[Queued, ...]] = field(default_factory=dict)
    """Kiln's jobs, by the folder that they work for."""
    places: Mapping[str, Place] = field(default_factory=lambda: _NO_PLACES)
    """Where those stand that wait for nodes, by the number of the job or of its array."""
    problem: str | None = None
    """Why it says nothing."""


def ask() -> Word:
    """Ask Slurm for the user's jobs, and for the order of the queue if some of them wait."""
    try:
        jobs: dict[Path, list[Queued]] = {}
        for job in client.queue():
            if job.folder is not None:
                jobs.setdefault(job.folder, []).append(job)
        there = {folder: tuple(found) for folder, found in jobs.items()}
        waits = any(
            waits_for_nodes(job.state, job.reason) for each in there.values() for job in each
        )
        return Word(jobs=there, places=ask_places() if waits else _NO_PLACES)
    except client.SlurmError as error:
        return Word(problem=str(error))


def look(folder: Path, jobs: Sequence[Queued]) -> Seen:
    """Read what a folder tells: little, however long the run is."""
    attempts = attempt_folders(folder)
    newest = read_attempt(attempts[-1]) if attempts else None
    before = read_attempt(attempts[-2]) if len(attempts) > 1 else None
    plan, events = read_json(folder / PLAN), read_rows(folder / EVENTS)
    is_local = bool(attempts) and newest is None and not jobs
    trained = is_local and is_trained(folder)
    return Seen(
        folder=folder,
        jobs=tuple(jobs),
        num_attempts=len(attempts),
        newest=newest,
        before=before.end if before else None,
        row=newest_row(folder),
        total_steps=plan["total_steps"] if plan else None,
        is_trained=trained,
        error=error_in(attempts[-1]) if is_local and not trained else None,
        event=events[-1] if events else None,
    )


def look_below(root: Path, word: Word) -> list[Seen]:
    """Look at all runs in a folder, and at what has jobs there and is no run yet."""
    waiting = {folder for folder in word.jobs if folder.is_relative_to(root)}
    folders = sorted({*run_folders(root), *waiting})
    return [look(folder, word.jobs.get(folder, ())) for folder in folders]


def goes_on(seen: Seen, word: Word) -> bool | None:
    """Say whether the newest attempt goes on; None when only Slurm could tell, and is mute."""
    if seen.is_local:
        return seen.is_trained
    if seen.newest is None or seen.newest.end is not None:
        return False
    if word.problem is not None:
        return None
    own = [job for job in seen.jobs if job.job_id == seen.newest.begin.job_id]
    return any(job.state != "PENDING" for job in own)


def stage_of(job: Queued, folder: Path) -> str:
    """Return which stage of a pipeline a job is of; a job by itself, or of a sweep, trains."""
    match = _STAGE.search(job.job_name)
    if match is None or job.job_name in {folder.name, folder.parent.name}:
        return TRAIN
    return match.group(1)


def is_trained(run: Path) -> bool:
    """Whether `kiln train` works on a run, here or on another machine that writes its metrics."""
    if is_held(run):
        return True
    with suppress(OSError):
        pid = (run / ".lock").read_text(encoding="utf-8")
        return pid.isdigit() and b"train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def find(given: Path) -> Path:
    """Return the folder that a user means: by its path, or by the name of a run in runs/."""
    named = RUNS / given
    return named if not given.exists() and named.is_dir() else given


def find_run(given: Path) -> Path:
    """Return the folder of a run that a user means.

    Raises:
        BadInput: There is none.
    """
    folder = find(given)
    if (folder / "attempts").is_dir():
        return folder
    inside = [str(path) for path in run_folders(folder)] if folder.is_dir() else []
    advice = (
        f"There are runs in it: {', '.join(inside[:8])}. Give one of them."
        if inside
        else "Give what `kiln launch` or `kiln train` made; `kiln status` lists them."
    )
    raise BadInput(f"{folder} is no folder of a run. {advice}")
