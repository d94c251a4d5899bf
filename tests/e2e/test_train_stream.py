"""The stream in training: other batches, mixes, buckets, removals, tars without an index."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.conftest import kiln
from tests.tiny import SMALL_NETWORK
from trainer.observe.jsonl import read_rows
from trainer.place import place
from trainer.runtime.checkpoint import read_state
from trainer.runtime.rundir import complete

pytestmark = pytest.mark.e2e


def train(dataset: Path, run: Path, *more: str, code: int = 0, **changes: object) -> str:
    settings = {"total_images": 80, "checkpoint.every_images": 40, "cluster.ranks_per_node": 1}
    words = [f"{key}={value}" for key, value in (settings | changes).items()]
    given = [*SMALL_NETWORK, *more]
    last = {word.partition("=")[0]: word for word in [*given, *words]}
    return kiln("train", f"data.dataset={dataset}", f"run={run}", *last.values(), code=code)


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_rows(run / "metrics.jsonl")}


def states(run: Path) -> list[dict]:
    return read_rows(run / "stream.jsonl")


@pytest.fixture(scope="module")
def whole(encoded, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(encoded, run)
    return run


def test_the_global_batch_may_change_in_mid_run_and_it_is_on_record(encoded, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("step_00000010"))
    wider = ("batch.global_batch_images=16", "batch.micro_batch_images=8", "data.threads=1")
    said = train(encoded, run, *wider)
    assert "changed since the run began: batch.global_batch_images: 8 -> 16" in said
    assert "attempt 1, step 5 of 8" in said
    first, second = states(run)
    assert (first["step"], first["global_batch_images"], first["stream"]["samples"]) == (0, 8, 0)
    assert (second["step"], second["global_batch_images"]) == (5, 16)
    assert second["stream"]["samples"] == 40
    state = read_state(complete(run / "checkpoints")[-1])
    assert (state.step, state.images_seen, state.stream["samples"]) == (8, 88, 88)
    assert {step: losses(run)[step] for step in range(1, 6)} == {
        step: losses(whole)[step] for step in range(1, 6)
    }


def test_a_mix_goes_by_weight_and_weights_may_change_but_not_the_datasets(encoded, whole, tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(encoded, other)

    def mix(weight: float) -> str:
        return f"data.mix=[{{dataset:{other},weight:{weight}}}]"

    train(encoded, run, mix(1.0), total_images=40)
    said = train(encoded, run, mix(3.0))
    assert "changed since the run began: data.mix" in said
    shares = [Counter(row["stream"]["shares"]) for row in states(run)]
    assert len(shares[0]) == 1
    assert max(shares[1]) == 3 * min(shares[1])
    assert states(run)[1]["stream"]["tallies"] == [[0, 20, 20]]
    assert len(losses(run)) == 10
    said = train(encoded, run, total_images=96, code=2)
    assert "the shards of data.dataset and data.mix" in said


def test_latents_of_several_sizes_are_learned_in_batches_of_one(encoded, tmp_path):
    run, dataset = tmp_path / "run", tmp_path / "dataset"
    shutil.copytree(encoded, dataset)
    buckets = "encoders.buckets={max_aspect:2,step_px:16}"
    kiln("encode", f"dataset={dataset}", buckets, "wandb=off")
    said = train(dataset, run, buckets, total_images=40)
    assert "finished at step 5" in said
    assert all(loss > 0 for loss in losses(run).values())


def test_a_run_goes_on_after_a_removal_without_the_removed(encoded, tmp_path):
    run, dataset = tmp_path / "run", tmp_path / "dataset"
    shutil.copytree(encoded, dataset)
    train(dataset, run, total_images=40)

    def samples() -> list[tuple[int, str]]:
        lines = kiln("order", f"run={run}", "steps=0:10", "format=json").splitlines()
        steps = [json.loads(line) for line in lines if line.startswith("{")]
        return [(step["step"], one["key"]) for step in steps for one in step["samples"]]

    before = samples()
    assert len(before) == 80
    kiln("remove", f"dataset={dataset}", f"keys=[{before[-1][1]}]", "why=test")
    assert samples() == before
    said = train(dataset, run)
    assert "attempt 1, step 5 of 10" in said
    assert [row["stream"]["datasets"] for row in states(run)] == 2 * [
        states(run)[0]["stream"]["datasets"]
    ]


def test_a_checkpoint_of_other_shards_is_refused_before_a_rank_starts(encoded, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    record = complete(run / "checkpoints")[-1] / "checkpoint.json"
    changed = record.read_text().replace(states(run)[0]["stream"]["datasets"][0][0], "0" * 16)
    record.write_text(changed)
    said = train(encoded, run, code=2, total_images=160)
    assert "the order of the samples would not continue" in said
    assert "another run=" in said
    assert not (run / "attempts/001").exists()


def test_too_many_streams_are_refused_with_a_number_that_works(encoded, tmp_path):
    said = train(encoded, tmp_path / "run", "data.canonical_streams=64", code=2)
    assert "Give data.canonical_streams=" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.weight=0"], "all weights of data are 0"),
        (["data.reader=webdataset"], "data.epoch_images"),
        (["data.epoch_images=9"], "null with reader=kiln"),
        (
            ["data.reader=webdataset", "data.epoch_images=9", "data.mix=[{dataset:x,weight:1}]"],
            "cannot mix datasets",
        ),
        (["data.reader=webdataset", "data.epoch_images=9"], "is trained on latents"),
        (["data.mix=[{dataset:nowhere,weight:1}]"], "the dataset nowhere is not there"),
        (["data.ending=drop", "batch.global_batch_images=400"], "would drop every sample"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(encoded, tmp_path, words, message):
    assert message in train(encoded, tmp_path / "run", *words, code=2)


def test_an_autoencoder_learns_from_tars_without_an_index_and_resumes_roughly(encoded, tmp_path):
    run, tars = tmp_path / "run", place(encoded) / "shards" / "*.tar"
    words = [
        "experiment=scenes_autoencoder",
        "data.reader=webdataset",
        "data.epoch_images=40",
        "batch.global_batch_images=4",
        "batch.micro_batch_images=4",
        "cluster.ranks_per_node=1",
        "checkpoint.every_images=4",
        "logging.every_steps=1",
        "logging.wandb=off",
        f"data.dataset={tars}",
        f"run={run}",
    ]
    assert "resuming is approximate" in kiln("train", *words, "total_images=8")
    said = kiln("train", *words, "total_images=16")
    assert "attempt 1, step 2 of 4" in said
    assert len(losses(run)) == 4
