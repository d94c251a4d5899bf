"""Accounts of runs on several nodes, through all that ends attempts, close."""

import pytest

from slurm.runfile import JOBS, append_row, write_json
from tests.unit.observe.test_ledger import Clock, Watts, open_ledger
from trainer.observe.accounts import totals
from trainer.observe.jsonl import read_rows
from trainer.observe.ledger import Bucket
from trainer.run_account import run_account

NODES = ("n1", "n2")
SUBMITTED_S = 1000.0


class Run:
    """A run whose time is set by hand."""

    def __init__(self, folder):
        self.folder, self.clock, self.number = folder, Clock(SUBMITTED_S), 0
        self.node_s, self.free_s = 0.0, SUBMITTED_S
        (folder / "attempts").mkdir(parents=True)
        append_row(folder / JOBS, {"job_id": "7", "unix_s": SUBMITTED_S})

    def attempt(self, cause, *, queued_s, steps, nodes=NODES, killed=False, ends_s=5):
        """Wait, start for 20 s, take a step a second, or none at all, and end."""
        self.clock.at_s += queued_s
        begin_s = self.clock.at_s
        folder = self.folder / f"attempts/{self.number:03d}"
        folder.mkdir()
        begin = {"job_id": "7", "nodes": nodes, "unix_s": begin_s, "saved_step": 0}
        write_json(folder / "begin.json", begin)
        for rank, node in enumerate(nodes if steps else ()):
            self.clock.at_s = begin_s + 20
            self._work(rank, node, steps, killed=killed)
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
    sums = totals(rows)
    seconds = {bucket: total.seconds for (_, bucket), total in sums.items() if total.seconds}
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
    metered_j = sum(total.joules for total in sums.values())
    assert metered_j == pytest.approx(100 * (seconds["productive"] + seconds["lost_work"]))


def test_of_an_attempt_that_goes_on_the_account_ends_where_it_is_now(run):
    before_s = sum(row["seconds"] for row in run_account(run.folder))
    run.attempt("finished", queued_s=10, steps=(200, 230), nodes=("n3",))
    (run.folder / "attempts/006/end.json").unlink()
    after_s = sum(row["seconds"] for row in run_account(run.folder))
    assert after_s - before_s == pytest.approx(10 + 20 + 30)


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
