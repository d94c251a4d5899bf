import hashlib
import io
import random
import tarfile

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.foreign_tars import write_tar
from trainer.data.headers import read_members, split_name
from trainer.data.index import Window, scan_foreign
from trainer.data.shards import (
    Blob,
    Sample,
    Shard,
    key_ids,
    read_index,
    scan_tar,
    write_shard,
)
from trainer.data.tars import expand_braces, list_tars
from trainer.errors import BadData, BadInput

LONG = "a folder/" * 20 + "x" * 150
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def scan(path):
    with Blob(path) as blob:
        return scan_foreign(blob, repair="Repair it.")


def pair(key, ext="jpg"):
    return [(f"{key}.{ext}", b"picture of " + key.encode()), (f"{key}.txt", key.encode())]


@pytest.mark.parametrize("format", FORMATS)
def test_every_member_is_found_where_tarfile_finds_it(tmp_path, format):
    names = ["some/", "some/a.jpg", "b.txt", "\u00e9\u4e2d.txt", *["l.txt"] * 2]
    if format != tarfile.USTAR_FORMAT:
        names += [f"{LONG}.txt", "after.txt"]
    path = write_tar(
        tmp_path / "x.tar", [(n, bytes(300 * i)) for i, n in enumerate(names)], format=format
    )
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    with Blob(path) as blob:
        assert list(read_members(blob, repair="")) == expected


