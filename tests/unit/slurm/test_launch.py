import re
import sys
from datetime import UTC, datetime, timedelta

import pytest

from tests.hours import this_hour, write_hours
from trainer.cli import main
from trainer.config import LaunchConfig
from trainer.frozen import compose
from trainer.launch import jobs_of, snapshot, train_config

LAUNCH = [
    "launch",
    "night",
    "experiment=sd2_512",
    "cluster=example",
    "data.dataset=laion",
]


def test_a_dry_run_prints_all_and_touches_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*LAUNCH, "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert f"# sbatch {tmp_path}/runs/night/submit.sbatch" in said
    assert re.search(r"^# plan: \d.* GiB of 79 per rank", said, re.MULTILINE)
    assert "#SBATCH --gpus-per-node=8" in said
    assert "#SBATCH --account=ldm" in said
    assert f"exec {sys.executable} -m slurm.batch {tmp_path}/runs/night" in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster=local"], "`kiln launch` is for Slurm"),
        (["cluster.time_limit_min=5"], "cluster: warn_before_kill_s=300"),
        (["cluster.warn_before_kill_s=1"], "Try cluster.warn_before_kill_s="),
        (["batch.global_batch_images=2000"], "Try "),
        (["engine.zero_stage=0", "cluster.device_memory_gib=8"], "GiB per rank"),
        (["cluster.slurm.min_nodes=3"], "slurm.min_nodes=3 is more than num_nodes=2"),
        (["+cluster.slurm.env.HF_TOKEN=x"], "env has HF_TOKEN, which looks like a secret"),
        (["cluster.slurm.partition='a b'"], "cluster.slurm.partition"),
        (["cluster.slurm=null"], "kind=slurm needs the section slurm"),
    ],
)
def test_what_cannot_run_is_refused_before_the_queue(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main([*LAUNCH, "dry_run=true", "engine.precision=fp32", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_name_is_needed_and_has_to_be_a_folders(capsys):
    assert main(["launch", "experiment=sd2_512", "data.dataset=x"]) == 2
    assert "name has no value" in capsys.readouterr().err
    assert main(["launch", "../x", "cluster=example", "data.dataset=x"]) == 2
    assert "name=" in capsys.readouterr().err


def test_a_dry_run_says_when_it_would_begin(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hours(tmp_path / "hours.csv", [300, 300, 300, 100, 300, 300])
    words = [
        *("start.by=carbon", "start.hourly=hours.csv", "start.hours=1"),
        f"start.deadline={datetime.now(UTC) + timedelta(hours=4):%Y-%m-%dT%H:%M}Z",
    ]
    assert main([*LAUNCH, "dry_run=true", *words]) == 0
    said = capsys.readouterr().out
    assert re.match(r"# begins at .*: 100 gCO2/kWh over 1 h; .* be 300, 67 % less\n", said)
    begin = datetime.fromtimestamp(this_hour() + 3 * 3600)
    assert f"#SBATCH --begin={begin:%Y-%m-%dT%H:%M:%S}\n" in said
    assert main([*LAUNCH, "dry_run=true", *words[:2], "start.deadline=2020-01-01"]) == 2
    assert "start.deadline=2020-01-01 00:00" in capsys.readouterr().err


def test_the_account_s_hours_choose_the_begin_and_are_in_the_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hours(tmp_path / "hours.csv", [300, 300, 300, 100, 300, 300])
    words = [
        *("start.by=carbon", "start.hours=1"),
        f"start.deadline={datetime.now(UTC) + timedelta(hours=4):%Y-%m-%dT%H:%M}Z",
    ]
    known = [*LAUNCH[2:], "cluster.accelerator=a100_80gb", "accounts.hourly=hours.csv"]
    assert main(["launch", "night", *known, "dry_run=true", *words]) == 0
    assert "100 gCO2/kWh over 1 h" in capsys.readouterr().out
    assert main(["plan", *known]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the mean over all hours of hours.csv" in said


def test_a_table_of_hours_that_is_not_there_is_refused_and_nothing_is_left(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for command in (LAUNCH, [*LAUNCH, "dry_run=true"], ["plan", *LAUNCH[2:]]):
        assert main([*command, "accounts.hourly=none.csv"]) == 2
        assert "accounts.hourly=none.csv cannot be read" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_run_knows_nothing_of_when_its_job_begins(tmp_path):
    words = ["name=x", *LAUNCH[2:]]
    waits = ["start.by=price", "start.hourly=h.csv", "start.deadline=2026-12-01", "start.hours=3"]
    plain, waiting = (compose(LaunchConfig, "launch", [*words, *more]) for more in ((), waits))
    assert train_config(plain, tmp_path) == train_config(waiting, tmp_path)


def test_a_dataset_that_is_not_there_is_refused_before_the_queue(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(LAUNCH) == 2
    assert "laion" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_snapshot_has_the_code_and_the_versions_and_is_made_once(tmp_path):
    snapshot(tmp_path)
    assert (tmp_path / "code/trainer/worker.py").exists()
    assert "torch==" in (tmp_path / "environment.txt").read_text()
    (tmp_path / "code/trainer/worker.py").write_text("as it was")
    snapshot(tmp_path)
    assert (tmp_path / "code/trainer/worker.py").read_text() == "as it was"


def test_containers_wrap_ranks_and_not_the_batch_script(tmp_path):
    inside = "{kind: %s, image: /shared/kiln.img, mounts: ['/data:/data'], python: python3}"
    words = ["name=x", f"run={tmp_path}", *LAUNCH[2:]]
    found = {}
    for kind in ("pyxis", "apptainer"):
        container = f"cluster.slurm.container={inside % kind}"
        cfg = compose(LaunchConfig, "launch", [*words, container])
        job, found[kind] = jobs_of(cfg, "x")
        assert job.command[0] == sys.executable
    mounts = f"{tmp_path}:{tmp_path},/data:/data"
    rank = ("python3", "-m", "trainer.worker", str(tmp_path))
    assert found["pyxis"].worker == rank
    assert found["pyxis"].srun == (
        "--container-image=/shared/kiln.img",
        f"--container-mounts={mounts}",
    )
    before = ("apptainer", "exec", "--nv", "--bind", mounts, "/shared/kiln.img")
    assert found["apptainer"].worker == (*before, *rank)
    assert found["apptainer"].srun == ()


def test_a_run_may_shrink_to_counts_that_its_batch_allows(tmp_path):
    words = ["name=x", f"run={tmp_path}", *LAUNCH[2:], "cluster.num_nodes=16"]
    sizes = ["batch.global_batch_images=2048", "batch.micro_batch_images=8"]
    cfg = compose(LaunchConfig, "launch", [*words, *sizes, "cluster.slurm.min_nodes=3"])
    assert jobs_of(cfg, "x")[1].node_counts == (16, 8, 4)
    cfg = compose(LaunchConfig, "launch", [*words, *sizes])
    assert jobs_of(cfg, "x")[1].node_counts == (16,)
