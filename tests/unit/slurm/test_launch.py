import sys

import pytest

from trainer.cli import main
from trainer.launch import snapshot

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
