import json
import shutil

import numpy as np
import pytest

from data_prep.config import VerifyConfig
from data_prep.prepare import run as prepare
from data_prep.verify import main, run
from tests.tiny_source import prepare_cfg, publish_here
from trainer.data.manifest import (
    Encoding,
    describe_shard,
    encoding_folder,
    load_manifest,
    save_encoding,
)
from trainer.data.null_text import NULL_TEXT
from trainer.data.shards import Sample, read_index, write_shard
from trainer.errors import BadInput


@pytest.fixture(scope="module")
def published(served, tmp_path_factory):
    """The tiny source, published in this process."""
    cfg = prepare_cfg(served, tmp_path_factory.mktemp("published"))
    publish_here(cfg)
    return cfg.dataset


@pytest.fixture
def dataset(published, tmp_path):
    return shutil.copytree(published, tmp_path / "dataset")


def problems(dataset, capsys):
    code = run(VerifyConfig(dataset=dataset))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert code == (1 if said else 0)
    return said


def test_a_fresh_dataset_has_no_problems(dataset, capsys):
    assert main([f"dataset={dataset}"]) == 0
    assert "no problems" in capsys.readouterr().out


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_a_picture_is_found(dataset, capsys):
    tar = dataset / "shards" / "00001.tar"
    flip(tar, read_index(dataset / "index" / "00001.parquet")["offset.jpg"][0].as_py() + 50)
    found = problems(dataset, capsys)
    assert len(found) == 2
    assert "00001.tar has sha256" in found[0]
    assert ".jpg is not what the index says" in found[1]
    assert all("recheck=hashes" in line for line in found)


def test_a_cut_tar_and_a_missing_index_are_named(dataset, capsys):
    tar = dataset / "shards" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    (dataset / "index" / "00002.parquet").unlink()
    found = problems(dataset, capsys)
    assert "00000.tar is cut: expected at least" in found[0]
    assert "00002.parquet is not there" in found[1]


def test_swapped_shards_are_found(dataset, capsys):
    shutil.copy(dataset / "shards" / "00000.tar", dataset / "shards" / "00001.tar")
    assert any("holds other members" in line for line in problems(dataset, capsys))


def test_a_shard_that_is_there_twice_is_found(dataset, capsys):
    for name in ("shards/{}.tar", "index/{}.parquet"):
        shutil.copy(dataset / name.format("00000"), dataset / name.format("00001"))
    assert any("keys are there more than once" in line for line in problems(dataset, capsys))


def test_lost_and_damaged_quarantine_lines_are_found(dataset, capsys):
    path = max(dataset.glob("quarantine/*.jsonl"), key=lambda path: path.stat().st_size)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    reason = json.loads(lines[0])["reason"]
    found = problems(dataset, capsys)
    assert len(found) == 2
    assert f"rows for {reason}, the manifest says" in found[0]
    assert f"{path.name} has sha256" in found[1]
    for damaged in (b"{\n", b"\xff\n"):
        path.write_bytes(damaged)
        assert any("is no quarantine record" in line for line in problems(dataset, capsys))


def test_a_count_that_differs_is_found(dataset, capsys):
    path = dataset / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["count"] += 1
    manifest["shards"][1]["count"] -= 1
    path.write_text(json.dumps(manifest))
    found = problems(dataset, capsys)
    assert sum("rows, the manifest says" in line for line in found) == 2


