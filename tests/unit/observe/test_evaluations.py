"""Evaluations come late and out of order, and land at their step."""

import errno
import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.observed_run import IMAGES_PER_STEP, STEPS, write_run
from trainer.claims import locked_folder
from trainer.observe.columns import read_metrics
from trainer.observe.evaluations import (
    Merger,
    evaluation_rows,
    hold_metrics,
    is_evaluation,
    merge,
    metrics_row,
    result_path,
    training_rows,
)
from trainer.observe.figures import Figures
from trainer.observe.jsonl import JsonLines, read_rows
from trainer.observe.progress import LiveProgress, PlainProgress
from trainer.observe.report_page import render
from trainer.observe.sinks import Sinks, send_to_wandb
from trainer.observe.story import read_story


def evaluation(step, value, *, weights="ema"):
    scores = {"all_frac": {"value": value, "low": value - 0.1, "high": value + 0.1, "count": 9},
              "autoencoder_psnr_db": 30.0}  # fmt: skip
    return {"step": step, "images_seen": 8 * step, "weights": weights, "scores": scores}


def publish(run, told):
    path = result_path(run, told["step"], told["weights"])
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(told))


def train(run, steps):
    file = JsonLines(run / "metrics.jsonl")
    file.append([{"step": n, "images_seen": 8 * n, "attempt": 0, "train/loss": 1 / n}
                 for n in steps])  # fmt: skip
    file.close()


def test_a_row_has_the_scores_with_their_intervals():
    row = metrics_row(evaluation(4, 0.5))
    assert row == {
        "step": 4, "images_seen": 32, "eval/all_frac": 0.5, "eval/all_frac_low": 0.4,
        "eval/all_frac_high": 0.6, "eval/autoencoder_psnr_db": 30.0,
    }  # fmt: skip
    raw = metrics_row(evaluation(4, 0.5, weights="raw"))
    assert raw["eval_raw/all_frac"] == 0.5
    assert is_evaluation(row)
    assert is_evaluation(raw)


def test_evaluations_merge_at_their_step_and_no_training_row_is_lost(tmp_path):
    train(tmp_path, range(1, 7))
    for step in (4, 2):
        publish(tmp_path, evaluation(step, 0.1 * step))
        assert [row["step"] for row in merge(tmp_path)] == [step]
    train(tmp_path, range(7, 9))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["step"].tolist() == list(range(1, 9))
    assert [row["step"] for row in training_rows(rows)] == list(range(1, 9))
    found = evaluation_rows(tmp_path, rows)
    assert [(row["step"], row["eval/all_frac"]) for row in found] == [(2, 0.2), (4, 0.4)]


def test_each_is_merged_once_and_again_when_it_changed(tmp_path):
    train(tmp_path, range(1, 5))
    publish(tmp_path, evaluation(4, 0.5))
    assert len(merge(tmp_path)) == 1
    assert merge(tmp_path) == []
    merger = Merger(tmp_path)
    assert merger.rows() == []
    publish(tmp_path, evaluation(4, 0.75))
    assert [row["eval/all_frac"] for row in merger.rows()] == [0.75]
    assert merger.rows() == []
    assert len(merge(tmp_path)) == 1  # the rows that the merger gave out were not written
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert evaluation_rows(tmp_path, rows)[0]["eval/all_frac"] == 0.75


