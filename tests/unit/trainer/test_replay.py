"""`kiln order` and `kiln where` against what real readers of the same run give out."""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from tests.latents_without_encoders import make_dataset
from tests.tiny import tiny_config
from trainer import order, where
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.data.manifest import load_manifest
from trainer.data.opening import open_readers
from trainer.data.quarantine import Quarantine
from trainer.data.shards import read_index
from trainer.data.sources import LatentSource, Samples
from trainer.data.stream import advance, begin, remix, step_slots, to_json
from trainer.data.tombstones import REMOVAL_SCHEMA, add_tombstones, save_state, weigh
from trainer.datasets import STREAM, law_of
from trainer.errors import BadInput
from trainer.frozen import compose, write_yaml
from trainer.observe.jsonl import JsonLines
from trainer.replay import ahead, history, run_dataset
from trainer.runtime.rundir import RECORD

BUCKETS = ("32x32", "32x24", "24x32")
# (first step, global batch, weights) of each attempt; later ones take steps again, even far back.
ATTEMPTS = [(0, 8, (2, 1)), (7, 12, (2, 1)), (4, 4, (1, 3)), (9, 12, (1, 3))]
KINDS = {
    "one dataset": {},
    "a mix": {"mixed": True},
    "buckets": {"buckets": BUCKETS},
    "a mix with buckets": {"mixed": True, "buckets": BUCKETS},
    "drop": {"data__ending": "drop"},
    "pad": {"data__ending": "pad"},
    "ranges": {"data__order": "ranges"},
}
REACHED = 14


def jsonl(path, rows):
    with closing(JsonLines(path)) as file:
        file.append(rows)


def remove(dataset, key):
    rows = pa.table([[int(key, 16)], [None], ["asked to"]], schema=REMOVAL_SCHEMA)
    manifest = load_manifest(dataset)
    add_tombstones(dataset, rows, version=manifest.removal_version + 1)
    save_state(dataset, weigh(dataset, manifest), why="test")


def keys_of(dataset):
    indexes = sorted((dataset / "index").glob("*.parquet"))
    return [key for index in indexes for key in read_index(index)["key"].to_pylist()]


def make_run(root, *, mixed=False, buckets=BUCKETS[:1], attempts=ATTEMPTS, **changes):
    """Write what a run leaves of its stream; return also the sample ids of each of its steps."""
    datasets = [make_dataset(root / "one", shard_counts=(7, 5, 8, 6, 1), buckets=buckets)]
    if mixed:
        datasets.append(make_dataset(root / "two", shard_counts=(9, 4), buckets=buckets, salt="b"))
    run = root / "run"
    run.mkdir()
    mix = [{"dataset": str(dataset), "weight": 1} for dataset in datasets[1:]]
    own = {"run": str(run), "data__dataset": str(datasets[0]), "data__mix": mix}
    cfg = tiny_config(**own, data__window_shards=1, **changes)
    write_yaml(cfg, run / "config.yaml")
    opened = [run_dataset(cfg, dataset) for dataset in datasets]
    law = law_of(cfg, opened, None)
    samples = Samples(law, open_readers(opened, law), Quarantine(None, max_bad_frac=0.0))
    states, taken = {}, {}
    with closing(samples):
        source = LatentSource(samples)
        for number, (first, images, all_weights) in enumerate(attempts):
            weights = all_weights[: len(datasets)]
            state = remix(law, states[first], weights) if first else begin(law, weights)
            row = {"attempt": number, "step": first, "global_batch_images": images}
            jsonl(run / STREAM, [{**row, "stream": to_json(law, state)}])
            for step in range(first, REACHED):
                batch = source.load(step_slots(law, state, images))
                ids = batch.ids_B.numpy().view(np.uint64)
                taken[step] = [
                    (f"{id_:016x}", visit)
                    for id_, visit in zip(ids.tolist(), batch.visits_B.tolist(), strict=True)
                ]
                state = advance(law, state, images)
                states[step + 1] = state
    jsonl(run / "metrics.jsonl", [{"attempt": len(attempts) - 1, "step": REACHED}])
    return SimpleNamespace(run=run, datasets=datasets, law=law, taken=taken, states=states)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"), **KINDS[request.param])
    for dataset in run.datasets:  # neither command needs them
        for tar in dataset.rglob("*.tar"):
            tar.unlink()
    return run


