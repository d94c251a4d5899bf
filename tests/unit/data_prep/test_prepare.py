import errno
import json
import multiprocessing
import os
import random
import shutil
import socket
import threading
import time
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.prepare import locked, main, run
from tests.tiny_source import (
    FAULTY,
    NUM_PICTURES,
    prepare_cfg,
    prepare_overrides,
    rules_hash,
    tree_hashes,
)
from trainer import cli
from trainer.data.manifest import check_files, load_manifest
from trainer.errors import BadInput, BadWorld
from trainer.observe.accounts import totals
from trainer.observe.jsonl import read_rows
from trainer.observe.ledger import Bucket


@pytest.fixture(scope="module")
def dataset(served, tmp_path_factory):
    """The tiny source, published by the command."""
    folder = tmp_path_factory.mktemp("dataset")
    assert main(prepare_overrides(served, folder)) == 0
    return folder


def test_the_sum_of_the_rows_is_exact(dataset):
    manifest = load_manifest(dataset)
    faulty = sum(count for count, _ in FAULTY.values())
    assert manifest.rows_in == NUM_PICTURES + FAULTY["duplicate"][0]
    assert manifest.rows_kept == manifest.rows_in - faulty
    assert manifest.rows_rejected == faulty
    assert len(manifest.shards) == 4
    check_files(dataset, manifest.shards)
    assert not (dataset / ".work").exists()


def test_the_manifest_tells_where_the_data_came_from(dataset):
    provenance = load_manifest(dataset).provenance
    assert len(provenance["plan_sha256"]) == 1
    assert provenance["rules"]["policy"]["safety"] == "unstated"
    assert provenance["rules"]["download"]["robots_directives"][0] == "noai"
    assert provenance["versions"][0]["img2dataset"] == "1.47.0"


def test_the_run_is_in_the_ledger(dataset):
    accounts = totals(read_rows(dataset / "ledger.jsonl"))
    account = accounts["prepare", Bucket.PRODUCTIVE]
    assert account.seconds > 0
    assert account.joules > 0


def test_the_same_command_again_has_nothing_to_do(served, dataset, capsys):
    before = tree_hashes(dataset)
    assert run(prepare_cfg(served, dataset)) == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said
    assert "rejected: http_404" in said
    assert tree_hashes(dataset) == before


def test_the_order_of_the_rows_changes_no_shard(served, dataset, tmp_path):
    rows = pq.read_table(served / "rows.parquet")
    order = random.Random(0).sample(range(len(rows)), len(rows))
    shuffled = tmp_path / "shuffled.parquet"
    pq.write_table(rows.take(order), shuffled)
    before, copy = load_manifest(dataset), shutil.copytree(dataset, tmp_path / "copy")
    assert run(prepare_cfg(served, copy, f"rows={shuffled}")) == 0
    after = load_manifest(copy)
    assert after == before
    # Nothing was downloaded, it was only planned.
    more = read_rows(copy / "ledger.jsonl")[len(read_rows(dataset / "ledger.jsonl")) :]
    assert {row["stage"] for row in more} == {"plan"}


def test_the_same_command_repairs_what_is_damaged_and_nothing_else(served, dataset, capsys):
    before = tree_hashes(dataset)
    untouched = (dataset / "shards" / "00003.tar").stat().st_mtime_ns
    tar = dataset / "shards" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    (dataset / "index" / "00002.parquet").unlink()
    assert run(prepare_cfg(served, dataset)) == 0
    assert "2 of 4 units are published" in capsys.readouterr().out
    assert tree_hashes(dataset) == before
    assert (dataset / "shards" / "00003.tar").stat().st_mtime_ns == untouched


