"""Accounts of runs on several nodes, through all that ends attempts, close."""

import json

import pytest

from slurm.runfile import JOBS, append_row, write_json
from tests.unit.observe.test_ledger import Clock, Watts, open_ledger
from trainer.observe.accounts import totals
from trainer.observe.allocation import missing_frac
from trainer.observe.jsonl import read_rows
from trainer.observe.ledger import Bucket
from trainer.run_account import CLOSES_WITHIN_FRAC, allocations_of, run_account

NODES = ("n1", "n2")
SUBMITTED_S = 1000.0


class Run:
    """A run whose time is set by hand."""

    def __init__(self, folder):
        self.folder, self.clock, self.number = folder, Clock(SUBMITTED_S), 0
        self.node_s, self.free_s = 0.0, SUBMITTED_S
        (folder / "attempts").mkdir(parents=True)
        append_row(folder / JOBS, {"job_id": "7", "unix_s": SUBMITTED_S})

    def attempt(
        self, cause, *, queued_s, steps, nodes=NODES, killed=False, ends_s=5, orphan_s=0
    ):  # fmt: skip
        """Wait, start for 20 s, take a step a second, or none at all, and end.

        An orphan on the last node works on meanwhile, and may do so beyond the end.
        """
        self.clock.at_s += queued_s
        begin_s = self.clock.at_s
        folder = self.folder / f"attempts/{self.number:03d}"
        folder.mkdir()
        begin = {"job_id": "7", "nodes": nodes, "unix_s": begin_s, "saved_step": 0}
        write_json(folder / "begin.json", begin)
        for rank, node in enumerate(nodes if steps else ()):
            self.clock.at_s = begin_s + 20
            is_orphan = orphan_s and node == nodes[-1]
            last_step = steps[1] + orphan_s * bool(is_orphan)
            self._work(rank, node, (steps[0], last_step), killed=killed)
            self.clock.at_s = begin_s + 20 + steps[1] - steps[0]
        seen_s = self.clock.at_s
        self.clock.at_s += ends_s
        end = {"cause": cause, "why": "", "unix_s": self.clock.at_s, "saved_step": 0}
        write_json(folder / "end.json", {**end, "suspects": {}})
        end_s = seen_s if cause == "lost" else self.clock.at_s
        self.node_s += len(nodes) * (end_s - self.free_s)
        self.free_s = end_s
        self.number += 1

    def _work(self, rank, node, steps, *, killed):
        path = self.folder / f"ledger/train-{self.number:03d}-{node}.jsonl"
        labels = {"node": node, "rank": rank, "attempt": self.number}
        ledger = open_ledger(path, self.clock, meters=[Watts(self.clock, 100.0)], **labels)
        ledger.resume_at(steps[0])
        ledger.switch("productive")
        for step in range(*steps):
            self.clock.at_s += 1
            ledger.reach(step + 1)
            ledger.flush()
        if not killed:
            ledger.close()


def by_bucket(rows):
    return {bucket: total.seconds for (_, bucket), total in totals(rows).items() if total.seconds}


def joules(rows):
    return sum(row["joules"] for row in rows)


@pytest.fixture
def run(tmp_path):
    """All that ends attempts, and fewer nodes in the end."""
    run = Run(tmp_path / "run")
    run.attempt("preempted", queued_s=60, steps=(0, 100))
    run.attempt("crashed", queued_s=10, steps=(100, 150), killed=True)
    run.attempt("lost", queued_s=30, steps=(120, 150), killed=True, ends_s=40)
    run.attempt("bad_node", queued_s=3, steps=None, ends_s=25)
    run.attempt("walltime", queued_s=2, steps=(120, 160), nodes=("n2", "n3"))
    run.attempt("finished", queued_s=10, steps=(160, 200), nodes=("n3",))
    return run


def test_every_second_of_every_node_is_in_one_bucket(run, caplog):
    rows = run_account(run.folder)
    assert caplog.messages == []
    seconds = by_bucket(rows)
    assert seconds == pytest.approx(
        {
            # A lost attempt is over when its last rank fell silent, and its job waits from then on.
            Bucket.QUEUE: 2 * (60 + 10 + 30 + 40 + 3 + 2) + 10,
            Bucket.INIT: 2 * (4 * 20 + 25) + 20,
            Bucket.PRODUCTIVE: 2 * (100 + 20 + 40) + 40,
            Bucket.LOST_WORK: 2 * (30 + 30),
            Bucket.DRAIN: 2 * (5 + 5) + 5,
            Bucket.IDLE: 2 * 5,
        }
    )
    assert sum(seconds.values()) == pytest.approx(run.node_s)
    assert joules(rows) == pytest.approx(100 * (seconds["productive"] + seconds["lost_work"]))


