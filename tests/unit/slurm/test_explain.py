from dataclasses import replace

import pytest

from slurm.attempts import begin_attempt, read_attempts
from slurm.explain import gather
from slurm.history import read_history
from slurm.runfile import append_row, write_json
from slurm.seen import Word
from slurm.sentences import ahead, happened
from slurm.words import clock
from tests.seen_runs import NOW, attempt, launched, metrics, queued, stormy
from tests.unit.observe.test_ledger import Clock, Watts, open_ledger
from trainer.cli import main
from trainer.runtime.ending import write_failure


def facts_of(run, *jobs, **more):
    """What is known when Slurm has these jobs for the run."""
    facts = gather(run, "runs/a")
    seen = replace(facts.seen, jobs=jobs)
    running = bool(jobs) and jobs[0].state == "RUNNING"
    more = {"word": Word(), "goes_on": running, **more}
    return replace(
        facts, seen=seen, chapters=read_history(run, goes_on=more["goes_on"] is not False), **more
    )


def told(facts):
    return [sentence for _, sentence in happened(facts)]


@pytest.fixture(autouse=True)
def _no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_stormy_run_is_told_oldest_first(tmp_path):
    facts = facts_of(stormy(tmp_path / "a"), queued(tmp_path / "a", nodes="node1"))
    assert told(facts) == [
        "submitted as job 12, and waited 2 s for its nodes",
        "attempt 0 on node[1,3] began with step 0 and died at step 1,212 after 1 h 10 min: "
        "rank 2 on node3: Killed; 212 steps lost; restarted in 2 s without node3, as `kiln "
        "supervise` lifted Slurm's hold",
        "attempt 1 on node[1-2] went on from step 1,000 and was lost at step 1,100 after 18 min "
        "20 s: node2 is down* (Not responding); no step lost; restarted in 11 min 28 s "
        "without node2 on 1 node",
    ]
    assert ahead(facts) == [
        f"attempt 2 runs on node1 since {clock(NOW + 6000)}, step 1,200 of 5,000, 12.3 images/s, "
        "1 min 30 s left"
    ]


def account(run, number, steps, *, provenance="counter", watts=1.8e6):
    """Two nodes take a step a second, and draw so much that it shows."""
    for rank, node in enumerate(("node1", "node2")):
        clock = Clock(NOW + 10_000 * number)
        meter = Watts(clock, watts, provenance)
        labels = {"attempt": number, "rank": rank, "node": node}
        path = run / f"ledger/train-{number:03d}-{node}.jsonl"
        with open_ledger(path, clock, meters=[meter], **labels) as ledger:
            ledger.resume_at(steps[0])
            ledger.switch("productive")
            for step in range(*steps):
                clock.at_s += 1
                ledger.reach(step + 1)
                ledger.flush()


def dead_and_back(run, **more):
    launched(run)
    attempt(run, 0, cause="crashed", why="boom", saved=60, ended=NOW + 100)
    metrics(run, 0, range(1, 101))
    account(run, 0, (0, 100), **more)
    attempt(run, 1, began=NOW + 10_000, from_step=60)
    metrics(run, 1, range(61, 131), began=NOW + 10_000)
    account(run, 1, (60, 130), **more)
    return run


@pytest.mark.parametrize(
    ("provenance", "words"),
    [
        ("counter", "40.0 kWh, 100 % measured (counter)"),
        ("tdp_model", "40.0 kWh, 100 % modelled (tdp_model)"),
    ],
)
def test_a_failure_is_told_with_the_energy_of_what_it_lost(tmp_path, provenance, words):
    run = dead_and_back(tmp_path / "a", provenance=provenance)
    assert f"boom; 40 steps lost (1 min 20 s of a node and {words}); restarted in" in told(
        facts_of(run)
    )[1].replace("at step 100 after 1 min 40 s: ", "")


def test_where_nothing_was_metered_time_alone_is_told(tmp_path):
    run = dead_and_back(tmp_path / "a", provenance="none", watts=0.0)
    assert (
        "40 steps lost (1 min 20 s of a node, and energy that nobody metered)"
        in told(facts_of(run))[1]
    )


