import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.observed_run import STEPS, Model, Now, metrics_row, write_run
from trainer.errors import BadInput
from trainer.observe import columns
from trainer.observe.columns import columns_of, last_of_each_step, read_metrics
from trainer.observe.html import Script
from trainer.observe.ledger import read_account
from trainer.observe.report_data import MOST_BINS, cumulative_joules, page_data, training_curves
from trainer.observe.story import Story, read_story


def told(run):
    return read_story(run, ledger=read_account(run), dataset=None, versions={})


def story_of(rows):
    return Story(run_dir=None, config={}, plan={}, metrics=columns_of(rows), ledger=[],
                 evaluation={}, samples={}, dataset=None, versions={})  # fmt: skip


@given(st.lists(st.integers(0, 20)))
def test_a_row_counts_unless_training_went_back_to_it_or_before(steps):
    kept = []
    for number, step in enumerate(steps):
        kept = [other for other in kept if steps[other] < step] + [number]
    assert np.flatnonzero(last_of_each_step(np.array(steps, float))).tolist() == kept


def test_columns_have_the_numbers_of_the_rows(tmp_path):
    rows = [metrics_row(step, 0, 10.0 + step) for step in range(1, 6)]
    rows[2]["train/loss"] = None
    rows[3]["note"] = {"kind": "text"}
    del rows[4]["train/lr"]
    evaluation = {"step": 3, "images_seen": 192, "eval/all": 0.5, "time_unix_s": 12.0}
    lines = [json.dumps(row) for row in (*rows[:4], evaluation, *rows[4:])]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(lines) + '\n{"step": 6, "images_se')
    training, evaluations = read_metrics(file)
    assert evaluations == [evaluation]
    assert training["step"].tolist() == [1, 2, 3, 4, 5]
    assert np.isnan(training["train/loss"]).tolist() == [False, False, True, False, False]
    assert training.newest()["train/lr"] == rows[3]["train/lr"]
    assert "note" not in training.by_key


def test_rows_that_arrow_cannot_put_in_one_table_are_read_all_the_same(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [metrics_row(1, 0, 1.0), {**metrics_row(2, 0, 2.0), "train/loss": "high"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training, _ = read_metrics(file)
    assert training["step"].tolist() == [1, 2]
    assert np.isfinite(training["train/loss"]).tolist() == [True, False]


@pytest.mark.parametrize("text", ["", '{"step": 1'])
def test_without_a_whole_line_there_are_no_rows(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    for name in ("metrics.jsonl", "missing.jsonl"):
        training, evaluations = read_metrics(tmp_path / name)
        assert (len(training), evaluations) == (0, [])


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(BadInput, match=r"metrics\.jsonl:2 is"):
        read_metrics(tmp_path / "metrics.jsonl")


@given(st.integers(1, 9000), st.integers(0, 9000))
def test_bins_keep_spikes_means_and_attempts_apart(num_rows, first):
    spike = first % num_rows
    rows = [{"step": n, "images_seen": 2 * n, "attempt": int(n > spike), "a/b": float(n == spike)}
            for n in range(num_rows)]  # fmt: skip
    curves = training_curves(story_of(rows))
    assert len(curves.attempts) <= MOST_BINS + 2
    assert curves.high["a/b"].max() == 1.0
    at = int(curves.high["a/b"].argmax())
    assert curves.attempts[at] == 0.0  # the spike is the last row of the first attempt
    assert curves.axes["steps"][at] == spike
    assert (curves.low["a/b"] <= curves.mean["a/b"]).all()
    assert set(curves.attempts) == {float(row["attempt"]) for row in rows}


def test_a_short_run_is_told_row_by_row(tmp_path):
    curves = training_curves(told(write_run(tmp_path)))
    assert curves.axes["steps"].tolist() == list(range(1, STEPS + 1))
    assert curves.mean["train/loss"][6] == metrics_row(7, 0, 0.0)["train/loss"]
    assert (curves.low["train/loss"] == curves.high["train/loss"]).all()


def test_joules_up_to_now_are_those_of_the_meter(tmp_path):
    run = write_run(tmp_path)
    story = told(run)
    begun_s = min(row["start_unix_s"] for row in story.ledger)
    now = Now()
    meter = Model(now)
    now.at_s = begun_s
    before_j = meter.read_j()
    for now.at_s in (begun_s, begun_s + 30.0, begun_s + 100.0):
        found = cumulative_joules(story.ledger, np.array([now.at_s]))
        assert found[0] == pytest.approx(meter.read_j() - before_j, abs=0.1)
    whole = cumulative_joules(story.ledger, np.array([math.inf]))[0]
    assert whole == pytest.approx(sum(row["joules"] for row in story.ledger))
    assert np.isnan(cumulative_joules([], np.array([1.0]))).all()


def test_the_page_gets_plain_json_that_cannot_end_its_element(tmp_path):
    story = told(write_run(tmp_path))
    data = page_data([story], "written")
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    (text, _) = Script("0", {"name": "</script><!--"}).elements()
    assert text.count("<") == 2
    assert json.loads(text[text.index(">") + 1 : text.rindex("<")])["name"] == "</script><!--"


def test_rows_over_many_pieces_are_all_read(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_PIECE_BYTES", 1000)
    file = tmp_path / "metrics.jsonl"
    rows = [metrics_row(step, 0, float(step)) for step in range(1, 101)]
    rows[50]["energy/w"] = 3  # a key that comes late, and goes
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 101')
    training, _ = read_metrics(file)
    assert training["step"].tolist() == list(range(1, 101))
    assert training["train/loss"].tolist() == [row["train/loss"] for row in rows]
    assert np.flatnonzero(np.isfinite(training["energy/w"])).tolist() == [50]
