"""Launch one run; or with -m a sweep: a run for each combination of values, as one Slurm array.

`kiln launch -m NAME seed=0,1,2 optim.learning_rate=1e-4,2e-4` makes runs/NAME/000, 001 and so on,
each frozen like a run by itself; sweep.json says which words made which. The same line again
submits what is neither finished nor in the queue; more values add more runs.
"""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from slurm import client
from slurm.chain import split
from slurm.render import sbatch_script
from slurm.runfile import JOBS, SWEEP, append_row, nth_run, read_json, write_json
from slurm.spec import JobSpec, RunSpec
from trainer import launch
from trainer.begin_time import Planned
from trainer.command import long_words
from trainer.config import LaunchConfig, TrainConfig
from trainer.errors import BadInput
from trainer.frozen import compose, expand
from trainer.runtime.rundir import locked

log = logging.getLogger(__name__)

_MULTIRUN = {"-m", "--multirun"}
_USUAL_ARRAY_SIZE = 1001
_SAME = ("name", "run", "dry_run", "at_once", "start")
"""Keys that belong to all runs of a sweep."""


@dataclass(frozen=True)
class Task:
    """A run of a sweep, and what it is as a job."""

    number: int
    words: tuple[str, ...]
    config: TrainConfig
    job: JobSpec
    spec: RunSpec


@dataclass(frozen=True)
class Array:
    """Runs that are submitted together."""

    job: JobSpec
    numbers: tuple[int, ...]

    @property
    def script(self) -> str:
        """Name of its sbatch script, in the sweep's folder."""
        return f"submit_{self.numbers[0]:03d}.sbatch"


def numbered(
    known: dict[str, list[str]], combinations: Sequence[Sequence[str]]
) -> dict[int, tuple[str, ...]]:
    """Give each combination the number that it has, or the next one; in whatever order its words.

    Args:
        known: The words of the runs that the sweep has already, by number.
        combinations: Of the words on the line.
    """
    numbers = {frozenset(words): int(number) for number, words in known.items()}
    found = {}
    for words in combinations:
        number = numbers.setdefault(frozenset(words), len(numbers))
        found[number] = tuple(words)
    return found


def arrays(
    tasks: Sequence[Task], most: int, *, folder: Path, at_once: int | None
) -> Iterator[Array]:
    """Put tasks whose jobs ask for the same together, as arrays that Slurm takes.

    Args:
        tasks: In order.
        most: Numbers in an array must be below this.
        folder: Of the sweep.
        at_once: Most tasks of an array at the same time.
    """
    alike: dict[str, tuple[JobSpec, list[int]]] = {}
    for task in tasks:
        alike.setdefault(sbatch_script(task.job), (task.job, []))[1].append(task.number)
    for job, numbers in alike.values():
        for first, indices in split(numbers, most):
            array = replace(
                job,
                comment=client.sweep_comment(folder, first),
                command=(*job.command, str(first)),
                array=indices,
                at_once=at_once,
            )
            yield Array(array, tuple(first + index for index in indices))


def run(fixed: Sequence[str], combinations: Sequence[Sequence[str]]) -> int:
    """Freeze the runs of a sweep and submit those that are due; or print what would be."""
    configs = {
        frozenset(words): compose(LaunchConfig, "launch", [*fixed, *words])
        for words in combinations
    }
    first = next(iter(configs.values()))
    folder = Path(first.run).resolve()

    def tasks() -> list[Task]:
        numbers = numbered(read_json(folder / SWEEP) or {}, combinations)
        return [
            task_of(configs[frozenset(words)], folder, number, words)
            for number, words in sorted(numbers.items())
        ]

    if first.dry_run:
        return _show(tasks(), folder, first)
    for config in {repr(task.config.data): task.config for task in tasks()}.values():
        launch.check_datasets(config)
    for array in arrays(tasks(), _USUAL_ARRAY_SIZE, folder=folder, at_once=None):
        launch.check_fits(array.job)
    with locked(folder, ".launch.lock", doing="launched"), launch.slurm_errors():
        due = list(_due(tasks(), folder))
        if due:
            _submit(due, folder, first)
    return 0