@pytest.fixture
def plain(tmp_path):
    return make_run(tmp_path)


def test_the_order_is_what_the_readers_of_the_last_attempt_got(made, capsys):
    assert main(["order", f"run={made.run}", f"steps=0:{REACHED}", "format=json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == list(range(REACHED))
    for line in lines:
        found = [(sample["key"], sample["epoch"]) for sample in line["samples"]]
        assert found == made.taken[line["step"]]
        names = {str(dataset): set(keys_of(dataset)) for dataset in made.datasets}
        assert all(sample["key"] in names[sample["dataset"]] for sample in line["samples"])


def test_where_is_the_inverse_of_order(made):
    expected = defaultdict(list)
    for step, samples in sorted(made.taken.items()):
        for key, epoch in samples:
            expected[key].append((step, epoch))
    with history(made.run) as past:
        for key in {key for dataset in made.datasets for key in keys_of(dataset)}:
            (home,) = where.find(past, range(len(made.datasets)), key)
            known = where.placed(past.law, past.readers[home.member], home)
            assert sorted(where.visits(past, home.member, *known)) == expected[key]


def test_going_ahead_at_once_or_step_by_step_is_the_same(made):
    state, law = begin(made.law, [1.0] * len(made.datasets)), made.law
    for num_steps in range(9):
        expected = begin(law, [1.0] * len(made.datasets))
        for _ in range(num_steps):
            expected = advance(law, expected, 8)
        assert ahead(law, state, 8, num_steps) == expected


def test_where_says_steps_and_how_far_the_run_is(plain, capsys):
    key, epoch = plain.taken[3][0]
    assert main(["where", f"run={plain.run}", f"key={key}"]) == 0
    out = capsys.readouterr().out
    assert f"  step 3, epoch {epoch}\n" in out
    assert "in the 14 steps so far (metrics.jsonl)" in out
    (plain.run / "checkpoints/step_00000001").mkdir(parents=True)
    (plain.run / "checkpoints/step_00000020").mkdir(parents=True)
    (plain.run / "checkpoints/step_00000020" / RECORD).touch()
    assert main(["where", f"run={plain.run}", f"key={key}"]) == 0
    assert "in the 20 steps so far (step_00000020)" in capsys.readouterr().out


def test_steps_of_an_attempt_that_was_given_up_do_not_count(plain, capsys):
    jsonl(plain.run / STREAM, [json.loads((plain.run / STREAM).read_text().splitlines()[0])])
    assert main(["where", f"run={plain.run}", f"key={plain.taken[0][0][0]}"]) == 0
    assert "due 0 times in the 0 steps so far (stream.jsonl)" in capsys.readouterr().out


def test_text_and_steps_to_come(plain, capsys, caplog):
    caplog.set_level("INFO")
    assert main(["order", f"run={plain.run}", "steps=13"]) == 0
    line = " ".join(f"{key}@{epoch}" for key, epoch in plain.taken[13])
    assert capsys.readouterr().out == f"13: {line}\n"
    assert not caplog.records
    assert main(["order", f"run={plain.run}", "steps=13:15"]) == 0
    assert "has done 14 steps (metrics.jsonl): those from 14 on" in caplog.text


def test_text_of_a_mix_numbers_its_datasets(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    mix = make_run(tmp_path, mixed=True, buckets=BUCKETS)
    assert main(["order", f"run={mix.run}", "steps=0"]) == 0
    step, bucket, *samples = capsys.readouterr().out.split()
    assert (step, bucket[:-1] in BUCKETS) == ("0", True)
    assert {sample.partition(":")[0] for sample in samples} == {"0", "1"}
    assert f"1 is {mix.datasets[1]}" in caplog.text


def test_a_sample_removed_before_the_run_was_never_seen(tmp_path, capsys):
    dataset = make_dataset(tmp_path / "d")
    key = keys_of(dataset)[3]
    remove(dataset, key)
    cfg = tiny_config(data__dataset=str(dataset))
    law = law_of(cfg, [run_dataset(cfg, dataset)], None)
    write_yaml(cfg, tmp_path / "config.yaml")
    row = {"attempt": 0, "step": 0, "global_batch_images": 8}
    jsonl(tmp_path / STREAM, [{**row, "stream": to_json(law, begin(law, [1.0]))}])
    assert main(["where", f"run={tmp_path}", f"key={key}"]) == 0
    assert "removed at version 1" in (out := capsys.readouterr().out)
    assert "never seen" in out


def test_samples_removed_since_or_unreadable_keep_their_steps_and_are_said(plain, capsys, caplog):
    caplog.set_level("INFO")
    (gone, _), (bad, _) = plain.taken[0][:2]
    remove(plain.datasets[0], gone)
    row = {"dataset": str(plain.datasets[0]), "shard": "x.tar", "key": bad, "why": "it is cut."}
    (plain.run / "quarantine").mkdir()
    jsonl(plain.run / "quarantine/rank_00000.jsonl", [row])
    assert main(["order", f"run={plain.run}", "steps=0"]) == 0
    assert gone in capsys.readouterr().out
    assert "2 of these 8 samples could not be read" in caplog.text
    assert main(["where", f"run={plain.run}", f"key={gone}"]) == 0
    assert "removed at version 1" in (out := capsys.readouterr().out)
    assert "step 0, epoch 0" in out
    assert main(["where", f"run={plain.run}", f"key={bad}"]) == 0
    assert "could not read it, and took others in its place: it is cut." in capsys.readouterr().out


def test_a_key_of_digits_stays_text_and_an_unknown_one_is_refused(plain, capsys):
    for key in ("1234567890123e45", "1234567890123456", "'0x10'"):
        assert main(["where", f"run={plain.run}", f"key={key}"]) == 2
        assert f"no sample of this run has the key {key.strip(chr(39))}:" in capsys.readouterr().err


def test_a_dataset_that_is_not_of_the_run_is_refused(plain):
    with pytest.raises(BadInput, match=r"dataset=other is none of this run. Give one of: .*one"):
        where.main([f"run={plain.run}", "key=x", "dataset=other"])


@pytest.mark.parametrize("steps", ["3:3", "5:2", "all", "1:"])
def test_what_is_no_span_of_steps_is_refused(plain, steps):
    with pytest.raises(BadInput, match=f"steps={steps} is no span of steps. Give steps=0:10"):
        order.main([f"run={plain.run}", f"steps={steps}"])


def test_a_run_that_took_no_step_and_no_run_are_refused(plain):
    (plain.run / STREAM).unlink()
    with pytest.raises(BadInput, match=r"has no stream.jsonl: it did not begin to train yet"):
        order.main([f"run={plain.run}", "steps=0"])
    with pytest.raises(BadInput, match=r"config.yaml is not there; is .* a run directory"):
        order.main([f"run={plain.run}/none", "steps=0"])


def test_a_run_that_read_tars_as_they_come_cannot_be_replayed(tmp_path):
    words = ["experiment=scenes_autoencoder", "data.dataset=x", "data.reader=webdataset"]
    cfg = compose(TrainConfig, "train", [*words, "data.epoch_images=9"])
    write_yaml(cfg, tmp_path / "config.yaml")
    with pytest.raises(BadInput, match=r"data.reader=webdataset: which samples a step got"):
        order.main([f"run={tmp_path}", "steps=0"])


def test_a_missing_index_is_named(plain):
    next(plain.datasets[0].glob("encodings/*/index/00001.parquet")).unlink()
    with pytest.raises(BadInput, match=r"index/00001.parquet is not there"):
        order.main([f"run={plain.run}", "steps=0:6"])


def test_a_changed_dataset_is_refused(plain):
    shutil.rmtree(plain.datasets[0])
    make_dataset(plain.datasets[0].parent, shard_counts=(7, 5, 8, 5, 1))
    with pytest.raises(BadInput, match=r"the shards of data.dataset and data.mix was"):
        order.main([f"run={plain.run}", "steps=0"])


def test_a_reader_that_has_seen_enough_is_no_error(plain):
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "order", f"run={plain.run}", "steps=0:2000"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
        cwd=Path(__file__).parents[3],
        timeout=120,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")
