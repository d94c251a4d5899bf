import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.observe.accounts import close_check, combined, totals
from trainer.observe.jsonl import read_rows
from trainer.observe.ledger import Bucket, Ledger, accounted, next_attempt, read_account
from trainer.observe.ledger import Clock as LedgerClock
from trainer.observe.waiting_time import Waited, hand_over

NEVER_S = 1e9


class Clock:
    def __init__(self, at_s=0.0):
        self.at_s = at_s

    def __call__(self):
        return self.at_s


class Watts:
    """A meter that draws constant power by the clock."""

    def __init__(self, clock, watts, provenance="counter", device="gpu"):
        self.clock, self.watts, self.provenance = clock, watts, provenance
        self.device = device

    def read_j(self):
        return self.clock.at_s * self.watts


def open_ledger(path, clock, **changes):
    settings_ = {"clock": LedgerClock(clock, clock, NEVER_S), **changes}
    return Ledger(path, **settings_)


def seconds(rows):
    sums = {bucket.value: total.seconds for (_, bucket), total in totals(rows).items()}
    return {bucket: total_s for bucket, total_s in sums.items() if total_s > 0}


def test_nested_spans_count_each_second_once(tmp_path):
    clock = Clock(100.0)
    with open_ledger(tmp_path / "l.jsonl", clock) as ledger:
        clock.at_s += 1
        ledger.switch("productive")
        clock.at_s += 2
        with ledger.span("checkpoint_stall"):
            clock.at_s += 4
            with ledger.span("data_stall"):
                clock.at_s += 8
            clock.at_s += 16
        clock.at_s += 32
    found = seconds(read_rows(tmp_path / "l.jsonl"))
    assert found == {"init": 1, "productive": 34, "checkpoint_stall": 20, "data_stall": 8}