def test_links_folders_and_global_headers_are_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(
        path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}
    ) as tar:
        for name, kind in (("l.jpg", tarfile.SYMTYPE), ("d.txt", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "elsewhere/" * 30, 1000
            tar.addfile(info)
        for name, content in pair("a"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert scan(path).index["key"].to_pylist() == ["a"]


@settings(max_examples=60, deadline=None)
@given(
    name=st.text("a._/-B\u00e9", min_size=1, max_size=12).filter(
        lambda name: not any(part == "" or part[0] == "." for part in name.split("/"))
    )
)
def test_names_are_split_as_webdataset_splits_them(name):
    # Hidden files alone are no samples here.
    key, ext = wds.tariterators.base_plus_ext(name)
    skipped = name.startswith("__") and name.split("/")[0].endswith("__") and len(name) > 3
    if not skipped:
        assert split_name(name) == ((key, ext) if ext else None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_foreign_tar_is_read_as_webdataset_reads_it(tmp_path):
    rng = random.Random(0)
    members = [("readme", b"?"), (".hidden", b"?"), ("__meta__", b"?"), ("v1.0/", b"")]
    for number in range(30):
        own = [*pair(f"v1.0/{number:04d}"), (f"v1.0/{number:04d}.cls.npy", bytes(number))]
        members += rng.sample(own, 3)
    path = write_tar(tmp_path / "x.tar", members)
    found = scan(path)
    expected = {s["__key__"]: s for s in wds.WebDataset(str(path), shardshuffle=False)}
    with Shard(path, found.index) as shard:
        assert shard.keys == sorted(expected)
        for row, key in enumerate(shard.keys):
            for ext in shard.extensions(row):
                assert shard.read(row, ext) == expected[key][ext]
            assert shard.extensions(row) == ["cls.npy", "jpg", "txt"]
    assert found.left == []


def test_rows_in_are_rows_kept_and_left(tmp_path):
    members = [
        *pair("b"),
        *pair("a", "JPEG"),
        ("no_caption.png", b"p"),
        ("no_picture.txt", b"t"),
        ("empty.webp", b""),
        ("empty.txt", b"t"),
        *pair("c", "webp"),
        ("d.png", b"p"),
        ("d.json", b"{}"),
        *pair("b"),
        *pair("b"),
    ]
    found = scan(write_tar(tmp_path / "x.tar", members))
    assert found.index["key"].to_pylist() == ["a", "b", "c", "d"]
    assert {n for n in found.index.column_names if n.startswith("offset")} == {
        f"offset.{ext}" for ext in ("jpg", "txt", "webp", "png", "json")
    }
    assert [(left.key, left.reason) for left in found.left] == [
        ("no_caption", "missing_caption"),
        ("no_picture", "missing_picture"),
        ("empty", "missing_picture"),
        ("b", "duplicate"),
        ("b", "duplicate"),
    ]
    assert found.left[0].detail == "no_caption.png"


def test_the_hash_changes_with_any_header_and_with_no_payload(tmp_path):
    path = write_tar(tmp_path / "x.tar", [m for n in range(3) for m in pair(f"k{n}")])
    content, before = bytearray(path.read_bytes()), scan(path).sha256
    assert before.startswith("headers:")
    with tarfile.open(path) as tar:
        places = [(m.offset, m.offset_data) for m in tar]
    for header, payload in places:
        changed = content.copy()
        changed[payload] ^= 1
        path.write_bytes(changed)
        assert scan(path).sha256 == before
        info = tarfile.TarInfo.frombuf(content[header : header + 512], "utf-8", "strict")
        info.mtime += 1
        changed[header : header + 512] = info.tobuf(tarfile.GNU_FORMAT)
        path.write_bytes(changed)
        assert scan(path).sha256 != before


@pytest.mark.parametrize("keep_frac", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_tar_is_bad_data(tmp_path, keep_frac, format):
    name = LONG if format != tarfile.USTAR_FORMAT else "short"
    path = write_tar(tmp_path / "x.tar", pair(name), format=format)
    with Blob(path) as blob:
        used = max(m.offset + 512 for m in read_members(blob, repair=""))
    path.write_bytes(path.read_bytes()[: int(used * keep_frac)])
    with pytest.raises(BadData, match=r"x.tar is cut: expected at least \d+ bytes.*Repair it"):
        scan(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1f\x8b" + bytes(2000), "it is compressed: unpack it"),
        (b"<html>" * 400, "byte 0 is no tar header"),
    ],
)
def test_what_is_no_tar_is_bad_data(tmp_path, content, says):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(BadData, match=says):
        scan(tmp_path / "x.tar")


@pytest.mark.parametrize("name", ["a.jpg", "\u00e9.jpg"])
def test_any_changed_byte_of_a_header_is_noticed(tmp_path, name):
    path = write_tar(tmp_path / "x.tar", [(name, b"picture")])
    content = path.read_bytes()
    with Blob(path) as blob:
        at = next(iter(read_members(blob, repair=""))).offset - 512
    ends_of_checksum = {154, 155}
    for place in set(range(512)) - ends_of_checksum:
        changed = bytearray(content)
        changed[at + place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(BadData, match="is no tar header"):
            scan(path)


def header(name, type_, size):
    info = tarfile.TarInfo(name)
    info.type, info.size = type_, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (header("a", tarfile.XHDTYPE, 5 << 20), "a name of 5242880 bytes"),
        (header("a.jpg", tarfile.GNUTYPE_SPARSE, 10), "a sparse file"),
        (header("a.jpg", tarfile.REGTYPE, -5), "a file of -5 bytes"),
    ],
)
def test_headers_that_would_mislead_are_bad_data(tmp_path, head, says):
    (tmp_path / "x.tar").write_bytes(head + bytes(6 << 20))
    with pytest.raises(BadData, match=says):
        scan(tmp_path / "x.tar")


def test_names_whose_kind_is_a_number_are_explained(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"img.{n}.jpg", b"p") for n in range(100)])
    assert scan(path).left[0].reason == "missing_picture"
    members = [m for n in range(100) for m in [*pair(f"k{n}"), (f"k{n}.part{n}", b"?")]]
    with pytest.raises(BadData, match=r"more than 64 kinds.*ends at the first dot"):
        scan(write_tar(tmp_path / "y.tar", members))


class Counted:
    """Counts what is read of bytes in memory."""

    def __init__(self, content):
        self.path, self.num_bytes, self._content = "x.tar", len(content), content
        self.reads = []

    def read_at(self, offset, num_bytes):
        got = self._content[offset : offset + num_bytes]
        self.reads.append(len(got))
        return got


def counted(tmp_path, count, payload_bytes):
    members = [
        m
        for n in range(count)
        for m in ((f"{n:06d}.jpg", bytes(payload_bytes)), (f"{n:06d}.txt", b"t"))
    ]
    return Counted(write_tar(tmp_path / "x.tar", members).read_bytes())


@pytest.mark.parametrize("skip_bytes", [0, 1 << 16, 1 << 30])
@pytest.mark.parametrize("payload_bytes", [100, 30_000, 300_000])
def test_a_window_changes_nothing_but_the_number_of_reads(tmp_path, skip_bytes, payload_bytes):
    file = counted(tmp_path, 20, payload_bytes)
    expected = scan_foreign(file, repair="")
    file.reads.clear()
    window = Window(file, skip_bytes=skip_bytes)
    assert scan_foreign(window, repair="") == expected
    assert (window.num_requests, window.num_read_bytes) == (len(file.reads), sum(file.reads))


def test_large_payloads_are_skipped_and_small_ones_read_along(tmp_path):
    large = counted(tmp_path, 20, 1_000_000)
    scan_foreign(Window(large), repair="")
    assert len(large.reads) <= 21
    assert sum(large.reads) <= 21 * (1 << 14)
    small = counted(tmp_path, 600, 10_000)
    scan_foreign(Window(small), repair="")
    assert len(small.reads) <= 10


def test_ids_of_hexadecimal_keys_are_their_numbers_and_of_others_their_hash():
    draw = np.random.default_rng(0)
    numbers = draw.integers(0, 1 << 64, 200, dtype=np.uint64)
    keys = [f"{number:016x}" for number in numbers.tolist()]
    assert (key_ids(keys).view(np.uint64) == numbers).all()
    others = ["000170003", "a/b", "", "\u00e9", "zzzzzzzzzzzzzzzz", "0123456789abcde ", "0" * 32]
    mixed = key_ids([*keys, *others])
    assert (mixed[:200] == key_ids(keys)).all()
    for key, got in zip(others, mixed[200:].tolist(), strict=True):
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        assert got == int.from_bytes(digest, "big", signed=True)
    assert key_ids([]).shape == (0,)


def test_keys_of_any_length_and_alphabet_can_be_written_and_read(tmp_path):
    keys = sorted([LONG, "v1.0/000", "\u00e9" * 60, "plain"])
    paths = tmp_path / "x.tar", tmp_path / "x.parquet"
    write_shard(*paths, [Sample(key, {"latent.npy": key.encode()}) for key in keys])
    assert scan_tar(paths[0]).equals(read_index(paths[1]))
    with Shard(paths[0], read_index(paths[1])) as shard:
        assert [shard.read(row, "latent.npy").decode() for row in range(4)] == keys


def test_captions_come_from_txt_then_from_json(tmp_path):
    samples = [
        Sample("a", {"txt": b"from txt", "json": b'{"caption": "no"}'}),
        Sample("b", {"json": b'{"caption": null, "text": "from json"}'}),
        Sample("c", {"json": b"[1]"}),
        Sample("d", {"json": b'{"x": 1}'}),
        Sample("e", {"jpg": b""}),
        Sample("f", {"txt": b"\xff"}),
    ]
    paths = tmp_path / "x.tar", tmp_path / "x.parquet"
    write_shard(*paths, samples)
    with Shard(paths[0], read_index(paths[1])) as shard:
        assert [shard.caption(row) for row in (0, 1, 5)] == ["from txt", "from json", "\ufffd"]
        for row in (2, 3, 4):
            key = key_ids([shard.keys[row]]).view(np.uint64)[0]
            with pytest.raises(BadData, match=rf"no caption.*keys=\[{key:016x}\]"):
                shard.caption(row)


def test_braces_stand_for_numbers_and_names():
    folders = [f"{folder}/{number}.tar" for folder in "ab" for number in ("08", "09", "10")]
    assert list(expand_braces("{a,b}/{08..10}.tar")) == folders
    assert list(expand_braces("x{9..10}")) == ["x9", "x10"]
    for wrong, says in (
        ("{a", "without its partner"),
        ("{5..1}", "are -3 numbers"),
        ("{abc}", "neither"),
        ("{0..99999999}", "need 1 to"),
    ):
        with pytest.raises(BadInput, match=says):
            list(expand_braces(wrong))


def test_patterns_name_tars_in_order_and_nothing_is_run(tmp_path):
    for name in ("b", "a", "c"):
        write_tar(tmp_path / f"{name}.tar", [])
    names = [str(tmp_path / f"{name}.tar") for name in "abc"]
    assert list(map(str, list_tars(str(tmp_path)))) == names
    assert list(map(str, list_tars(f"{tmp_path}/[ab].tar"))) == names[:2]
    assert list(map(str, list_tars(f"{tmp_path}/{{c,a}}.tar"))) == [names[2], names[0]]
    with pytest.raises(BadInput, match="means no file"):
        list_tars(f"{tmp_path}/*.zip")
    with pytest.raises(BadInput, match="twice"):
        list_tars(f"{tmp_path}/{{a,?}}.tar")
    with pytest.raises(BadInput, match="command for a shell"):
        list_tars(f"pipe:touch {tmp_path}/run")
    assert not (tmp_path / "run").exists()
