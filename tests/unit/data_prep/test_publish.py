import json
from collections import Counter
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest
import webdataset as wds

from data_prep.prepare import hash_rules, rules
from data_prep.publish import Unreachable, is_done, publish_unit, read_record, sift
from data_prep.quarantine import read_quarantine, write_quarantine
from data_prep.rows import Row, Unit, cut, read_units, row_key
from tests.tiny_source import FAULTY, NUM_PICTURES, NUM_REDIRECTED, prepare_cfg, tree_hashes
from trainer.data.shards import Shard, read_index
from trainer.errors import BadInput


def row(url, caption="a caption", extra="{}"):
    return Row(row_key(url, caption), extra, url, caption)


def publish(unit, cfg):
    counted = []
    result = publish_unit(unit, cfg, hash_rules(rules(cfg)), counted.append)
    return result, Counter(counted)


@pytest.fixture(scope="module")
def whole(served, tmp_path_factory):
    """The tiny source published as one unit: (config, unit, record, rows counted)."""
    cfg = prepare_cfg(served, tmp_path_factory.mktemp("dataset"), "shard_rows=1000")
    (unit,) = read_units(cfg)
    record, counted = publish(unit, cfg)
    return cfg, unit, record, counted


def expected_reasons():
    counts = Counter()
    for count, reason in FAULTY.values():
        counts[reason] += count
    return dict(counts)


def test_every_fault_lands_in_its_reason_and_every_row_counts_once(whole):
    _, unit, record, counted = whole
    duplicates = FAULTY["duplicate"][0]
    assert record.rows_in == len(unit.rows) == NUM_PICTURES + duplicates
    assert record.rejected == dict(sorted(expected_reasons().items()))
    assert record.rows_kept + sum(record.rejected.values()) == record.rows_in
    assert counted == {True: record.rows_kept, False: sum(record.rejected.values())}


def test_redirected_rows_are_kept(whole):
    cfg, unit, _, _ = whole
    faults = json.loads((cfg.rows.parent / "faults.json").read_text())
    moved = {path for path, fault in faults.items() if fault["kind"] == "redirect"}
    kept = set(read_index(cfg.dataset / "index" / "00000.parquet")["key"].to_pylist())
    keys = {r.key for r in unit.rows if urlsplit(r.url).path in moved}
    assert len(keys) == NUM_REDIRECTED
    assert keys <= kept


def test_the_same_unit_again_is_the_same_byte_for_byte(whole, tmp_path):
    cfg, unit, record, _ = whole
    again = prepare_cfg(cfg.rows.parent, tmp_path, "shard_rows=1000", "threads=3")
    assert publish(unit, again)[0] == record
    assert tree_hashes(tmp_path) == tree_hashes(cfg.dataset)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shard_unchanged(whole):
    cfg, unit, record, _ = whole
    path = cfg.dataset / record.shard.name
    samples = list(wds.WebDataset(str(path), shardshuffle=False).decode("rgb8"))
    captions = {r.key: r.caption for r in unit.rows}
    assert len(samples) == record.rows_kept
    for sample in samples:
        assert sample["jpg"].shape == (32, 32, 3)
        assert sample["txt"] == sample["json"]["caption"] == captions[sample["__key__"]]


def test_the_index_tells_what_the_tar_holds(whole):
    cfg, _, record, _ = whole
    index = read_index(record.shard.index(cfg.dataset))
    with Shard(record.shard.tar(cfg.dataset), index) as shard:
        about = [json.loads(shard.read(i, "json")) for i in range(len(shard.keys))]
    assert index["width"].to_pylist() == [sample["width"] for sample in about]
    assert index["caption_chars"].to_pylist() == [len(sample["caption"]) for sample in about]
    assert {"url", "original_width", "source_sha256", "similarity"} <= about[0].keys()
    assert shard.keys == sorted(shard.keys)


def test_a_unit_is_done_until_its_rows_rules_or_files_change(whole):
    cfg, unit, record, _ = whole
    dataset, sha256 = cfg.dataset, hash_rules(rules(cfg))
    assert read_record(dataset, unit.name) == record

    def done(unit=unit, sha256=sha256, hashes=False):
        return is_done(dataset, unit, record, rules_sha256=sha256, hashes=hashes)

    assert done()
    assert done(hashes=True)
    assert not done(sha256=hash_rules(rules(cfg) | {"image_side_px": 33}))
    assert not done(unit=Unit(unit.number, unit.rows[1:]))
    tar = record.shard.tar(dataset)
    content = tar.read_bytes()
    try:
        tar.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
        assert done()
        assert not done(hashes=True)
        tar.write_bytes(content[:2000])
        assert not done()
        tar.unlink()
        assert not done()
        assert not done(hashes=True)
    finally:
        tar.write_bytes(content)


def test_rows_that_need_no_fetch_are_sifted_with_the_reason():
    twice = [row("http://a/1"), row("http://a/1", extra='{"x": 1}')]
    others = [row(""), row("http://a/2", ""), row("file:///etc/passwd"), row("http://a/3")]
    rows = sorted([*twice, *others])
    rejected, candidates = sift(rows)
    assert sorted(r.url for r in candidates) == ["http://a/1", "http://a/3"]
    assert Counter(r.reason for r in rejected) == {
        "duplicate": 1,
        "missing_url": 1,
        "missing_caption": 1,
        "scheme_refused": 1,
    }
    assert min(twice) in candidates


def test_a_unit_without_a_kept_row_has_a_quarantine_and_no_shard(source, tmp_path):
    cfg = prepare_cfg(source, tmp_path)
    (unit,) = cut([row("file:///x"), row("")], 10)
    record, _ = publish(unit, cfg)
    assert record.shard is None
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "00000.json",
        "00000.jsonl",
    ]
    assert is_done(tmp_path, unit, record, rules_sha256=hash_rules(rules(cfg)), hashes=True)


def test_a_unit_of_which_nothing_can_be_reached_is_not_published(source, tmp_path):
    (unit,) = cut([row("http://127.0.0.1:9/a"), row("http://127.0.0.1:9/b"), row("")], 10)
    result, _ = publish(unit, prepare_cfg(source, tmp_path))
    assert isinstance(result, Unreachable)
    assert (result.rows, result.first.reason) == (2, "connection")
    assert read_record(tmp_path, unit.name) is None
    record, _ = publish(unit, prepare_cfg(source, tmp_path, "download.accept_unreachable=true"))
    assert record.rejected == {"connection": 2, "missing_url": 1}


def test_extra_columns_and_odd_characters_survive(served, tmp_path):
    url = pq.read_table(served / "rows.parquet")["URL"][0].as_py()
    text = "q\u0303uote \u201cx\u201d \U0001f600"
    (unit,) = cut([row(url + "?a=1", text, '{"LICENSE": "CC0"}')], 10)
    cfg = prepare_cfg(served, tmp_path)
    record, _ = publish(unit, cfg)
    with Shard(record.shard.tar(tmp_path), read_index(record.shard.index(tmp_path))) as shard:
        assert shard.read(0, "txt").decode() == text
        assert json.loads(shard.read(0, "json"))["LICENSE"] == "CC0"


def test_quarantine_lines_are_read_back_and_damage_is_named(tmp_path):
    path = tmp_path / "00000.jsonl"
    rejected, _ = sift([row(""), row("file:///x")])
    write_quarantine(path, rejected)
    assert list(read_quarantine(path)) == rejected
    path.write_text(path.read_text() + '{"key": 1}\n')
    with pytest.raises(BadInput, match=r"00000.jsonl:3 is no quarantine record.*recheck=hashes"):
        list(read_quarantine(path))