def test_an_account_that_cannot_be_read_keeps_nobody_from_explaining(tmp_path, caplog):
    run = dead_and_back(tmp_path / "a")
    path = run / "ledger/train-000-node1.jsonl"
    path.write_text("oops\n" + path.read_text())
    assert "; 40 steps lost; restarted in" in told(facts_of(run))[1]
    assert "What was lost is not known" in caplog.text


def test_where_not_every_step_is_logged_more_may_be_lost(tmp_path):
    run = launched(tmp_path / "a", logs_every=10)
    attempt(run, 0, cause="crashed", why="boom", saved=64)
    metrics(run, 0, range(10, 80, 10))
    write_json(run / "saved.json", {"step": 64, "images_seen": 1})
    assert told(facts_of(run))[-1].endswith(
        "died at step 70 after 1 min 00 s: boom; at least 6 steps lost"
    )
    assert ahead(facts_of(run)) == [
        "it would have come back, but its job is not in the queue",
        "the same `kiln launch` line goes on from step 64",
    ]


@pytest.mark.parametrize(
    ("cause", "saved", "words"),
    [
        ("finished", 5000, "finished at step 5,000 after 1 min 00 s"),
        ("walltime", 7, "saved at step 7 after 1 min 00 s, as its walltime was about to end"),
        ("preempted", 7, "saved at step 7 after 1 min 00 s, as Slurm wanted the nodes back"),
        ("stopped", 7, "saved at step 7 after 1 min 00 s, as `kiln stop` had asked"),
        ("cancelled", 0, "was cancelled at step 0 after 1 min 00 s: words"),
        ("stuck", 0, "was stuck and ended at step 0 after 1 min 00 s: words"),
        ("bad_node", 0, "did not start its ranks: words"),
        ("refused", 0, "was refused: words"),
        ("superseded", 0, "gave way to a newer attempt at step 0 after 1 min 00 s: words"),
        ("gave_up", 0, "was the last at step 0 after 1 min 00 s: words"),
    ],
)
def test_every_end_has_its_sentence(tmp_path, cause, saved, words):
    run = launched(tmp_path / "a")
    attempt(run, 0, cause=cause, saved=saved)
    write_json(run / "saved.json", {"step": saved, "images_seen": 1})
    assert told(facts_of(run))[-1] == f"attempt 0 on node[1-2] began with step 0 and {words}"


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("finished", "it is done: kiln sample runs/a"),
        ("stopped", "the same `kiln launch` line goes on from step 7"),
        ("gave_up", "nothing happens by itself: `kiln logs runs/a` has the errors; then the same"),
        ("refused", "give what the message asks for; then the same `kiln launch` line"),
        ("crashed", "it would have come back, but its job is not in the queue (it is cancelled)"),
    ],
)
def test_what_has_to_be_done_is_said(tmp_path, cause, words):
    run = launched(tmp_path / "a")
    attempt(run, 0, cause=cause, saved=7)
    write_json(run / "saved.json", {"step": 7, "images_seen": 1})
    assert ahead(facts_of(run, job_state="cancelled"))[0].startswith(words)


def test_what_waits_says_for_what(tmp_path):
    run = launched(tmp_path / "a")
    attempt(run, 0)
    metrics(run, 0, range(1, 8))
    job = queued(run, state="PENDING", reason="BeginTime")
    facts = facts_of(run, job, lost_why="node2 is down*")
    assert told(facts)[-1] == (
        "attempt 0 on node[1-2] began with step 0 and was lost at step 7 after 7 s: "
        "node2 is down*; 7 steps lost"
    )
    assert ahead(facts) == [
        "job 12 is held by Slurm after its last end; `kiln supervise` lifts that"
    ]
    assert ahead(facts_of(run, queued(run, state="COMPLETING"))) == [
        "job 12 is completing on node[1-2]"
    ]
    (words,) = ahead(facts_of(run, goes_on=None, word=Word(problem="no squeue")))
    assert words == "whether it goes on only Slurm could say: no squeue"


