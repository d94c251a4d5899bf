"""Before a stage: check its gates, count what it has to do, and share that between tasks.

Its own process, which a pipeline starts when the stages before have ended: here, or as a Slurm job,
which then submits the stage's array and lets the stages after it wait for that. Such a job may be
killed at any moment and come back: the array waits for its good end, as does all that follows.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.due import Due, due_latents, due_rows
from slurm import chain, client
from slurm.runfile import EVENTS, append_row, read_json, write_json
from trainer import launch
from trainer.config import TrainConfig
from trainer.config_pipeline import ArrayConfig, PipelineConfig, ShardsConfig
from trainer.data.manifest import load_manifest
from trainer.encoded import matching_encoding
from trainer.errors import BadInput, BadWorld
from trainer.frozen import read_yaml
from trainer.gates import problems, read_facts
from trainer.pipeline_jobs import array_jobs, job_name
from trainer.pipeline_stages import (
    FROZEN,
    PIPELINE,
    Stage,
    composed,
    stages_of,
    train_config,
)
from trainer.place import storage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """How a stage is shared when its turn has come."""

    width: int
    """Parts that its units are dealt out to."""
    tasks: tuple[int, ...]
    """Which of them have something to do; none: nothing is."""


def share(due: Due, *, max_tasks: int, units_per_task: int) -> Turn:
    """Share units between as few tasks as have enough for each, and at most so many.

    Commands deal units out by number, so that a few of them may all fall to the same task; those
    without any are left out. Part 0 always runs: it also does what is done once for all.
    """
    if due.is_finished:
        return Turn(0, ())
    width = max(1, min(max_tasks, math.ceil(len(due.units) / units_per_task)))
    return Turn(width, tuple(sorted({0} | {unit % width for unit in due.units})))


class Coordinator:
    """One stage of a frozen pipeline."""

    def __init__(self, folder: Path, name: str) -> None:
        """Read what was frozen."""
        self._folder = folder / PIPELINE
        self._cfg = read_yaml(PipelineConfig, folder / FROZEN)
        self._stage = next(each for each in stages_of(self._cfg) if each.name == name)

    @property
    def is_on_slurm(self) -> bool:
        """Whether this is one of the pipeline's jobs."""
        return self._cfg.cluster.kind == "slurm"

    def decide(self) -> Turn:
        """Check the gates, and say how the stage is shared.

        Raises:
            BadInput: A gate is closed.
        """
        stage, section = self._stage, self._stage.config
        if stage.has_gates:
            check_gates(self._cfg, stage)
        if not isinstance(section, ArrayConfig) or not stage.is_counted:
            return Turn(1, (0,))
        due = count(stage)
        turn = share(due, max_tasks=section.max_tasks, units_per_task=section.units_per_task)
        self.say(
            f"{len(due.units)} of {due.total} are missing or damaged; tasks: {len(turn.tasks)}"
        )
        return turn

    def submit(self, me: str) -> None:
        """Do all that as a Slurm job, and submit the tasks, which begin when it has ended well."""
        record = self._folder / f"{self._stage.name}.json"
        done = read_json(record)
        if done is not None and done["coordinator"] == me:  # this job was here before
            self._repoint(me, done["arrays"])
            return
        self._cancel_leftovers(me)
        turn = self.decide()
        if not self._stage.is_counted or not turn.tasks:
            return
        arrays: list[str] = []
        try:
            most = client.max_array_size() - 1
            for job in array_jobs(self._cfg, self._stage, turn.tasks, width=turn.width, most=most):
                job.path.write_text(job.script, encoding="utf-8")
                arrays.append(launch.submit(job.path, chain.after([me])))
            self.say(f"submitted as {', '.join(arrays)}")
            write_json(record, {"coordinator": me, "arrays": arrays})
            self._repoint(me, arrays)
        except (client.SlurmError, BadWorld):
            record.unlink(missing_ok=True)
            client.cancel(arrays)
            raise

    def say(self, words: str) -> None:
        """Tell it here and in the pipeline's events."""
        log.info("%s: %s", self._stage.name, words)
        row = {"unix_s": time.time(), "stage": self._stage.name, "words": words}
        append_row(self._folder.parent / EVENTS, row)

    def _repoint(self, me: str, arrays: Sequence[str]) -> None:
        """Let what waits for this job wait for its arrays, too."""
        waiting = chain.waiting_for(me, client.queue())
        chain.repoint([job for job in waiting if job.array not in arrays], arrays)

    def _cancel_leftovers(self, me: str) -> None:
        """Cancel arrays of an attempt of this job that did not get to its record."""
        mine = job_name(self._cfg, self._stage.name)
        waiting = chain.waiting_for(me, client.queue())
        client.cancel(sorted({job.array for job in waiting if job.job_name == mine}))


def check_gates(cfg: PipelineConfig, stage: Stage) -> None:
    """Refuse to begin a stage when what must hold before it does not.

    Raises:
        BadInput: With all that does not hold.
    """
    with storage(cfg.dataset):
        encodings = []
        if stage.name == "train":
            train: TrainConfig = train_config(cfg, stage)
            if train.reads_latents:
                manifest = load_manifest(cfg.dataset)
                encodings.append(matching_encoding(train, cfg.dataset, manifest))
        facts = read_facts(cfg.dataset, stage.gates, encodings)
    found = list(problems(stage.name, stage.gates, facts))
    if found:
        raise BadInput("\n".join(found))


def count(stage: Stage) -> Due:
    """Find what a stage has to do; what is damaged is taken back."""
    command, section = composed(stage), stage.config
    if isinstance(section, ShardsConfig):
        due = due_rows if stage.name == "prepare" else due_latents
        return due(command, section.recheck)
    from trainer.evaluate import chosen, undone  # noqa: PLC0415 - imports torch

    units, total = range(len(undone(command))), len(chosen(command))
    return Due(units, total, is_finished=not units and command.curves is None)


def main(argv: Sequence[str]) -> int:
    """`python -m trainer.coordinator FOLDER STAGE`: prints the turn, or submits it on Slurm."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    coordinator = Coordinator(Path(argv[0]), argv[1])
    try:
        if coordinator.is_on_slurm:
            me = os.environ["SLURM_JOB_ID"]
            _leave_job()
            coordinator.submit(me)
        else:
            sys.stdout.write(f"\n{json.dumps(asdict(coordinator.decide()))}")
    except (BadInput, BadWorld, client.SlurmError) as error:
        coordinator.say(f"does not begin: {error}")
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _leave_job() -> None:
    """Forget the job this is, as arrays would inherit its restarts and limits."""
    for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        del os.environ[name]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
