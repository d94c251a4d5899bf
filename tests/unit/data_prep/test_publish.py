import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from data_prep.config import CaptionsConfig
from data_prep.perceptual import phash
from data_prep.plan import read_rows
from data_prep.publish import Systemic, is_done, publish_unit, read_record, sift, systemic
from data_prep.quarantine import Rejected, read_quarantine, write_quarantine
from data_prep.rows import Row, row_key
from tests.tiny_source import (
    FAULTY,
    NUM_PICTURES,
    NUM_REDIRECTED,
    plan_units,
    prepare_cfg,
    rules_hash,
    tree_hashes,
    write_rows,
)
from trainer.data.shards import Shard, read_index
from trainer.errors import BadInput

CAPTIONS = CaptionsConfig(unescape_html=True, drop_urls=True, max_chars=4000)


def row(url, caption="a caption"):
    return Row(row_key(url, caption), url, caption, {})


def planned(tmp_path, *pairs, more=()):
    """The config and the one unit of a source of these rows."""
    rows = write_rows(tmp_path / "rows.parquet", *pairs)
    cfg = prepare_cfg(tmp_path, tmp_path / "d", f"rows={rows}", "shard_rows=1000", *more)
    (unit,) = plan_units(cfg)
    return cfg, unit


def source_of(cfg):
    return Path(cfg.rows).parent


def publish(unit, cfg):
    counted = []
    result = publish_unit(unit, cfg, rules_hash(cfg), counted.append)
    return result, Counter(counted)


@pytest.fixture(scope="module")
def whole(served, tmp_path_factory):
    """The tiny source published as one unit: (config, unit, record, rows counted)."""
    cfg = prepare_cfg(served, tmp_path_factory.mktemp("dataset"), "shard_rows=1000")
    (unit,) = plan_units(cfg)
    record, counted = publish(unit, cfg)
    return cfg, unit, record, counted


def expected_reasons():
    counts = Counter()
    for count, reason in FAULTY.values():
        counts[reason] += count
    del counts["duplicate"]  # the plan has none
    return dict(counts)


def test_every_fault_lands_in_its_reason_and_every_row_counts_once(whole):
    _, unit, record, counted = whole
    assert record.rows_in == unit.rows == NUM_PICTURES
    assert record.rejected == dict(sorted(expected_reasons().items()))
    assert record.rows_kept + sum(record.rejected.values()) == record.rows_in
    assert counted == {True: record.rows_kept, False: sum(record.rejected.values())}


def test_the_index_has_the_perceptual_hash_and_the_host(whole):
    cfg, _, record, _ = whole
    index = read_index(record.shard.index(cfg.dataset))
    assert index.schema.field("phash").type == pa.uint64()
    assert set(index["host"].to_pylist()) == {"127.0.0.1"}
    with Shard(record.shard.tar(cfg.dataset), index) as shard:
        distances = []
        for number, value in enumerate(index["phash"].to_pylist()):
            assert json.loads(shard.read(number, "json"))["phash"] == f"{value:016x}"
            body = np.frombuffer(shard.read(number, "jpg"), np.uint8)
            stored = phash(cv2.imdecode(body, cv2.IMREAD_COLOR_RGB))
            distances.append((stored ^ value).bit_count())
        # The hash is of the pixels before their compression, so a few bits may differ.
        assert np.median(distances) <= 3
    assert max(index["phash"].to_pylist()) >= 2**63


def test_redirected_rows_are_kept(whole):
    cfg, unit, _, _ = whole
    faults = json.loads((source_of(cfg) / "faults.json").read_text())
    moved = {path for path, fault in faults.items() if fault["kind"] == "redirect"}
    kept = set(read_index(cfg.dataset / "index" / "00000.parquet")["key"].to_pylist())
    keys = {r.key for r in read_rows(cfg.dataset, unit) if urlsplit(r.url).path in moved}
    assert len(keys) == NUM_REDIRECTED
    assert keys <= kept


