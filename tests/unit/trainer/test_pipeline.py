"""The stages of a pipeline: their words, their jobs, and how they are shared."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.due import Due
from tests.tiny_source import write_rows
from trainer.cli import main
from trainer.config_pipeline import PipelineConfig
from trainer.coordinator import share
from trainer.frozen import compose
from trainer.pipeline_jobs import array_jobs, jobs_of
from trainer.pipeline_stages import stages_of
from trainer.runtime.rundir import locked

GOLDEN = Path(__file__).parents[2] / "golden"
SD2 = [
    "name=sd2",
    "run=/shared/runs/sd2",
    "rows=/shared/laion.parquet",
    "cluster=example",
    "encoders=['autoencoder=sd','text=clip_sd2','encoders.image_side_px=256']",
    "prepare.words=['policy=relaion']",
    "prepare.max_tasks=2048",
    "encode.gpus=1",
    "encode.cpus=4",
    "encode.memory_gb=32",
    "encode.max_tasks=32",
    "train.words=['experiment=sd2_256']",
    "evaluate.max_tasks=4",
]


def pipeline(*words):
    return compose(PipelineConfig, "pipeline", [*SD2, *words])


def words_of(cfg):
    return {stage.name: stage.words for stage in stages_of(cfg)}


def test_stages_are_commands_that_share_their_places_and_encoders():
    cfg = pipeline()
    told = words_of(cfg)
    assert list(told) == ["prepare", "dedup", "encode", "train", "evaluate", "export", "report"]
    dataset = "dataset=/shared/runs/sd2/dataset"
    assert told["prepare"] == ("rows=/shared/laion.parquet", dataset, "policy=relaion")
    assert told["encode"] == (dataset, *cfg.encoders, "threads=4", "device=cuda")
    assert told["train"] == (
        "run=/shared/runs/sd2",
        f"data.{dataset}",
        *cfg.encoders,
        "experiment=sd2_256",
    )
    assert told["export"] == ("run=/shared/runs/sd2", "out=/shared/runs/sd2/export")


def test_here_the_training_gets_the_machine_as_words():
    assert words_of(pipeline("cluster=local", "cluster.ranks_per_node=1"))["train"][5:7] == (
        "cluster=local",
        "cluster.ranks_per_node=1",
    )


def test_places_are_written_as_they_must_be_typed():
    told = words_of(pipeline("rows='/a b/it\\'s=(1).parquet'"))
    assert told["prepare"][0] == "rows='/a b/it\\'s=(1).parquet'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rows=null"], "rows is null, and the stage prepare needs a source"),
        (["stages=[train,train]"], "stages=[train,train] has one twice"),
        (["stages=[trian]"], "stages.0='trian'"),
        (["prepare.words=['parts=4']"], "prepare.words has parts=4, which a pipeline decides"),
        (["train.words=['cluster.num_nodes=4']"], "train.words has cluster.num_nodes=4"),
        (["encode.words=['text=t5_base']"], "encode.words has text=t5_base"),
        (["train.words=['sede=3']"], "train.words: got the key 'sede'"),
        (["prepare.words=['shard_rows=0']"], "prepare.words: shard_rows=0"),
        (["encode.time_limit_min=1"], "encode: warn_before_kill_s=60"),
        (["cluster.warn_before_kill_s=1"], "Try cluster.warn_before_kill_s="),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_done(
    tmp_path, capsys, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["pipeline", *SD2, *words, "dry_run=true"]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("cluster", ["local", "example"])
def test_a_source_or_dataset_that_is_not_there_is_refused_first(
    tmp_path, capsys, monkeypatch, cluster
):
    monkeypatch.chdir(tmp_path)
    line = ["pipeline", "a", f"cluster={cluster}"]
    assert main([*line, "rows=nowhere.parquet"]) == 2
    assert "nowhere.parquet is not there" in capsys.readouterr().err
    assert main([*line, "stages=[encode,train]"]) == 2
    assert f"the dataset {tmp_path}/runs/a/dataset is not there" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_two_launches_of_one_name_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.parquet", ("http://127.0.0.1/a.jpg", "a"))
    with locked(tmp_path / "runs/a", ".launch.lock", doing="launched"):
        assert main(["pipeline", "a", "rows=rows.parquet"]) == 2
    assert f"runs/a is being launched by process {os.getpid()}" in capsys.readouterr().err


def test_a_dry_run_on_slurm_prints_all_jobs_and_what_they_wait_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["pipeline", *SD2, "dry_run=true"]) == 0
    said = capsys.readouterr().out
    heads = [line for line in said.splitlines() if "sbatch --parsable" in line]
    names = [line.partition("=")[0].removeprefix("# ") for line in heads]
    assert names == [
        *("prepare_coordinator", "prepare", "prepare", "prepare", "dedup"),
        *("encode_coordinator", "encode", "train_coordinator", "train"),
        *("evaluate_coordinator", "evaluate", "export", "report"),
    ]
    assert "--hold /shared/runs/sd2/pipeline/prepare-coordinator.sbatch" in heads[0]
    assert "--dependency=afterok:$prepare_coordinator --kill-on-invalid-dep=yes" in heads[4]
    assert said.rstrip().endswith("# scontrol release $prepare_coordinator")
    assert "#SBATCH --array=0-999" in said
    assert "--first=2000" in said
    assert not any(tmp_path.iterdir())


def test_a_dry_run_here_prints_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pipeline", "a", "rows=x.parquet", "prepare.max_tasks=2", "dry_run=true"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "# prepare: tasks are counted when its turn comes, at most 2",
        f"kiln prepare rows={tmp_path}/x.parquet dataset={tmp_path}/runs/a/dataset parts=2 part=N",
        f"kiln dedup dataset={tmp_path}/runs/a/dataset",
    ]
    assert "# train begins only if its gates hold" in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["encode-coordinator", "encode"])
def test_the_scripts_are_what_was_reviewed(name, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/shared/venv/bin/python")
    cfg = pipeline()
    stages = {stage.name: stage for stage in stages_of(cfg)}
    jobs = {job.name: job for job in jobs_of(cfg, [stages["encode"]])}
    (jobs["encode"],) = array_jobs(cfg, stages["encode"], [0, 3, 4], width=5, most=1000)
    path = GOLDEN / f"pipeline_{name}.sbatch"
    if "KILN_WRITE_GOLDEN" in os.environ:
        path.write_text(jobs[name].script)
    assert jobs[name].script == path.read_text()


@given(st.sets(st.integers(0, 3000)), st.integers(1, 64), st.integers(1, 20), st.booleans())
def test_units_are_shared_by_as_few_tasks_as_have_enough_each(units, most, per_task, is_listed):
    due = Due(sorted(units), 3001, is_finished=not units and is_listed)
    turn = share(due, max_tasks=most, units_per_task=per_task)
    if due.is_finished:
        assert turn.tasks == ()
        return
    assert turn.width == max(1, min(most, -(-len(units) // per_task)))
    # As the commands deal them out: every unit has its task.
    assert {unit % turn.width for unit in units} | {0} == set(turn.tasks)


def test_nothing_of_a_single_task_is_dealt_out():
    encode = next(stage for stage in stages_of(pipeline()) if stage.name == "encode")
    assert encode.part("0", 1) == encode.words
    assert encode.part("3", 8) == (*encode.words, "parts=8", "part=3")
    evaluate = next(stage for stage in stages_of(pipeline()) if stage.name == "evaluate")
    assert evaluate.part("3", 8) == evaluate.words
