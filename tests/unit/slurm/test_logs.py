import os
import subprocess
import sys
import threading
import time

import pytest

from slurm.log_files import start_of_last
from slurm.logs import long_options
from slurm.runfile import write_json
from tests.seen_runs import attempt, launched, metrics
from trainer.cli import main
from trainer.errors import BadInput
from trainer.observe.evaluations import hold_metrics


@pytest.fixture(autouse=True)
def _no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def run(tmp_path):
    """Two attempts of two ranks on two nodes."""
    run = launched(tmp_path / "a")
    for number in range(2):
        folder = attempt(run, number, cause="crashed")
        for rank in range(4):
            lines = "".join(f"attempt {number} rank {rank} line {n}\n" for n in range(30))
            (folder / f"rank_{rank:05d}.log").write_text(lines)
    (run / "attempts/slurm_12.log").write_text("of the script\n")
    return run


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["a", "-f", "--rank", "3"], ["a", "follow=true", "rank=3"]),
        (["--follow", "--rank=3", "a"], ["follow=true", "rank=3", "a"]),
        (["a", "-n", "5", "--attempt", "2"], ["a", "lines=5", "attempt=2"]),
        (["a", "rank=batch"], ["a", "rank=batch"]),
    ],
)
def test_options_may_be_typed_as_elsewhere(typed, words):
    assert long_options(typed) == words


def test_an_option_without_its_number_is_refused():
    with pytest.raises(BadInput, match="--rank needs a number after it, as in `--rank 3`"):
        long_options(["a", "--rank"])


@pytest.mark.parametrize(
    ("words", "first", "count"),
    [
        ([], "attempt 1 rank 0 line 0", 30),
        (["--rank", "3"], "attempt 1 rank 3 line 0", 30),
        (["--rank", "3", "attempt=0"], "attempt 0 rank 3 line 0", 30),
        (["-n", "2"], "attempt 1 rank 0 line 28", 2),
        (["rank=batch"], "of the script", 1),
    ],
)
def test_the_log_that_is_asked_for_is_printed(run, capsys, words, first, count):
    assert main(["logs", str(run), *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert (said[0], len(said)) == (first, count)


def test_where_no_rank_has_begun_the_script_tells_why(run, capsys):
    attempt(run, 2, cause="bad_node")
    assert main(["logs", str(run)]) == 0
    assert capsys.readouterr().out == "of the script\n"
    assert main(["logs", str(run), "--rank", "1"]) == 2
    assert "there is no log of rank 1 in" in capsys.readouterr().err


def test_before_the_first_attempt(tmp_path, capsys):
    run = launched(tmp_path / "a")
    assert main(["logs", str(run)]) == 2
    assert f"no attempt of {run} has begun yet" in capsys.readouterr().err
    (run / "attempts/slurm_12.log").write_text("module: command not found\n")
    assert main(["logs", str(run)]) == 0
    assert capsys.readouterr().out == "module: command not found\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "4"], "attempt 1 of {run} has no rank 4. It has 4 ranks, 0 to 3."),
        (["attempt=7"], "{run} has no attempt 7. There are: 0-1."),
        (["--rank", "x"], "rank"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(run, capsys, words, message):
    assert main(["logs", str(run), *words]) == 2
    assert message.format(run=run) in capsys.readouterr().err


def test_rank_0_of_kiln_train_wrote_to_the_terminal(tmp_path, capsys):
    run = tmp_path / "a"
    folder = run / "attempts/000"
    folder.mkdir(parents=True)
    (folder / "rank_00001.log").write_text("of rank 1\n")
    assert main(["logs", str(run)]) == 2
    said = capsys.readouterr().err
    assert "whose rank 0 wrote to the terminal. Of the others give --rank: 1." in said
    assert main(["logs", str(run), "--rank", "1"]) == 0
    assert capsys.readouterr().out == "of rank 1\n"
    assert main(["logs", str(run), "--rank", "7"]) == 2
    assert "has no log of rank 7. Of the others give --rank: 1." in capsys.readouterr().err


def test_a_run_of_kiln_train_is_followed_until_it_ends(tmp_path, capsys):
    run = tmp_path / "a"
    log = run / "attempts/000/rank_00001.log"
    log.parent.mkdir(parents=True)
    metrics(run, 0, [1])
    log.write_text("before\n")
    held = hold_metrics(run)

    def go_on():
        time.sleep(1)
        with log.open("a") as file:
            file.write("meanwhile\n")
        time.sleep(1)
        held.close()

    thread = threading.Thread(target=go_on)
    thread.start()
    assert main(["logs", str(run), "-f", "--rank", "1"]) == 0
    thread.join()
    assert capsys.readouterr().out == "before\nmeanwhile\n"


def test_following_goes_over_to_the_next_attempt_and_ends_with_the_last(run, capsys):
    def go_on():
        time.sleep(1)
        with (run / "attempts/slurm_12.log").open("a") as file:
            file.write("again\n")
        folder = attempt(run, 2)
        time.sleep(1)
        (folder / "rank_00000.log").write_text("attempt 2\n")
        time.sleep(1)
        end = {"cause": "stopped", "why": "x", "unix_s": 1.0, "saved_step": 1, "suspects": {}}
        write_json(folder / "end.json", end)

    thread = threading.Thread(target=go_on)
    thread.start()
    assert main(["logs", str(run), "-f", "lines=1"]) == 0
    thread.join()
    assert capsys.readouterr().out == "attempt 1 rank 0 line 29\nagain\nattempt 2\n"


def test_a_reader_that_has_enough_is_no_error(run):
    (run / "attempts/001/rank_00000.log").write_text("line\n" * 100_000)
    command = f"{sys.executable} -m trainer.cli logs {run} | /usr/bin/head -n 1"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", command],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "line\n"
    assert "Broken" not in done.stderr


@pytest.mark.parametrize("text", ["", "a\n", "a\nb\n", "a\nb", "\n\n\n", "xyz\n" * 50_000])
@pytest.mark.parametrize("lines", [1, 2, 3, 40_000])
def test_the_last_lines_begin_where_they_do(tmp_path, text, lines):
    path = tmp_path / "log"
    path.write_text(text)
    expected = "".join(text.splitlines(keepends=True)[-lines:])
    assert text[start_of_last(path, lines) :] == expected
