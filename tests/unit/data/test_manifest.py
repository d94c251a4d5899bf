import dataclasses
import json

import pytest

from trainer.data.manifest import (
    Encoding,
    Manifest,
    check_files,
    describe_shard,
    encoding_folder,
    list_encodings,
    load_encoding,
    load_manifest,
    save_encoding,
    save_manifest,
)
from trainer.data.shards import Sample, write_shard
from trainer.errors import BadInput


@pytest.fixture
def dataset(tmp_path):
    entries = []
    for number in range(2):
        write_shard(
            tmp_path / "shards" / f"{number:05d}.tar",
            tmp_path / "index" / f"{number:05d}.parquet",
            [Sample(f"{number}{i:015x}", {"txt": b"x" * i}) for i in range(3)],
        )
        entries.append(describe_shard(tmp_path, f"shards/{number:05d}.tar", 3))
    save_manifest(
        tmp_path,
        Manifest(shards=tuple(entries), rows_in=8, rows_kept=6, rejected={"timeout": 2}),
    )
    return tmp_path


def test_a_manifest_is_read_back_as_it_was_saved(dataset):
    manifest = load_manifest(dataset)
    before = (dataset / "manifest.json").read_bytes()
    save_manifest(dataset, manifest)
    assert load_manifest(dataset) == manifest
    assert (dataset / "manifest.json").read_bytes() == before


def test_the_fingerprint_depends_on_content_and_on_nothing_else(dataset):
    manifest = load_manifest(dataset)
    same = dataclasses.replace(manifest, shards=manifest.shards[::-1], provenance={"x": 1})
    assert same.fingerprint == manifest.fingerprint
    for change in ({"sha256": "0" * 64}, {"count": 4}, {"name": "shards/7.tar"}):
        other = (dataclasses.replace(manifest.shards[0], **change), manifest.shards[1])
        assert dataclasses.replace(manifest, shards=other).fingerprint != manifest.fingerprint


def test_complete_files_pass_the_check(dataset):
    check_files(dataset, load_manifest(dataset).shards)


@pytest.mark.parametrize("name", ["shards/00001.tar", "index/00000.parquet"])
def test_a_file_that_is_gone_or_cut_is_named(dataset, name):
    shards = load_manifest(dataset).shards
    content = (dataset / name).read_bytes()
    (dataset / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match=rf"{name} does not match.*{len(content)} bytes.*prepare"):
        check_files(dataset, shards)
    (dataset / name).unlink()
    with pytest.raises(BadInput, match=rf"{name} is not there"):
        check_files(dataset, shards)


def test_no_dataset_and_an_unfinished_one_are_told_apart(tmp_path):
    with pytest.raises(BadInput, match=r"unfinished.*kiln prepare"):
        load_manifest(tmp_path)
    with pytest.raises(BadInput, match=r"is not there"):
        load_manifest(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows_in": 9}, "does not add up: 9 rows in"),
        ({"rows_kept": 5}, "does not add up"),
        ({"schema": 99}, "has schema 99"),
        ({"shards": "none"}, "damaged: shards"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_refused(dataset, change, says):
    path = dataset / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=says):
        load_manifest(dataset)


def test_finished_encodings_are_listed(dataset):
    manifest = load_manifest(dataset)
    encoding = Encoding(
        fingerprint="abc",
        dataset_fingerprint=manifest.fingerprint,
        shards=manifest.shards,
        bucket_counts={"32x32": [1, 3], "48x24": [2, 0]},
        facts={"dtype": "float16"},
    )
    save_encoding(dataset, encoding)
    encoding_folder(dataset, "half-done").mkdir()
    assert list_encodings(dataset) == [encoding]
    assert encoding.bucket_totals == {"32x32": 4, "48x24": 2}
    with pytest.raises(BadInput, match=r"no finished encoding.*kiln encode"):
        load_encoding(encoding_folder(dataset, "half-done"))


@pytest.mark.parametrize(
    ("buckets", "says"),
    [
        ({"32x32": [3, 2]}, "5 samples in 2 shards, need .*, 6 in 2"),
        ({"32x32": [2, 4]}, "6 samples in 2 shards, need those of its shards one by one"),
        ({"32x32": [3, 3], "48x24": [0, 0, 1]}, "7 samples in 3 shards"),
        ({"32x32": [3]}, "3 samples in 1 shards"),
        ({}, "0 samples in 0 shards"),
        ({"32x32": [4, 3], "48x24": [-1, 0]}, "damaged: bucket_counts"),
        (None, "damaged: bucket_counts Field required"),
    ],
)
def test_an_encoding_whose_buckets_do_not_add_up_is_refused(dataset, buckets, says):
    manifest = load_manifest(dataset)
    save_encoding(
        dataset,
        Encoding(
            fingerprint="abc",
            dataset_fingerprint=manifest.fingerprint,
            shards=manifest.shards,
            bucket_counts={"32x32": [3, 3]},
        ),
    )
    folder = encoding_folder(dataset, "abc")
    assert load_encoding(folder).bucket_counts == {"32x32": [3, 3]}
    content = json.loads((folder / "encoding.json").read_text())
    content |= {"bucket_counts": buckets} if buckets is not None else {}
    if buckets is None:
        del content["bucket_counts"]
    (folder / "encoding.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=f"{says}.* `kiln encode`"):
        load_encoding(folder)
