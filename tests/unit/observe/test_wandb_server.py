"""W&B has what metrics.jsonl has, once, whatever happens to its server, its key or the run."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import wandb
from PIL import Image

from tests.wandb_server import WandbServer, needs_wandb_server
from trainer.cli import main
from trainer.observe import wandb_session, wandb_sink
from trainer.observe.evaluations import hold_metrics
from trainer.observe.jsonl import JsonLines, read_rows
from trainer.observe.sinks import Sinks, send_to_wandb
from trainer.observe.wandb_session import Target, run_id, send_all

pytestmark = needs_wandb_server

CONFIG = {"seed": 7, "optim": {"learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with WandbServer(tmp_path_factory.mktemp("wandb") / "server") as running:
        yield running


@pytest.fixture
def own_server(tmp_path):
    """One that may be killed."""
    with WandbServer(tmp_path / "server") as running:
        yield running


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "night"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    """W&B waits for 15 s before it sends rows, or writes them to its file."""
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
    monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")


@pytest.fixture
def at(monkeypatch):
    """Set the environment to a server's, as a new process would find it."""

    def go(server, **changes):
        wandb.teardown()
        for name, value in {**server.env(), **changes}.items():
            monkeypatch.setenv(name, value)

    yield go
    wandb.teardown()


def row(step):
    return {"step": step, "images_seen": 8 * step, "train/loss": 1 / step, "speed/x": None}


def train(run, attempt, steps, *, wandb="auto", after=lambda step: None):
    """Log some steps; return the seconds that the slowest `log` took."""
    slowest_s = 0.0
    with Sinks.open(
        run, attempt=attempt, total_steps=99, config=CONFIG, wandb=wandb, progress="quiet"
    ) as sinks:
        for step in steps:
            began_s = time.monotonic()
            sinks.log(row(step))
            slowest_s = max(slowest_s, time.monotonic() - began_s)
            after(step)
    return slowest_s


def told(rows):
    """What rows say, without what W&B adds."""
    return [{k: v for k, v in each.items() if not k.startswith("_")} for each in rows]


def holds_all(server, run):
    """Whether W&B's history is metrics.jsonl, line by line, each once."""
    history = server.history(run_id(target(run)))
    written = read_rows(run / "metrics.jsonl")
    assert told(history) == written
    assert [each["_timestamp"] for each in history] == [each["time_unix_s"] for each in written]
    return True


def until_some_are_sent(server, run):
    """Wait, since W&B sends some seconds' rows together."""
    ends_s = time.monotonic() + 40
    while not server.history(run_id(target(run))):
        assert time.monotonic() < ends_s
        time.sleep(0.2)


def sync(run, pattern="offline-run-*"):
    """Let W&B's own command send its files."""
    folders = sorted((run / "wandb").glob(pattern))
    command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=run)
    return done.stdout + done.stderr


def test_attempts_with_a_rollback_are_one_wandb_run_that_has_every_row(server, at, run):
    at(server)
    train(run, 0, [1, 2, 3, 4])
    train(run, 1, [3, 4, 5, 3, 4])
    train(run, 2, [5, 6])
    assert holds_all(server, run)
    assert [folder.name for folder in server.run_folders()].count(run_id(target(run))) == 1
    found = server.run(run_id(target(run)))
    assert (found["displayName"], found["state"]) == ("night", "finished")
    assert found["config"]["seed"]["value"] == 7
    definitions = found["config"]["_wandb"]["value"]["m"]
    axes = [d.get("1") for d in definitions]
    (every,) = [d for d in definitions if d.get("2") == "*"]
    assert axes[every["5"] - 1] == "images_seen"
    assert found["summaryMetrics"]["images_seen"] == 48


