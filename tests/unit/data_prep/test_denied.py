import hashlib
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.denied import DeniedContent, load_denied
from data_prep.plan import read_rows
from data_prep.policy import load_policy, plain_policy
from data_prep.publish import publish_unit
from data_prep.quarantine import read_quarantine
from tests.tiny_source import plan_units, prepare_cfg, rules_hash
from trainer.data.shards import read_index
from trainer.errors import BadInput
from trainer.frozen import write_yaml


def md5(content):
    return hashlib.md5(content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def denied(folder, *lines):
    path = folder / "denied.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return DeniedContent(path)


@settings(max_examples=50, deadline=None)
@given(contents=st.lists(st.binary(max_size=3), max_size=30), other=st.binary(max_size=3))
def test_content_is_found_if_and_only_if_a_hash_of_it_is_listed(tmp_path_factory, contents, other):
    hashes = [(md5, sha256)[len(content) % 2](content) for content in contents]
    found = denied(tmp_path_factory.mktemp("list"), *hashes)
    assert len(found) == len(set(hashes))
    for content in (*contents, other):
        name = ("md5", "sha256")[len(content) % 2]
        expected = f"{name} {hashlib.new(name, content).hexdigest()}"
        assert found.find(content) == (expected if content in contents else None)


@pytest.mark.parametrize("hashed", [md5, sha256])
def test_hashes_that_end_in_zero_bytes_are_like_others(tmp_path, hashed):
    ending = [content for n in range(2000) if hashed(content := b"%d" % n).endswith("00")]
    assert len(ending) > 2
    found = denied(tmp_path, *map(hashed, ending[1:]))
    assert found.find(ending[0]) is None
    assert all(found.find(content) for content in ending[1:])


def test_order_case_repetition_and_comments_change_nothing_but_an_entry_does(tmp_path):
    lines = [md5(b"a"), md5(b"b"), sha256(b"a"), sha256(b"c")]
    first = denied(tmp_path, *lines).sha256
    again = ["# reported 2026", *reversed(lines), "", f"  {lines[0].upper()} # twice"]
    assert denied(tmp_path, *again).sha256 == first
    for other in (lines[1:], [*lines, md5(b"c")], [md5(b"c"), *lines[1:]]):
        assert denied(tmp_path, *other).sha256 != first


def test_ten_million_hashes_would_take_less_than_400_mb(tmp_path):
    count = 50_000
    rng = random.Random(0)
    path = tmp_path / "denied.txt"
    path.write_text("".join(f"{rng.randbytes(32).hex()}\n" for _ in range(count)))
    tracemalloc.start()
    found = DeniedContent(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == count
    assert peak_bytes / count * 10e6 < 400e6


@pytest.mark.parametrize("line", ["abc", "x" * 64, "a" * 40, "é" * 32, "ab " * 21 + "a"])
def test_a_line_that_is_no_hash_is_refused_with_its_number(tmp_path, line):
    with pytest.raises(BadInput, match=r"denied\.txt.*line 2 .*need an MD5 of 32"):
        denied(tmp_path, md5(b""), line)


def test_a_list_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"denied_content_file=.*nothing\.txt cannot be read"):
        load_denied(str(tmp_path / "nothing.txt"))


def policy_with(folder, *hashes):
    (folder / "hashes.txt").write_text("".join(f"{line}\n" for line in hashes))
    cfg = plain_policy(denied_content_file=str(folder / "hashes.txt")).cfg
    write_yaml(cfg, folder / "policy.yaml")
    return str(folder / "policy.yaml")


def test_denied_content_is_rejected_by_its_source_and_by_what_is_stored(served, tmp_path):
    cfg = prepare_cfg(served, tmp_path / "before", "shard_rows=1000")
    (unit,) = plan_units(cfg)
    before = publish_unit(unit, cfg, rules_hash(cfg), lambda kept: None)
    index = read_index(cfg.dataset / "index" / "00000.parquet")
    keys, stored = index["key"].to_pylist(), index["image_sha256"].to_pylist()
    names = {row.key: row.url.rpartition("/")[2] for row in read_rows(cfg.dataset, unit)}
    sources = [(served / "pictures" / names[key]).read_bytes() for key in keys[:2]]

    policy = policy_with(tmp_path, md5(sources[0]), sha256(sources[1]), stored[2])
    cfg = prepare_cfg(served, tmp_path / "after", "shard_rows=1000", f"policy={policy}")
    (unit,) = plan_units(cfg)
    counted = []
    after = publish_unit(unit, cfg, rules_hash(cfg), counted.append)
    assert after.rejected == dict(sorted({**before.rejected, "denied_content": 3}.items()))
    assert after.rows_kept == before.rows_kept - 3
    assert (counted.count(True), len(counted)) == (after.rows_kept, after.rows_in)
    lines = read_quarantine(cfg.dataset / "quarantine" / "00000.jsonl")
    details = {line.key: line.detail for line in lines if line.reason == "denied_content"}
    assert details == {
        keys[0]: f"md5 {md5(sources[0])}",
        keys[1]: f"sha256 {sha256(sources[1])}",
        keys[2]: f"sha256 {stored[2]}",
    }


def test_another_list_makes_other_rules_and_another_place_of_it_does_not(served, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    first, moved = (policy_with(folder, md5(b"x")) for folder in folders)
    assert load_policy(first).sha256 == load_policy(moved).sha256
    cfg = prepare_cfg(served, tmp_path / "d", f"policy={first}")
    before = rules_hash(cfg)
    policy_with(folders[0], md5(b"y"))
    assert rules_hash(cfg) != before
