"""Paths of folders and URLs, and what goes wrong with URLs."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_prep.config import PrepareConfig, VerifyConfig
from data_prep.prepare import locked
from data_prep.prepare import run as prepare
from data_prep.verify import run as verify
from tests.streams import load, pictures
from tests.tiny_dataset import scenes_dataset
from tests.tiny_source import prepare_cfg
from trainer.data.manifest import check_files, load_manifest
from trainer.data.publish import publish_bytes, published
from trainer.data.shards import Blob, scan_tar
from trainer.errors import BadInput, BadWorld
from trainer.frozen import freeze, thaw
from trainer.observe.ledger import accounted, read_account
from trainer.place import (
    explain,
    file_version,
    is_local,
    local_folder,
    open_sparsely,
    place,
    read_bytes,
    remove,
    sizes_bytes,
    storage,
)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty folder in memory, and a temporary folder of the test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield place("memory://datasets/one")
    fs.store.clear()


def contents(folder):
    """Relative path -> content of all files that belong to a dataset."""
    return {
        path.relative_to(folder).as_posix(): read_bytes(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.parent.name not in {"status", "ledger"}
        and path.name not in {"sources.json", "ledger.jsonl"}
        and not path.name.startswith(".")
    }


@pytest.mark.parametrize("where", ["/data/one", "relative", "memory://a/b", "s3://bucket/a/b"])
def test_a_place_goes_through_text_pickle_and_configs_unchanged(where):
    if where.startswith("s3"):
        pytest.importorskip("s3fs")
    found = place(where)
    assert str(found) == where
    assert is_local(found) == ("://" not in where)
    assert pickle.loads(pickle.dumps(found)) == found == place(str(found))
    cfg = VerifyConfig(dataset=found)
    assert thaw(cfg) == {"dataset": where}
    assert freeze(VerifyConfig, thaw(cfg)) == cfg
    assert place(found / "x").name == "x"


def test_file_urls_are_folders():
    assert place("file:///data/one") == Path("/data/one")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("s3://KEY:SECRET@bucket/x", "with credentials.*AWS_ACCESS_KEY_ID"),
        ("simplecache::s3://bucket/x", "further protocols"),
        ("nosuch://x", "nosuch:// is unknown.*s3://BUCKET"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(where, says):
    with pytest.raises(BadInput, match=says) as caught:
        freeze(VerifyConfig, {"dataset": where})
    assert "SECRET@" not in str(caught.value)


def test_a_missing_package_is_named_by_its_extra(monkeypatch):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(BadInput, match=r"missing: pip install -e '\.\[s3\]'"):
        place("s3://bucket/x")


def test_what_is_published_remotely_is_there_whole_or_not_at_all(memory, tmp_path):
    path = memory / "shards" / "0.bin"

    def give_up():
        with published(path) as partial:
            partial.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        give_up()
    assert sizes_bytes([path]) == [None]
    with published(path) as partial:
        partial.write_bytes(b"first")
        assert sizes_bytes([path]) == [None]
    assert read_bytes(path) == b"first"
    publish_bytes(path, b"second")
    with path.open("rb") as file:
        assert file.read() == b"second"
    with open_sparsely(path) as file:
        assert file.read() == b"second"
    remove(path)
    remove(path)
    assert sizes_bytes([path]) == [None]
    assert not [file for file in (tmp_path / "tmp").rglob("*") if file.is_file()]


def test_a_file_that_is_written_again_has_another_version(memory, tmp_path):
    for path in (memory / "x.bin", tmp_path / "x.bin"):
        assert file_version(path) is None
        publish_bytes(path, b"first")
        before = file_version(path)
        assert file_version(path) == before
        publish_bytes(path, b"second")
        assert file_version(path) != before


@pytest.mark.parametrize("whole", [False, True])
def test_every_way_to_open_a_file_gives_the_same_bytes(memory, tmp_path, whole):
    content = np.random.default_rng(0).bytes(10_000)
    for folder in (memory, tmp_path):
        publish_bytes(folder / "x.bin", content)
        with Blob(folder / "x.bin", whole=whole) as blob:
            assert blob.num_bytes == len(content)
            for offset, size in ((0, 10_000), (17, 512), (9_990, 100), (10_000, 5), (20_000, 5)):
                assert blob.read_at(offset, size) == content[offset : offset + size]
        with pytest.raises(BadInput, match=r"no\.bin is not there"):
            Blob(folder / "no.bin", whole=whole)


def test_a_dataset_in_memory_is_that_of_a_folder_and_reads_the_same(memory, tmp_path):
    local = scenes_dataset(tmp_path / "local")
    scenes_dataset(memory)
    assert contents(memory) == contents(local)
    tar = memory / "shards" / "00000.tar"
    assert scan_tar(tar) == scan_tar(local / "shards" / "00000.tar")
    assert verify(VerifyConfig(dataset=memory)) == 0
    loaded = []
    for dataset in (memory, local):
        with pictures(dataset, side_px=16) as source:
            loaded.append(load(source, np.arange(12)).pictures_BCHW)
    assert loaded[0].equal(loaded[1])
    publish_bytes(tar, read_bytes(tar)[:-3000])
    assert verify(VerifyConfig(dataset=memory)) == 1
    with pytest.raises(BadInput, match=r"memory://.*does not match the manifest"):
        check_files(memory, load_manifest(memory).shards)


def test_a_plan_and_its_lock_are_of_the_url(memory, source):
    cfg = prepare_cfg(source, memory)
    assert isinstance(cfg, PrepareConfig)
    assert cfg.scratch_folder.parent == local_folder(memory) != local_folder(memory.parent)
    with locked(memory), pytest.raises(BadWorld, match="another `kiln` command is at work"):
        prepare(cfg)


def test_accounts_of_several_commands_add_up_in_a_remote_dataset(memory):
    for stage in ("prepare", "encode", "prepare"):
        with accounted(memory, stage=stage, tdp_w_per_core=1.0):
            pass
    rows = read_account(memory)
    assert [row["stage"] for row in rows if row.get("closed")] == ["prepare", "encode", "prepare"]
    assert {row["attempt"] for row in rows if row["stage"] == "prepare"} == {0, 1}


class Refusal(Exception):
    """What an S3 client raises, as far as it matters."""

    def __init__(self, code):
        super().__init__(code)
        self.response = {"Error": {"Code": code, "Message": "no"}}


@pytest.mark.parametrize(
    ("code", "cls", "says"),
    [
        ("NoSuchBucket", BadInput, "Make the bucket"),
        ("AccessDenied", BadInput, "rights"),
        ("ExpiredToken", BadInput, "AWS_ACCESS_KEY_ID"),
        ("InternalError", BadWorld, "give the same command again"),
    ],
)
def test_what_a_storage_says_becomes_what_to_do(memory, code, cls, says):
    with pytest.raises(cls, match=says), storage(memory):
        raise PermissionError from Refusal(code)


def test_other_errors_stay_what_they_are(memory):
    assert explain(memory, OSError("a disk")) is None
    with pytest.raises(OSError, match="a disk"), storage(memory):
        raise OSError("a disk")


def test_a_foreign_temporary_folder_is_not_used(memory, tmp_path):
    own = local_folder(memory).parent
    own.rename(tmp_path / "moved")
    own.symlink_to(tmp_path / "moved")
    with pytest.raises(BadWorld, match=r"not a folder of this user\. Set TMPDIR"):
        local_folder(memory)


def test_many_threads_may_read_one_remote_file(memory):
    publish_bytes(memory / "x.bin", bytes(range(256)))
    with Blob(memory / "x.bin") as blob, ThreadPoolExecutor(8) as threads:
        read = threads.map(lambda at: blob.read_at(at, 1), range(256))
        assert b"".join(read) == bytes(range(256))
