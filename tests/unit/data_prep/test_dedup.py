import re
import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.config import VerifyConfig
from data_prep.config_curate import DedupConfig, RemoveConfig
from data_prep.dedup import run
from data_prep.remove import run as remove
from data_prep.verify import run as verify
from tests.curated_dataset import dataset_of, sample
from tests.streams import ids, load, pictures, size
from tests.tiny_source import tree_hashes
from trainer.data.manifest import load_manifest
from trainer.data.shards import read_index
from trainer.data.tombstones import read_cluster_weights, read_tombstones
from trainer.errors import BadInput
from trainer.frozen import compose


def config(dataset, *words):
    return compose(DedupConfig, "dedup", [f"dataset={dataset}", "processes=1", *words])


def shards():
    """Six different pictures; 1 is there three times, 2 twice byte by byte, two are flat."""
    return (
        [sample(1), sample(2, "two"), sample(3), sample(10, flat=True)],
        [sample(1, quality=60), sample(2, "two, with a longer caption"), sample(4)],
        [sample(1, side_px=128), sample(5), sample(6), sample(20, flat=True)],
    )


def key(*args, **options):
    return int(sample(*args, **options).key, 16)


def take_out(dataset, gone):
    words = [f"dataset={dataset}", f"keys=['{gone.key}']", "why=asked"]
    assert remove(compose(RemoveConfig, "remove", words)) == 0


DOOMED = {key(1), key(1, quality=60), key(2, "two")}


@pytest.fixture
def dataset(tmp_path):
    return dataset_of(tmp_path / "d", *shards())


def live_keys(dataset):
    with pictures(dataset, side_px=16) as source:
        batch = load(source, np.arange(size(source)))
    return Counter(ids(batch)), batch.weights_B


def all_keys(dataset):
    tables = [read_index(path) for path in sorted(dataset.glob("index/*.parquet"))]
    return {int(name, 16) for table in tables for name in table["key"].to_pylist()}


def test_of_each_cluster_the_largest_with_the_longest_caption_stays(dataset, capsys):
    before, tars = load_manifest(dataset), tree_hashes(dataset / "shards")
    assert run(config(dataset)) == 0
    assert "2 clusters with 1 exact and 2 near-duplicates; 2 flat" in capsys.readouterr().out

    tombstones = read_tombstones(dataset)
    assert set(tombstones["key"].to_pylist()) == DOOMED
    assert tombstones["key"].to_pylist() == sorted(DOOMED)
    why = dict(zip(tombstones["key"].to_pylist(), tombstones["why"].to_pylist(), strict=True))
    stays = sample(2, "two, with a longer caption").key
    assert why[key(2, "two")] == f"exact_duplicate of {stays}"
    assert why[key(1)] == f"near_duplicate of {sample(1, side_px=128).key}"
    assert tombstones["url"].null_count == len(tombstones)

    after = load_manifest(dataset)
    assert after.fingerprint != before.fingerprint
    assert after.shards == before.shards
    assert tree_hashes(dataset / "shards") == tars
    assert (after.rows_kept, after.rows_removed, after.rows_live) == (11, 3, 8)
    assert (before.removal_version, after.removal_version) == (0, 1)
    assert set(tombstones["version"].to_pylist()) == {1}
    counts, weights = live_keys(dataset)
    assert counts == Counter(all_keys(dataset) - DOOMED)
    assert weights is None
    assert verify(VerifyConfig(dataset=dataset)) == 0


@pytest.mark.parametrize("outcome", ["remove", "weight"])
def test_a_second_time_there_is_nothing_to_do(dataset, capsys, outcome):
    assert run(config(dataset, f"outcome={outcome}")) == 0
    once = tree_hashes(dataset)
    capsys.readouterr()
    assert run(config(dataset, f"outcome={outcome}")) == 0
    said = capsys.readouterr().out
    found = {"remove": "8 images, 0 clusters", "weight": "11 images, 2 clusters"}
    assert found[outcome] in said
    assert "Nothing to do; the fingerprint stays" in said
    assert tree_hashes(dataset) == once


@pytest.mark.parametrize("outcome", ["remove", "weight"])
def test_killed_before_the_manifest_the_same_command_again_finishes(dataset, tmp_path, outcome):
    """It had changed the weights of a shard that had some, and all else but the manifest."""
    whole = shutil.copytree(dataset, tmp_path / "whole")
    for folder in (dataset, whole):
        take_out(folder, sample(3))
    before = (dataset / "manifest.json").read_bytes()
    for folder in (dataset, whole):
        assert run(config(folder, f"outcome={outcome}")) == 0
    (dataset / "manifest.json").write_bytes(before)
    assert run(config(dataset, f"outcome={outcome}")) == 0
    assert load_manifest(dataset) == load_manifest(whole)
    assert verify(VerifyConfig(dataset=dataset)) == 0


def test_after_a_removal_the_weights_of_a_cluster_are_shared_anew(dataset):
    assert run(config(dataset, "outcome=weight")) == 0
    take_out(dataset, sample(1, quality=60))
    assert run(config(dataset, "outcome=weight")) == 0
    _, weights_B = live_keys(dataset)
    assert sorted(weights_B.tolist()) == [0.5] * 4 + [1.0] * 6
    assert verify(VerifyConfig(dataset=dataset)) == 0


