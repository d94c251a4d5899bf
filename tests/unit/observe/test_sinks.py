import io
import json
import subprocess
import sys
from contextlib import suppress

import pytest
import wandb
from rich.console import Console

from trainer.errors import BadInput
from trainer.observe.jsonl import read_rows
from trainer.observe.progress import LiveProgress, PlainProgress, in_words, open_progress
from trainer.observe.sinks import Sinks, resolve_wandb_mode
from trainer.observe.wandb_session import Target, read_kept, run_id

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


def inspect(file, *words):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *words, str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()] if not words else done.stdout


def wandb_files(run_dir):
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def history(file):
    """Rows of a W&B file, without what W&B adds."""
    rows = [record["history"]["item"] for record in inspect(file) if record["type"] == "history"]
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


def test_offline_is_the_default_and_holds_config_rows_and_how_each_attempt_ended(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("SECRET_OF_MINE", "swordfish")
    run_dir = tmp_path / "my_run"
    run_dir.mkdir()
    with open_sinks(run_dir) as sinks:
        for row in ROWS:
            sinks.log(row)
    with suppress(RuntimeError), open_sinks(run_dir, attempt=1) as sinks:
        for row in ROWS[1:]:
            sinks.log(row)
        raise RuntimeError
    first, second = wandb_files(run_dir)
    made = json.loads((run_dir / "wandb.json").read_text())["id"]
    assert first.name == second.name == f"run-{made}.wandb"
    records = inspect(first)
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert (run["display_name"], run["host"]) == ("my_run", "-")
    assert run["config"]["update"]["seed"] == 7
    assert history(first) + history(second) == read_rows(run_dir / "metrics.jsonl")
    definitions = [record["metric"] for record in records if record["type"] == "metric"]
    assert {"glob_name": "*", "step_metric": "images_seen"}.items() <= definitions[0].items()
    ends = [json.loads(inspect(file, "--summary")) for file in (first, second)]
    assert [(end["state"], end["exit_code"]) for end in ends] == [("finished", 0), ("failed", 1)]
    everything = b"".join(f.read_bytes() for f in run_dir.rglob("*") if f.is_file())
    assert b"swordfish" not in everything


def test_offline_alerts_are_kept_once_of_each_kind(tmp_path):
    with open_sinks(tmp_path, wandb="offline", stuck=lambda: "rank 3 holds it up") as sinks:
        for row in ROWS:
            sinks.log(row)
            sinks.alert("rollback", f"loss is nan at step {row['step']}", level="WARN")
    (file,) = wandb_files(tmp_path)
    alerts = [record["alert"] for record in inspect(file) if record["type"] == "alert"]
    assert sorted((alert["text"], alert["level"]) for alert in alerts) == [
        ("loss is nan at step 1", "WARN"),
        ("rank 3 holds it up", "ERROR"),
    ]


def target(run_dir, config, mode="offline"):
    return Target(run_dir, mode, "kiln", config)


def test_each_run_has_an_id_of_its_own(tmp_path):
    ids = set()
    for place in ("1", "2"):
        folder = tmp_path / place / "same_name"
        folder.mkdir(parents=True)
        ids.add(run_id(target(folder, {"x": 1})))
    assert len(ids) == 2


def test_a_longer_training_of_the_same_run_keeps_its_id(tmp_path):
    first = run_id(target(tmp_path, {"total_images": 1}))
    assert run_id(target(tmp_path, {"total_images": 2})) == first
    assert read_kept(tmp_path)["config"] == {"total_images": 2}


def warnings_of(caplog):
    return [record for record in caplog.records if record.levelname == "WARNING"]


def test_broken_wandb_warns_once_and_training_goes_on(tmp_path, monkeypatch, caplog):
    def fail(**_):
        raise wandb.errors.CommError("no route")

    monkeypatch.setattr(wandb, "init", fail)
    with open_sinks(tmp_path, wandb="online") as sinks:
        for row in ROWS:
            sinks.log(row)
    (warning,) = warnings_of(caplog)
    assert "no route" in warning.getMessage()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


class Broken:
    def define_metric(self, *_, **__): ...

    def log(self, _, step):
        raise OSError("pipe closed")

    def finish(self, exit_code):
        raise OSError("pipe closed")


@pytest.mark.parametrize("rows", [ROWS, []])
def test_wandb_that_breaks_on_the_way_warns_once(tmp_path, monkeypatch, caplog, rows):
    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    with open_sinks(tmp_path, wandb="offline") as sinks:
        for row in rows:
            sinks.log(row)
    (warning,) = warnings_of(caplog)
    assert "pipe closed" in warning.getMessage()


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
    (tmp_path / ".netrc").write_text("machine 127.0.0.1:8080 login user password k\n")
    assert (
        resolve_wandb_mode("auto", {**home, "WANDB_BASE_URL": "http://127.0.0.1:8080"}) == "online"
    )
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