def test_a_new_job_and_what_the_supervisor_did_are_told(tmp_path):
    run = launched(tmp_path / "a")
    attempt(run, 0, cause="stopped", saved=7)
    append_row(run / "jobs.jsonl", {"job_id": "13", "unix_s": NOW + 100})
    row = {"unix_s": NOW + 101, "job_id": "13", "what": "shrunk", "words": "takes 1 nodes"}
    append_row(run / "supervisor.jsonl", row)
    attempt(run, 1, job_id="13", began=NOW + 160, from_step=7, nodes=("node1",))
    facts = facts_of(run, queued(run, job_id="13", shown_id="13"))
    assert told(facts)[1].endswith("; continued as job 13 after 1 min 40 s")
    assert told(facts)[2:] == [
        "submitted as job 13, and waited 1 min 00 s for its nodes",
        "`kiln supervise`: job 13 takes 1 nodes",
    ]
    assert ahead(facts)[0].endswith(", and has taken no step yet")


def test_a_run_of_kiln_train_is_told_by_its_metrics(tmp_path):
    run = tmp_path / "a"
    for number, steps in enumerate((range(1, 11), range(9, 21))):
        (run / f"attempts/{number:03d}").mkdir(parents=True)
        metrics(run, number, steps, began=NOW + 100 * number)
    write_failure(run / "attempts/000", 1, "ValueError: boom", is_echo=False)
    facts = facts_of(run)
    assert told(facts)[0].startswith("attempt 0 began with step 0 and ended at step 10 after 9 s: ")
    assert "ValueError: boom" in told(facts)[0]
    assert told(facts)[0].endswith("; at least 2 steps lost; continued after 1 min 39 s")
    assert ahead(facts) == ["the same `kiln train` line goes on from step 0"]


def test_what_happened_between_the_stages_of_a_pipeline_is_told(tmp_path):
    run = launched(tmp_path / "a")
    (run / "pipeline").mkdir()
    append_row(run / "jobs.jsonl", {"job_id": "11", "unix_s": NOW - 3, "stage": "encode"})
    event = {"unix_s": NOW, "stage": "encode", "words": "2 of 9 units are missing: 1 tasks"}
    append_row(run / "pipeline/events.jsonl", event)
    attempt(run, 0, cause="stopped", saved=7, began=NOW + 1)
    facts = facts_of(run)
    assert told(facts)[:3] == [
        "encode: submitted as job 11",
        "submitted as job 12, and waited 3 s for its nodes",
        "encode: 2 of 9 units are missing: 1 tasks",
    ]
    assert ahead(facts) == ["the same `kiln pipeline` line goes on from step 0"]


def test_the_line_that_continues_a_run_of_a_sweep_has_m(tmp_path):
    write_json(tmp_path / "sweep.json", {})
    run = launched(tmp_path / "000")
    attempt(run, 0, cause="stopped", saved=7)
    assert ahead(facts_of(run)) == ["the same `kiln launch -m` line goes on from step 0"]


def test_a_run_without_attempts(tmp_path):
    run = launched(tmp_path / "a")
    assert told(facts_of(run)) == ["submitted as job 12"]
    assert ahead(facts_of(run))[0].startswith("no attempt has begun, and no job of it")


def test_explain_prints_it(tmp_path, capsys):
    assert main(["explain", str(stormy(tmp_path / "a"))]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert "attempt 0 on node[1,3]" in said[1]
    assert said[3].startswith("now: ")
    assert "there is no squeue on this machine's PATH" in said[3]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "sweep",
            "runs/sweep is no folder of a run. There are runs in it: runs/sweep/000. Give one",
        ),
        ("b", "b is no folder of a run. Give what `kiln launch` or `kiln train` made"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "logs"])
def test_what_is_no_run_is_refused(tmp_path, capsys, monkeypatch, command, given, words):
    launched(tmp_path / "runs/sweep/000")
    monkeypatch.chdir(tmp_path)
    assert main([command, given]) == 2
    assert words in capsys.readouterr().err


def test_a_run_is_found_by_its_name_alone(tmp_path, capsys, monkeypatch):
    stormy(tmp_path / "runs/night")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/night/attempts/002/rank_00000.log").write_text("hello\n")
    for command, words in (
        ("explain", "attempt 0 on node[1,3]"),
        ("logs", "hello"),
        ("status", "kiln explain runs/night"),
    ):
        assert main([command, "night"]) == 0
        assert words in capsys.readouterr().out


def test_attempts_are_still_read_one_by_one(tmp_path):
    run = launched(tmp_path / "a")
    first = begin_attempt(run, "7", ["node1"])
    (run / "attempts/001").mkdir()
    assert read_attempts(run) == [first]
