from dataclasses import replace
from pathlib import Path

import pytest

from slurm.attempts import Attempt, Begin, End
from slurm.client import Queued, sweep_comment
from slurm.lines import lines, state, wait_words
from slurm.places import Place, places, waits_for_nodes
from slurm.seen import Word, goes_on, stage_of
from slurm.words import clock, from_slurm
from tests.seen_runs import queued, seen

RUN = Path("/runs/a")
FAR = "2037-05-04T06:07:08"
BEGIN = Begin(job_id="12", nodes=("node1",), unix_s=1.0, saved_step=1000)
ROW = {"step": 1212, "attempt": 3, "speed/images_per_s": 12.34, "time/left_s": 90.0}


def ended(cause="crashed", why="rank 2 on node3: Killed"):
    return End(cause=cause, why=why, unix_s=2.0, saved_step=1000, suspects={})


def newest(end=None):
    return Attempt(number=3, folder=RUN / "attempts/003", begin=BEGIN, end=end)


def row_of(told):
    (line,) = lines(told, Word(), "a")
    return line


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"reason": "Resources"}, "waits for nodes, 3 of 17 in gpu"),
        (
            {"reason": "Priority", "start": FAR},
            "waits for nodes, 3 of 17 in gpu, Slurm's estimate: 04 May 06:07:08",
        ),
        ({"reason": "QOSMaxGRESPerUser"}, "waits for QOSMaxGRESPerUser, 3 of 17 in gpu"),
        (
            {
                "reason": "Dependency",
                "dependency": "afterok:7(unfulfilled),afterok:9_*(unfulfilled)",
            },
            "waits for job 7, 9",
        ),
        (
            {"reason": "DependencyNeverSatisfied", "dependency": "afterok:7(failed)"},
            "waits for job 7 and never begins",
        ),
        ({"reason": "Dependency", "dependency": "singleton"}, "waits for job singleton"),
        ({"reason": "JobHeldUser"}, "is held; `scontrol release 12` lets it go"),
        (
            {"reason": "BeginTime"},
            "is held by Slurm after its last end; `kiln supervise` lifts that",
        ),
    ],
)
def test_what_a_job_waits_for_is_said(told, words):
    job = queued(RUN, state="PENDING", **told)
    assert wait_words(job, Place(3, 17, "gpu"), has_begun=True).startswith(words)


def test_a_hold_says_until_when():
    job = queued(RUN, state="PENDING", reason="BeginTime", start=FAR)
    assert "after its last end until " in wait_words(job, None, has_begun=True)


def test_a_job_that_has_not_begun_waits_for_its_time_and_not_for_a_supervisor():
    job = queued(RUN, state="PENDING", reason="BeginTime", start=FAR)
    waits = f"waits until {clock(from_slurm(FAR))} to begin"
    assert wait_words(job, None, has_begun=False) == waits
    assert row_of(seen(RUN, jobs=(job,))).says == waits
    again = row_of(seen(RUN, jobs=(job,), num_attempts=4, newest=newest(ended()))).says
    assert "is held by Slurm after its last end" in again
    other = replace(job, job_id="13")
    after = row_of(seen(RUN, jobs=(other,), num_attempts=4, newest=newest(ended()))).says
    assert after.startswith(waits)


@pytest.mark.parametrize(
    ("told", "problem", "expected"),
    [
        ({"jobs": (queued(RUN, state="COMPLETING"),)}, None, "completing"),
        ({}, None, "not in the queue"),
        ({}, "no squeue", "unknown"),
        ({"num_attempts": 4, "newest": newest(ended("walltime"))}, "no squeue", "walltime"),
        ({"num_attempts": 4, "newest": newest()}, None, "lost"),
        ({"num_attempts": 4, "newest": newest()}, "no squeue", "unknown"),
        ({"num_attempts": 4, "is_trained": True}, None, "training"),
        ({"num_attempts": 4, "row": ROW}, None, "not running"),
        ({"num_attempts": 4, "row": {**ROW, "step": 5000}}, None, "finished"),
    ],
)
def test_a_word_says_how_a_run_is(told, problem, expected):
    assert state(seen(RUN, **told), Word(problem=problem)) == expected


def test_a_run_that_runs_shows_its_speed_and_what_went_wrong_before():
    told = {"num_attempts": 4, "newest": newest(), "before": ended(), "row": ROW}
    line = row_of(seen(RUN, jobs=(queued(RUN),), **told))
    assert (line.job, line.attempt, line.step) == ("12", "3", "1,212/5,000")
    assert (line.images_per_s, line.left) == ("12.3", "1 min 30 s")
    assert line.says == "on node[1-2]; attempt 2 crashed: rank 2 on node3: Killed"


