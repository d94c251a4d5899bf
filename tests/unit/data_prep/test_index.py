import re
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from data_prep import index as command
from data_prep.config import EncodeConfig, IndexConfig, VerifyConfig
from data_prep.encode import run as encode
from data_prep.index import main, run
from data_prep.prepare import run as prepare
from data_prep.quarantine import read_quarantine
from data_prep.verify import run as verify
from tests import tiny_encoders
from tests.foreign_tars import img2dataset_tar, picture, write_tar
from tests.s3_server import BUCKET, S3Server, needs_s3
from tests.streams import latents, load, pictures, size
from tests.tiny_source import prepare_cfg
from trainer.data.manifest import check_files, load_manifest
from trainer.data.shards import Shard, key_ids, read_index
from trainer.data.tombstones import REMOVAL_SCHEMA, add_tombstones, save_state, weigh
from trainer.errors import BadInput
from trainer.frozen import compose

ROWS = 6


@pytest.fixture
def tars(tmp_path):
    """Three tars, a few of whose samples cannot be used."""
    folder = tmp_path / "foreign"
    for number in range(2):
        img2dataset_tar(folder / f"{number:05d}.tar", number, ROWS)
    odd = [
        ("v1.0/b.JPEG", picture(7)),
        ("v1.0/b.json", b'{"caption": "in json"}'),
        ("v1.0/a.webp", picture(8)),
        ("v1.0/a.txt", b"in txt"),
        ("lonely.jpg", picture(9)),
        ("silent.txt", b"no picture"),
        ("v1.0/a.webp", picture(8)),
        ("v1.0/a.txt", b"again"),
    ]
    write_tar(folder / "00002.tar", odd)
    return folder


@pytest.fixture
def dataset(tmp_path):
    return tmp_path / "dataset"


def index(tars, dataset, *more):
    words = [f"tars='{tars}'", f"dataset={dataset}", "threads=2", *more]
    return run(compose(IndexConfig, "index", words))


def check(dataset):
    return verify(VerifyConfig(dataset=dataset))


def samples_of(dataset):
    found = {}
    for entry in load_manifest(dataset).shards:
        with Shard(entry.tar(dataset), read_index(entry.index(dataset))) as shard:
            for row, key in enumerate(shard.keys):
                found[key] = {ext: shard.read(row, ext) for ext in shard.extensions(row)}
    return found


def tree(dataset):
    paths = (path for path in dataset.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(dataset)): path.read_bytes() for path in paths}


def test_every_row_is_kept_or_in_quarantine_and_the_folder_verifies(tars, dataset, capsys):
    assert index(tars, dataset) == 0
    manifest = load_manifest(dataset)
    assert (manifest.rows_in, manifest.rows_kept) == (2 * ROWS + 5, 2 * ROWS + 2)
    assert manifest.rejected == {"missing_picture": 1, "missing_caption": 1, "duplicate": 1}
    rows = [r for path in (dataset / "quarantine").iterdir() for r in read_quarantine(path)]
    assert Counter(row.reason for row in rows) == manifest.rejected
    assert {row.key: row.detail for row in rows if row.reason != "duplicate"} == {
        "lonely": "lonely.jpg",
        "silent": "silent.txt",
    }
    found = samples_of(dataset)
    assert found["v1.0/b"] == {"jpg": picture(7), "json": b'{"caption": "in json"}'}
    assert found["v1.0/a"] == {"webp": picture(8), "txt": b"in txt"}
    assert found["000010003"]["jpg"] == picture(103)
    check_files(dataset, manifest.shards)
    assert check(dataset) == 0
    assert "no problems" in capsys.readouterr().out


def test_the_trainer_reads_the_folder(tars, dataset):
    index(tars, dataset)
    with pictures(dataset, side_px=16) as source:
        batch = load(source, np.arange(size(source)))
    assert Counter(batch.ids_B.tolist()) == Counter(key_ids(list(samples_of(dataset))).tolist())
    assert batch.pictures_BCHW.shape == (2 * ROWS + 2, 3, 16, 16)


