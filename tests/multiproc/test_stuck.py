"""Ranks that are stuck, fail or lag, among real ranks that wait for them in real collectives."""

import ctypes
import signal
import time
from functools import partial

import pytest

from tests.forked import run_forked
from tests.multiproc.toy_rank import train_toy
from tests.multiproc.toys import log, losses
from trainer.observe.jsonl import read_rows
from trainer.runtime.ending import cause, read_failures, read_stuck
from trainer.runtime.rundir import attempt_dir

pytestmark = pytest.mark.multiproc

LIMIT_S = 1.5
SETTINGS = {
    "watchdog.first_step_timeout_s": 60.0,
    "watchdog.timeout_s": LIMIT_S,
    "checkpoint.every_images": 16,
}
MET = {0: 18, 1: 19}
"""A sample of the third step, by the rank that meets it."""


def sleep_forever():
    time.sleep(1000)


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(1000)


def catch_fire(what):
    raise RuntimeError(f"the disk of {what} is on fire")


def run(folder, *, steps=6, stage=1, others_s=4.0, changes=(), **faults):
    """Train a toy on two ranks; return their exit codes."""
    folder.mkdir(exist_ok=True)
    settings = {"engine.zero_stage": stage, **SETTINGS, **dict(changes)}
    main = partial(train_toy, **faults)
    return run_forked(main, folder, steps, settings, num_ranks=2, log_dir=folder, others_s=others_s)


def verdict(folder):
    return read_stuck(attempt_dir(folder, 0))


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_rank_that_waits_for_data_forever_is_named_and_all_ranks_show_stacks(tmp_path, guilty):
    assert run(tmp_path, feed_acts={MET[guilty]: sleep_forever}) == [85, 85]
    said = verdict(tmp_path)
    assert f"held up by rank {guilty} on " in said
    assert "in data of step 3, for " in said
    assert "Waiting: 1 rank in gloo:all_to_all (backward of step 3)" in said
    for rank in (0, 1):
        assert f"rank {rank}: {said}" in log(tmp_path, rank)
    assert "in sleep_forever" in log(tmp_path, guilty)
    assert "in all_to_all" in log(tmp_path, 1 - guilty)


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_rank_that_is_stopped_is_named_by_the_others(tmp_path, guilty):
    codes = run(tmp_path, told=(MET[guilty], signal.SIGSTOP), others_s=1.0)
    assert codes[1 - guilty] == 85
    assert codes[guilty] == -9
    said = verdict(tmp_path)
    assert f"held up by rank {guilty} on " in said
    assert "gave no sign of life" in said
    assert "Waiting: 1 rank in gloo:all_to_all" in said


def test_a_c_call_that_keeps_the_interpreter_shows_its_stack_and_ends_too(tmp_path):
    # Heard of once in the step before, so that its timer knows the limit of a step.
    pause = {MET[1]: partial(time.sleep, 0.4)}
    assert run(tmp_path, feed_acts=pause, acts={MET[1]: hold_the_interpreter}) == [85, 85]
    assert "held up by rank 1 on " in verdict(tmp_path)
    assert "gave no sign of life" in verdict(tmp_path)
    assert "in hold_the_interpreter" in log(tmp_path, 1)


def test_a_rank_stuck_in_a_sharded_forward_is_told_from_those_that_gather_and_can_go_on(tmp_path):
    assert run(tmp_path, stage=3, acts={MET[1]: sleep_forever}) == [85, 85]
    assert "held up by rank 1 on " in verdict(tmp_path)
    assert "in forward of step 3, for " in verdict(tmp_path)
    assert "gather" in verdict(tmp_path)
    assert run(tmp_path) == [0, 0]
    assert len(losses(tmp_path)) == 6
    assert verdict(tmp_path) is None


def test_what_takes_its_time_is_not_stuck(tmp_path):
    """The first step, saving, and going back to the last good state."""
    long_s = LIMIT_S + 1.0
    first = {0: partial(time.sleep, long_s)}
    assert run(tmp_path, feed_acts=first, save_s=long_s, nan_ids=[18], steps=3) == [0, 0]
    assert verdict(tmp_path) is None
    assert len(losses(tmp_path)) == 3


def test_a_rank_that_never_comes_is_named(tmp_path):
    quick = {"watchdog.first_step_timeout_s": 2.0}
    codes = run_forked(absent_rank_1, tmp_path, quick, num_ranks=2, log_dir=tmp_path, others_s=1.0)
    assert codes == [85, -9]
    assert "held up by rank 1, which was never heard of" in verdict(tmp_path)


def absent_rank_1(folder, changes):
    import os  # noqa: PLC0415

    if os.environ["RANK"] == "1":
        time.sleep(1000)
    return train_toy(folder, 1, {"engine.zero_stage": 1, **SETTINGS, **changes})


@pytest.mark.parametrize("guilty", [0, 1])
def test_the_error_of_the_first_rank_that_failed_is_the_last_word_of_all(tmp_path, guilty):
    started_s = time.monotonic()
    fire = partial(catch_fire, f"rank {guilty}")
    assert run(tmp_path, acts={MET[guilty]: fire}, others_s=30.0) == [1, 1]
    assert time.monotonic() - started_s < 20
    first = cause(read_failures(attempt_dir(tmp_path, 0)).values())
    assert first.rank == guilty
    for rank in (0, 1):
        assert (
            log(tmp_path, rank)
            .splitlines()[-1]
            .endswith(f"RuntimeError: the disk of rank {guilty} is on fire")
        )
    assert f"rank {guilty} on {first.node} failed first" in log(tmp_path, 1 - guilty)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_slow_rank_is_named_once_a_minute_and_measured_always(tmp_path, stage):
    slow = {n: partial(time.sleep, 0.05) for n in range(1, 4 * 8, 2)}
    assert run(tmp_path, stage=stage, feed_acts=slow, steps=4) == [0, 0]
    (said,) = [line for line in log(tmp_path).splitlines() if "slower than the median" in line]
    assert "rank 1 on " in said
    assert "rank 0" not in said
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[0]["speed/slowest_rank_ratio"] is None
    assert all(row["speed/slowest_rank_ratio"] > 1.5 for row in rows[1:])


def test_equal_ranks_are_not_called_slow(tmp_path):
    even = {n: partial(time.sleep, 0.05) for n in range(4 * 8)}
    assert run(tmp_path, feed_acts=even, steps=4) == [0, 0]
    assert "slower than" not in log(tmp_path)
