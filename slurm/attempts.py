"""The attempts of a run: what began each, what ended it, and whether another one may follow."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from slurm.runfile import read_json, saved_step, write_json

BEGIN, END = "begin.json", "end.json"

Cause = Literal[
    "finished",
    "walltime",
    "preempted",
    "stopped",
    "cancelled",
    "crashed",
    "stuck",
    "bad_node",
    "lost",
    "refused",
    "superseded",
    "gave_up",
]
"""finished: all images are seen. walltime, preempted: saved, for Slurm's sake. stopped: saved, for
`kiln stop`. cancelled: by scancel. crashed, stuck: see the run's watchdog and its ranks' errors.
bad_node: preflight found one. lost: no word, as when a node dies. refused: what was asked cannot be
done. superseded: another attempt has begun. gave_up: no attempt may follow."""

FINAL: frozenset[Cause] = frozenset(
    {"finished", "stopped", "cancelled", "refused", "superseded", "gave_up"}
)
"""After these a job does not come back."""


@dataclass(frozen=True, kw_only=True)
class Begin:
    """What an attempt began with."""

    job_id: str
    nodes: tuple[str, ...]
    unix_s: float
    saved_step: int
    """Of the newest checkpoint; 0 for none."""
    eligible_unix_s: float | None = None
    """Since when Slurm might have started it: after what it had to wait for by its own wish."""


@dataclass(frozen=True, kw_only=True)
class End:
    """What ended it."""

    cause: Cause
    why: str
    """In words."""
    unix_s: float
    saved_step: int
    suspects: dict[str, float]
    """Nodes that may be to blame, and how surely, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run's ranks."""

    number: int
    folder: Path
    begin: Begin
    end: End | None
    """None while it goes on, and for ever when it was lost."""


def begin_attempt(
    run: Path, job_id: str, nodes: Sequence[str], *, eligible_unix_s: float | None = None
) -> Attempt:
    """Make the folder of the next attempt: the number is taken by whoever can make it."""
    attempts = run / "attempts"
    attempts.mkdir(exist_ok=True)
    number = sum(1 for _ in attempts.glob("[0-9]*"))
    while True:
        folder = attempts / f"{number:03d}"
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    begin = Begin(
        job_id=job_id,
        nodes=tuple(nodes),
        unix_s=time.time(),
        saved_step=saved_step(run),
        eligible_unix_s=eligible_unix_s,
    )
    write_json(folder / BEGIN, asdict(begin))
    return Attempt(number=number, folder=folder, begin=begin, end=None)


def end_attempt(attempt: Attempt, end: End) -> None:
    """Write down what ended it."""
    write_json(attempt.folder / END, asdict(end))


def read_attempts(run: Path) -> list[Attempt]:
    """Read all attempts that a job made, oldest first."""
    found = map(read_attempt, attempt_folders(run))
    return [attempt for attempt in found if attempt is not None]


def attempt_folders(run: Path) -> list[Path]:
    """List the folders of a run's attempts, oldest first."""
    return sorted((run / "attempts").glob("[0-9]*"), key=lambda path: int(path.name))


def read_attempt(folder: Path) -> Attempt | None:
    """Read one attempt; None when no job made it, or it has not begun yet."""
    begin = read_json(folder / BEGIN)
    if begin is None:
        return None
    end = read_json(folder / END)
    return Attempt(
        number=int(folder.name),
        folder=folder,
        begin=Begin(**{**begin, "nodes": tuple(begin["nodes"])}),
        end=End(**end) if end else None,
    )


def gives_up(
    attempts: Sequence[Attempt], now_saved_step: int, *, max_restarts: int, no_progress: int
) -> str | None:
    """Say why a job may not begin another attempt, if so.

    Args:
        attempts: Of the job so far; the last of them has ended, or was lost.
        now_saved_step: Of the newest checkpoint.
        max_restarts: Attempts beyond its first.
        no_progress: So many in a row without a new checkpoint are too many.
    """
    if len(attempts) > max_restarts:
        return (
            f"it was started {len(attempts)} times, and cluster.slurm.max_restarts={max_restarts}"
        )
    last = attempts[-no_progress:]
    if len(last) < no_progress or last[0].begin.saved_step != now_saved_step:
        return None
    words = "; ".join(f"{each.number:03d} {_word(each)}" for each in last)
    return (
        f"{no_progress} attempts in a row saved nothing beyond step {now_saved_step} "
        f"(cluster.slurm.no_progress_attempts={no_progress}): {words}"
    )


def _word(attempt: Attempt) -> str:
    return f"{attempt.end.cause} ({attempt.end.why})" if attempt.end else "was lost"
