"""`kiln launch` on a real Slurm: asked for too much, twice at once, and with fewer nodes."""

import logging
import subprocess
import sys
import time
from datetime import datetime

import pytest

from slurm import client
from slurm.attempts import read_attempts
from slurm.words import clock, from_slurm
from tests.cluster.jobs import (
    ROOT,
    job_of,
    state,
    submit,
    supervised,
    wait_ended,
    wait_for,
    wait_running,
)
from tests.cluster.training import SITE, launch, losses, publish, words
from tests.hours import this_hour, write_hours
from trainer.cli import main

pytestmark = pytest.mark.cluster

SHORT = ["total_images=256", "batch.global_batch_images=8", "batch.micro_batch_images=2"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("cluster.slurm.partition=gpus", "invalid partition specified: gpus"),
        ("cluster.ranks_per_node=9", "18 cores (9 ranks x 2) and 9 GPUs on each node"),
        ("cluster.num_nodes=5", "the job run wants 5 such nodes, which partition train has not"),
        ("cluster.slurm.constraint=a100", "Invalid feature specification"),
    ],
)
def test_what_the_site_does_not_have_is_said_with_what_it_has(
    cluster, dataset, tmp_path, capsys, word, told
):
    run = tmp_path / "run"
    batch = ["batch.global_batch_images=90", "batch.micro_batch_images=1"]
    assert launch(dataset, run, *batch, "cluster.device=cuda", word) in {1, 2}
    said = capsys.readouterr().err
    assert told in said
    assert "partition train: 4 nodes with 8 cores, 16000 MB, gpu:8; time limit infinite" in said
    assert not client.queue()


def test_the_same_line_twice_at_once_is_one_job(cluster, dataset, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = tmp_path / "run"
    line = ["launch", "run", *words(dataset, run, *SHORT), *SITE, "cluster.slurm.partition=high"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer.cli", *line],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert sum("submitted as job" in words for words in said) == 1, said
    (job,) = client.queue()
    assert main(line) == 0
    assert f"job {job.shown_id} is " in caplog.text
    client.cancel([job.job_id])
    wait_for(lambda: not client.queue(), "the job's end")
    assert main(line) == 0
    assert len(client.queue()) == 1


def test_a_job_waits_for_its_hour_and_its_run_is_the_same(cluster, dataset, tmp_path, capsys):
    run, table = tmp_path / "runs/run", tmp_path / "hours.csv"
    run.parent.mkdir()
    hour_s = this_hour()
    write_hours(table, [300, 300, 100, 300])
    deadline = f"{datetime.fromtimestamp(hour_s + 3 * 3600):%Y-%m-%dT%H:%M}"
    waits = ["start.by=carbon", f"start.hourly={table}", f"start.deadline={deadline}"]
    assert launch(dataset, run, *SHORT, *waits, "start.hours=1") == 0
    (job,) = client.queue()
    assert (job.state, from_slurm(job.start)) == ("PENDING", hour_s + 2 * 3600)
    frozen = (run / "config.yaml").read_text()
    capsys.readouterr()
    assert main(["supervise", str(run.parent), "once=true"]) == 0  # it lifts holds, not wishes
    assert main(["status", str(run)]) == 0
    assert f"waits until {clock(hour_s + 2 * 3600)} to begin" in capsys.readouterr().out
    assert client.show_job(job.job_id)["Reason"] == "BeginTime"

    client.update(job.job_id, StartTime="now")
    wait_for(lambda: read_attempts(run), "the first attempt")
    client.cancel([job.job_id])
    wait_ended(run)
    wait_for(lambda: not client.queue(), "the job's end")
    # The same line, long after: the deadline cannot be kept any more, and the run goes on.
    past = [*waits[:2], "start.deadline=2026-01-01"]
    assert launch(dataset, run, *SHORT, *past, "start.hours=1") == 0
    assert wait_ended(run, 1).end.cause == "finished"
    assert (run / "config.yaml").read_text() == frozen
    assert len(losses(run)) == 32


def test_a_job_begins_at_its_time_and_not_before(cluster, tmp_path):
    run, begin_s = tmp_path / "run", int(time.time()) + 8
    submit(run, job_of(run, begin=datetime.fromtimestamp(begin_s)))
    assert wait_running(run).begin.unix_s >= begin_s
    (run / "finish").touch()
    wait_ended(run)


def test_training_goes_on_with_fewer_nodes_at_the_same_batch(cluster, dataset, tmp_path):
    calm, run = tmp_path / "calm", tmp_path / "runs/run"
    assert main(["train", *words(dataset, calm, *SHORT)]) == 0
    busy = ("--nodes=3", "--exclusive", "--partition=high", "--output=/dev/null")
    other = cluster.slurm("sbatch", "--parsable", *busy, "--wrap=sleep 600").strip()
    wait_for(lambda: state(other) == "RUNNING", "the other job")
    run.parent.mkdir()
    with supervised(run.parent):
        shrinks = ["cluster.slurm.min_nodes=1", "cluster.slurm.shrink_after_min=0.05"]
        assert launch(dataset, run, *SHORT, *shrinks) == 0
        assert wait_ended(run).end.cause == "finished"
    (attempt,) = read_attempts(run)
    assert len(attempt.begin.nodes) == 1
    expected = losses(calm)
    assert len(expected) == 32
    assert losses(run) == pytest.approx(expected, rel=1e-4)
