import io
import tarfile

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.publish import file_sha256, publish_bytes, published
from trainer.data.shards import Sample, Shard, read_index, scan_tar, write_shard
from trainer.errors import BadInput


def samples_of(count, *, seed=0):
    draw = np.random.default_rng(seed)
    for number in range(count):
        body = draw.bytes(int(draw.integers(0, 1500)))
        yield Sample(
            f"{number:016x}",
            {"jpg": body, "json": b"{}", "latent.npy": body[::-1]},
            {"width": number, "height": 2 * number},
        )


@pytest.fixture
def shard(tmp_path):
    paths = tmp_path / "shards" / "00000.tar", tmp_path / "index" / "00000.parquet"
    assert write_shard(*paths, samples_of(7)).num_samples == 7
    return paths


def test_equal_samples_give_equal_bytes(tmp_path, shard):
    again = tmp_path / "b.tar", tmp_path / "b.parquet"
    write_shard(*again, samples_of(7))
    assert [file_sha256(p) for p in again] == [file_sha256(p) for p in shard]


def test_members_have_no_owner_no_time_and_sorted_names(shard):
    with tarfile.open(shard[0]) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }


@settings(max_examples=25, deadline=None)
@given(bodies=st.lists(st.binary(max_size=2000), max_size=5))
def test_every_member_is_read_back_by_position(bodies, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    tar, index = folder / "0.tar", folder / "0.parquet"
    write_shard(tar, index, (Sample(f"{i:016x}", {"bin": b}) for i, b in enumerate(bodies)))
    with Shard(tar, read_index(index)) as shard:
        assert [shard.read(i, "bin") for i in range(len(bodies))] == bodies


def test_header_scan_gives_the_member_part_of_the_index(shard):
    scanned, index = scan_tar(shard[0]), read_index(shard[1])
    assert scanned.equals(index.select(scanned.column_names))
    assert set(index.column_names) - set(scanned.column_names) == {"width", "height"}


def test_samples_may_have_different_members(tmp_path):
    tar, index = tmp_path / "0.tar", tmp_path / "0.parquet"
    write_shard(tar, index, [Sample("a", {"jpg": b"1"}), Sample("b", {"png": b"22"})])
    with Shard(tar, read_index(index)) as shard:
        assert [shard.extensions(row) for row in (0, 1)] == [["jpg"], ["png"]]
        assert shard.read(1, "png") == b"22"
        with pytest.raises(KeyError, match=r"b.jpg"):
            shard.read(1, "jpg")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_tar_unchanged(shard):
    read = list(wds.WebDataset(str(shard[0]), shardshuffle=False))
    for got, want in zip(read, samples_of(7), strict=True):
        assert got["__key__"] == want.key
        assert {ext: got[ext] for ext in want.members} == want.members


@pytest.mark.parametrize("keep_frac", [0.5, 0.03, 0.99])
def test_a_cut_tar_is_named_with_its_sizes_and_the_way_out(shard, keep_frac):
    tar, index = shard[0], read_index(shard[1])
    content = tar.read_bytes()
    end = max(
        o + s
        for o, s in zip(
            *(index[f"{c}.latent.npy"].to_pylist() for c in ("offset", "size")), strict=True
        )
    )
    tar.write_bytes(content[: int(end * keep_frac)])
    with pytest.raises(BadInput, match=r"00000.tar is cut: expected .* found \d+.*kiln prepare"):
        scan_tar(tar)
    with Shard(tar, index) as opened, pytest.raises(BadInput, match=r"is cut.*kiln prepare"):
        opened.read(6, "latent.npy")


def test_bytes_that_are_no_tar_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"<html>" * 400)
    with pytest.raises(BadInput, match=r"byte 0 is no tar header"):
        scan_tar(path)


def test_missing_and_damaged_files_are_named(tmp_path):
    index = tmp_path / "x.parquet"
    with pytest.raises(BadInput, match=r"x.parquet is not there"):
        read_index(index)
    index.write_bytes(b"no parquet")
    with pytest.raises(BadInput, match=r"no readable parquet"):
        read_index(index)
    with pytest.raises(BadInput, match=r"x.tar is not there"):
        scan_tar(tmp_path / "x.tar")


def test_foreign_tars_with_folders_are_scanned(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo("some")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("000.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert scan_tar(path).to_pylist() == [{"key": "000", "offset.txt": 1024, "size.txt": 3}]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    publish_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), published(path) as partial:
        partial.write_bytes(b"half") // 0
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
