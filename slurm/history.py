"""The attempts of a run with all that is known of each: where it ran, how far it came, its loss."""

from dataclasses import dataclass, replace
from pathlib import Path

from slurm.attempts import End, attempt_folders, read_attempt
from slurm.runfile import saved_step
from trainer.observe.tail import Span, spans
from trainer.runtime.ending import cause, read_failures, read_stuck


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """One attempt."""

    number: int
    job_id: str
    """Empty for one of `kiln train`."""
    nodes: tuple[str, ...]
    began_unix_s: float | None
    """None: it took no step, and no job began it."""
    from_step: int
    reached_step: int
    """The last step that it logged or saved; `from_step` when there is none."""
    heard_unix_s: float | None
    """When that was."""
    end: End | None
    """None while it goes on, or when nobody wrote down what ended it."""
    error: str | None
    """What ended one of `kiln train`, if a rank could say it."""
    lost_steps: int
    """Logged steps that the next attempt took again, or will take."""

    @property
    def over_unix_s(self) -> float | None:
        """When it was over; of one that was lost, when it was heard of last."""
        if self.end is None:
            return self.heard_unix_s
        return (self.heard_unix_s if self.end.cause == "lost" else None) or self.end.unix_s

    @property
    def lasted_s(self) -> float | None:
        """How long it took, or has taken to its last word."""
        if self.began_unix_s is None or self.over_unix_s is None:
            return None
        return max(0.0, self.over_unix_s - self.began_unix_s)


def read_history(run: Path, *, goes_on: bool) -> list[Chapter]:
    """Read the attempts of a run, oldest first.

    Args:
        run: Its folder.
        goes_on: The newest of them is not over, or that is not known.
    """
    stepped = spans(run)
    found = [_chapter(folder, stepped.get(int(folder.name))) for folder in attempt_folders(run)]
    # Where each was gone on from.
    after = [each.from_step for each in found[1:]]
    after += [found[-1].reached_step if goes_on else saved_step(run)] if found else []
    return [
        replace(each, lost_steps=max(0, each.reached_step - step))
        for each, step in zip(found, after, strict=True)
    ]


def error_in(folder: Path) -> str | None:
    """Read what ended an attempt, as far as its ranks could say it."""
    failed = cause(read_failures(folder).values())
    return read_stuck(folder) or (str(failed) if failed else None)


def _chapter(folder: Path, stepped: Span | None) -> Chapter:
    attempt = read_attempt(folder)
    first_step = int(stepped.first["step"]) - 1 if stepped else 0
    from_step = attempt.begin.saved_step if attempt else first_step
    logged_step = int(stepped.last["step"]) if stepped else 0
    end = attempt.end if attempt else None
    began_unix_s = attempt.begin.unix_s if attempt else None
    if began_unix_s is None and stepped is not None:
        began_unix_s = stepped.first["time_unix_s"]
    return Chapter(
        number=int(folder.name),
        job_id=attempt.begin.job_id if attempt else "",
        nodes=attempt.begin.nodes if attempt else (),
        began_unix_s=began_unix_s,
        from_step=from_step,
        reached_step=max(from_step, logged_step, end.saved_step if end else 0),
        heard_unix_s=stepped.last["time_unix_s"] if stepped else None,
        end=end,
        error=error_in(folder),
        lost_steps=0,
    )