def test_of_an_attempt_that_goes_on_the_account_ends_where_it_is_now(run):
    before_s = sum(row["seconds"] for row in run_account(run.folder))
    run.attempt("finished", queued_s=10, steps=(200, 230), nodes=("n3",))
    (run.folder / "attempts/006/end.json").unlink()
    after_s = sum(row["seconds"] for row in run_account(run.folder))
    assert after_s - before_s == pytest.approx(10 + 20 + 30)


INTERRUPTIONS = {
    "preempted": {"cause": "preempted"},
    "kill -9 of a rank": {"cause": "crashed", "killed": True},
    "a node that dies": {"cause": "lost", "killed": True, "ends_s": 40, "orphan_s": 15},
    "walltime": {"cause": "walltime"},
    "kiln stop": {"cause": "stopped"},
    "scancel": {"cause": "cancelled", "killed": True},
    "stuck": {"cause": "stuck", "killed": True, "ends_s": 600},
}


@pytest.mark.parametrize("kind", INTERRUPTIONS)
def test_a_run_that_is_interrupted_three_times_closes_to_1_percent(tmp_path, caplog, kind):
    run = Run(tmp_path / "run")
    for first in (0, 80, 160):
        run.attempt(queued_s=30, steps=(first, first + 100), **INTERRUPTIONS[kind])
    run.attempt("finished", queued_s=30, steps=(240, 300))
    rows = run_account(run.folder)
    assert caplog.messages == []
    allocations = allocations_of(run.folder, rows)
    assert missing_frac(rows, allocations) < CLOSES_WITHIN_FRAC
    wall_node_s = len(NODES) * (run.clock.at_s - SUBMITTED_S)
    seconds = by_bucket(rows)
    assert sum(seconds.values()) == pytest.approx(wall_node_s, rel=CLOSES_WITHIN_FRAC)
    orphan_s = 3 * INTERRUPTIONS[kind].get("orphan_s", 0)
    assert seconds[Bucket.PRODUCTIVE] == pytest.approx(2 * 300)
    assert seconds[Bucket.LOST_WORK] == pytest.approx(2 * 60 + orphan_s)
    worked_s = seconds[Bucket.PRODUCTIVE] + seconds[Bucket.LOST_WORK]
    assert joules(rows) == pytest.approx(100 * worked_s)


@pytest.mark.parametrize("killed", [False, True], ids=["Ctrl-C", "kill -9"])
def test_a_run_on_this_machine_that_is_interrupted_closes_to_1_percent(tmp_path, caplog, killed):
    """All its attempts share a file, and the next one closes what a kill left open."""
    clock, lasted_s = Clock(SUBMITTED_S), 0.0
    for first in (0, 80, 160):
        began_s = clock.at_s
        ledger = open_ledger(tmp_path / "ledger.jsonl", clock, meters=[Watts(clock, 100.0)])
        clock.at_s += 20
        ledger.resume_at(first)
        ledger.switch("productive")
        for step in range(first, first + 100):
            clock.at_s += 1
            ledger.reach(step + 1)
            ledger.flush()
        if killed:
            clock.at_s += 0.8  # since the last row
        else:
            ledger.close()
        lasted_s += clock.at_s - began_s
        clock.at_s += 1000  # until somebody gives the same command again
    with open_ledger(tmp_path / "ledger.jsonl", clock):
        pass
    rows = run_account(tmp_path)
    assert caplog.messages == []
    seconds = by_bucket(rows)
    assert sum(seconds.values()) == pytest.approx(lasted_s, rel=CLOSES_WITHIN_FRAC)
    assert seconds[Bucket.PRODUCTIVE] == pytest.approx(260)
    assert seconds[Bucket.LOST_WORK] == pytest.approx(40 + 3 * killed)
    assert joules(rows) == pytest.approx(100 * 3 * 120)


def test_a_kill_in_mid_line_costs_that_line(run, caplog):
    """The torn line is the last of a dead node's account, whose time is then idle."""
    path = run.folder / "ledger/train-001-n2.jsonl"
    whole = path.read_bytes()
    before = by_bucket(run_account(run.folder))
    path.write_bytes(whole[:-20])
    after = by_bucket(run_account(run.folder))
    assert caplog.messages == []
    assert sum(after.values()) == pytest.approx(sum(before.values()))
    assert after[Bucket.IDLE] == pytest.approx(before[Bucket.IDLE] + 1)