def test_no_tar_is_touched_and_indexes_are_the_same_bytes_wherever_they_are_made(
    tars, dataset, tmp_path
):
    before = {path: path.read_bytes() for path in tars.iterdir()}
    index(tars, dataset)
    index(tars, tmp_path / "again")
    assert {path: path.read_bytes() for path in tars.iterdir()} == before
    assert tree(dataset) == tree(tmp_path / "again")
    assert not list(dataset.rglob("*.tar"))


def test_the_same_command_reads_nothing_again_and_changes_nothing(tars, dataset, monkeypatch):
    index(tars, dataset)
    before = tree(dataset)
    monkeypatch.setattr(command, "scan_foreign", None)
    assert index(tars, dataset) == 0
    assert tree(dataset) == before


def test_an_interrupted_command_is_finished_by_the_same_one(tars, dataset, tmp_path):
    index(tars, tmp_path / "whole")
    # As if it had been killed: the last tar has no record, another one a damaged index.
    index(tars, dataset)
    (dataset / "manifest.json").unlink()
    (dataset / "indexed/00002.json").unlink()
    (dataset / "index/00000.parquet").write_bytes(b"half")
    (dataset / "indexed/00001.json").write_text("{")
    assert index(tars, dataset) == 0
    assert tree(dataset) == tree(tmp_path / "whole")


def test_more_tars_add_shards_and_a_tar_keeps_its_number(tars, dataset):
    index(f"{tars}/{{00001,00002}}.tar", dataset)
    first = load_manifest(dataset)
    index(f"{tars}/*.tar", dataset)
    more = load_manifest(dataset)
    assert more.shards[:2] == first.shards
    assert [shard.at[-9:] for shard in more.shards] == ["00001.tar", "00002.tar", "00000.tar"]
    index(f"{tars}/00002.tar", dataset)
    fewer = load_manifest(dataset)
    assert fewer.shards == first.shards[1:]
    assert sorted(path.name for path in (dataset / "index").iterdir()) == ["00001.parquet"]
    assert check(dataset) == 0


def test_a_tar_that_was_written_again_is_read_again_and_found_by_verify(tars, dataset, capsys):
    index(tars, dataset)
    before = load_manifest(dataset)
    img2dataset_tar(tars / "00000.tar", 7, ROWS)
    assert check(dataset) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "put it back as it was, or give the `kiln index` command again" in said
    index(tars, dataset)
    after = load_manifest(dataset)
    assert after.fingerprint != before.fingerprint
    assert after.shards[1:] == before.shards[1:]
    assert "000070000" in samples_of(dataset)
    assert check(dataset) == 0


def test_a_hash_of_everything_tells_payloads_apart(tars, dataset):
    index(tars, dataset, "hash=true")
    entry = load_manifest(dataset).shards[0]
    assert entry.content_sha256 == entry.sha256
    assert check(dataset) == 0
    content = bytearray(entry.tar(dataset).read_bytes())
    content[520] ^= 1
    entry.tar(dataset).write_bytes(content)
    assert check(dataset) == 1


def test_headers_alone_do_not_claim_to_know_the_content(tars, dataset):
    index(tars, dataset)
    assert {entry.content_sha256 for entry in load_manifest(dataset).shards} == {None}


def test_broken_tars_stop_the_manifest_and_nothing_else(tars, dataset, capsys):
    cut, lost = tars / "00000.tar", f"{tars}/{{00000..00004}}.tar"
    cut.write_bytes(cut.read_bytes()[:4000])
    (tars / "00004.tar").write_bytes(b"<html>" * 1000)
    assert index(lost, dataset) == 1
    said = " ".join(capsys.readouterr().out.split())
    for what in ("00000.tar is cut", "00003.tar is not there", "00004.tar: byte 0 is no tar"):
        assert what in said
    assert "3 of 5 tars are broken, the others are indexed" in said
    assert not (dataset / "manifest.json").exists()
    assert index(lost, dataset, "accept_broken=true") == 0
    manifest = load_manifest(dataset)
    assert [shard.number for shard in manifest.shards] == ["00001", "00002"]
    assert len(manifest.provenance["broken"]) == 3
    assert check(dataset) == 0
    img2dataset_tar(cut, 0, ROWS)
    for number in (3, 4):
        img2dataset_tar(tars / f"{number:05d}.tar", number, ROWS)
    assert index(lost, dataset) == 0
    assert len(load_manifest(dataset).shards) == 5


