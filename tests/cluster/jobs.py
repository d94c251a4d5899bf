"""Jobs for the tests: as `kiln launch` makes them, with ranks that need no torch."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from slurm import client
from slurm.attempts import Attempt, read_attempts
from slurm.render import sbatch_script
from slurm.runfile import SCRIPT, write_spec
from slurm.spec import JobSpec, RunSpec, Site

ROOT = Path(__file__).parents[2]


def job_of(run: Path, **changes: Any) -> JobSpec:
    job = JobSpec(
        name=run.name,
        comment=f"{client.COMMENT}{run}",
        log=run / "attempts/slurm_%j.log",
        num_nodes=2,
        tasks_per_node=2,
        cpus_per_task=1,
        gpus_per_node=2,
        memory_gb=1,
        exclusive=False,
        time_limit_min=10,
        warn_before_kill_s=20,
        stop_signal="USR2",
        warns="tasks",
        site=Site(partition="train"),
        code=ROOT,
        command=(sys.executable, "-m", "slurm.batch", str(run)),
    )
    return replace(job, **changes)


def spec_of(run: Path, **changes: Any) -> RunSpec:
    spec = RunSpec(
        ranks_per_node=2,
        cores_per_rank=1,
        node_counts=(2,),
        exclude=(),
        worker=(sys.executable, str(ROOT / "tests/cluster/rank.py"), str(run)),
        meet=("true",),
        srun=(),
        env={},
        max_restarts=20,
        no_progress_attempts=3,
        warn_before_kill_s=20,
        stop_signal="USR2",
        shrink_after_s=5.0,
        checks=None,
    )
    return replace(spec, **changes)


def submit(run: Path, job: JobSpec | None = None, spec: RunSpec | None = None) -> str:
    (run / "attempts").mkdir(parents=True)
    write_spec(run, spec or spec_of(run))
    (run / SCRIPT).write_text(sbatch_script(job or job_of(run)))
    return client.submit(run / SCRIPT)


def wait_for(what: Callable[[], Any], told: str, timeout_s: float = 240) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    with contextlib.suppress(client.SlurmError):
        told += f" ({client.run('squeue', '--noheader', '--format=%i %T %r %N')})"
    raise AssertionError(f"{told} did not come within {timeout_s} s")


def ranks(attempt: Attempt) -> list[dict[str, Any]]:
    found = []
    for path in sorted(attempt.folder.glob("rank_?.json")):
        with contextlib.suppress(ValueError):
            found.append(json.loads(path.read_text()))
    return found


def wait_running(run: Path, number: int = 0, count: int = 4, timeout_s: float = 240) -> Attempt:
    """Wait until all ranks of an attempt are there."""

    def ready() -> Attempt | None:
        attempts = read_attempts(run)
        if len(attempts) > number and len(ranks(attempts[number])) == count:
            return attempts[number]
        return None

    found: Attempt = wait_for(ready, f"attempt {number} of {run}", timeout_s)
    return found


def wait_ended(run: Path, number: int = 0, timeout_s: float = 240) -> Attempt:
    def ended() -> Attempt | None:
        attempts = read_attempts(run)
        return attempts[number] if len(attempts) > number and attempts[number].end else None

    found: Attempt = wait_for(ended, f"the end of attempt {number} of {run}", timeout_s)
    return found


def heard(attempt: Attempt) -> list[set[str]]:
    """Return what each of the four ranks heard before it left."""
    found = [attempt.folder / f"heard_{rank}.json" for rank in range(4)]
    return [set(json.loads(path.read_text())) for path in found]


def state(job_id: str) -> str:
    return client.show_job(job_id).get("JobState", "")


def shorten(job_id: str) -> None:
    """Let the walltime of a running job end half a minute to one and a half from now."""
    ran_s = client.seconds(client.show_job(job_id)["RunTime"])
    assert ran_s is not None
    client.update(job_id, TimeLimit=str((ran_s + 30) // 60 + 1))


@contextlib.contextmanager
def told_on_failure(run: Path) -> Iterator[None]:
    """Show what the attempts of a run wrote down, if its test fails."""
    try:
        yield
    except BaseException:
        for path in sorted((run / "attempts").rglob("*")):
            if path.is_file():
                sys.stdout.write(f"== {path}\n{path.read_text(errors='replace')[-2000:]}\n")
        raise


@contextlib.contextmanager
def supervised(root: Path) -> Iterator[None]:
    """Run `kiln supervise` meanwhile, as a user would."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", "supervise", str(root), "poll_s=0.5"],
        cwd=ROOT,
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