def test_other_rules_replace_every_unit(served, dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    assert run(prepare_cfg(served, copy, "shard_rows=50")) == 0
    assert [shard.number for shard in load_manifest(copy).shards] == ["00000", "00001"]
    assert {path.stem for path in copy.glob("[!ps]*/0*")} == {"00000", "00001"}


def test_only_what_shapes_the_data_is_a_rule(source, tmp_path):
    plain = rules_hash(prepare_cfg(source, tmp_path))
    same = ("processes=2", "threads=1", "recheck=hashes", "download.accept_unreachable=true")
    parts = ("parts=3", "part=1", "scratch=/tmp/x", "plan_memory_gb=9")
    assert rules_hash(prepare_cfg(source, tmp_path / "x", *same, *parts)) == plain
    for other in ("download.max_body_bytes=9", "encode_quality=9", "policy=relaion"):
        assert rules_hash(prepare_cfg(source, tmp_path, other)) != plain


def test_parts_together_publish_what_one_command_does(served, dataset, tmp_path, capsys):
    for part in (2, 0, 1):
        assert not (tmp_path / "manifest.json").exists()
        assert run(prepare_cfg(served, tmp_path, "parts=3", f"part={part}")) == 0
    said = capsys.readouterr().out
    assert "part 2 of 3 is done; 1 of 4 units" in said
    assert tree_hashes(tmp_path) == tree_hashes(dataset)


def test_a_part_that_is_not_there_is_refused(source, tmp_path):
    with pytest.raises(BadInput, match="part=3, need 0 to parts - 1 = 2"):
        prepare_cfg(source, tmp_path, "parts=3", "part=3")


def test_more_rows_only_add_shards(served, tmp_path):
    rows = pq.read_table(served / "rows.parquet")
    first, whole = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(rows.slice(0, 40), first)
    pq.write_table(rows, whole)
    dataset = tmp_path / "d"
    assert run(prepare_cfg(served, dataset, f"rows={first}")) == 0
    before, shards = load_manifest(dataset), tree_hashes(dataset / "shards")
    assert run(prepare_cfg(served, dataset, f"rows={whole}")) == 0
    after = load_manifest(dataset)
    assert after.shards[: len(before.shards)] == before.shards
    assert tree_hashes(dataset / "shards").items() > shards.items()
    distinct = len({row["URL"] for row in rows.to_pylist()})
    known_twins = after.rows_in - len(rows)
    assert -FAULTY["duplicate"][0] <= known_twins <= 0  # twins of planned rows are not new
    assert after.rows_kept + after.rows_rejected - after.rejected.get("duplicate", 0) == distinct
    assert after.fingerprint != before.fingerprint


def test_a_policy_rejects_before_anything_is_fetched_and_is_in_the_manifest(served, tmp_path):
    policy = tmp_path / "mine.yaml"
    policy.write_text((files("conf") / "policies" / "plain.yaml").read_text())
    policy.write_text(policy.read_text().replace("min_side_px: null", "min_side_px: 100"))
    rows = pq.read_table(served / "rows.parquet").to_pylist()
    small = sum(min(row["width"], row["height"]) < 100 for row in rows)
    assert run(prepare_cfg(served, tmp_path / "d", f"policy={policy}")) == 0
    manifest = load_manifest(tmp_path / "d")
    assert manifest.rejected["rule_min_side_px"] == small > 0
    assert manifest.rows_in == len(rows)
    assert manifest.provenance["rules"]["policy"]["min_side_px"] == 100


def test_rows_of_another_source_are_not_dropped_by_other_rules(served, tmp_path):
    rows = pq.read_table(served / "rows.parquet")
    for name, part in (("a", rows.slice(0, 40)), ("b", rows.slice(40))):
        pq.write_table(part, tmp_path / f"{name}.parquet")
        assert run(prepare_cfg(served, tmp_path / "d", f"rows={tmp_path / name}.parquet")) == 0
    words = (f"rows={tmp_path}/b.parquet", "shard_rows=7")
    with pytest.raises(BadInput, match=r"has rows of .*a.parquet, which .*Give rows= for all"):
        run(prepare_cfg(served, tmp_path / "d", *words))
    words = (f"rows={tmp_path}/*.parquet", "shard_rows=50")
    assert run(prepare_cfg(served, tmp_path / "d", *words)) == 0
    assert load_manifest(tmp_path / "d").rows_in == len(rows)


def rows_at(address, source, tmp_path):
    """The same rows at another address; the path of their parquet."""
    rows = pq.read_table(source / "rows.parquet").to_pylist()
    for row in rows:
        row["URL"] = f"http://{address}/" + row["URL"].rsplit("/", 1)[1]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:9", r"Nothing answers at 127.0.0.1:9: start .*kiln serve source="),
        ("127.0.0.2:9", r"address_refused.*download.allow_hosts=\[127.0.0.2\]"),
        ("no-such-host.invalid", r"name server.*download.accept_unreachable=true"),
    ],
)
def test_a_source_that_cannot_be_reached_is_explained_at_once(source, tmp_path, address, says):
    cfg = prepare_cfg(source, tmp_path / "d", f"rows={rows_at(address, source, tmp_path)}")
    with pytest.raises(BadWorld, match=says):
        run(cfg)
    assert not list((tmp_path / "d").glob("units/*"))


