"""Pipelines as Slurm jobs: all of the way, what is damaged, and what goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.serve import serving
from slurm import client
from slurm.runfile import read_rows
from tests.cluster.jobs import ROOT, wait_for
from tests.cluster.training import SITE
from tests.tiny_pipeline import contents, flip, made_anew, make_source, tars, words
from tests.virtual_cluster import NODES
from trainer.cli import main
from trainer.observe.accounts import close_check
from trainer.run_account import run_account

pytestmark = pytest.mark.cluster

QUICKLY = [
    "coordinator.memory_gb=1",
    *(f"{name}.time_limit_min=5" for name in ("prepare", "encode", "evaluate", "report")),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sixteen pictures, of which one is missing, served."""
    out = make_source(tmp_path_factory.mktemp("source") / "source", 16, "faults.missing_frac=0.07")
    with serving(out):
        yield out


def line(source: Path, run: Path, *more: str) -> list[str]:
    return ["pipeline", *words(source, run, *SITE, *QUICKLY, *more)]


def wait_for_all(run: Path, timeout_s: float = 900) -> dict[str, str]:
    """Wait until no job of a pipeline is left; return how the last ones ended, by stage."""

    def are_gone() -> bool:
        return not any(job.folder == run for job in client.queue())

    wait_for(are_gone, f"the end of {run}'s jobs", timeout_s)
    rows = read_rows(run / "jobs.jsonl")
    first = max(n for n, row in enumerate(rows) if row["stage"] == "prepare-coordinator")
    return {row["stage"]: client.show_job(row["job_id"])["JobState"] for row in rows[first:]}


def logs(run: Path) -> str:
    paths = [*sorted((run / "pipeline/logs").iterdir()), *(run / "attempts").glob("*.log")]
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in paths)


@pytest.mark.timeout(1800)
def test_the_whole_way_as_jobs_whatever_is_edited_meanwhile(cluster, source, tmp_path):
    repository, run = tmp_path / "repository", tmp_path / "whole"
    for name in ("trainer", "data_prep", "slurm", "conf"):
        shutil.copytree(ROOT / name, repository / name)
    more = ["prepare.max_tasks=2", "prepare.units_per_task=1", "encode.max_tasks=2"]
    more += ["stages=[prepare,encode,train,evaluate,report]"]
    gate = "gates.encode.min_kept_frac"
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", *line(source, run, *more, f"{gate}=0.99")],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for path in ("trainer/coordinator.py", "trainer/cli.py", "slurm/task.py", "conf/train.yaml"):
        (repository / path).write_text("edited: [since")
    states = wait_for_all(run)
    assert states.pop("prepare-coordinator") == "COMPLETED", logs(run)
    assert states.pop("encode-coordinator") == "FAILED"
    assert set(states.values()) == {"CANCELLED"}
    assert "encode: does not begin: 15 of 16 rows became samples" in logs(run)
    assert len(list((run / "pipeline/logs").glob("prepare_*.log"))) == 2
    before = tars(run / "dataset")
    damaged = "shards/00002.tar"
    flip(run / "dataset" / damaged)

    assert main(line(source, run, *more, f"{gate}=0.9")) == 0
    states = wait_for_all(run)
    assert set(states.values()) == {"COMPLETED"}, logs(run)
    assert json.loads((run / "evaluation.json").read_text())["scores"]
    assert (run / "report.html").exists()
    account = run_account(run, run / "dataset")
    waited = {row["stage"] for row in account if row["bucket"] == "queue"}  # some for no second
    assert {"encode", "evaluate"} <= waited
    assert waited & {"plan", "prepare"}
    assert all(closure.holds() for closure in close_check(account) if closure.wall_s)
    after = {name: tar for name, tar in tars(run / "dataset").items() if name in before}
    assert made_anew(before, after) == {damaged}
    assert contents(after) == contents(before)

    submitted = read_rows(run / "jobs.jsonl")
    assert main(line(source, run, "stages=[train]")) == 0
    assert read_rows(run / "jobs.jsonl") == submitted


def test_nothing_is_left_of_what_cannot_be_submitted_or_is_cancelled(
    cluster, source, tmp_path, capsys, caplog
):
    caplog.set_level("INFO")
    run = tmp_path / "refused"
    stages = "stages=[prepare,encode,train,report]"
    assert main(line(source, run, stages, "report.partition=nowhere")) == 1
    told = capsys.readouterr().err
    assert "nvalid partition" in told
    assert "partition train: 4 nodes" in told
    assert client.queue() == []

    for node in NODES:
        cluster.slurm("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    assert main(line(source, run, stages)) == 0
    assert "in part only" not in caplog.text
    first = {job.job_id for job in client.queue()}
    assert len(first) == 5
    assert main(line(source, run, stages)) == 0
    assert "is pending already" in caplog.text
    assert {job.job_id for job in client.queue()} == first

    # As if it had been killed while it submitted.
    (run / "pipeline/submitting").touch()
    assert main(line(source, run, stages)) == 0
    assert "in part only" in caplog.text
    ids = {row["stage"]: row["job_id"] for row in read_rows(run / "jobs.jsonl")}
    assert {job.job_id for job in client.queue()} == set(ids.values())
    assert not first & set(ids.values())

    client.cancel([ids["prepare-coordinator"]])
    assert set(wait_for_all(run, 60).values()) == {"CANCELLED"}


def test_stages_are_seen_and_stopped(cluster, source, tmp_path, capsys):
    run = tmp_path / "runs/seen"
    assert main(line(source, run, "prepare.max_tasks=2", "prepare.units_per_task=1")) == 0

    def are_preparing() -> bool:
        capsys.readouterr()
        assert main(["status", str(run.parent)]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        assert all(row[0] == "seen" for row in rows)
        stages = [row[1] for row in rows]
        return stages[0] == "prepare" and "train" in stages and rows[0][3:5] == ["2", "running"]

    wait_for(are_preparing, "the tasks of prepare")
    assert main(["stop", str(run)]) == 0
    assert client.queue() == []
    capsys.readouterr()
    assert main(["explain", str(run)]) == 0
    said = capsys.readouterr().out
    assert "prepare-coordinator: submitted as job " in said
    assert "prepare: submitted as " in said
    assert "now: no attempt has begun, and no job of it is in the queue" in said