def test_while_a_run_is_trained_nobody_else_writes_its_metrics(tmp_path):
    train(tmp_path, range(1, 3))
    publish(tmp_path, evaluation(2, 0.5))
    held = hold_metrics(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert merge(tmp_path) is None
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert evaluation_rows(tmp_path, [])[0]["step"] == 2  # readers see it already
    held.close()
    assert len(merge(tmp_path)) == 1


def test_who_waits_for_the_metrics_gets_them_when_they_are_free(tmp_path):
    held = hold_metrics(tmp_path)
    timer = threading.Timer(0.3, held.close)
    timer.start()
    second = hold_metrics(tmp_path)
    assert second is not None
    second.close()


def test_where_nothing_can_be_locked_only_training_merges(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    publish(tmp_path, evaluation(2, 0.5))
    assert merge(tmp_path) is None
    with locked_folder(tmp_path / "folder"):
        assert [row["step"] for row in Merger(tmp_path).rows()] == [2]


@pytest.mark.parametrize("damage", ["{", "[]", '{"step": 1}'])
def test_a_damaged_result_is_warned_of_and_left_out(tmp_path, caplog, damage):
    publish(tmp_path, evaluation(4, 0.5))
    result_path(tmp_path, 2, "ema").write_text(damage)
    assert [row["step"] for row in evaluation_rows(tmp_path, [])] == [4]
    assert "step_00000002.json is damaged" in caplog.text


def test_raw_and_averaged_weights_of_a_step_share_a_row(tmp_path):
    publish(tmp_path, evaluation(4, 0.5))
    publish(tmp_path, evaluation(4, 0.25, weights="raw"))
    (row,) = evaluation_rows(tmp_path, [])
    assert (row["eval/all_frac"], row["eval_raw/all_frac"]) == (0.5, 0.25)


def test_the_report_draws_scores_over_the_images_seen(tmp_path):
    run = write_run(tmp_path)

    def page():
        story = read_story(run, ledger=[], dataset=None, versions={})
        return render(story, Figures(by_bucket={}, by_key={}))

    without = page()
    for step, value in ((50, 0.2), (STEPS, 0.6)):
        publish(run, {**evaluation(step, value), "images_seen": step * IMAGES_PER_STEP})
    merge(run)
    found = page()
    assert found.count("<svg") == without.count("<svg") + 2
    assert 'aria-label="All"' in found
    assert f"{STEPS * IMAGES_PER_STEP:,} images" in found
    Image.new("RGB", (8, 8)).save(run / "evaluations/grid_steps.png")
    assert "Pictures by steps" in page()


def test_no_bar_goes_back_to_an_evaluated_step():
    row, out = metrics_row(evaluation(4, 0.5)), io.StringIO()
    live = LiveProgress(Console(file=out, force_terminal=True, width=80), total_steps=9)
    plain = PlainProgress(Console(file=out), total_steps=9, every_s=0.0)
    for sink in (live, plain):
        sink.log(row)
        sink.close()
    assert "4/9" not in out.getvalue()


def history(run):
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json"]
    rows = []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        done = subprocess.run([*command, str(file)], check=True, capture_output=True, text=True)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        rows += [r["history"]["item"] for r in records if r["type"] == "history"]
        definitions = [r["metric"] for r in records if r["type"] == "metric"]
        assert any(d.get("step_metric") == "images_seen" for d in definitions)
    return rows


def test_in_wandb_evaluations_stand_at_their_images_whenever_they_come(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with Sinks.open(run, attempt=0, total_steps=9, config={}, wandb="offline",
                    progress="quiet") as sinks:  # fmt: skip
        for step in (1, 2, 3):
            sinks.log({"step": step, "images_seen": 8 * step, "train/loss": 1.0})
        sinks.log(metrics_row(evaluation(2, 0.5)))
    publish(run, evaluation(1, 0.25))
    merge(run)
    send_to_wandb(run, config={}, wandb="offline", project="kiln")
    found = [(row["images_seen"], row.get("eval/all_frac")) for row in history(run)]
    assert found == [(8, None), (16, None), (24, None), (16, 0.5), (8, 0.25)]


def test_nothing_is_sent_without_wandb_or_metrics_or_while_somebody_else_does(tmp_path):
    send_to_wandb(tmp_path, config={}, wandb="offline", project="kiln")
    assert not list(tmp_path.iterdir())
    train(tmp_path, [1, 2])
    send_to_wandb(tmp_path, config={}, wandb="off", project="kiln")
    with hold_metrics(tmp_path):
        send_to_wandb(tmp_path, config={}, wandb="offline", project="kiln")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