def test_the_speed_of_an_attempt_that_is_over_is_not_shown():
    told = {"num_attempts": 4, "newest": newest(), "row": {**ROW, "attempt": 2}}
    line = row_of(seen(RUN, jobs=(queued(RUN),), **told))
    assert (line.step, line.images_per_s, line.says) == ("1,000/5,000", "", "starting on node[1-2]")
    told = {"num_attempts": 4, "newest": newest(ended()), "row": ROW}
    line = row_of(seen(RUN, **told))
    assert (line.images_per_s, line.says) == ("", "rank 2 on node3: Killed")


def test_an_attempt_without_an_end_was_lost_when_its_job_waits_or_is_gone():
    told = {"num_attempts": 4, "newest": newest(), "row": ROW}
    job = queued(RUN, state="PENDING", reason="Resources")
    assert row_of(seen(RUN, jobs=(job,), **told)).says == "waits for nodes; attempt 3 was lost"
    assert row_of(seen(RUN, **told)).says == "no word from attempt 3, and no job in the queue"
    assert row_of(seen(RUN, before=ended(), **told)).says.endswith(
        "; attempt 2 crashed: rank 2 on node3: Killed"
    )


@pytest.mark.parametrize(
    ("told", "problem", "expected"),
    [
        ({"jobs": (queued(RUN),)}, None, True),
        ({"jobs": (queued(RUN, state="PENDING"),)}, None, False),
        ({"jobs": (queued(RUN, job_id="13"),)}, None, False),
        ({}, None, False),
        ({}, "no squeue", None),
    ],
)
def test_whether_an_attempt_goes_on_is_known_or_not(told, problem, expected):
    run = seen(RUN, num_attempts=4, newest=newest(), **told)
    assert goes_on(run, Word(problem=problem)) is expected
    assert goes_on(replace(run, newest=newest(ended())), Word(problem=problem)) is False


def test_stages_of_a_pipeline_have_rows_of_their_own():
    event = {"stage": "encode", "words": "does not begin: too few"}
    jobs = (
        queued(RUN, shown_id="13", job_name="a-report", state="PENDING", reason="Dependency"),
        queued(RUN, shown_id="11", job_name="a-train-coordinator", state="PENDING"),
        queued(RUN, shown_id="9_0", job_name="a-encode"),
        queued(RUN, shown_id="9_1", job_name="a-encode", state="PENDING", reason="Resources"),
        queued(RUN, shown_id="12", state="PENDING", reason="Dependency", dependency="afterok:9"),
    )
    found = list(
        lines(seen(RUN, jobs=jobs, event=event), Word(places={"9": Place(1, 2, "p")}), "a")
    )
    assert [(each.stage, each.job, each.state) for each in found] == [
        ("encode", "9", "1 running, 1 pending"),
        ("train-coordinator", "11", "pending"),
        ("train", "12", "pending"),
        ("report", "13", "pending"),
    ]
    assert found[0].says == "waits for nodes, 1 of 2 in p"
    assert found[2].says == "waits for job 9"
    (line,) = lines(seen(RUN, event=event), Word(), "a")
    assert line.says == "encode: does not begin: too few"


@pytest.mark.parametrize(
    ("name", "folder", "stage"),
    [
        ("a", "/runs/a", "train"),
        ("other", "/runs/a", "train"),
        ("a-encode", "/runs/a", "encode"),
        ("a-train-coordinator", "/runs/a", "train-coordinator"),
        ("my-encode", "/runs/my-encode", "train"),
        ("my-report", "/runs/my-report/003", "train"),
    ],
)
def test_the_stage_of_a_job_is_told_by_its_name(name, folder, stage):
    assert stage_of(queued(Path(folder), job_name=name), Path(folder)) == stage


def test_a_task_of_a_sweep_works_for_the_folder_of_its_run():
    fields = dict.fromkeys(Queued.__dataclass_fields__, "")
    comment = sweep_comment(Path("/runs/a b"), 1000)
    task = Queued(**{**fields, "comment": comment, "shown_id": "12_3"})
    assert (task.folder, task.array) == (Path("/runs/a b/1003"), "12")
    whole = Queued(**{**fields, "comment": sweep_comment(RUN, 0), "shown_id": "12_[3-7]"})
    assert whole.folder == RUN


def test_places_are_counted_by_priority_among_those_that_wait_for_nodes():
    rows = [
        ("5", "gpu", "100", "Priority"),
        ("4", "gpu,cpu", "300", "Resources"),
        ("6", "gpu", "900", "Dependency"),
        ("7", "gpu", "900", "JobHeldUser"),
        ("3", "gpu", "100", "Priority"),
        ("3", "gpu", "100", "Priority"),
        ("8", "cpu", "400", "Priority"),
    ]
    assert places(rows) == {
        "4": Place(1, 3, "gpu"),
        "3": Place(2, 3, "gpu"),
        "5": Place(3, 3, "gpu"),
        "8": Place(1, 2, "cpu"),
    }
    assert not waits_for_nodes("RUNNING", "None")
