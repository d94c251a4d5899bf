import json
from contextlib import closing
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.latents_without_encoders import make_dataset
from trainer.data.manifest import list_encodings, load_manifest
from trainer.data.shards import read_index
from trainer.data.sources import LatentSource, PictureSource
from trainer.data.stream import micro_batches
from trainer.data.tombstones import (
    TOMBSTONE_SCHEMA,
    WEIGHT_SCHEMA,
    add_tombstones,
    is_weighed,
    key_numbers,
    read_row_weights,
    read_tombstones,
    removed_urls,
    row_weights_path,
    save_cluster_weights,
    save_state,
    weigh,
)
from trainer.errors import BadInput


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A dataset for laws that begin by taking all tombstones back."""
    return make_dataset(tmp_path_factory.mktemp("played"))


def keys_of(dataset):
    paths = sorted(dataset.glob("index/*.parquet"))
    return [int(key) for path in paths for key in key_numbers(read_index(path))]


def stones(keys, *, url=None, why="a request"):
    lines = [{"key": key, "url": url, "why": why} for key in keys]
    return pa.Table.from_pylist(lines, TOMBSTONE_SCHEMA)


def remove(dataset, keys, **about):
    before = load_manifest(dataset)
    add_tombstones(dataset, stones(keys, **about))
    save_state(dataset, weigh(dataset, before), why="test", parent=before.fingerprint)


def forget(dataset):
    for name in ("tombstones.parquet", "weights.parquet", "history.jsonl"):
        (dataset / name).unlink(missing_ok=True)
    save_state(dataset, weigh(dataset, load_manifest(dataset)), why="test")


def epoch(source, *, epochs=2):
    """Ids of whole epochs, in order."""
    batches = micro_batches(
        source,
        images_seen=0,
        seed=3,
        rank=0,
        world=1,
        global_batch_images=source.num_samples,
        micro_batch_images=source.num_samples,
        prefetch_batches=0,
    )
    found = [batch.ids_B.numpy().view(np.uint64).tolist() for batch in islice(batches, epochs)]
    batches.close()
    return found


@given(dead=st.sets(st.integers(0, 19), max_size=19))
@settings(max_examples=25, deadline=None)
def test_the_removed_never_come_and_all_others_once_an_epoch(played, dead):
    forget(played)
    keys = keys_of(played)
    gone = {keys[number] for number in dead}
    if gone:
        remove(played, gone)
    manifest = load_manifest(played)
    assert (manifest.rows_kept, manifest.rows_live) == (20, 20 - len(dead))
    latents = LatentSource(played, list_encodings(played)[0])
    pictures = PictureSource(played, manifest, side_px=8)
    with closing(latents), closing(pictures):
        for source in (latents, pictures):
            for ids in epoch(source):
                assert sorted(ids) == sorted(set(keys) - gone)
        numbers = np.arange(latents.num_samples)
        both = [source.load(numbers, numbers) for source in (latents, pictures)]
    assert torch.equal(both[0].ids_B, both[1].ids_B)
    assert both[0].weights_B is both[1].weights_B is None


@given(order=st.permutations(range(6)), cut=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_the_fingerprint_depends_on_who_was_removed_and_not_on_the_order(played, order, cut):
    forget(played)
    untouched = load_manifest(played).fingerprint
    keys = keys_of(played)[3:9]
    remove(played, keys)
    at_once = load_manifest(played).fingerprint
    assert at_once != untouched

    forget(played)
    assert load_manifest(played).fingerprint == untouched
    seen = {untouched}
    for part in (order[:cut], order[cut:]):
        remove(played, [keys[number] for number in part], why=str(cut))
        seen.add(load_manifest(played).fingerprint)
    assert load_manifest(played).fingerprint == at_once
    assert len(seen) == 3


def test_encodings_and_the_shards_own_name_outlive_a_removal(dataset):
    before = load_manifest(dataset)
    remove(dataset, keys_of(dataset)[:1])
    after = load_manifest(dataset)
    assert after.shards == before.shards
    assert after.shards_fingerprint == before.fingerprint
    assert list_encodings(dataset)[0].dataset_fingerprint == after.shards_fingerprint


def test_removal_only_grows_and_a_line_with_a_url_wins(dataset):
    keys = keys_of(dataset)
    assert add_tombstones(dataset, stones(keys[:2], why="first")) == 2
    assert add_tombstones(dataset, stones(keys[1:3], why="second")) == 1
    assert add_tombstones(dataset, stones(keys[:1], url="http://x/", why="taken down")) == 1
    assert add_tombstones(dataset, stones(keys[:3], why="again")) == 0
    table = read_tombstones(dataset)
    found = dict(zip(table["key"].to_pylist(), table["why"].to_pylist(), strict=True))
    assert found == {keys[0]: "taken down", keys[1]: "first", keys[2]: "second"}
    assert list(found) == sorted(found)
    assert removed_urls(dataset) == ["http://x/"]


def test_history_says_where_each_state_came_from(dataset):
    first = load_manifest(dataset).fingerprint
    remove(dataset, keys_of(dataset)[:1])
    second = load_manifest(dataset).fingerprint
    remove(dataset, keys_of(dataset)[:1])
    remove(dataset, keys_of(dataset)[:2])
    lines = [json.loads(line) for line in (dataset / "history.jsonl").read_text().splitlines()]
    assert [line["parent"] for line in lines] == [first, second]
    assert lines[-1]["fingerprint"] == load_manifest(dataset).fingerprint
    assert [line["rows_removed"] for line in lines] == [1, 2]

    with (dataset / "history.jsonl").open("a") as file:
        file.write("{")
    with pytest.raises(BadInput, match=r"history\.jsonl is damaged .*from a copy"):
        save_state(dataset, load_manifest(dataset), why="a test")


def test_weights_reach_the_batch_and_zero_wins(dataset):
    keys = keys_of(dataset)
    lines = [{"key": key, "weight": 1 / 3} for key in keys[:4]]
    save_cluster_weights(dataset, pa.Table.from_pylist(lines, WEIGHT_SCHEMA))
    add_tombstones(dataset, stones(keys[3:5]))
    manifest = weigh(dataset, load_manifest(dataset))
    save_state(dataset, manifest, why="test")
    assert is_weighed(dataset, load_manifest(dataset))
    assert (manifest.rows_removed, manifest.rows_weighted) == (2, 3)
    for source in (
        LatentSource(dataset, list_encodings(dataset)[0]),
        PictureSource(dataset, manifest, side_px=8),
    ):
        with closing(source):
            batch = source.load(np.arange(18), np.zeros(18, np.int64))
        ids = batch.ids_B.numpy().view(np.uint64).tolist()
        found = dict(zip(ids, batch.weights_B.tolist(), strict=True))
        assert found == {
            key: pytest.approx(1 / 3 if key in keys[:4] else 1)
            for key in keys
            if key not in keys[3:5]
        }


def test_other_weights_than_the_manifest_lists_are_refused(dataset):
    remove(dataset, keys_of(dataset)[:1])
    manifest = load_manifest(dataset)
    shard = manifest.shards[0]
    path = row_weights_path(dataset, shard.number)
    content = path.read_bytes()
    path.write_bytes(content[:-4] + bytes(4))
    with pytest.raises(BadInput, match=r"is not what the manifest said .* `kiln prepare`"):
        read_row_weights(dataset, shard, manifest.weights[shard.number])
    path.unlink()
    with pytest.raises(BadInput, match=r"00000\.npy is not there"):
        read_row_weights(dataset, shard, manifest.weights[shard.number])


def test_a_manifest_that_removes_more_than_there_is_is_refused(dataset):
    remove(dataset, keys_of(dataset)[:1])
    path = dataset / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["weights"]["00000"]["removed"] = 8
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="8 samples removed and 0 weighted of 7 in shard 00000"):
        load_manifest(dataset)


def test_damaged_tombstones_are_named(dataset):
    (dataset / "tombstones.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"tombstones\.parquet is no readable parquet"):
        read_tombstones(dataset)


def test_a_dataset_of_which_all_was_removed_is_refused(dataset):
    remove(dataset, keys_of(dataset))
    with pytest.raises(BadInput, match=r"all samples of .* were removed"):
        PictureSource(dataset, load_manifest(dataset), side_px=8)
