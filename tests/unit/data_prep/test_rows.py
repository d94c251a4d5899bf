import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.plan import read_rows
from data_prep.rows import connect, row_key, source_files
from tests.tiny_source import plan_units, prepare_cfg, write_rows
from trainer.errors import BadInput

PAIRS = [("http://a/1", "one"), ("http://a/2", "zwei, \u00e9"), ("https://b/3?x=1", 'a "quote"')]


def planned(rows, tmp_path, *more):
    cfg = prepare_cfg(tmp_path, tmp_path / "dataset", f"rows={rows}", *more)
    return {(r.url, r.caption) for unit in plan_units(cfg) for r in read_rows(cfg.dataset, unit)}


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


def test_a_damaged_line_names_the_file(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"URL": "http://a", "TEXT": "t"}\n' * 3 + "{not json\n")
    with pytest.raises(BadInput, match=r"x.jsonl is no readable jsonl file"):
        planned(tmp_path / "x.jsonl", tmp_path)


def test_the_network_is_never_asked_for_extensions(tmp_path):
    with connect(tmp_path, memory_gb=0.1, threads=1) as connection:
        setting = "SELECT current_setting('autoinstall_known_extensions')"
        assert connection.execute(setting).fetchone() == (False,)
