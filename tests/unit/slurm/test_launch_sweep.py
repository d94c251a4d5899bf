from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from slurm.runfile import nth_run
from slurm.spec import Site
from tests.cluster.jobs import job_of
from tests.hours import this_hour, write_hours
from trainer.cli import main
from trainer.errors import BadInput
from trainer.frozen import expand
from trainer.launch_sweep import Task, arrays, numbered

LINE = ["launch", "-m", "night", "experiment=sd2_512", "cluster=example", "data.dataset=laion"]
FOLDER = Path("/runs/night")


def test_words_with_several_values_make_combinations():
    words = ["name='a,b'", "seed=0,1", "text=t5_base", "optim.learning_rate=1e-4,2e-4"]
    fixed, combinations = expand(words, "launch")
    assert fixed == ["name='a,b'", "text=t5_base"]
    assert combinations == [
        ["seed=0", "optim.learning_rate=0.0001"],
        ["seed=0", "optim.learning_rate=0.0002"],
        ["seed=1", "optim.learning_rate=0.0001"],
        ["seed=1", "optim.learning_rate=0.0002"],
    ]
    assert expand(["seed=range(1,4)"], "launch")[1] == [["seed=1"], ["seed=2"], ["seed=3"]]
    assert ["experiment=sd2_512"] in expand(["experiment=glob(*)"], "launch")[1]


@pytest.mark.parametrize(
    ("word", "message"),
    [("seed=interval(0,1)", "has no end of values"), ("seed=choice(", "no viable alternative")],
)
def test_what_cannot_be_counted_is_refused(word, message):
    with pytest.raises(BadInput, match=message):
        expand([word], "launch")


def test_a_combination_keeps_its_number_and_new_ones_come_behind():
    first = numbered({}, [["seed=0", "a=1"], ["seed=1", "a=1"]])
    assert first == {0: ("seed=0", "a=1"), 1: ("seed=1", "a=1")}
    known = {f"{number:03d}": list(words) for number, words in first.items()}
    again = numbered(known, [["a=1", "seed=1"], ["a=1", "seed=2"], ["a=1", "seed=2"]])
    assert again == {1: ("a=1", "seed=1"), 2: ("a=1", "seed=2")}


def task(number, **changes):
    return Task(number, (), None, job_of(Path("/runs/x"), **changes), None)


def test_an_array_holds_runs_that_ask_for_the_same_and_as_many_as_slurm_takes():
    tasks = [task(n, site=Site(partition="b" if n == 3 else "a")) for n in (0, 2, 3, 4, 9, 11)]
    found = list(arrays(tasks, 5, folder=FOLDER, at_once=2))
    assert [each.numbers for each in found] == [(0, 2, 4), (9,), (11,), (3,)]
    assert [each.job.array for each in found] == [(0, 2, 4), (4,), (1,), (3,)]
    assert [each.job.comment for each in found] == [
        f"kiln:{FOLDER}/+{first}" for first in (0, 5, 10, 0)
    ]
    assert [each.job.command[-1] for each in found] == ["0", "5", "10", "0"]
    assert {each.job.at_once for each in found} == {2}
    for each in found:
        names = [nth_run(FOLDER, int(each.job.command[-1]) + n) for n in each.job.array]
        assert names == [nth_run(FOLDER, n) for n in each.numbers]


def test_a_dry_run_prints_all_and_touches_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["seed=0,1", "cluster.num_nodes=1,2", "dry_run=true", "at_once=2"]
    assert main([*LINE, *words]) == 0
    said = capsys.readouterr().out
    assert "# 000: seed=0 cluster.num_nodes=1\n" in said
    assert "# 003: seed=1 cluster.num_nodes=2\n" in said
    folder = tmp_path / "runs/night"
    assert [line for line in said.splitlines() if line.startswith("# sbatch")] == [
        f"# sbatch {folder}/submit_000.sbatch",
        f"# sbatch {folder}/submit_001.sbatch",
    ]
    assert "#SBATCH --array=0,2%2\n" in said
    assert "#SBATCH --array=1,3%2\n" in said
    assert f"#SBATCH --comment=kiln:{folder}/+0\n" in said
    assert f"-m slurm.sweep {folder} 0\n" in said
    assert not any(tmp_path.iterdir())


def test_all_arrays_of_a_sweep_begin_when_their_hours_are_best(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    write_hours(tmp_path / "hours.csv", [300, 300, 100, 200, 200, 100, 100, 300])
    deadline = f"{datetime.now(UTC) + timedelta(hours=7):%Y-%m-%dT%H:%M}Z"
    start = ["start.by=carbon", "start.hourly=hours.csv", f"start.deadline={deadline}"]
    limits = ["seed=0,1", "cluster.time_limit_min=60,120", "cluster.warn_before_kill_s=300"]
    assert main([*LINE, *limits, *start, "dry_run=true"]) == 0
    said = capsys.readouterr().out
    hour = [datetime.fromtimestamp(this_hour() + 3600 * n) for n in range(8)]
    begins = [line for line in said.splitlines() if "--begin=" in line]
    assert begins == [f"#SBATCH --begin={hour[n]:%Y-%m-%dT%H:%M:%S}" for n in (2, 5)]
    assert said.count("# begins at ") == 2
    assert main([*LINE, *limits, *start, "at_once=1", "dry_run=true"]) == 0
    assert "over 4 h, its walltime" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "-m needs a key with several values"),
        (["run=a,b"], "run is one for all runs of a sweep"),
        (["start.hours=1,2"], "start.hours is one for all runs of a sweep"),
        (["seed=0,1", "cluster=local"], "`kiln launch` is for Slurm"),
        (["seeed=0,1"], "Did you mean seed?"),
        (["batch.global_batch_images=2000,2048"], "Try "),
        (["seed=0,1"], "laion"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_the_queue(
    tmp_path, capsys, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    assert main([*LINE, *words]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_run_by_itself_has_no_others_at_once(capsys):
    assert main([*[word for word in LINE if word != "-m"], "at_once=2", "dry_run=true"]) == 2
    assert "at_once=2 is for sweeps. Add -m, or leave it out." in capsys.readouterr().err


def test_jobs_of_a_sweep_are_alike_whatever_the_number():
    assert replace(task(1).job, comment="") == replace(task(2).job, comment="")