def test_an_attempt_that_fails_is_failed_and_the_next_one_is_not(server, at, run):
    at(server)
    with pytest.raises(ZeroDivisionError):
        train(run, 0, [1, 2], after=lambda step: 1 // (2 - step))
    assert server.run(run_id(target(run)))["state"] == "failed"
    train(run, 1, [2, 3])
    assert server.run(run_id(target(run)))["state"] == "finished"
    assert holds_all(server, run)


def warnings_of(caplog):
    """What Kiln warned of."""
    return [
        each.getMessage()
        for each in caplog.records
        if each.name.startswith("trainer") and each.levelno >= logging.WARNING
    ]


def target(run, mode="online"):
    return Target(run, mode, "kiln", CONFIG)


@pytest.mark.parametrize("trouble", ["wrong key", "no server"])
def test_without_wandb_training_goes_on_at_once_and_all_is_sent_later(
    server, at, run, caplog, monkeypatch, trouble
):
    monkeypatch.setattr(wandb_session, "_INIT_S", 3.0)
    changes = {"WANDB_API_KEY": "0" * 40}
    if trouble == "no server":
        changes = {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    at(server, **changes)
    began_s = time.monotonic()
    assert train(run, 0, range(1, 21)) < 0.5
    assert time.monotonic() - began_s < 20
    (warning,) = warnings_of(caplog)
    assert ("401" if trouble == "wrong key" else "refused") in warning
    assert f"kiln sync {run}" in warning
    assert "WANDB_API_KEY" in warning
    assert len(read_rows(run / "metrics.jsonl")) == 20
    assert not list((run / "wandb").glob("run-*"))
    at(server)
    assert send_all(target(run)) == 20
    assert holds_all(server, run)
    assert send_all(target(run)) == 0
    train(run, 1, [21])
    assert holds_all(server, run)


def test_a_server_that_comes_back_gets_what_it_missed_in_the_same_attempt(own_server, at, run):
    at(own_server)

    def away(step):
        if step == 10:
            until_some_are_sent(own_server, run)
            own_server.kill()
        if step == 30:
            time.sleep(3)
            own_server.start()

    assert train(run, 0, range(1, 61), after=away) < 0.5
    assert holds_all(own_server, run)


def test_what_a_dead_server_missed_the_next_attempt_sends(own_server, at, run, caplog, monkeypatch):
    monkeypatch.setattr(wandb_sink, "_FINISH_S", 2.0)
    at(own_server)

    def die(step):
        if step == 10:
            until_some_are_sent(own_server, run)
            own_server.kill()

    assert train(run, 0, range(1, 31), after=die) < 0.5
    (warning,) = warnings_of(caplog)
    assert "kiln sync" in warning
    own_server.start()
    assert 0 < len(own_server.history(run_id(target(run)))) < 30
    train(run, 1, range(25, 35))
    assert holds_all(own_server, run)


def test_a_key_that_is_taken_away_in_mid_run_is_noticed_and_the_rest_is_sent_later(
    own_server, at, run, caplog
):
    at(own_server)
    key = own_server.key

    def revoke(step):
        if step == 10:
            until_some_are_sent(own_server, run)
            own_server.kill()
            own_server.key = "0" * 40
            own_server.start()
        time.sleep(1.0 if step > 10 else 0)

    train(run, 0, range(1, 35), after=revoke)
    assert "it has ended the upload" in caplog.text
    own_server.kill()
    own_server.key = key
    own_server.start()
    assert send_all(target(run)) > 0
    assert holds_all(own_server, run)


ATTEMPT = """
import os, signal, sys, time
from pathlib import Path
import psutil
from tests.unit.observe.test_wandb_server import row, CONFIG
from trainer.observe import wandb_sink
from trainer.observe.sinks import Sinks
run, pause_s, whom = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
wandb_sink._PAUSES_S = (0.5, 0.5)
sinks = Sinks.open(run, attempt=0, total_steps=99, config=CONFIG, progress="quiet")
for step in range(1, 40):
    sinks.log(row(step))
    time.sleep(pause_s)
    if step == 20 and whom == "wandb-core":
        for child in psutil.Process().children(recursive=True):
            if child.name() == "wandb-core":
                child.kill()
                print("killed it")
files = "wandb/offline-run-*/*.wandb"
while whom == "itself" and pause_s and not any(f.stat().st_size > 3000 for f in run.glob(files)):
    time.sleep(0.1)
if whom.startswith("itself"):
    os.kill(os.getpid(), signal.SIGKILL)
sinks.close()
"""


def attempt_apart(run, pause_s, *, killed):
    """Log 39 steps in a process of its own, in which a process is killed."""
    command = [sys.executable, "-c", ATTEMPT, str(run), str(pause_s), killed]
    # Otherwise it would share the helper process that W&B keeps for this one.
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    assert len(read_rows(run / "metrics.jsonl")) == 39
    return done


def kill_attempt(run, pause_s, whom="itself"):
    assert attempt_apart(run, pause_s, killed=whom).returncode == -signal.SIGKILL


def test_when_wandbs_own_process_dies_another_one_goes_on(server, at, run):
    at(server)
    done = attempt_apart(run, 0.2, killed="wandb-core")
    assert (done.returncode, done.stdout) == (0, "killed it\n")
    assert done.stderr.count("W&B does not take the metrics") == 1
    assert holds_all(server, run)


def test_what_a_killed_attempt_did_not_send_the_next_one_does(server, at, run):
    at(server)
    kill_attempt(run, 0.1, whom="itself online")
    train(run, 1, range(30, 42))
    assert holds_all(server, run)


@pytest.mark.parametrize("pause_s", [0.0, 0.1])
def test_offline_a_killed_attempt_loses_nothing_and_sends_nothing_twice(server, at, run, pause_s):
    kill_attempt(run, pause_s)
    train(run, 1, range(30, 42), wandb="offline")
    train(run, 2, range(42, 45), wandb="offline")
    at(server)
    sync(run)
    assert holds_all(server, run)
    assert "No runs to sync" in sync(run)
    train(run, 3, [45])
    assert holds_all(server, run)


def test_offline_what_was_synced_unfinished_is_continued(server, at, run, monkeypatch):
    kill_attempt(run, 0.1)
    time.sleep(3)
    at(server)
    sync(run)
    sent = len(server.history(run_id(target(run))))
    train(run, 1, range(35, 42), wandb="offline")
    sync(run)
    assert holds_all(server, run)
    assert sent > 0


def test_offline_attempts_are_sent_by_the_first_online_one_and_never_again(server, at, run):
    train(run, 0, [1, 2, 3], wandb="offline")
    train(run, 1, [3, 4], wandb="offline")
    at(server)
    train(run, 2, [5, 6])
    assert holds_all(server, run)
    assert "No runs to sync" in sync(run)
    train(run, 3, [7], wandb="offline")  # writes no file that could be sent twice
    assert "No runs to sync" in sync(run)
    assert send_all(target(run)) == 1
    assert holds_all(server, run)


def test_a_run_that_began_without_wandb_is_sent_whole(server, at, run):
    train(run, 0, [1, 2], wandb="off")
    train(run, 1, [3], wandb="offline")
    at(server)
    sync(run)
    assert holds_all(server, run)


def test_a_run_made_anew_under_the_same_name_is_another_one(server, at, tmp_path):
    at(server)
    ids = []
    for place in ("first", "second"):
        folder = tmp_path / place / "night"
        folder.mkdir(parents=True)
        train(folder, 0, [1, 2])
        assert holds_all(server, folder)
        ids.append(run_id(target(folder)))
    assert len(set(ids)) == 2


def add_pictures(run, *, step, captions):
    """What `kiln sample` leaves, as far as W&B is concerned."""
    folder = run / "samples"
    folder.mkdir(exist_ok=True)
    entries = []
    for number, caption in enumerate(captions):
        name = f"sample_{number:04d}"
        Image.new("RGB", (8, 8), (step, number, 0)).save(folder / f"{name}.png")
        label = {"step": step, "images_seen": 8 * step, "weights_sha256": f"of step {step}"}
        (folder / f"{name}.json").write_text(json.dumps(label))
        entries.append({"caption": caption, "picture": f"{name}.png", "ok": number % 2 == 0})
    (folder / "index.json").write_text(json.dumps({"samples": entries, "reconstructions": []}))


def send(run, wandb="auto"):
    send_to_wandb(run, config=CONFIG, wandb=wandb, project="kiln")


def pictures(server, run):
    """Images seen, captions and files of each time that pictures came."""
    history = server.history(run_id(target(run)))
    found = [(each["images_seen"], each["samples"]) for each in history if "samples" in each]
    for _, told in found:
        assert told["_type"] == "images/separated"
        for name in told["filenames"]:
            assert list((server.folder / "files").glob(f"*/*/{run_id(target(run))}/{name}"))
    return [(images, told["captions"]) for images, told in found]


def test_pictures_come_once_with_their_captions_and_cost_no_row(server, at, run):
    at(server)
    train(run, 0, [1, 2, 3])
    assert holds_all(server, run)
    add_pictures(run, step=2, captions=["a red ring", "a blue star"])
    for _ in range(2):
        send(run)
    first = (16, ["right: a red ring", "wrong: a blue star"])
    assert pictures(server, run) == [first]
    add_pictures(run, step=3, captions=["a red ring"])
    train(run, 1, [4])
    assert pictures(server, run) == [first, (24, ["right: a red ring"])]
    add_pictures(run, step=4, captions=[f"number {n}" for n in range(40)])
    send(run)
    assert len(pictures(server, run)[-1][1]) == 16
    train(run, 2, [5])
    rows = [each for each in server.history(run_id(target(run))) if "samples" not in each]
    assert told(rows) == read_rows(run / "metrics.jsonl")


def test_offline_pictures_are_synced_or_sent_by_the_first_online_command(server, at, run):
    train(run, 0, [1, 2, 3], wandb="offline")
    add_pictures(run, step=3, captions=["a red ring"])
    send(run, wandb="offline")
    add_pictures(run, step=3, captions=["a blue ring"])
    send(run, wandb="offline")
    at(server)
    sync(run)
    assert [captions for _, captions in pictures(server, run)] == [
        ["right: a red ring"],
        ["right: a blue ring"],
    ]


def test_pictures_that_were_only_offline_are_sent_when_online(server, at, run):
    train(run, 0, [1, 2, 3], wandb="offline")
    add_pictures(run, step=3, captions=["a red ring"])
    send(run, wandb="offline")
    at(server)
    assert send_all(target(run)) == 3
    assert pictures(server, run) == [(24, ["right: a red ring"])]


def test_alerts_come_once_of_each_kind(server, at, run):
    at(server)
    with Sinks.open(run, attempt=0, total_steps=9, config=CONFIG, progress="quiet",
                    stuck=lambda: "rank 3 holds it up") as sinks:  # fmt: skip
        for step in (1, 2):
            sinks.log(row(step))
            sinks.alert("rollback", f"loss is nan at step {step}", level="WARN")
        time.sleep(2)
    mine = [each for each in server.alerts() if each["runName"] == run_id(target(run))]
    assert sorted((each["title"], each["text"], each["severity"]) for each in mine) == [
        ("night: rollback", "loss is nan at step 1", "WARN"),
        ("night: stuck", "rank 3 holds it up", "ERROR"),
    ]


def test_a_superseded_attempt_does_not_send_the_rows_of_the_next_one(server, at, run):
    at(server)

    def next_begins(step):
        if step == 3:
            later = JsonLines(run / "metrics.jsonl")
            later.append([{**row(n), "attempt": 1, "time_unix_s": 1.0} for n in (3, 4, 5)])
            later.close()
            time.sleep(1)

    train(run, 0, [1, 2, 3], after=next_begins)
    assert len(server.history(run_id(target(run)))) == 3
    train(run, 2, [6])
    assert holds_all(server, run)


def test_the_command_says_what_it_sent_and_refuses_what_it_cannot(
    server, at, run, monkeypatch, capsys, caplog
):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("HOME", str(run))
    assert main(["sync", str(run)]) == 2
    assert "has no metrics of a run" in capsys.readouterr().err
    train(run, 0, [1, 2, 3], wandb="off")
    (run / "config.yaml").write_text("seed: 7\nlogging: {wandb_project: kiln}\n")
    assert main(["sync", str(run)]) == 2
    assert "got no key of W&B. Set WANDB_API_KEY" in capsys.readouterr().err
    at(server, WANDB_API_KEY="0" * 40)
    assert main(["sync", str(run)]) == 1
    assert "401" in capsys.readouterr().err
    at(server)
    with hold_metrics(run):
        assert main(["sync", str(run)]) == 2
    assert "is being written" in capsys.readouterr().err
    assert main(["sync", str(run)]) == 0
    assert "it lacked 3" in caplog.text
    assert holds_all(server, run)
