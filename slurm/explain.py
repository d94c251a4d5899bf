"""Tell what happened to a run, attempt by attempt, and what will or has to be done next."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from slurm import client
from slurm.attempts import Attempt
from slurm.config import ExplainConfig
from slurm.history import read_history
from slurm.lost import node_states, why_lost
from slurm.runfile import EVENTS, JOBS, SWEEP, saved_step
from slurm.seen import TRAIN, ask, find_run, goes_on, look
from slurm.sentences import Facts, ahead, happened
from slurm.supervise import RECORD
from slurm.words import clock
from trainer.command import run_command
from trainer.observe.jsonl import read_rows
from trainer.run_losses import losses_in_words


def gather(run: Path, name: str) -> Facts:
    """Read a run's files, and ask Slurm about its job and its nodes.

    Args:
        run: Its folder, in full.
        name: As a user would give it.
    """
    word = ask()
    seen = look(run, word.jobs.get(run, ()))
    going_on = goes_on(seen, word)
    rows = read_rows(run / JOBS)
    submitted = [row for row in rows if row.get("stage", TRAIN) == TRAIN]
    is_lost = going_on is False and seen.newest is not None and seen.newest.end is None
    return Facts(
        name=name,
        command=f"kiln {_command(run, is_local=seen.is_local)}",
        seen=seen,
        word=word,
        chapters=read_history(run, goes_on=going_on is not False),
        goes_on=going_on,
        submitted=submitted,
        other_jobs=[row for row in rows if row not in submitted],
        events=read_rows(run / EVENTS),
        supervised=read_rows(run / RECORD),
        losses=losses_in_words(run),
        is_every_step_logged=_logs_every_step(run),
        saved_step=saved_step(run),
        lost_why=_why_lost(seen.newest) if is_lost and seen.newest else "",
        job_state=_job_state(submitted[-1]["job_id"]) if submitted and not seen.jobs else "",
    )


def _command(run: Path, *, is_local: bool) -> str:
    """Tell which command made a run, by what lies beside it."""
    if (run / EVENTS).parent.is_dir():
        return "pipeline"
    if (run.parent / SWEEP).exists():
        return "launch -m"
    return "train" if is_local else "launch"


def _logs_every_step(run: Path) -> bool:
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    return bool(config.get("logging", {}).get("every_steps") == 1)


def _why_lost(attempt: Attempt) -> str:
    try:
        return why_lost(attempt, node_states(attempt.begin.nodes)).why
    except client.SlurmError as error:
        return f"its batch script ended without a word ({error})"


def _job_state(job_id: str) -> str:
    """Ask for a job that is no longer in the queue; Slurm forgets it after some minutes."""
    with suppress(client.SlurmError):
        return client.show_job(job_id).get("JobState", "").lower()
    return ""


def run(cfg: ExplainConfig) -> int:
    """Print the sentences."""
    found = find_run(cfg.run)
    facts = gather(found.resolve(), str(found))
    for unix_s, sentence in happened(facts):
        sys.stdout.write(f"{clock(unix_s)}  {sentence}\n")
    for sentence in ahead(facts):
        sys.stdout.write(f"now: {sentence}\n")
    return 0


def main(argv: Sequence[str]) -> int:
    """`kiln explain RUN`."""
    return run_command(run, ExplainConfig, "explain", argv, positional="run")
