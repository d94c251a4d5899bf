import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.latents_without_encoders import make_dataset
from tests.streams import ids, latents, load, pictures, size
from trainer.data.manifest import list_encodings, load_manifest
from trainer.data.opening import Dataset, Layout, make_law
from trainer.data.shards import read_index
from trainer.data.tombstones import (
    REMOVAL_SCHEMA,
    TOMBSTONE_SCHEMA,
    WEIGHT_SCHEMA,
    add_tombstones,
    is_weighed,
    key_numbers,
    live_rows,
    read_row_weights,
    read_tombstones,
    removed_since,
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
    return pa.Table.from_pylist(lines, REMOVAL_SCHEMA)


def remove(dataset, keys, **about):
    before = load_manifest(dataset)
    add_tombstones(dataset, stones(keys, **about), version=before.removal_version + 1)
    save_state(dataset, weigh(dataset, before), why="test", parent=before.fingerprint)


def forget(dataset):
    for name in ("tombstones.parquet", "weights.parquet", "history.jsonl"):
        (dataset / name).unlink(missing_ok=True)
    save_state(dataset, weigh(dataset, load_manifest(dataset)), why="test")


def epoch(source, *, epochs=2):
    """Ids of whole epochs, in order."""
    return [ids(load(source, np.arange(size(source)), epoch=epoch)) for epoch in range(epochs)]


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
    with latents(played) as some, pictures(played, side_px=8) as others:
        for source in (some, others):
            for found in epoch(source):
                assert sorted(found) == sorted(set(keys) - gone)
        both = [load(source, np.arange(size(source))) for source in (some, others)]
    assert torch.equal(both[0].ids_B, both[1].ids_B)
    assert both[0].weights_B is both[1].weights_B is None


@given(order=st.permutations(range(6)), cut=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_the_fingerprint_depends_on_who_went_at_which_version_and_nothing_else(played, order, cut):
    forget(played)
    untouched = load_manifest(played).fingerprint
    keys = keys_of(played)[3:9]
    parts = [[keys[number] for number in part] for part in (order[:cut], order[cut:])]
    remove(played, keys)
    at_once = load_manifest(played)
    seen = {untouched, at_once.fingerprint}
    for turned in (1, -1):
        forget(played)
        assert load_manifest(played).fingerprint == untouched
        for part in parts:
            remove(played, part[::turned], why=str(turned))
            seen.add(load_manifest(played).fingerprint)
        assert load_manifest(played).rows_live == at_once.rows_live
    assert len(seen) == 4


@given(numbers=st.lists(st.sets(st.integers(0, 19), max_size=6), max_size=5))
@settings(max_examples=25, deadline=None)
def test_live_at_a_version_and_removed_until_then_are_all_and_each_version_has_less(
    played, numbers
):
    forget(played)
    keys = keys_of(played)
    epochs, gone = [set(keys)], set()
    for some in numbers:
        asked = {keys[number] for number in some}
        if asked - gone:
            remove(played, asked)
            gone |= asked
            epochs.append(set(keys) - gone)
    manifest = load_manifest(played)
    assert manifest.removal_version == len(epochs) - 1
    for version, live in enumerate(epochs):
        assert manifest.rows_live_at(version) == len(live)
        found, since, counts = set(), set(), []
        for shard in manifest.shards:
            weights = read_row_weights(played, shard, manifest.weights.get(shard.number))
            own = key_numbers(read_index(shard.index(played)))
            rows = live_rows(weights, version)
            counts.append(len(rows))
            found |= set(own[rows].tolist())
            since |= set(own[removed_since(weights, version)].tolist())
        assert found == live
        assert since == live - epochs[-1]
        assert manifest.live_counts_at(version) == counts
    assert manifest.rows_live == len(epochs[-1])


def test_an_older_copy_does_not_know_the_version_of_a_later_run(dataset):
    remove(dataset, keys_of(dataset)[:1])
    manifest = load_manifest(dataset)
    with pytest.raises(BadInput, match=r"has removal version 1, and 2 is needed, .* newer copy"):
        manifest.live_counts_at(2)


def test_what_was_never_live_is_live_at_no_version(dataset):
    add_tombstones(dataset, stones(keys_of(dataset)[:2]), version=0)
    manifest = weigh(dataset, load_manifest(dataset))
    save_state(dataset, manifest, why="test")
    assert manifest.removal_version == 0
    assert manifest.rows_live == manifest.rows_live_at(0) == 18
    weights = read_row_weights(dataset, manifest.shards[0], manifest.weights["00000"])
    assert live_rows(weights, 0).tolist() == [2, 3, 4, 5, 6]


def test_tombstones_of_before_versions_are_of_the_first(dataset):
    keys = keys_of(dataset)
    pq.write_table(stones(sorted(keys[:2])), dataset / "tombstones.parquet")
    assert read_tombstones(dataset)["version"].to_pylist() == [1, 1]
    assert read_tombstones(dataset).schema == TOMBSTONE_SCHEMA
    assert read_tombstones(dataset, ["why"]).column_names == ["why"]
    save_state(dataset, weigh(dataset, load_manifest(dataset)), why="test")
    remove(dataset, keys[1:3])
    assert read_tombstones(dataset)["version"].to_pylist() == [1, 1, 2]
    assert load_manifest(dataset).weights["00000"].removed == {1: 2, 2: 1}


def test_encodings_and_the_shards_own_name_outlive_a_removal(dataset):
    before = load_manifest(dataset)
    remove(dataset, keys_of(dataset)[:1])
    after = load_manifest(dataset)
    assert after.shards == before.shards
    assert after.shards_fingerprint == before.fingerprint
    assert list_encodings(dataset)[0].dataset_fingerprint == after.shards_fingerprint


def test_removal_only_grows_and_a_line_with_a_url_wins(dataset):
    keys = keys_of(dataset)
    taken_down = stones(keys[:1], url="http://x/", why="taken down")
    assert add_tombstones(dataset, stones(keys[:2], why="first"), version=1) == 2
    assert add_tombstones(dataset, stones(keys[1:3], why="second"), version=2) == 1
    assert add_tombstones(dataset, taken_down, version=3) == 1
    before = (dataset / "tombstones.parquet").read_bytes()
    assert add_tombstones(dataset, stones(keys[:3], why="again"), version=4) == 0
    assert (dataset / "tombstones.parquet").read_bytes() == before
    table = read_tombstones(dataset)
    assert table.schema == TOMBSTONE_SCHEMA
    assert table["version"].to_pylist() == [1, 1, 2]
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
    assert [line["removal_version"] for line in lines] == [1, 2]

    with (dataset / "history.jsonl").open("a") as file:
        file.write("{")
    with pytest.raises(BadInput, match=r"history\.jsonl is damaged .*from a copy"):
        save_state(dataset, load_manifest(dataset), why="a test")


def test_weights_reach_the_batch_and_removal_wins(dataset):
    keys = keys_of(dataset)
    lines = [{"key": key, "weight": 1 / 3} for key in keys[:4]]
    save_cluster_weights(dataset, pa.Table.from_pylist(lines, WEIGHT_SCHEMA))
    add_tombstones(dataset, stones(keys[3:5]), version=1)
    manifest = weigh(dataset, load_manifest(dataset))
    save_state(dataset, manifest, why="test")
    assert is_weighed(dataset, load_manifest(dataset))
    assert (manifest.rows_removed, manifest.rows_weighted) == (2, 3)
    for opened in (latents(dataset), pictures(dataset, side_px=8)):
        with opened as source:
            batch = load(source, np.arange(18))
        found = dict(zip(ids(batch), batch.weights_B.tolist(), strict=True))
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
    manifest["weights"]["00000"]["removed"] = {"1": 8}
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="8 samples removed and 0 weighted of 7 in shard 00000"):
        load_manifest(dataset)


def test_a_manifest_whose_samples_went_at_a_later_version_than_its_own_is_refused(dataset):
    remove(dataset, keys_of(dataset)[:1])
    path = dataset / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"removal_version": 0}))
    with pytest.raises(BadInput, match="shard 00000 went at removal version 1, the dataset's is 0"):
        load_manifest(dataset)


def test_damaged_tombstones_are_named(dataset):
    (dataset / "tombstones.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"tombstones\.parquet is no readable parquet"):
        read_tombstones(dataset)


def test_a_dataset_of_which_all_was_removed_is_refused(dataset):
    remove(dataset, keys_of(dataset))
    with pytest.raises(BadInput, match=r"all samples of .* were removed"):
        make_law([Dataset(dataset, load_manifest(dataset), None)], Layout(seed=0))
