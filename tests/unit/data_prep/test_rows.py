import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.rows import Row, cut, read_units, row_key, source_sha256
from tests.tiny_source import prepare_cfg
from trainer.errors import BadInput

ROWS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xyz")), min_size=1)


def cfg_of(path, tmp_path, *more):
    return prepare_cfg(tmp_path, tmp_path / "dataset", f"rows={path}", *more)


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@given(pairs=ROWS, seed=st.integers(), shard_rows=st.integers(1, 5))
def test_units_depend_on_the_rows_and_not_on_their_order(pairs, seed, shard_rows):
    rows = [Row(row_key(url, text), "{}", url, text) for url, text in pairs]
    shuffled = random.Random(seed).sample(rows, len(rows))
    units = cut(rows, shard_rows)
    assert cut(shuffled, shard_rows) == units
    assert sorted(row for unit in units for row in unit.rows) == sorted(rows)
    distinct = [{row.key for row in unit.rows} for unit in units]
    assert all(len(keys) == shard_rows for keys in distinct[:-1])
    assert sum(map(len, distinct)) == len(set.union(*distinct))  # no key in two units


def test_files_of_a_folder_are_one_source(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    write(folder / "a.parquet", URL=["http://a/1", "http://a/2"], TEXT=["one", "two"])
    write(folder / "b.parquet", URL=["http://a/3"], TEXT=["three"])
    whole = write(
        tmp_path / "w.parquet",
        URL=[f"http://a/{i}" for i in (3, 1, 2)],
        TEXT=["three", "one", "two"],
    )
    assert read_units(cfg_of(folder, tmp_path)) == read_units(cfg_of(whole, tmp_path))
    assert len(source_sha256(cfg_of(folder, tmp_path))) == 2


def test_nulls_and_nan_are_no_values(tmp_path):
    path = write(
        tmp_path / "x.parquet",
        URL=["http://a/1", None],
        TEXT=pa.array([None, " two "]),
        punsafe=[float("nan"), 0.5],
    )
    (unit,) = read_units(cfg_of(path, tmp_path))
    assert {(row.url, row.caption, row.extra_json) for row in unit.rows} == {
        ("http://a/1", "", "{}"),
        ("", "two", '{"punsafe": 0.5}'),
    }


def test_a_missing_column_is_named_with_the_ones_there_and_the_key_to_change(tmp_path):
    path = write(tmp_path / "x.parquet", link=["http://a"], TEXT=["t"])
    with pytest.raises(BadInput, match=r"no column 'URL'; it has link, TEXT.*columns.url="):
        read_units(cfg_of(path, tmp_path))
    with pytest.raises(BadInput, match=r"no column 'alt'.*columns.caption="):
        read_units(cfg_of(path, tmp_path, "columns.url=link", "columns.caption=alt"))
    assert read_units(cfg_of(path, tmp_path, "columns.url=link"))


def test_sources_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"none.parquet is not there.*kiln source"):
        read_units(cfg_of(tmp_path / "none.parquet", tmp_path))
    with pytest.raises(BadInput, match=r"folder without \*.parquet"):
        read_units(cfg_of(tmp_path, tmp_path))
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"URL,TEXT\n")
    with pytest.raises(BadInput, match=r"bad.parquet is no readable parquet"):
        read_units(cfg_of(bad, tmp_path))
    empty = write(
        tmp_path / "e.parquet", URL=pa.array([], pa.string()), TEXT=pa.array([], pa.string())
    )
    with pytest.raises(BadInput, match=r"e.parquet has no rows"):
        read_units(cfg_of(empty, tmp_path))
