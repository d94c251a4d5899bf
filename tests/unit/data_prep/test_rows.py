import gzip
import json
import os
import signal
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.plan import read_rows
from data_prep.policy import plain_policy
from data_prep.rows import connect, row_key, source_files
from tests.tiny_source import plan_units, prepare_cfg, write_rows
from trainer.errors import BadInput
from trainer.frozen import write_yaml

PAIRS = [("http://a/1", "one"), ("http://a/2", "zwei, \u00e9"), ("https://b/3?x=1", 'a "quote"')]


def planned(rows, tmp_path, *more):
    cfg = prepare_cfg(tmp_path, tmp_path / "dataset", f"rows={rows}", *more)
    return {(r.url, r.caption) for unit in plan_units(cfg) for r in read_rows(cfg.dataset, unit)}


@settings(deadline=None)
@given(url=st.text(), caption=st.text())
def test_ids_are_the_same_in_sql_and_in_python(url, caption):
    sql = "SELECT printf('%016x', md5_number_lower(? || chr(0) || ?))"
    with connect_once() as connection:
        assert connection.execute(sql, [url, caption]).fetchone() == (row_key(url, caption),)


def connect_once():
    import duckdb  # noqa: PLC0415

    return duckdb.connect()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "csv.gz", "jsonl.gz"])
def test_text_files_are_read_as_parquet_is(tmp_path, kind):
    if kind.startswith("jsonl"):
        text = "".join(json.dumps({"URL": url, "TEXT": text}) + "\n" for url, text in PAIRS)
    else:
        mark = "\t" if kind == "tsv" else ","
        quoted = [(url, '"' + text.replace('"', '""') + '"') for url, text in PAIRS]
        text = "".join(mark.join(pair) + "\n" for pair in [("URL", "TEXT"), *quoted])
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    assert planned(path, tmp_path) == set(PAIRS)


def test_files_of_a_folder_or_glob_are_one_source(tmp_path):
    folder = tmp_path / "parts" / "deep"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("not rows")
    write_rows(folder / "a.parquet", *PAIRS[:2])
    write_rows(folder / "b.parquet", PAIRS[2])
    assert planned(tmp_path / "parts", tmp_path) == set(PAIRS)
    assert planned(f"{folder}/a*.parquet", tmp_path / "x") == set(PAIRS[:2])


def test_columns_are_found_in_any_case_and_wrong_types_are_text(tmp_path):
    table = pa.table({"url": [["http://a"], None], "text": [1, 2], "width": ["wide", "7"]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert planned(tmp_path / "x.parquet", tmp_path) == set()
    table = pa.table({"URL": ["http://a/1"], "TEXT": [17.5]})
    pq.write_table(table, tmp_path / "y.parquet")
    assert planned(tmp_path / "y.parquet", tmp_path / "y") == {("http://a/1", "17.5")}


def test_a_missing_column_is_named_with_the_ones_there_and_the_key_to_change(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"link": ["http://a"], "TEXT": ["t"]}), path)
    with pytest.raises(BadInput, match=r"no column 'URL'; it has link, TEXT.*columns.url="):
        planned(path, tmp_path)
    with pytest.raises(BadInput, match=r"no column 'alt'.*columns.caption="):
        planned(path, tmp_path, "columns.url=link", "columns.caption=alt")
    assert planned(path, tmp_path, "columns.url=link") == {("http://a", "t")}


