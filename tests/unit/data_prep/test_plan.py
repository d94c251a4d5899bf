import itertools
import math
import random
import shutil
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.plan import (
    list_units,
    make_plan,
    plan_path,
    plan_quarantine_path,
    read_generations,
    read_rows,
)
from data_prep.policy import plain_policy
from data_prep.rows import row_key
from tests.tiny_source import prepare_cfg, write_rows
from trainer.errors import BadInput

URLS = st.sampled_from(["http://a/1", "http://a/2", "http://b/3", "ftp://c/4", ""])
ROWS = st.lists(st.tuples(URLS, st.sampled_from(["x", "y", "z", ""])), min_size=1)


def plan(rows, dataset, *more, policy=None):
    cfg = prepare_cfg(dataset.parent, dataset, f"rows={rows}", *more)
    return make_plan(cfg, policy or plain_policy(), cfg.scratch_folder)


def rejected_rows(dataset, generation=0):
    return pq.read_table(plan_quarantine_path(dataset, generation)).to_pylist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=ROWS, seed=st.integers(), shard_rows=st.integers(1, 5))
def test_every_row_is_in_one_unit_or_rejected_whatever_their_order(
    tmp_path_factory, pairs, seed, shard_rows
):
    folder = tmp_path_factory.mktemp("plan")
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    plans = []
    for name, order in (("a", pairs), ("b", shuffled)):
        rows = write_rows(folder / f"{name}.parquet", *order)
        (generation,) = plan(rows, folder / name, f"shard_rows={shard_rows}")
        plans.append(generation)
    assert plans[0] == plans[1]
    assert generation.rows_in == len(pairs)
    assert sum(generation.unit_rows) + sum(generation.rejected.values()) == len(pairs)
    units = list_units([generation])
    kept = [row for unit in units for row in read_rows(folder / "b", unit)]
    assert [row.key for row in kept] == sorted({row.key for row in kept})
    good = {pair for pair in pairs if pair[0].startswith("http:") and pair[1]}
    assert {(row.url, row.caption) for row in kept} == good
    assert all(row.key == row_key(row.url, row.caption) for row in kept)
    assert all(unit.rows == shard_rows for unit in units[:-1])
    assert Counter(row["reason"] for row in rejected_rows(folder / "b")) == generation.rejected
    shutil.rmtree(folder)


def test_equal_rows_in_several_batches_are_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.plan.BATCH_ROWS", 2048)  # DuckDB's smallest
    pairs = [(f"http://a/{i}", "x") for i in range(3000)]
    rows = write_rows(tmp_path / "rows.parquet", *pairs, *pairs, *pairs)
    (generation,) = plan(rows, tmp_path / "d")
    assert generation.rejected == {"duplicate": 6000}
    assert sum(generation.unit_rows) == 3000


def test_of_twins_one_that_keeps_the_rules_is_kept(tmp_path):
    twins = [("http://a/1", "x", {"width": 8, "height": 8}), ("http://a/1", "x", {"width": 900})]
    good = ("http://a/1", "x", {"width": 99, "height": 99})
    rows = write_rows(tmp_path / "rows.parquet", *twins, good)
    policy = plain_policy(min_side_px=64, missing="reject")
    (generation,) = plan(rows, tmp_path / "d", "columns.extra=[width]", policy=policy)
    assert generation.rejected == {"rule_min_side_px": 2}
    (unit,) = list_units([generation])
    assert read_rows(tmp_path / "d", unit)[0].extra == {"width": 99}


def test_more_rows_add_units_and_leave_the_others(tmp_path):
    pairs = [(f"http://a/{i}", "x") for i in range(25)]
    rows = write_rows(tmp_path / "rows.parquet", *pairs[:10], pairs[0])
    dataset = tmp_path / "d"
    first = plan(rows, dataset, "shard_rows=4")
    before = plan_path(dataset, 0).read_bytes()
    assert plan(rows, dataset, "shard_rows=4") == first
    write_rows(rows, *pairs, pairs[0])
    both = plan(rows, dataset, "shard_rows=4")
    assert both[0] == first[0]
    assert plan_path(dataset, 0).read_bytes() == before
    assert both[1].rows_in == 15
    assert [unit.number for unit in list_units(both)] == list(range(3 + 4))
    kept = [row.url for unit in list_units(both) for row in read_rows(dataset, unit)]
    assert sorted(kept) == sorted({url for url, _ in pairs})
    # The same rows in other files add nothing.
    again = write_rows(tmp_path / "again.parquet", *pairs)
    assert plan(again, dataset, "shard_rows=4") == both


def test_other_rules_plan_anew(tmp_path):
    pairs = [(f"http://a/{i}", "x" * i) for i in range(1, 9)]
    rows = write_rows(tmp_path / "rows.parquet", *pairs)
    dataset = tmp_path / "d"
    plan(rows, dataset)
    (generation,) = plan(rows, dataset, policy=plain_policy(min_caption_chars=5))
    assert generation.rejected == {"rule_min_caption_chars": 4}
    assert read_generations(dataset) == [generation]


def test_a_plan_that_was_cut_short_is_made_again(tmp_path):
    rows = write_rows(tmp_path / "rows.parquet", ("http://a/1", "x"))
    whole = plan(rows, tmp_path / "d")
    record = plan_path(tmp_path / "d", 0).with_suffix(".json")
    record.unlink()  # it is written last
    assert plan(rows, tmp_path / "d") == whole
    for path in (record, record.with_name("sources.json")):
        path.write_text("{")
        with pytest.raises(BadInput, match=rf"{path.name} is damaged .*Remove the folder"):
            plan(rows, tmp_path / "d")
        shutil.rmtree(path.parent)
        assert plan(rows, tmp_path / "d") == whole


def test_values_of_extra_columns_keep_their_types(tmp_path):
    more = {"score": 0.5, "tags": ["a", "b"], "none": None, "flag": True, "far": math.inf}
    rows = write_rows(tmp_path / "rows.parquet", ("http://a/1", "x", more))
    (generation,) = plan(rows, tmp_path / "d", "columns.extra=[SCORE,tags,flag,none,far,other]")
    (row,) = itertools.chain(*(read_rows(tmp_path / "d", u) for u in list_units([generation])))
    assert row.extra == {"score": 0.5, "tags": ["a", "b"], "flag": True}
