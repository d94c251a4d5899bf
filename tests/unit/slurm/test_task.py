"""A task without Slurm: what it runs, and when it stops; tests/cluster has how it comes back."""

import os
import signal
import subprocess
import sys

import pytest

from slurm.task import filled_in, job_name, may_come_back

STOPS = (
    "import time\nprint('on', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: exit(9)"
)
ENDS = STOPS.replace("exit(9)", "exit(0)")


def start(script, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "slurm.task", "--max-restarts=1", sys.executable, "-c", script],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


@pytest.mark.parametrize("code", [0, 3])
def test_a_command_that_ends_by_itself_ends_the_task_with_its_code(code):
    process = start(f"exit({code})")
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert f"-c exit({code})" in said


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize(("script", "code"), [(STOPS, 9), (ENDS, 0)])
def test_a_warned_command_is_told_to_stop_and_after_too_many_restarts_stays_away(
    number, script, code
):
    process = start(script, SLURM_RESTART_COUNT="1")
    assert process.stdout.readline() == "on\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert f"{number.name}: stopping" in said
    assert ("cluster.slurm.max_restarts=1: not again" in said) == bool(code)


def test_without_slurm_it_cannot_come_back(tmp_path):
    process = start(STOPS, SLURM_JOB_ID="7", PATH=str(tmp_path))
    process.stdout.readline()
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 9
    assert "could not be requeued: there is no scontrol" in said


def test_a_task_of_an_array_is_requeued_by_its_own_number():
    assert job_name({"SLURM_JOB_ID": "12"}) == "12"
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_name(array) == "9_3"


def test_a_task_writes_its_number_among_all_arrays_into_its_command():
    command = ("kiln", "encode", "note=part={task}", "part={task}")
    assert filled_in(command, 1000, {"SLURM_ARRAY_TASK_ID": "7"})[2:] == (
        "note=part={task}",
        "part=1007",
    )


def test_a_job_that_slurm_is_ending_does_not_come_back_by_itself():
    assert may_come_back({"JobState": "RUNNING"})
    assert not may_come_back({"JobState": "COMPLETING"})
    assert not may_come_back({})
