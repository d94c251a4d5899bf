"""One run on two nodes, through all that ends attempts, equals a run that nothing happened to."""

import json
import os
import signal

import psutil
import pytest

from slurm.attempts import read_attempts
from tests.cluster.jobs import shorten, state, supervised, wait_ended, wait_for
from tests.cluster.test_signals import preempt
from tests.cluster.training import launch, losses, newest_step, publish, words
from trainer.cli import main
from trainer.observe.jsonl import read_rows
from trainer.runtime.rundir import complete

pytestmark = pytest.mark.cluster

STEPS = 320
LONG = [
    f"total_images={STEPS * 32}",
    "batch.global_batch_images=32",
    "batch.micro_batch_images=1",
    "checkpoint.every_images=320",
    "cluster.warn_before_kill_s=50",
]


def test_chaos(cluster, tmp_path, capsys):
    dataset = publish(tmp_path)
    calm = tmp_path / "calm"
    assert main(["train", *words(dataset, calm, *LONG)]) == 0

    runs = tmp_path / "runs"
    run = runs / "stormy"
    runs.mkdir()
    with supervised(runs):
        assert launch(dataset, run, *LONG) == 0
        job_id = json.loads((run / "jobs.jsonl").read_text())["job_id"]

        def attempt_at(number: int, steps: int):
            """Wait until an attempt has taken so many steps; return it."""

            def there():
                found = read_attempts(run)
                if len(found) <= number:
                    return None
                began = found[number].begin.saved_step
                own = [r for r in read_rows(run / "metrics.jsonl") if r.get("attempt") == number]
                return found[number] if own and own[-1]["step"] >= began + steps else None

            return wait_for(there, f"attempt {number}, {steps} steps on", 120)

        attempt_at(0, 8)
        preempt(cluster)
        third = attempt_at(1, 8).begin.nodes[1]
        cluster.kill_node(third)
        attempt = attempt_at(2, 8)
        assert third not in attempt.begin.nodes
        os.kill(_pid_of_rank(run, 1), signal.SIGKILL)
        drained = attempt_at(3, 8).begin.nodes[0]
        cluster.start_node(third)
        cluster.slurm("scontrol", "update", f"NodeName={drained}", "State=DRAIN", "Reason=dimm")
        cluster.slurm("scontrol", "requeue", job_id)
        attempt = attempt_at(4, 5)
        assert drained not in attempt.begin.nodes
        shorten(job_id)
        wait_ended(run, 4, timeout_s=120)
        client.update(job_id, TimeLimit="10")
        attempt_at(5, 1)
        wait_for(lambda: state(job_id) == "COMPLETED", "the end of the run", 120)

    causes = [attempt.end.cause for attempt in read_attempts(run)]
    assert causes == ["preempted", "lost", "crashed", "lost", "walltime", "finished"]
    assert newest_step(run) == STEPS
    assert losses(run) == losses(calm)
    orders = []
    for folder in (run, calm):
        capsys.readouterr()
        assert main(["order", f"run={folder}", f"steps=0:{STEPS}"]) == 0
        orders.append(capsys.readouterr().out)
    assert orders[0] == orders[1]
    same = [complete(folder / "checkpoints")[-1] for folder in (run, calm)]
    assert same[0].name == same[1].name
    _no_orphan_wrote(run)


def _pid_of_rank(run, rank: int) -> int:
    """Find a rank's process; a killed node's orphans are gone by then, having lost their peers."""
    (found,) = (
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if (process.info["cmdline"] or [])[1:] == ["-m", "trainer.worker", str(run)]
        and process.info["environ"]["SLURM_PROCID"] == str(rank)
    )
    return int(found)


def _no_orphan_wrote(run) -> None:
    begins = [attempt.begin.unix_s for attempt in read_attempts(run)]
    for name in ("metrics.jsonl",):
        for row in read_rows(run / name):
            after = row["attempt"] + 1
            if after < len(begins):
                assert row["time_unix_s"] < begins[after], (name, row)
