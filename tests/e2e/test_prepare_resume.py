"""`kiln prepare` as a user runs it: killed, interrupted, given again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.serve import serving
from tests.tiny_source import (
    make_source,
    prepare_cfg,
    prepare_overrides,
    publish_here,
    tree_hashes,
)

# One download at a time and small units, so that there is time to stop in the middle.
SLOWLY = ("shard_rows=2", "threads=1", "processes=1")
STARTED_S = 0.02  # a Python that was started so long ago is importing still


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("source")
    make_source(out)
    with serving(out):
        yield out


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    """Hashes of all files of a dataset that was published in one go, in this process."""
    cfg = prepare_cfg(source, tmp_path_factory.mktemp("whole"), "shard_rows=2")
    publish_here(cfg)  # the number of threads is no rule: the records are the slow command's
    return tree_hashes(cfg.dataset)


def start(source, dataset, *more):
    words = prepare_overrides(source, dataset, *SLOWLY, *more)
    command = [sys.executable, "-m", "trainer.cli", "prepare", *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        start_new_session=True,
    )


def wait_for_units(process, dataset, count):
    deadline_s = time.monotonic() + 120
    while len(list(dataset.glob("units/*.json"))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.mark.e2e
def test_a_killed_and_an_interrupted_prepare_end_where_an_uninterrupted_one_does(
    source, uninterrupted, tmp_path
):
    dataset = tmp_path / "dataset"
    process = start(source, dataset)
    wait_for_units(process, dataset, 3)
    process.kill()
    process.communicate()
    time.sleep(0.2)  # the worker ends with its parent
    after_kill = len(list(dataset.glob("units/*.json")))
    time.sleep(0.5)
    assert len(list(dataset.glob("units/*.json"))) == after_kill < 40
    assert not (dataset / "manifest.json").exists()

    process = start(source, dataset)
    wait_for_units(process, dataset, after_kill + 3)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 130, said
    assert f"{after_kill} of 40 units are published" in said
    assert "the same command continues" in said
    states = {json.loads(path.read_text())["state"] for path in dataset.glob("status/*.json")}
    assert states <= {"done", "interrupted"}

    process = start(source, dataset)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert tree_hashes(dataset) == uninterrupted


def wait_for_children(process, count):
    """Wait until so many processes were started; the first one is multiprocessing's own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline_s = time.monotonic() + 60
    while len(children.read_text().split()) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.e2e
@pytest.mark.parametrize(("num_children", "later_s"), [(2, 0.0), (3, STARTED_S), (3, 0.3)])
def test_ctrl_c_while_workers_start_is_one_line_of_the_command_alone(
    source, tmp_path, num_children, later_s
):
    process = start(source, tmp_path / "dataset", "processes=2")
    wait_for_children(process, num_children)
    time.sleep(later_s)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 130, said
    told = said.splitlines()
    assert told[-2:] == [
        "0 of 40 units are published and valid (0 samples).",
        "kiln prepare: interrupted; the same command continues.",
    ]
    assert "Traceback" not in said
    assert "KeyboardInterrupt" not in said