def test_encodings_must_have_the_keys_and_fingerprint_of_the_dataset_and_their_own_buckets(
    dataset, capsys
):
    manifest = load_manifest(dataset)
    folder = encoding_folder(dataset, "abc")

    def encode(skip, fingerprint, bucket="8x8"):
        entries = []
        for shard in manifest.shards:
            keys = read_index(shard.index(dataset))["key"].to_pylist()[skip:]
            samples = (Sample(key, {"latent.npy": b"x"}, {"bucket": bucket}) for key in keys)
            name = f"{shard.number}.tar"
            write_shard(folder / name, folder / "index" / f"{shard.number}.parquet", samples)
            entries.append(describe_shard(folder, name, len(keys)))
        save_encoding(
            dataset,
            Encoding(
                fingerprint="abc",
                dataset_fingerprint=fingerprint,
                shards=tuple(entries),
                bucket_counts={"8x8": [entry.count for entry in entries]},
            ),
        )

    encode(0, manifest.fingerprint)
    with (folder / NULL_TEXT).open("wb") as file:
        np.save(file, np.zeros((1, 2), np.float16))
    assert problems(dataset, capsys) == []
    encode(0, "another")
    (found,) = problems(dataset, capsys)
    assert "another state of the dataset" in found
    encode(0, manifest.fingerprint, bucket="16x4")
    found = problems(dataset, capsys)
    assert len(found) == len(manifest.shards)
    assert all("has other buckets than" in line for line in found)
    encode(1, manifest.fingerprint)
    found = problems(dataset, capsys)
    assert len(found) == len(manifest.shards)
    assert all("other keys than the dataset" in line for line in found)


def test_an_unfinished_dataset_is_refused(tmp_path):
    with pytest.raises(BadInput, match="unfinished"):
        run(VerifyConfig(dataset=tmp_path))


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("plan/000.parquet", "folder plan/"),
        ("quarantine/plan-000.parquet", "folder plan/"),
        ("plan/000.json", "the folder"),
        ("units/00001.json", "recheck=hashes"),
        ("quarantine/00001.jsonl", "recheck=hashes"),
        ("history.jsonl", "back from a copy"),
        ("index/00000.parquet", "recheck=hashes"),
        ("shards/00000.tar", "recheck=hashes"),
    ],
)
@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b"")])
def test_no_damaged_file_goes_unseen_or_ends_the_reading(dataset, name, says, damage, capsys):
    damage(dataset / name)
    found = problems(dataset, capsys)
    assert any(name in line and says in line for line in found), found


def test_records_that_read_well_and_say_something_else_are_found(dataset, capsys):
    for name, change in (
        ("units/00001.json", {"rows_in": 24}),
        ("units/00002.json", {"rejected": {"http_404": 25}}),
        ("manifest.json", {"fingerprint": "0" * 64}),
        ("plan/000.json", {"plan_sha256": "0" * 64}),
    ):
        path = dataset / name
        before = path.read_bytes()
        path.write_text(json.dumps(json.loads(before) | change))
        assert any(str(dataset / name.split(".")[0]) in line for line in problems(dataset, capsys))
        path.write_bytes(before)
    with (dataset / "history.jsonl").open("a") as file:
        file.write('{"fingerprint": "another"}\n')
    (found,) = problems(dataset, capsys)
    assert "ends with fingerprint another" in found


@pytest.mark.parametrize("name", ["shards/00000.tar", "index/00000.parquet", "units/00000.json"])
def test_files_that_no_manifest_lists_are_named(dataset, name, capsys):
    extra = dataset / name.replace("00000", "00077")
    shutil.copy(dataset / name, extra)
    (found,) = problems(dataset, capsys)
    assert found.startswith(f"- {extra} is ")


def test_an_unfinished_encoding_is_said_to_be_one(dataset, capsys):
    (encoding_folder(dataset, "abc") / "index").mkdir(parents=True)
    assert run(VerifyConfig(dataset=dataset)) == 0
    assert "encoding abc, unfinished" in capsys.readouterr().out


def test_what_prepare_is_told_to_repair_it_repairs(served, dataset, capsys):
    flip(dataset / "shards" / "00001.tar", 600)
    flip(dataset / "quarantine" / "00000.jsonl", 20)
    (dataset / "units" / "00002.json").write_bytes(b"")
    assert len(problems(dataset, capsys)) >= 3
    assert prepare(prepare_cfg(served, dataset, "recheck=hashes")) == 0
    capsys.readouterr()
    assert problems(dataset, capsys) == []
    (dataset / "plan" / "000.parquet").write_bytes(b"")
    assert problems(dataset, capsys)
    shutil.rmtree(dataset / "plan")
    assert prepare(prepare_cfg(served, dataset)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert problems(dataset, capsys) == []