actions = st.lists(
    st.tuples(
        st.sampled_from(["switch", "push", "pop", "flush", "step", "rollback"]),
        st.sampled_from(list(Bucket)),
        st.floats(0, 100),
    ),
    max_size=40,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(actions)
def test_seconds_and_joules_are_conserved_whatever_happens(tmp_path, actions):
    path = tmp_path / "l.jsonl"
    path.unlink(missing_ok=True)
    clock = Clock(1000.0)
    meters = (Watts(clock, 300.0), Watts(clock, 20.0, "tdp_model"))
    ledger = open_ledger(path, clock, meters=meters)
    open_spans, step = [], 0
    for action, bucket, passes_s in actions:
        clock.at_s += passes_s
        match action:
            case "switch":
                ledger.switch(bucket)
            case "push":
                open_spans.append(ledger.span(bucket))
                open_spans[-1].__enter__()
            case "pop" if open_spans:
                open_spans.pop().__exit__(None, None, None)
            case "flush":
                ledger.flush()
            case "step":
                step += 1
                ledger.reach(step)
            case "rollback":
                step //= 2
                ledger.resume_at(step)
    ledger.close()
    rows = read_rows(path)
    wall_s = clock.at_s - 1000.0
    parts = totals(rows).values()
    assert sum(part.seconds for part in parts) == pytest.approx(wall_s, abs=1e-6)
    assert sum(part.joules for part in parts) == pytest.approx(320 * wall_s, abs=1e-3)
    assert all(row["seconds"] >= 0 and row["joules"] >= 0 for row in rows)
    assert all(closure.holds() for closure in close_check(rows))
    if wall_s > 1e-3:  # joules are written with a last digit, which is all of less
        known_by = combined(parts).known_by
        assert known_by == pytest.approx({"counter": 300 / 320, "tdp_model": 20 / 320})


def test_joules_follow_power_over_time(tmp_path):
    clock = Clock()
    meter = Watts(clock, 10.0)
    with open_ledger(tmp_path / "l.jsonl", clock, meters=(meter,)) as ledger:
        clock.at_s += 50
        with ledger.span("evaluation"):
            clock.at_s += 30
    found = totals(read_rows(tmp_path / "l.jsonl"))
    assert found["train", Bucket.INIT].joules == pytest.approx(500)
    assert found["train", Bucket.EVALUATION].joules == pytest.approx(300)


def test_without_a_meter_joules_are_zero_of_unknown_provenance(tmp_path):
    clock = Clock()
    with open_ledger(tmp_path / "l.jsonl", clock):
        clock.at_s += 1
    rows = read_rows(tmp_path / "l.jsonl")
    assert {(row["joules"], row["provenance"]) for row in rows} == {(0.0, "none")}
    assert combined(totals(rows).values()).known_by == {}


def test_imports_before_the_ledger_was_opened_are_init(tmp_path):
    clock = Clock(100.0)
    meter = Watts(clock, 1.0, "tdp_model")  # has counted 100 J since the process was born
    with open_ledger(tmp_path / "l.jsonl", clock, meters=(meter,), started_unix_s=90.0):
        clock.at_s += 1
    found = totals(read_rows(tmp_path / "l.jsonl"))["train", Bucket.INIT]
    assert (found.seconds, found.joules) == pytest.approx((11, 101))


def test_a_task_of_a_job_begins_with_its_time_in_the_queue_once(tmp_path, monkeypatch):
    path, clock = tmp_path / "ledger.jsonl", Clock()
    clock.at_s = 30
    meters = [Watts(clock, 100.0, device="gpu")]
    with open_ledger(path, clock, meters=meters) as ledger:
        clock.at_s = 40
        ledger.flush()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # killed by force
    clock.at_s = 100
    for name, value in hand_over(Waited(41.0, 90.0)).items():
        monkeypatch.setenv(name, value)
    with open_ledger(path, clock, meters=meters, stage="plan") as ledger:
        clock.at_s = 105
    with open_ledger(path, clock, meters=meters, stage="prepare") as ledger:
        clock.at_s = 110
    rows = read_rows(path)
    assert seconds([row for row in rows if row["stage"] == "plan"]) == {"queue": 49, "init": 15}
    assert seconds([row for row in rows if row["stage"] == "prepare"]) == {"init": 5}
    assert all(closure.holds() for closure in close_check(rows))
    assert sum(row["joules"] for row in rows if row["stage"] == "plan") == pytest.approx(500)


def test_a_job_that_began_at_once_or_by_a_clock_ahead_waited_for_no_time(tmp_path, monkeypatch):
    for number, waited in enumerate([Waited(50.0, 50.0), Waited(70.0, 80.0), Waited(50.0, 40.0)]):
        for name, value in hand_over(waited).items():
            monkeypatch.setenv(name, value)
        clock = Clock()
        clock.at_s = 60
        with open_ledger(tmp_path / f"{number}.jsonl", clock):
            clock.at_s = 61
        counted = seconds(read_rows(tmp_path / f"{number}.jsonl"))
        assert counted == {"init": 1 if waited.since_unix_s == 70 else 11}


def train(path, clock, *, from_step, to_step, s_per_step=1.0, flush_steps=3, kill=False):
    ledger = open_ledger(path, clock)
    ledger.resume_at(from_step)
    ledger.switch("productive")
    for step in range(from_step + 1, to_step + 1):
        clock.at_s += s_per_step
        ledger.reach(step)
        if step % flush_steps == 0 or (kill and step == to_step):
            ledger.flush()
    if kill:
        return ledger
    ledger.close()
    return None


@pytest.mark.parametrize(("reached", "restored"), [(10, 10), (10, 7), (10, 5), (10, 0), (2, 1)])
def test_steps_done_again_after_a_resume_are_lost_work(tmp_path, reached, restored):
    path, clock = tmp_path / "l.jsonl", Clock()
    train(path, clock, from_step=0, to_step=reached)
    clock.at_s += 1000
    train(path, clock, from_step=restored, to_step=12)
    found = seconds(read_rows(path))
    assert found["productive"] == pytest.approx(12)
    assert found.get("lost_work", 0.0) == pytest.approx(reached - restored)


def test_steps_lost_twice_are_lost_twice_and_survive_once(tmp_path):
    path, clock = tmp_path / "l.jsonl", Clock()
    for from_step, to_step in [(0, 10), (4, 8), (6, 20), (2, 20)]:
        train(path, clock, from_step=from_step, to_step=to_step)
    found = seconds(read_rows(path))
    assert found["productive"] == pytest.approx(20)
    assert found["lost_work"] == pytest.approx(10 + 4 + 14 + 18 - 20)


def test_a_rollback_within_an_attempt_is_lost_work_too(tmp_path):
    path, clock = tmp_path / "l.jsonl", Clock()
    with open_ledger(path, clock) as ledger:
        ledger.switch("productive")
        for start in (0, 1):
            ledger.resume_at(start)
            for step in range(start + 1, 4):
                clock.at_s += 1
                ledger.reach(step)
    assert seconds(read_rows(path)) == pytest.approx({"productive": 3, "lost_work": 2})


def test_rows_of_two_meters_lose_the_same_share(tmp_path):
    path, clock = tmp_path / "l.jsonl", Clock()
    for start in (0, 5):
        meters = (Watts(clock, 3.0), Watts(clock, 1.0, "tdp_model"))
        with open_ledger(path, clock, meters=meters) as ledger:
            ledger.resume_at(start)
            ledger.switch("productive")
            clock.at_s += 10
            ledger.reach(start + 10)
    found = totals(read_rows(path))
    assert found["train", Bucket.LOST_WORK].joules_by == pytest.approx(
        {"counter": 15, "tdp_model": 5}
    )
    assert found["train", Bucket.PRODUCTIVE].seconds == pytest.approx(15)


def test_the_tail_of_a_killed_attempt_is_lost_work_of_at_most_one_period(tmp_path):
    path, clock = tmp_path / "l.jsonl", Clock()
    killed = train(path, clock, from_step=0, to_step=6, kill=True)
    clock.at_s += 1.5  # unwritten
    del killed
    train(path, clock, from_step=6, to_step=9)
    found = seconds(read_rows(path))
    assert found == pytest.approx({"productive": 9, "lost_work": 1.5})
    assert all(closure.holds() for closure in close_check(read_rows(path)))


def test_a_wait_of_days_between_attempts_is_not_work(tmp_path):
    path, clock = tmp_path / "l.jsonl", Clock()
    killed = train(path, clock, from_step=0, to_step=6, kill=True)
    del killed
    clock.at_s += 1e6
    train(path, clock, from_step=6, to_step=7)
    assert seconds(read_rows(path))["lost_work"] == pytest.approx(3)


def test_stages_keep_their_own_attempts_and_totals(tmp_path):
    path, clock = tmp_path / "l.jsonl", Clock()
    for stage in ("prepare", "encode", "prepare"):
        with open_ledger(path, clock, stage=stage):
            clock.at_s += 1
    rows = read_rows(path)
    named = dict.fromkeys((row["stage"], row["attempt"]) for row in rows)
    assert list(named) == [("prepare", 0), ("encode", 0), ("prepare", 1)]
    assert [total.seconds for total in totals(rows).values()] == [2, 1]


def test_attempts_take_the_given_number_but_none_twice(tmp_path):
    for given_number, found in [(None, 0), (4, 4), (4, 5), (None, 6)]:
        with open_ledger(tmp_path / "l.jsonl", Clock(), attempt=given_number) as ledger:
            assert ledger.attempt == found


def test_the_whole_stage_after_its_first_part_is_another_attempt(tmp_path):
    for stage, part in [
        ("prepare", 0),
        ("prepare", 1),
        ("prepare", None),
        ("prepare", 0),
        ("plan", None),
    ]:
        with accounted(tmp_path, stage=stage, part=part, tdp_w_per_core=1.0):
            pass
    assert next_attempt(tmp_path, "prepare", 0) == 3
    assert next_attempt(tmp_path, "sample", 0) == 0
    found = {(row["stage"], row["rank"], row["attempt"]) for row in read_account(tmp_path)}
    assert found == {
        ("prepare", 0, 0),
        ("prepare", 1, 0),
        ("prepare", 0, 1),
        ("prepare", 0, 2),
        ("plan", 0, 0),
    }


def test_an_unknown_bucket_is_refused(tmp_path):
    with (
        open_ledger(tmp_path / "l.jsonl", Clock()) as ledger,
        pytest.raises(ValueError, match="coffee"),
    ):
        ledger.switch("coffee")


def test_an_account_that_does_not_close_is_seen(tmp_path):
    path, clock = tmp_path / "l.jsonl", Clock()
    train(path, clock, from_step=0, to_step=9)
    rows = read_rows(path)
    assert all(closure.holds() for closure in close_check(rows))
    first_work = next(row for row in rows if row["seconds"] > 0)
    rows.remove(first_work)
    assert not all(closure.holds() for closure in close_check(rows))


WORKER = """
import sys, time
from pathlib import Path
from trainer.observe.ledger import Clock, Ledger
ledger = Ledger(Path(sys.argv[1]), clock=Clock(flush_every_s=0.1))
ledger.switch("productive")
with ledger.span("evaluation"):
    print("up", flush=True)
    time.sleep(60)
"""


def test_kill_9_inside_a_long_span_loses_at_most_a_period(tmp_path):
    path = tmp_path / "l.jsonl"
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout.readline() == "up\n"
    time.sleep(0.6)
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    written_s = seconds(read_rows(path))["evaluation"]
    assert written_s >= 0.3
    with Ledger(path):
        pass
    found = seconds(read_rows(path))
    assert found["evaluation"] == pytest.approx(written_s)
    assert 0 < found["lost_work"] < 0.4
