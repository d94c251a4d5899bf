import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from slurm.attempts import End, begin_attempt, end_attempt, gives_up, read_attempts
from slurm.judgement import Evidence, judge
from slurm.lost import why_lost
from slurm.runfile import read_spec, run_folders, saved_step, write_json, write_spec
from slurm.spec import Checks, RunSpec
from slurm.step import Died, Ended
from slurm.suspects import Suspicion, to_leave_out

SPEC = RunSpec(
    ranks_per_node=2,
    cores_per_rank=1,
    node_counts=(4, 2),
    exclude=(),
    worker=("python", "-m", "trainer.worker", "/runs/a"),
    meet=("python", "-m", "trainer.runtime.meet", "cpu"),
    srun=(),
    env={"A": "1"},
    max_restarts=5,
    no_progress_attempts=3,
    warn_before_kill_s=60,
    stop_signal="USR2",
    shrink_after_s=60.0,
    checks=Checks(folders=("/tmp",), min_free_gb=1.0, max_clock_skew_s=5.0, timeout_s=60, gpus=0),
)


def end_of(attempt, cause="crashed", saved_step=0, **suspects):
    return End(
        cause=cause, why="words", unix_s=time.time(), saved_step=saved_step, suspects=suspects
    )


def attempts_that_saved(run, steps):
    """Attempts of one job, each beginning at one of these steps."""
    for step in steps:
        write_json(run / "saved.json", {"step": step, "images_seen": 8 * step})
        attempt = begin_attempt(run, "7", ["node1"])
        end_attempt(attempt, end_of(attempt, saved_step=step))
    return read_attempts(run)


def test_what_is_written_is_read_back(tmp_path):
    write_spec(tmp_path, SPEC)
    assert read_spec(tmp_path) == SPEC
    assert read_spec(tmp_path / "nowhere") is None
    first = begin_attempt(tmp_path, "7", ["node1", "node2"])
    assert read_attempts(tmp_path) == [first]
    end = end_of(first, node1=0.5)
    end_attempt(first, end)
    assert [each.end for each in read_attempts(tmp_path)] == [end]


def test_attempts_that_begin_at_once_have_numbers_of_their_own(tmp_path):
    numbers = []
    threads = [
        threading.Thread(target=lambda: numbers.append(begin_attempt(tmp_path, "7", ["n"]).number))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(16))


@pytest.mark.parametrize(
    ("steps", "now", "stops"),
    [
        ([], 0, False),
        ([0], 0, False),
        ([0, 0], 0, False),
        ([0, 0, 0], 0, True),
        ([0, 0, 0], 5, False),  # the last one saved
        ([0, 5, 5], 5, False),
        ([0, 5, 5, 5], 5, True),
        ([0, 5, 5, 5], 6, False),
    ],
)
def test_three_attempts_without_a_new_checkpoint_are_the_last(tmp_path, steps, now, stops):
    found = attempts_that_saved(tmp_path, steps)
    reason = gives_up(found, now, max_restarts=50, no_progress=3)
    assert (reason is not None) == stops
    if stops:
        assert f"saved nothing beyond step {now}" in reason
        assert "crashed (words)" in reason


def test_restarts_have_a_budget(tmp_path):
    found = attempts_that_saved(tmp_path, [0, 1, 2, 3])
    assert gives_up(found, 4, max_restarts=4, no_progress=3) is None
    assert "max_restarts=3" in gives_up(found, 4, max_restarts=3, no_progress=3)


def evidence(code, **more):
    plain = {
        "ended": Ended(code, ()),
        "error": None,
        "error_code": 0,
        "stuck": None,
        "stuck_nodes": (),
        "job": {"JobState": "RUNNING"},
        "is_asked_to_stop": False,
        "is_near_walltime": False,
    }
    return Evidence(**{**plain, **more})


KILLED = Ended(137, (Died("node2", "1", "Killed"), Died("node1", "0", "Terminated")))
LEFT = Ended(143, (Died("node2", "1", "Exited with exit code 1"),))