def test_folders_among_the_tars_are_broken_tars(tars, dataset, capsys):
    (tars / "folder.tar").mkdir()
    assert index(f"{tars}/*.tar", dataset) == 1
    assert "folder.tar cannot be read (Is a directory)" in " ".join(capsys.readouterr().out.split())


def test_only_broken_tars_are_an_error(tars, dataset):
    with pytest.raises(BadInput, match=r"none can be indexed.*00009.tar is not there"):
        index(f"{tars}/{{00009,00010}}.tar", dataset)
    write_tar(tars / "x.tar", [("a.jpg", b"p"), ("b.txt", b"t")])
    with pytest.raises(BadInput, match=r"no sample can be used; 1 missing_caption, 1 missing_pict"):
        index(f"{tars}/x.tar", dataset)


def test_names_that_repeat_from_tar_to_tar_need_a_decision(tmp_path, dataset, capsys):
    folder = tmp_path / "foreign"
    for number in range(3):
        members = [("0.jpg", picture(number)), ("0.txt", b"t"), (f"{number + 1}.jpg", b"p")]
        write_tar(folder / f"{number}.tar", [*members, (f"{number + 1}.txt", b"t")])
    with pytest.raises(BadInput, match=r"0.tar and .*1.tar both have a sample '0'.*keys=by_tar"):
        index(folder, dataset)
    assert not (dataset / "manifest.json").exists()
    assert index(folder, dataset, "keys=by_tar") == 0
    assert list(samples_of(dataset)) == [f"0000{n}/{row}" for n in range(3) for row in (0, n + 1)]
    assert check(dataset) == 0


def test_repeated_names_are_told_after_a_few_tars_of_many(tmp_path, dataset, monkeypatch):
    folder = tmp_path / "foreign"
    for number in range(30):
        write_tar(folder / f"{number:02d}.tar", [("0.jpg", b"p"), ("0.txt", b"t")])
    with pytest.raises(BadInput, match="keys=by_tar"):
        index(folder, dataset, "threads=1")
    assert len(list((dataset / "indexed").iterdir())) < 30


def test_repeated_names_are_found_in_shares_of_the_ids(tars, dataset, monkeypatch):
    monkeypatch.setattr(command, "_SHARE_SAMPLES", 3)
    index(tars, dataset)
    shutil.copy(tars / "00001.tar", tars / "copy.tar")
    with pytest.raises(BadInput, match=r"00001.tar and .*copy.tar both have"):
        index(tars, dataset)


def test_a_dataset_with_its_tars_inside_can_be_moved(tars, dataset):
    shutil.copytree(tars, dataset / "tars")
    index(f"{dataset}/tars/*.tar", dataset)
    moved = dataset.rename(dataset.parent / "moved")
    assert [shard.at for shard in load_manifest(moved).shards] == [
        f"tars/0000{n}.tar" for n in (0, 1, 2)
    ]
    assert check(moved) == 0


def test_samples_are_removed_by_the_ids_of_their_keys(tars, dataset):
    index(tars, dataset)
    gone = key_ids(["v1.0/a"]).view(np.uint64)

    removed = pa.table({"key": gone, "url": [None], "why": ["asked"]}, REMOVAL_SCHEMA)
    add_tombstones(dataset, removed, version=1)
    save_state(dataset, weigh(dataset, load_manifest(dataset)), why="test")
    assert load_manifest(dataset).rows_live == 2 * ROWS + 1
    assert check(dataset) == 0
    index(f"{tars}/{{00001,00002}}.tar", dataset)
    assert load_manifest(dataset).rows_live == ROWS + 1