def test_the_same_unit_again_is_the_same_byte_for_byte(whole, tmp_path):
    cfg, unit, record, _ = whole
    again = prepare_cfg(source_of(cfg), tmp_path, "shard_rows=1000", "threads=3")
    assert plan_units(again) == [unit]
    assert publish(unit, again)[0] == record
    assert tree_hashes(tmp_path) == tree_hashes(cfg.dataset)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shard_unchanged(whole):
    cfg, unit, record, _ = whole
    path = cfg.dataset / record.shard.name
    samples = list(wds.WebDataset(str(path), shardshuffle=False).decode("rgb8"))
    captions = {r.key: r.caption for r in read_rows(cfg.dataset, unit)}
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
    dataset, sha256 = cfg.dataset, rules_hash(cfg)
    assert read_record(dataset, unit.name) == record

    def done(unit=unit, sha256=sha256, hashes=False):
        return is_done(dataset, unit, record, rules_sha256=sha256, hashes=hashes)

    assert done()
    assert done(hashes=True)
    assert not done(sha256="another")
    assert not done(unit=replace(unit, plan_sha256="another"))
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
    rejected, candidates = sift([row("http://[bad/1"), row("http://a/3")], CAPTIONS)
    assert [r.url for r in candidates] == ["http://a/3"]
    assert [(r.stage, r.reason) for r in rejected] == [("source", "scheme_refused")]


def test_a_unit_without_a_kept_row_has_a_quarantine_and_no_shard(tmp_path):
    cfg, unit = planned(tmp_path, ("http://a/x", "&nbsp;"))
    record, _ = publish(unit, cfg)
    assert record.shard is None
    assert {p.name for p in (tmp_path / "d").glob("[!.ps]*/*")} == {
        "00000.json",
        "00000.jsonl",
        "plan-000.parquet",
    }
    assert is_done(cfg.dataset, unit, record, rules_sha256=rules_hash(cfg), hashes=True)


def test_a_unit_of_which_nothing_can_be_reached_is_not_published(tmp_path):
    pairs = [(f"http://127.0.0.1:9/{i}", "text") for i in range(30)]
    cfg, unit = planned(tmp_path, *pairs)
    result, _ = publish(unit, cfg)
    assert isinstance(result, Systemic)
    assert (result.rows, result.tried, result.first.reason) == (30, 30, "connection")
    assert read_record(cfg.dataset, unit.name) is None
    shutil.rmtree(tmp_path / "d")
    cfg, unit = planned(tmp_path, *pairs, more=["download.accept_unreachable=true"])
    record, _ = publish(unit, cfg)
    assert record.rejected == {"connection": 30}


def test_only_failures_of_network_and_tools_are_systemic():
    def rejected(reason, count):
        return [
            Rejected(key="k", url="u", stage="s", reason=reason, detail="") for _ in range(count)
        ]

    assert systemic("0", rejected("undecodable", 100), 100, 0.95).first.reason == "undecodable"
    for reason in ("not_an_image", "truncated", "http_407", "http_511"):
        assert systemic("0", rejected(reason, 100), 100, 0.95).rows == 100
    assert systemic("0", rejected("http_404", 100), 100, 0.95) is None
    assert systemic("0", rejected("undecodable", 95), 100, 0.95) is None
    assert systemic("0", rejected("timeout", 19), 19, 0.95) is None  # too few to say
    mixed = [*rejected("http_404", 3), *rejected("timeout", 2), *rejected("http_403", 95)]
    found = systemic("0", mixed, 100, 0.95)
    assert (found.first.reason, found.rows) == ("http_403", 97)


def test_extra_columns_and_odd_characters_survive(served, tmp_path):
    url = pq.read_table(served / "rows.parquet")["URL"][0].as_py()
    text = "q\u00f5uote \u201cx\u201d \U0001f600"
    cfg, unit = planned(
        tmp_path, (url + "?a=1", text, {"LICENSE": "CC0", "similarity": float("nan")})
    )
    record, _ = publish(unit, cfg)
    index = read_index(record.shard.index(cfg.dataset))
    with Shard(record.shard.tar(cfg.dataset), index) as shard:
        assert shard.read(0, "txt").decode() == text
        about = json.loads(shard.read(0, "json"))
    assert about["LICENSE"] == "CC0"
    assert "similarity" not in about


def test_quarantine_lines_are_read_back_and_damage_is_named(tmp_path):
    path = tmp_path / "00000.jsonl"
    rejected, _ = sift([row("http://[bad/"), row("file:///x")], CAPTIONS)
    write_quarantine(path, rejected)
    assert list(read_quarantine(path)) == rejected
    path.write_text(path.read_text() + '{"key": 1}\n')
    with pytest.raises(BadInput, match=r"00000.jsonl:3 is no quarantine record.*recheck=hashes"):
        list(read_quarantine(path))