def test_sources_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"none.parquet is not there.*kiln source"):
        source_files(str(tmp_path / "none.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"is not there, or has no files of the kinds .parquet"):
        source_files(str(tmp_path / "empty"))
    (tmp_path / "mixed").mkdir()
    write_rows(tmp_path / "mixed" / "a.parquet", PAIRS[0])
    (tmp_path / "mixed" / "b.csv").write_text("URL,TEXT\n")
    with pytest.raises(BadInput, match=r"files of several kinds \(.csv, .parquet\)"):
        source_files(str(tmp_path / "mixed"))
    with pytest.raises(BadInput, match=r"cannot be opened"):
        source_files("nonsense://x/y.parquet")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(BadInput, match=r"rows.txt: a source is of the kinds"):
        planned(tmp_path / "rows.txt", tmp_path)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"URL,TEXT\n")
    with pytest.raises(BadInput, match=r"bad.parquet is no readable parquet"):
        planned(bad, tmp_path)
    empty = pa.table({"URL": pa.array([], pa.string()), "TEXT": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "e.parquet")
    with pytest.raises(BadInput, match=r"e.parquet has no rows"):
        planned(tmp_path / "e.parquet", tmp_path)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_a_row_says_does_not_depend_on_the_other_rows(tmp_path):
    texts = ["2020-01-01T10:00:00", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", 'a "quote"', "#tag"]
    for number, text in enumerate(texts):
        row = {"URL": "http://a/1", "TEXT": text}
        path = jsonl(tmp_path / f"{number}.jsonl", row)
        assert planned(path, tmp_path / f"d{number}") == {("http://a/1", text)}
        odd = [{"URL": "http://a/2", "TEXT": ["x"]}, {"URL": "http://a/3", "TEXT": 5}]
        path = jsonl(tmp_path / f"{number}.jsonl", row, *odd)
        found = planned(path, tmp_path / f"e{number}")
        assert found == {("http://a/1", text), ("http://a/2", '["x"]'), ("http://a/3", "5")}
    # A dialect that is guessed would take this for comments, other fields, or fewer rows.
    (tmp_path / "x.csv").write_text("URL,TEXT\nhttp://a/1,#tag\n#http://a/2,x\nhttp://a/3,a;b\n")
    assert planned(tmp_path / "x.csv", tmp_path) == {("http://a/1", "#tag"), ("http://a/3", "a;b")}


def test_a_column_that_comes_late_is_judged(tmp_path):
    rows = [{"URL": f"http://a/{i}", "TEXT": "x"} for i in range(21_000)]
    late = {"URL": "http://a/late", "TEXT": "x", "punsafe": "1"}
    path = jsonl(tmp_path / "x.jsonl", *rows, late)
    write_yaml(plain_policy(max_punsafe=0.5).cfg, tmp_path / "policy.yaml")
    policy = f"policy={tmp_path / 'policy.yaml'}"
    found = planned(path, tmp_path, policy, "shard_rows=30000")
    assert len(found) == 21_000
    assert ("http://a/late", "x") not in found


def test_bytes_are_read_as_text_and_columns_with_our_names_are_not_read(tmp_path):
    table = {
        "URL": [b"http://a/1", b"http://a/2"],
        "TEXT": ["caf\u00e9".encode(), b"\xff"],
        "kiln_url": ["http://evil/"] * 2,
        "KILN_host": ["evil"] * 2,
    }
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    found = planned(tmp_path / "x.parquet", tmp_path)
    assert found == {("http://a/1", "caf\u00e9"), ("http://a/2", "\\xFF")}


@pytest.mark.parametrize(
    "text",
    [
        'http://a/1,"no end\nhttp://a/2,b',
        'http://a/1,"a" b\nhttp://a/2,b',
        "http://a/1,a,b\nhttp://a/2,b",
        "http://a/1,caf\xe9",
    ],
)
def test_a_csv_that_is_none_says_what_one_is(tmp_path, text):
    (tmp_path / "x.csv").write_bytes(f"URL,TEXT\n{text}\n".encode("latin-1"))
    with pytest.raises(BadInput, match=r"x.csv is no readable csv.*Need UTF-8.*double quotes"):
        planned(tmp_path / "x.csv", tmp_path)


def test_a_damaged_line_names_the_file(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"URL": "http://a", "TEXT": "t"}\n' * 3 + "{not json\n")
    with pytest.raises(BadInput, match=r"x.jsonl is no readable jsonl file"):
        planned(tmp_path / "x.jsonl", tmp_path)


def test_the_network_is_never_asked_for_extensions(tmp_path):
    with connect(tmp_path, memory_gb=0.1, threads=1) as connection:
        setting = "SELECT current_setting('autoinstall_known_extensions')"
        assert connection.execute(setting).fetchone() == (False,)


def test_ctrl_c_ends_a_query_in_mid_step(tmp_path):
    # One step of an endless function: DuckDB alone would not look up before its end.
    endless = "SELECT count(*) FROM range(100_000_000_000) AS numbers(i) WHERE hash(i) = 1"
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    started_s = time.monotonic()

    def query():
        with connect(tmp_path, memory_gb=0.1, threads=2) as connection:
            timer.start()
            connection.execute(endless)

    with pytest.raises(KeyboardInterrupt):
        query()
    assert time.monotonic() - started_s < 10