@pytest.mark.parametrize("name", ["", "container-7"])
def test_a_row_that_names_no_node_of_slurms_is_of_the_node_of_its_rank(run, name, caplog):
    seconds = by_bucket(run_account(run.folder))
    for path in (run.folder / "ledger").iterdir():
        rows = [{**row, "node": name} for row in read_rows(path)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert by_bucket(run_account(run.folder)) == pytest.approx(seconds)
    assert caplog.messages == []


def test_where_the_first_rank_alone_wrote_nothing_is_known_of_the_other_node(tmp_path, caplog):
    """As runs of Kiln did before each node had its account; or its node died early."""
    run = Run(tmp_path / "run")
    run.attempt("crashed", queued_s=10, steps=(0, 50), killed=True)
    run.attempt("stopped", queued_s=10, steps=(40, 70))
    for path in (run.folder / "ledger").glob("*-n2.jsonl"):
        path.unlink()
    seconds = by_bucket(run_account(run.folder))
    assert caplog.messages == []
    assert seconds[Bucket.IDLE] == pytest.approx((50 + 5) + 5 + (30 + 5))
    assert seconds[Bucket.INIT] == pytest.approx(2 * 2 * 20)
    assert sum(seconds.values()) == pytest.approx(run.node_s)


@pytest.mark.parametrize(
    ("cause", "lent_s"),
    [("crashed", 2 * (20 + 50 + 5)),  # until the batch script said so
     ("lost", 2 * (20 + 50 + 12))],   # nobody said when; but the next attempt began
)  # fmt: skip
def test_what_an_orphan_does_when_its_node_is_taken_is_not_the_runs(
    tmp_path, caplog, cause, lent_s
):
    run = Run(tmp_path / "run")
    run.attempt(cause, queued_s=10, steps=(0, 50), killed=True, orphan_s=40)
    run.attempt("finished", queued_s=7, steps=(50, 90), nodes=("n1", "n3"))
    rows = [row for row in run_account(run.folder) if row["attempt"] == 0]
    assert caplog.messages == []
    seconds = by_bucket(rows)
    assert sum(seconds.values()) - seconds[Bucket.QUEUE] == pytest.approx(lent_s)
    orphan_s = lent_s / 2 - 20
    assert joules(rows) == pytest.approx(100 * (50 + orphan_s))


def test_an_attempt_that_nobody_wrote_an_end_of_ended_with_its_last_row(run, caplog):
    """Its job was cancelled with its node still down, and `kiln launch` made another one."""
    expected = by_bucket(run_account(run.folder))
    (run.folder / "attempts/002/end.json").unlink()
    assert by_bucket(run_account(run.folder)) == pytest.approx(expected)
    assert caplog.messages == []


def test_a_clock_that_a_node_has_slightly_early_makes_no_seconds(tmp_path, caplog):
    run = Run(tmp_path / "run")
    run.attempt("finished", queued_s=10, steps=(0, 50), nodes=("n1",))
    path = run.folder / "attempts/000/begin.json"
    begin = json.loads(path.read_text())
    write_json(path, {**begin, "unix_s": begin["unix_s"] + 40})
    rows = run_account(run.folder)
    assert caplog.messages == []
    assert by_bucket(rows) == pytest.approx({"queue": 10 + 40, "productive": 30, "drain": 5})
    assert joules(rows) == pytest.approx(100 * 30)


def test_an_account_that_does_not_close_says_so(run, caplog):
    path = run.folder / "ledger/train-000-n2.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20] + lines[60:]))
    run_account(run.folder)
    first, second = caplog.messages
    assert "attempt 0 of train (rank 1) took 100.0 s and its account has 60.0 s" in first
    assert "differ by 5.4 % from the time that Slurm lent them" in second


def test_a_run_on_this_machine_has_what_its_ledgers_have(tmp_path):
    clock = Clock()
    with open_ledger(tmp_path / "ledger.jsonl", clock, meters=[Watts(clock, 1.0)]):
        clock.at_s += 10
    assert run_account(tmp_path) == read_rows(tmp_path / "ledger.jsonl")


def test_a_job_that_is_to_begin_later_is_not_in_the_queue_until_then(tmp_path):
    run = Run(tmp_path)
    run.attempt("finished", queued_s=500, steps=(0, 30))
    path = tmp_path / "attempts/000/begin.json"
    begin = json.loads(path.read_text())
    assert totals(run_account(tmp_path))["train", Bucket.QUEUE].seconds == 2 * 500
    write_json(path, begin | {"eligible_unix_s": begin["unix_s"] - 20})
    assert totals(run_account(tmp_path))["train", Bucket.QUEUE].seconds == 2 * 20
