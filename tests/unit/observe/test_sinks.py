import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from rich.console import Console

from trainer.errors import BadInput
from trainer.observe.jsonl import read_rows
from trainer.observe.progress import LiveProgress, PlainProgress, in_words, open_progress
from trainer.observe.sinks import Sinks, WandbSink, resolve_wandb_mode, run_id

ROWS = [
    {"step": step, "images_seen": 8 * step, "train/loss": 1 / step, "speed/images_per_s": 25.0,
     "time/left_s": 100.0 - step} for step in range(1, 4)
]  # fmt: skip


def open_sinks(run_dir, **changes):
    options = {"attempt": 0, "total_steps": 3, "config": {"seed": 7}, "progress": "quiet"}
    return Sinks.open(run_dir, **{**options, **changes})


def test_every_row_is_in_the_file_before_log_returns(tmp_path):
    with open_sinks(tmp_path, wandb="off", attempt=2) as sinks:
        for count, row in enumerate(ROWS, start=1):
            sinks.log(row)
            written = read_rows(tmp_path / "metrics.jsonl")
            assert len(written) == count
            assert written[-1].items() >= {**row, "attempt": 2}.items()


def inspect(run):
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_wandb_offline_holds_the_run_and_attempts_share_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_MINE", "swordfish")
    run_dir = tmp_path / "my_run"
    run_dir.mkdir()
    for attempt in (0, 1):
        with open_sinks(run_dir, wandb="offline", attempt=attempt) as sinks:
            for row in ROWS:
                sinks.log(row)
    first, second = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name == f"run-{run_id(run_dir, {'seed': 7})}.wandb"
    records = inspect(first)
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert (run["display_name"], run["host"]) == ("my_run", "-")
    assert run["config"]["update"]["seed"] == 7
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [item["images_seen"] for item in history] == [8, 16, 24]
    everything = b"".join(f.read_bytes() for f in run_dir.rglob("*") if f.is_file())
    assert b"swordfish" not in everything


def test_the_run_id_depends_on_name_and_config_and_nothing_else(tmp_path):
    ids = set()
    for place, name, config in [
        ("1", "a", {"x": 1, "y": 2}),
        ("2", "a", {"y": 2, "x": 1}),
        ("3", "b", {"x": 1, "y": 2}),
        ("4", "a", {"x": 1, "y": 3}),
    ]:
        folder = tmp_path / place / name
        folder.mkdir(parents=True)
        ids.add(run_id(folder, config))
    assert len(ids) == 3


def test_a_longer_training_of_the_same_run_keeps_its_id(tmp_path):
    assert run_id(tmp_path, {"total_images": 1}) == run_id(tmp_path, {"total_images": 2})


def test_broken_wandb_warns_once_and_training_goes_on(tmp_path, monkeypatch, caplog):
    def fail(**_):
        raise wandb.errors.CommError("no route")

    monkeypatch.setattr(wandb, "init", fail)
    with open_sinks(tmp_path, wandb="online") as sinks:
        for row in ROWS:
            sinks.log(row)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


class Broken:
    def define_metric(self, *_, **__): ...

    def log(self, _):
        raise OSError("pipe closed")

    def finish(self, exit_code):
        raise OSError("pipe closed")


def test_wandb_that_breaks_on_the_way_warns_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    for rows in (ROWS, []):
        caplog.clear()
        sink = WandbSink(tmp_path, mode="offline", project="kiln", config={})
        for row in rows:
            sink.log(row)
        sink.close()
        assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("wanted", "environ", "found"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "off"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("off", {"WANDB_API_KEY": "k"}, "off"),
        ("online", {}, "online"),
    ],
)
def test_wandb_is_online_only_with_a_key(tmp_path, wanted, environ, found):
    assert resolve_wandb_mode(wanted, {"HOME": str(tmp_path), **environ}) == found


def test_a_login_in_netrc_is_a_key_for_its_own_host(tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    home = {"HOME": str(tmp_path)}
    assert resolve_wandb_mode("auto", home) == "online"
    other = {**home, "WANDB_BASE_URL": "https://wandb.example.org"}
    assert resolve_wandb_mode("auto", other) == "offline"
    (tmp_path / ".netrc").write_text("nonsense nonsense\n")
    assert resolve_wandb_mode("auto", home) == "offline"


def test_an_unknown_mode_is_refused():
    with pytest.raises(BadInput, match="need auto, offline, online or off"):
        resolve_wandb_mode("sometimes", {})


def test_plain_progress_prints_now_and_then_and_the_last_step():
    now, out = [0.0], io.StringIO()
    sink = PlainProgress(Console(file=out), total_steps=100, every_s=10, clock_s=lambda: now[0])
    for step in range(1, 101):
        now[0] += 0.26
        sink.log({"step": step, "train/loss": 0.5, "speed/images_per_s": 25, "time/left_s": 200})
    sink.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 1/100  loss 0.5000  25.0 images/s  3 min 20 s left"
    assert lines[-1].startswith("step 100/100 ")
    assert len(lines) == 4


def test_joules_are_never_told_without_how_they_are_known():
    out = io.StringIO()
    sink = PlainProgress(Console(file=out), total_steps=1, every_s=10)
    energy = {"energy/j_per_image": 35.12, "energy/measured_frac": 0.71}
    sink.log({"step": 1, "speed/images_per_s": 25, "speed/mfu_frac": 0.284, **energy})
    assert out.getvalue() == "step 1/1  25.0 images/s  MFU 28 %  35.1 J/image (71 % measured)\n"


def test_live_progress_shows_the_last_row():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    sink = open_progress("auto", total_steps=3, console=console)
    assert isinstance(sink, LiveProgress)
    for row in ROWS:
        sink.log(row)
    sink.close()
    assert "3/3" in out.getvalue()
    assert "loss 0.3333  25.0 images/s" in out.getvalue()


def test_quiet_shows_nothing_and_no_terminal_means_plain():
    assert open_progress("quiet", total_steps=3) is None
    plain = open_progress("auto", total_steps=3, console=Console(file=io.StringIO()))
    assert isinstance(plain, PlainProgress)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_spans_of_time_read_well(seconds, words):
    assert in_words(seconds) == words
