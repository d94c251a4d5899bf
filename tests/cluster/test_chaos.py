"""One run on two nodes, through all that ends attempts, equals a run that nothing happened to."""

import json
import math
import os
import signal

import psutil
import pytest
import torch

from slurm import client
from slurm.attempts import read_attempts
from tests.cluster.jobs import shorten, state, supervised, told_on_failure, wait_ended, wait_for
from tests.cluster.test_signals import preempt
from tests.cluster.training import launch, losses, newest_step, publish, words
from trainer.cli import main
from trainer.observe.accounts import close_check, totals
from trainer.observe.allocation import missing_frac
from trainer.observe.jsonl import read_rows
from trainer.run_account import CLOSES_WITHIN_FRAC, allocations_of, run_account
from trainer.runtime.checkpoint import read_record
from trainer.runtime.rundir import complete
from trainer.runtime.weights import read_weights

pytestmark = pytest.mark.cluster

STEPS = 320
LONG = [
    f"total_images={STEPS * 32}",
    "batch.global_batch_images=32",
    "batch.micro_batch_images=1",
    "checkpoint.every_images=320",
    "cluster.warn_before_kill_s=50",
]


@pytest.mark.timeout(1800)
def test_chaos(cluster, tmp_path, capsys):
    dataset = publish(tmp_path)
    calm, run = tmp_path / "calm", tmp_path / "runs/stormy"
    assert main(["train", *words(dataset, calm, *LONG)]) == 0
    run.parent.mkdir()
    with told_on_failure(run), supervised(run.parent):
        assert launch(dataset, run, *LONG) == 0
        storm(cluster, run)
    causes = [attempt.end.cause for attempt in read_attempts(run)]
    assert causes == ["preempted", "lost", "crashed", "lost", "walltime", "finished"]
    assert newest_step(run) == STEPS
    assert losses(run) == losses(calm)
    assert order(run, capsys) == order(calm, capsys)
    names = [complete(folder / "checkpoints")[-1].name for folder in (run, calm)]
    assert names == [f"step_{STEPS:08d}"] * 2
    now, before = (read_weights(folder, "ema")[0] for folder in (run, calm))
    assert all(torch.equal(weight, before[name]) for name, weight in now.items())
    assert_no_orphan_wrote(run)
    assert_account_closes(run)


def storm(cluster, run):
    """Let everything happen to a run, once each, and wait until it is done all the same."""
    job_id = json.loads((run / "jobs.jsonl").read_text())["job_id"]
    wait_until(run, attempt=0, steps=8)
    preempt(cluster)
    dead = wait_until(run, attempt=1, steps=8).begin.nodes[1]
    cluster.kill_node(dead)
    assert dead not in wait_until(run, attempt=2, steps=8).begin.nodes
    os.kill(_pid_of_rank(run, 1), signal.SIGKILL)
    drained = wait_until(run, attempt=3, steps=8).begin.nodes[0]
    cluster.start_node(dead)
    cluster.slurm("scontrol", "update", f"NodeName={drained}", "State=DRAIN", "Reason=dimm")
    cluster.slurm("scontrol", "requeue", job_id)
    assert drained not in wait_until(run, attempt=4, steps=5).begin.nodes
    shorten(job_id)
    wait_ended(run, 4)
    client.update(job_id, TimeLimit="10")
    wait_for(lambda: state(job_id) == "COMPLETED", "the end of the run", 300)


def wait_until(run, *, attempt: int, steps: int):
    """Wait until an attempt has taken so many steps; return it."""

    def there():
        found = read_attempts(run)
        if len(found) <= attempt:
            return None
        own = [row for row in read_rows(run / "metrics.jsonl") if row.get("attempt") == attempt]
        goal = found[attempt].begin.saved_step + steps
        return found[attempt] if own and own[-1]["step"] >= goal else None

    return wait_for(there, f"attempt {attempt}, {steps} steps on", 300)


def order(run, capsys) -> str:
    """Return which samples each step took."""
    capsys.readouterr()
    assert main(["order", f"run={run}", f"steps=0:{STEPS}"]) == 0
    return capsys.readouterr().out


def _pid_of_rank(run, rank: int) -> int:
    """Find a rank's process; a killed node's orphans are gone by then, having lost their peers."""
    (found,) = (
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if (process.info["cmdline"] or [])[1:] == ["-m", "trainer.worker", str(run)]
        and process.info["environ"]["SLURM_PROCID"] == str(rank)
    )
    return int(found)


def assert_no_orphan_wrote(run):
    """Rows of an attempt end before the next one begins."""
    begins = [attempt.begin.unix_s for attempt in read_attempts(run)]
    for row in read_rows(run / "metrics.jsonl"):
        assert row["time_unix_s"] < [*begins, math.inf][row["attempt"] + 1], row
    for folder in complete(run / "checkpoints"):
        assert read_record(folder).attempt < len(begins)


def assert_account_closes(run):
    """Every second that Slurm lent a node to the run is in one bucket, on both nodes."""
    rows = run_account(run)
    lent = allocations_of(run, rows)
    assert missing_frac(rows, lent) < CLOSES_WITHIN_FRAC
    assert all(closure.holds() for closure in close_check(rows) if closure.wall_s)
    seconds = {bucket: total.seconds for (_, bucket), total in totals(rows).items()}
    assert min(seconds[bucket] for bucket in ("queue", "init", "productive", "lost_work")) > 0
    for allocation in lent:
        nodes = {row["node"] for row in rows if row["attempt"] == allocation.attempt}
        assert nodes == set(allocation.nodes)
