"""A pipeline on this machine: interrupted, continued, held up by a gate, damaged and repaired."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.serve import serving
from tests.e2e.conftest import kiln
from tests.tiny_pipeline import contents, flip, made_anew, make_source, tars, words

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Forty pictures, of which one is missing, served."""
    out = make_source(tmp_path_factory.mktemp("source") / "source", 40, "faults.missing_frac=0.03")
    with serving(out):
        yield out


def events(run):
    rows = (run / "pipeline/events.jsonl").read_text().splitlines()
    return [(row["stage"], row["words"]) for row in map(json.loads, rows)]


def interrupt(line, dataset):
    """Start a line and press Ctrl-C when the first shard is there; return what was said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    deadline_s = time.monotonic() + 120
    while not list(dataset.glob("units/*.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    return said


def test_a_pipeline_goes_on_where_it_was_stopped_and_repeats_only_what_is_damaged(source, tmp_path):
    run = tmp_path / "run"
    dataset = run / "dataset"
    stages = "stages=[prepare,encode,train]"
    line = ["pipeline", *words(source, run, "prepare.max_tasks=2", stages)]

    said = interrupt(line, dataset)
    assert "parts=2 part=0-1" in said
    assert "kiln pipeline: interrupted; the same command continues." in said
    assert "Traceback" not in said
    recorded = {path.stem for path in dataset.glob("units/*.json")}
    published = {name: tar for name, tar in tars(dataset).items() if Path(name).stem in recorded}
    assert 0 < len(published) < 10

    said = kiln(*line, "gates.train.min_kept_frac=1", code=2)
    assert "train: does not begin: 39 of 40 rows became samples" in said
    assert "kiln pipeline: train was not begun, and why is above." in said
    assert not made_anew(published, tars(dataset))
    assert not (run / "config.yaml").exists()

    before = tars(dataset)
    assert len(before) == 20
    damaged = {sorted(before)[4], sorted(before)[15]}
    for name in damaged:
        flip(dataset / name)
    kiln(*line, "stages=[prepare,encode]")
    after = tars(dataset)
    assert made_anew(before, after) == damaged
    assert contents(after) == contents(before)
    assert events(run)[-2:] == [
        ("prepare", "1 of 10 are missing or damaged; tasks: 1"),
        ("encode", "1 of 10 are missing or damaged; tasks: 1"),
    ]
    assert (run / "pipeline.yaml").exists()
    assert (run / "code/trainer/pipeline.py").exists()
    assert (run / "environment.txt").exists()