def test_prepare_and_index_leave_each_others_datasets_alone(tars, dataset, tmp_path, source):
    (tmp_path / "prepared" / "plan").mkdir(parents=True)
    with pytest.raises(BadInput, match="made by `kiln prepare`"):
        index(tars, tmp_path / "prepared")
    index(tars, dataset)
    before = tree(dataset)
    with pytest.raises(BadInput, match="made by `kiln index`"):
        prepare(prepare_cfg(source, dataset))
    assert tree(dataset) == before


def test_an_encoding_has_the_keys_of_the_tars_and_captions_of_txt_or_json(tars, dataset, tmp_path):
    index(tars, dataset)
    words = [
        f"dataset={dataset}",
        "text=t5_base",
        f"encoders.autoencoder.path={tiny_encoders.save_kl(tmp_path / 'kl')}",
        f"encoders.text.path={tiny_encoders.save_t5(tmp_path / 't5')}",
        "encoders.image_side_px=16",
        "threads=1",
        "probe_s=0",
        "wandb=off",
    ]
    assert encode(compose(EncodeConfig, "encode", words)) == 0
    assert check(dataset) == 0
    with latents(dataset) as source:
        batch = load(source, np.arange(size(source)))
    assert Counter(batch.ids_B.tolist()) == Counter(key_ids(list(samples_of(dataset))).tolist())


def test_braces_need_no_quotes_beyond_the_shells(tars, dataset):
    assert main([f"tars={tars}/{{00000..00001}}.tar", f"dataset={dataset}"]) == 0
    assert len(load_manifest(dataset).shards) == 2


def test_help_teaches_every_key(capsys):
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in ("tars that others wrote", "skip_bytes", "accept_broken", "by_tar"):
        assert word in said


@needs_s3
def test_of_tars_at_a_url_little_more_than_headers_is_read(tmp_path, dataset, monkeypatch):
    aiobotocore = pytest.importorskip("aiobotocore.client")
    server = S3Server(tmp_path / "s3")
    try:
        for name, value in {**server.env("reader"), "TMPDIR": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        fs = server.client("writer")
        for number in range(3):
            path = img2dataset_tar(
                tmp_path / f"{number:05d}.tar", number, 8, body=lambda row: bytes(500_000)
            )
            fs.put_file(str(path), f"{BUCKET}/foreign/{path.name}")
        ranges = []
        real = aiobotocore.AioBaseClient._make_api_call

        async def counted(self, name, params):
            if name == "GetObject":
                first, last = map(int, re.findall(r"\d+", params["Range"]))
                ranges.append(last - first + 1)
            return await real(self, name, params)

        with monkeypatch.context() as patch:
            patch.setattr(aiobotocore.AioBaseClient, "_make_api_call", counted)
            assert index(f"s3://{BUCKET}/foreign/{{00000..00002}}.tar", dataset) == 0
        assert len(ranges) <= 3 * (8 + 1)
        assert sum(ranges) <= len(ranges) * (1 << 14)
        manifest = load_manifest(dataset)
        assert [shard.at for shard in manifest.shards] == [
            f"s3://{BUCKET}/foreign/{number:05d}.tar" for number in range(3)
        ]
        check_files(dataset, manifest.shards)
        assert samples_of(dataset)["000010003"]["jpg"] == bytes(500_000)
        assert check(dataset) == 0
        before = tree(dataset)
        monkeypatch.setattr(command, "scan_foreign", None)
        assert index(f"s3://{BUCKET}/foreign/*.tar", dataset) == 0
        assert tree(dataset) == before
        with pytest.raises(BadInput, match=r"NoSuchBucket|AccessDenied"):
            index("s3://elsewhere/*.tar", dataset)
    finally:
        server.close()
