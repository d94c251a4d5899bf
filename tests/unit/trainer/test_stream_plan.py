from dataclasses import replace

import pytest

from tests.latents_without_encoders import make_dataset
from tests.tiny import SLURM, tiny_config
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.data.manifest import list_encodings, load_manifest
from trainer.data.opening import Dataset
from trainer.datasets import find_law
from trainer.errors import BadInput
from trainer.frozen import compose
from trainer.place import place
from trainer.plan import make_plan
from trainer.stream_plan import StreamPlan, show


def plan_of(*datasets, **changes):
    mix = [{"dataset": str(dataset), "weight": 1.0} for dataset in datasets[1:]]
    own = {
        "data__dataset": str(datasets[0]),
        "data__mix": mix,
        "cluster__kind": "slurm",
        "cluster__slurm": SLURM,
    }
    cfg = tiny_config(**own, **changes)
    opened = [Dataset(d, load_manifest(d), list_encodings(d)[0]) for d in datasets]
    return StreamPlan(cfg, make_plan(cfg), opened, find_law(cfg, opened, None))


def table(plan):
    return {what.strip(): how_much for what, how_much in plan.rows()}


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("even"), shard_counts=(10, 10, 10, 10))


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory):
    root = tmp_path_factory.mktemp("bucketed")
    return make_dataset(root, shard_counts=(10, 10), buckets=("32x32", "24x32"), salt="b")


def test_epochs_windows_and_reads_of_one_dataset(even):
    rows = table(plan_of(even, total_images=80, data__window_shards=1, cluster__num_nodes=2))
    assert "40 samples in 4 shards" in rows["dataset"]
    assert rows["run"] == "10 steps of 8 samples"
    assert rows["canonical streams"].startswith("4: 2 per rank, up to 2 per node")
    assert "40 samples are shuffled together, 100 %" in rows["window"]
    assert rows["epoch"].startswith("80 reads, ")  # latents and texts; its row of steps is before
    assert rows["whole run"].startswith("160 reads, ")
    steps = [how for what, how in plan_of(even, total_images=80).rows() if what == "  epoch"]
    assert steps == ["5.0 steps; 2.00 epochs in the run"]
    dropped = plan_of(even, total_images=96, data__ending="drop", batch__global_batch_images=12)
    assert dropped.epochs == [pytest.approx(8 / 3)]  # of 40 samples, 36 in an epoch


def test_weights_of_a_mix_share_the_epochs(even, bucketed):
    plan = plan_of(even, bucketed, data__weight=3.0, total_images=160)
    assert plan.shares == pytest.approx([0.75, 0.25], abs=1e-5)
    assert plan.epochs == pytest.approx([3.0, 2.0], rel=1e-4)
    idle = plan_of(even, bucketed, data__weight=0.0)
    assert next(how for what, how in idle.rows() if what == "  epoch").startswith("never ends")
    assert idle.cache_bytes == idle.needs[1].two_windows_bytes


def test_buckets_are_counted_one_by_one_and_small_ones_warned_of(bucketed):
    plan = plan_of(bucketed)
    rows = table(plan)
    assert rows["bucket 24x32"] == "10 samples, 1.2 steps an epoch"
    assert rows["bucket 32x32"] == "10 samples, 1.2 steps an epoch"
    assert not [note for note in plan.notes() if "bucket" in note]
    notes = list(plan_of(bucketed, batch__global_batch_images=16).notes())
    assert "bucket 24x32 has 10 samples, less than a step of 16" in notes[0]


def test_streams_that_ranks_share_are_noted_with_a_number_that_is_even(even):
    assert not list(plan_of(even, cluster__num_nodes=2).notes())
    (note,) = plan_of(even, cluster__num_nodes=2, data__canonical_streams=3).notes()
    assert "3 canonical streams on 2 ranks" in note
    assert "data.canonical_streams=2 is even" in note
    many = {"batch__global_batch_images": 16, "cluster__num_nodes": 8}
    (note,) = plan_of(even, **many).notes()
    assert "8 streams need 8 shards, a dataset has 4" in note
    assert not list(plan_of(even, data__order="ranges", **many).notes())


def test_a_cache_is_measured_against_two_windows(even):
    options = {"data__cache": "cache", "data__window_shards": 1, "data__canonical_streams": 1}
    plan = plan_of(even, **options, total_images=400)
    shards = [entry.bytes for entry in plan.datasets[0].encoding.shards]
    assert plan.cache_bytes < sum(shards)
    assert not list(plan.notes())
    rows = table(plan)
    assert rows["epoch"].startswith("4 requests, ")
    assert rows["whole run"].startswith("4 requests, ")  # the second epoch finds all in the cache
    small = plan_of(even, **options, data__cache_gb=(max(shards) + 1) / 1e9, total_images=400)
    (note,) = small.notes()
    assert "of two windows: shards will be fetched more than once" in note
    assert table(small)["whole run"].startswith("41 requests, ")  # and one window ahead
    with pytest.raises(BadInput, match=r"no room for the largest shard.*Give data.cache_gb=1,"):
        list(plan_of(even, **options, data__cache_gb=min(shards) / 2e9).rows())


def test_ranges_need_all_shards_on_every_node(even):
    plan = plan_of(even, data__order="ranges", data__cache="cache", cluster__num_nodes=2)
    total = sum(entry.bytes for entry in plan.datasets[0].encoding.shards)
    assert plan.cache_bytes == total
    assert table(plan)["order"].startswith("ranges")
    assert plan.needs[0].epoch_bytes == 2 * total


def test_a_remote_dataset_without_a_cache_is_noted(even):
    plan = plan_of(even)
    there = replace(plan.datasets[0], folder=place("memory://bucket/data"))
    remote = replace(plan, datasets=[there])
    (note,) = remote.notes()
    assert "every member of every sample is a request of its own" in note
    assert "data.cache_gb=1 or more" in note
    assert table(remote)["epoch"].startswith("80 requests, ")


def test_the_command_prints_the_plan_of_pictures(even, capsys):
    words = ["experiment=scenes_autoencoder", f"data.dataset={even}", "total_images=6400"]
    assert main(["stream-plan", *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "40 samples in 4 shards" in out
    assert "of pictures" in out
    assert main(["stream-plan", *words, "data.ending=drop", "batch.global_batch_images=64"]) == 2
    assert "would drop every sample" in capsys.readouterr().err


def test_tars_as_they_come_have_no_plan():
    words = ["experiment=scenes_autoencoder", "data.dataset=x", "data.reader=webdataset"]
    cfg = compose(TrainConfig, "train", [*words, "data.epoch_images=9"])
    with pytest.raises(BadInput, match=r"data.reader=webdataset has no plan"):
        show(cfg)