@pytest.mark.parametrize(
    ("told", "cause", "words", "suspects"),
    [
        (evidence(0), "finished", "all images", {}),
        (evidence(85), "preempted", "saved", {}),
        (evidence(85, is_near_walltime=True), "walltime", "saved", {}),
        (evidence(85, is_asked_to_stop=True), "stopped", "saved", {}),
        (evidence(85, job={"JobState": "CANCELLED"}), "cancelled", "scancel", {}),
        (evidence(137, job={"JobState": "COMPLETING"}), "cancelled", "scancel", {}),
        (evidence(85, stuck="rank 1", stuck_nodes=["n2"]), "stuck", "rank 1", {"n2": 1.0}),
        (evidence(93, error="another"), "superseded", "another", {}),
        (evidence(143, error="seed: 0 -> 1", error_code=2), "refused", "seed", {}),
        (evidence(137, ended=KILLED), "crashed", "rank 1 on node2: Killed", {"node2": 0.5}),
        (evidence(1, error="rank 3: boom", error_code=1, ended=LEFT), "crashed", "boom", {}),
        (evidence(1), "crashed", "code 1", {}),
    ],
)
def test_what_ended_an_attempt_is_named(told, cause, words, suspects):
    found = judge(told)
    assert (found.cause, dict(found.suspects)) == (cause, suspects)
    assert words in found.why


def test_a_lost_attempt_is_blamed_on_nodes_that_are_not_well(tmp_path):
    attempt = begin_attempt(tmp_path, "7", ["node1", "node2"])
    end = why_lost(attempt, {"node1": "idle", "node2": "down* (Not responding)"})
    assert (end.cause, end.suspects) == ("lost", {"node2": 1.0})
    assert end.why == "node2 is down* (Not responding)"
    assert why_lost(attempt, {"node1": "idle", "node2": "mixed"}).suspects == {}


def test_suspicion_fades_and_adds_up():
    day_s = 24 * 3600
    certain, likely = Suspicion("a", 0, 1.0), Suspicion("b", 0, 0.5)
    assert to_leave_out([certain, likely], 0) == ("a",)
    assert to_leave_out([certain, likely, likely], 0) == ("a", "b")
    assert to_leave_out([certain], day_s) == ()
    assert to_leave_out([certain, Suspicion("a", day_s, 0.5)], day_s) == ("a",)


def test_runs_are_found_in_sweeps_and_pipelines_but_not_in_their_insides(tmp_path):
    for name in ("a/attempts", "a/code/x/attempts", "sweep/000/attempts", "pipe/train/attempts"):
        (tmp_path / name).mkdir(parents=True)
    found = [folder.relative_to(tmp_path).as_posix() for folder in run_folders(tmp_path)]
    assert found == ["a", "pipe/train", "sweep/000"]
    assert list(run_folders(tmp_path / "a")) == [tmp_path / "a"]


FIND_RUNS = """
import os, sys
from pathlib import Path
from slurm.runfile import run_folders
if os.geteuid() == 0:
    os.setuid(65534)
print([folder.name for folder in run_folders(Path(sys.argv[1]))])
try:
    list(run_folders(Path(sys.argv[1]) / "foreign"))
except PermissionError:
    print("refused")
"""


def test_folders_of_others_are_left_out_of_the_search_but_not_when_they_are_asked_for():
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in a folder of the user alone
        root = Path(name)
        (root / "mine/attempts").mkdir(parents=True)
        (root / "foreign/x").mkdir(parents=True)
        root.chmod(0o755)
        (root / "foreign").chmod(0)
        found = subprocess.run(
            [sys.executable, "-c", FIND_RUNS, name], capture_output=True, text=True, check=True
        )
        (root / "foreign").chmod(0o700)
    assert found.stdout.split("\n")[:2] == ["['mine']", "refused"]


def test_half_written_files_are_never_read(tmp_path):
    (tmp_path / ".saved.json.partial").write_text("{")
    write_json(tmp_path / "saved.json", {"step": 3})
    assert json.loads((tmp_path / "saved.json").read_text()) == {"step": 3}


def test_the_newest_checkpoint_is_known_without_looking_for_it(tmp_path):
    assert saved_step(tmp_path) == 0
    for step, name in ((8, "checkpoint.json"), (16, "checkpoint.json"), (24, "weights")):
        folder = tmp_path / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / name).touch()
    assert saved_step(tmp_path) == 16
    write_json(tmp_path / "saved.json", {"step": 40, "images_seen": 1})
    assert saved_step(tmp_path) == 40