def test_the_order_of_the_shards_and_the_threads_change_nothing(dataset, tmp_path):
    assert run(config(dataset)) == 0
    turned = dataset_of(tmp_path / "turned" / "d", *shards()[::-1])
    assert run(config(turned, "processes=2")) == 0
    assert read_tombstones(turned).equals(read_tombstones(dataset))
    assert (turned / "dedup.html").read_bytes() == (dataset / "dedup.html").read_bytes()


def test_the_weights_of_a_cluster_sum_to_one(dataset):
    before = load_manifest(dataset)
    assert run(config(dataset, "outcome=weight")) == 0
    table = read_cluster_weights(dataset)
    weights = dict(zip(table["key"].to_pylist(), table["weight"].to_pylist(), strict=True))
    ones = [key(1), key(1, quality=60), key(1, side_px=128)]
    twos = [key(2, "two"), key(2, "two, with a longer caption")]
    assert set(weights) == {*ones, *twos}
    for cluster in (ones, twos):
        assert sum(weights[name] for name in cluster) == pytest.approx(1)
        assert len({weights[name] for name in cluster}) == 1

    after = load_manifest(dataset)
    assert (after.rows_removed, after.rows_weighted) == (0, 5)
    assert after.removal_version == 0
    assert after.fingerprint != before.fingerprint
    counts, weights_B = live_keys(dataset)
    assert counts == Counter(all_keys(dataset))
    assert weights_B.sum() == pytest.approx(11 - 5 + 2)
    assert verify(VerifyConfig(dataset=dataset)) == 0

    # A removal instead of the weights: none of them is left.
    assert run(config(dataset)) == 0
    assert load_manifest(dataset).rows_weighted == 0
    assert load_manifest(dataset).removal_version == 1
    assert not (dataset / "weights.parquet").exists()
    assert verify(VerifyConfig(dataset=dataset)) == 0


def test_what_another_dataset_has_goes_and_the_other_stays_as_it_is(dataset, tmp_path):
    other = dataset_of(tmp_path / "other", [sample(3, quality=50), sample(7)], [sample(5, "five")])
    untouched = tree_hashes(other)
    assert run(config(dataset, f"against=[{other}]")) == 0
    assert set(read_tombstones(dataset)["key"].to_pylist()) == {*DOOMED, key(3), key(5)}
    name = load_manifest(other).fingerprint[:12]
    whys = read_tombstones(dataset)["why"].to_pylist()
    assert f"near_duplicate of {sample(3, quality=50).key} in dataset {name}" in whys
    assert f"exact_duplicate of {sample(5, 'five').key} in dataset {name}" in whys
    assert tree_hashes(other) == untouched


def test_a_dataset_against_itself_and_weights_against_others_are_refused(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    with pytest.raises(BadInput, match=r"has the same shards as .*Leave it out"):
        run(config(dataset, f"against=[{copy}]"))
    with pytest.raises(BadInput, match=r"outcome=weight .* against"):
        config(dataset, f"against=[{copy}]", "outcome=weight")


def test_the_oldest_stays_if_that_is_asked_for(dataset):
    assert run(config(dataset, "keep=oldest")) == 0
    dead = set(read_tombstones(dataset)["key"].to_pylist())
    assert key(1) not in dead
    assert key(1, side_px=128) in dead


def test_at_distance_zero_only_equal_hashes_are_duplicates(dataset):
    index = [read_index(path) for path in sorted(dataset.glob("index/*.parquet"))]
    hashes = Counter(value for table in index for value in table["phash"].to_pylist())
    assert run(config(dataset, "max_distance=0")) == 0
    dead = read_tombstones(dataset, ["key"])
    # The two flat pictures may have equal hashes.
    assert len(dead) == sum(count - 1 for value, count in hashes.items() if value.bit_count() > 8)


def test_a_dry_run_writes_the_page_and_nothing_else(dataset):
    before = tree_hashes(dataset)
    assert run(config(dataset, "dry_run=true")) == 0
    after = tree_hashes(dataset)
    assert after.pop("dedup.html")
    assert after == before


def test_the_page_shows_the_clusters_and_escapes_what_captions_say(tmp_path):
    script = "<script>alert('x')</script>&amp;"
    dataset = dataset_of(tmp_path / "d", [sample(1, script), sample(1), sample(2)])
    assert run(config(dataset)) == 0
    html = (dataset / "dedup.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert" in html
    assert html.count('src="data:image/jpeg;base64,') == 2
    assert "default-src 'none'" in html
    assert sample(1, script).key in html
    assert sample(2).key not in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html)


def test_a_scratch_folder_is_made_and_left_empty(dataset, tmp_path):
    assert run(config(dataset, f"scratch={tmp_path}/new/scratch")) == 0
    assert list((tmp_path / "new" / "scratch").iterdir()) == []


def test_a_scratch_that_cannot_be_written_is_named(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"scratch=.*/file/x cannot be written \(Not a directory\)"):
        run(config(dataset, f"scratch={tmp_path}/file/x"))


def test_too_little_memory_is_said_with_a_value_that_works(dataset):
    before = tree_hashes(dataset)
    with pytest.raises(BadInput, match=r"more than memory_gb=1e-06.*Try memory_gb=1,"):
        run(config(dataset, "memory_gb=1e-6"))
    assert tree_hashes(dataset) == before
    assert run(config(dataset, "memory_gb=1")) == 0


def test_a_dataset_without_hashes_is_refused(dataset):
    path = dataset / "index" / "00000.parquet"
    pq.write_table(read_index(path).drop_columns("phash"), path)
    with pytest.raises(BadInput, match=r"no column phash: an older Kiln .* or `kiln index`"):
        run(config(dataset))