def task_of(cfg: LaunchConfig, folder: Path, number: int, words: tuple[str, ...]) -> Task:
    """Return one run of a sweep in a folder."""
    config = launch.train_config(cfg, nth_run(folder, number))
    job, spec = launch.jobs_of(config, cfg.name, home=folder)
    job = replace(
        job,
        comment=client.sweep_comment(folder, 0),
        log=folder / "logs/%A_%a.log",
        command=(sys.executable, "-m", "slurm.sweep", str(folder)),
    )
    return Task(number, words, config, job, spec)


def _due(tasks: Sequence[Task], folder: Path) -> Iterator[Task]:
    """Leave out what is finished or in the queue, and say so."""
    queued = {job.folder for job in client.queue()}
    for task in tasks:
        run_folder = nth_run(folder, task.number)
        if run_folder in queued:
            log.info("%s: is in the queue already", run_folder)
        elif not launch.is_done(run_folder, task.config):
            yield task


def _submit(due: Sequence[Task], folder: Path, cfg: LaunchConfig) -> None:
    most = client.max_array_size()
    found = list(arrays(due, most, folder=folder, at_once=cfg.at_once))
    planned = [_planned_begin(cfg, array, folder) for array in found]
    known = read_json(folder / SWEEP) or {}
    more = {f"{task.number:03d}": list(task.words) for task in due}
    write_json(folder / SWEEP, known | more)
    launch.snapshot(folder)
    (folder / "logs").mkdir(exist_ok=True)
    for task in due:
        run_folder = nth_run(folder, task.number)
        run_folder.mkdir(exist_ok=True)
        launch.freeze_task(run_folder, task.config, task.spec)
    for array, begin in zip(found, planned, strict=True):
        script = folder / array.script
        script.write_text(sbatch_script(begin.job), encoding="utf-8")
        job_id = launch.submit(script)
        for number, index in zip(array.numbers, array.job.array, strict=True):
            row = {"job_id": f"{job_id}_{index}", "unix_s": time.time()}
            append_row(nth_run(folder, number) / JOBS, row)
        log.info("%s: %d runs are submitted as job %s", folder, len(array.numbers), job_id)
        if begin.words:
            log.info("job %s %s", job_id, begin.words)
    log.info("What becomes of them: kiln status %s", folder)


def _planned_begin(cfg: LaunchConfig, array: Array, folder: Path) -> Planned:
    runs = [nth_run(folder, number) for number in array.numbers]
    return launch.planned_begin(cfg, array.job, runs)


def _show(tasks: Sequence[Task], folder: Path, cfg: LaunchConfig) -> int:
    for task in tasks:
        sys.stdout.write(f"# {task.number:03d}: {' '.join(task.words)}\n")
    most = _USUAL_ARRAY_SIZE
    with suppress(client.SlurmError):
        most = client.max_array_size()
    for array in arrays(tasks, most, folder=folder, at_once=cfg.at_once):
        planned = _planned_begin(cfg, array, folder)
        if planned.words:
            sys.stdout.write(f"# {planned.words}\n")
        sys.stdout.write(f"# sbatch {folder / array.script}\n{sbatch_script(planned.job)}")
    return 0


def main(argv: Sequence[str]) -> int:
    """`kiln launch [-m] NAME [experiment=...] [cluster=...] [dry_run=true] [key=value ...]`."""
    words = [word for word in argv if word not in _MULTIRUN]
    if len(words) == len(argv) or {"-h", "--help"} & set(words):
        return launch.main(words)
    fixed, combinations = expand(long_words(words, positional="name"), "launch")
    swept = {word.partition("=")[0] for words in combinations for word in words}
    if not swept:
        raise BadInput(
            "-m needs a key with several values, as in `kiln launch -m NAME seed=0,1,2`."
        )
    shared = sorted(key for key in swept if key.partition(".")[0] in _SAME)
    if shared:
        raise BadInput(f"{shared[0]} is one for all runs of a sweep. Give one value.")
    return run(fixed, combinations)
