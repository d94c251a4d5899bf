"""The demo in small: the same steps, fewer pictures, a shorter training; then the same again."""

import json

import pytest

from tests.e2e.conftest import kiln
from tests.tiny import SMALL_NETWORK

pytestmark = pytest.mark.e2e

SMALL = [w for w in SMALL_NETWORK if not w.startswith("logging.every")]


def demo_words(out, *more):
    train = ",".join([*SMALL, "logging.every_steps=5"])
    return [
        "demo",
        f"out={out}",
        "num_pictures=64",
        "shard_rows=32",
        "total_images=160",
        f"train=[{','.join(repr(w) for w in train.split(','))}]",
        "evaluate=['num_captions=4','num_unseen_pairs=2','sampling.num_steps=2']",
        *more,
    ]


def test_the_demo_ends_in_a_report_and_the_same_command_repeats_nothing(tmp_path):
    out = tmp_path / "demo"
    said = kiln(*demo_words(out), timeout_s=600)
    last = said.strip().splitlines()[-1]
    assert "report.html" in said.replace("\n", "")[-300:], last
    report = (out / "run/report.html").read_text()
    for word in ("rows in", "productive", "tdp_model"):
        assert word.lower() in report.lower(), word
    evaluation = json.loads((out / "run/evaluation.json").read_text())
    assert evaluation["scores"]
    manifest = json.loads((out / "dataset/manifest.json").read_text())
    assert manifest["rows_in"] == manifest["rows_kept"] + sum(manifest["rejected"].values())

    shards = {p: p.stat().st_mtime_ns for p in (out / "dataset").rglob("*.tar")}
    metrics = (out / "run/metrics.jsonl").read_bytes()
    again = kiln(*demo_words(out), timeout_s=600)
    assert again.count("nothing to do") >= 3
    assert {p: p.stat().st_mtime_ns for p in (out / "dataset").rglob("*.tar")} == shards
    assert (out / "run/metrics.jsonl").read_bytes() == metrics


def test_a_folder_of_pictures_goes_the_same_way(tmp_path):
    pictures = tmp_path / "pets"
    kiln("source", "kind=scenes", f"out={tmp_path}/painted", "num_pictures=24", "max_side_px=96")
    pictures.mkdir()
    for number, path in enumerate(sorted((tmp_path / "painted/pictures").iterdir())):
        (pictures / path.name).write_bytes(path.read_bytes())
        (pictures / f"{path.stem}.txt").write_text(f"picture number {number}")
    said = kiln(*demo_words(tmp_path / "out", f"data={pictures}"), timeout_s=600)
    assert "report.html" in said.replace("\n", "")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    said = kiln("demo", "data=nowhere", f"out={tmp_path}/out", code=2)
    assert "data=nowhere is neither scenes, emoji nor a folder" in said


def test_a_failing_step_names_its_command_and_the_way_on(tmp_path):
    said = kiln(*demo_words(tmp_path / "demo", "first_stage=nowhere"), code=1)
    assert "`kiln encode" in said
    assert "the same command continues" in said