def test_a_server_that_never_answers_stops_the_command_with_nothing_published(source, tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=256) as silent:
        rows = rows_at(f"127.0.0.1:{silent.getsockname()[1]}", source, tmp_path)
        more = (f"rows={rows}", "threads=64", "download.timeout_s=0.2")
        with pytest.raises(BadWorld, match=r"0 of 4 units .*2\d of 2\d rows in 1.*timeout"):
            run(prepare_cfg(source, tmp_path / "d", *more))
    assert not list((tmp_path / "d").glob("units/*"))
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_a_worker_that_dies_is_reported_with_what_may_help(served, tmp_path):
    def kill_first_worker():
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        workers[0].kill()

    killer = threading.Thread(target=kill_first_worker)
    killer.start()
    with pytest.raises(BadWorld, match=r"a worker process died.*processes=1 or threads=8"):
        run(prepare_cfg(served, tmp_path))
    killer.join()


@pytest.mark.parametrize(("kind", "quality"), [("png", 95), ("jpg", 101), ("webp", 0)])
def test_a_quality_that_a_format_does_not_have_is_refused(source, tmp_path, kind, quality):
    words = (f"encode_format={kind}", f"encode_quality={quality}")
    with pytest.raises(BadInput, match=rf"encode_quality={quality} with .*{kind}: need \d to"):
        prepare_cfg(source, tmp_path, *words)
    assert prepare_cfg(source, tmp_path, f"encode_format={kind}").quality > 5


def test_two_at_once_are_kept_apart(tmp_path):
    with locked(tmp_path), pytest.raises(BadWorld, match="another `kiln` command is at work"):
        locked(tmp_path).__enter__()


@pytest.mark.parametrize("name", ["proc/nowhere", "proc"])
def test_a_place_where_nothing_can_be_written_is_refused(tmp_path, name):
    with pytest.raises(BadInput, match=r"cannot be written to .*Give a folder"):
        locked(Path("/") / name).__enter__()


@pytest.mark.parametrize(
    ("command", "words"),
    [("dedup", []), ("remove", ["why=x", "keys=[0123456789abcdef]"]), ("stats", [])],
)
def test_a_dataset_that_is_not_there_is_refused_and_not_made(tmp_path, command, words, capsys):
    assert cli.main([command, f"dataset={tmp_path / 'd'}", *words]) == 2
    assert "is not there" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_a_file_in_place_of_the_dataset_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file, need a folder"):
        locked(tmp_path / "file").__enter__()


def test_a_full_disk_is_named_and_what_was_finished_stays(served, tiny_disk):
    big = ("image_side_px=128", "encode_format=png", "encode_quality=0", "shard_rows=5")
    cfg = prepare_cfg(served, tiny_disk / "d", *big)
    with pytest.raises(BadWorld, match=r"the disk is full.*units are published.*same command"):
        run(cfg)
    records = sorted((tiny_disk / "d" / "units").glob("*.json"))
    assert records
    for path in records:
        shard = json.loads(path.read_text())["shard"]
        assert (tiny_disk / "d" / shard["name"]).stat().st_size == shard["bytes"]
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (tiny_disk / "rest").write_bytes(bytes(3_000_000))
