"""The report and W&B's workspace show the same charts."""

import importlib.util
import json
import re
import sys

import pytest
import wandb
import yaml

from tests.observed_run import IMAGES_PER_STEP, write_run
from tests.wandb_server import WandbServer, needs_wandb_server
from trainer.cli import main
from trainer.config_tools import ReportConfig
from trainer.dashboard import sections_of, workspace
from trainer.frozen import compose
from trainer.observe.jsonl import JsonLines
from trainer.report import write_report

needs_workspaces = pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None, reason="needs wandb-workspaces"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with every metric that has a chart."""
    folder = write_run(tmp_path_factory.mktemp("dashboard"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["logging"] = {"wandb_project": "scenes"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    more = {"train/grad_norm": 1.0, "speed/mfu_frac": 0.4, "speed/tflops_per_rank": 120.0,
            "speed/data_wait_frac": 0.1, "speed/slowest_rank_ratio": 1.1, "energy/w": 300.0,
            "energy/j_per_image": 3.0}  # fmt: skip
    file = JsonLines(folder / "metrics.jsonl")
    for step in (201, 202):
        at = {"step": step, "images_seen": step * IMAGES_PER_STEP, "attempt": 2}
        file.append([{**at, **more, "train/loss": 0.1, "train/lr": 0.0, "time/left_s": None}])
        score = {"eval/all_frac": 0.5, "eval/all_frac_low": 0.4, "eval/all_frac_high": 0.6}
        file.append([{**at, **score, "eval_raw/fid": 20.0}])
    file.close()
    return folder


def in_report(run, tmp_path):
    """Titles of the report's charts of metrics, without their units."""
    page = tmp_path / "report.html"
    assert write_report(compose(ReportConfig, "report", [f"run={run}", f"output={page}"])) == 0
    html = page.read_text().partition('<section id="accounts">')[0]
    titles = re.findall(r"<figcaption>([^<]*)</figcaption><svg", html)
    return [title.split(" (")[0] for title in titles]


@needs_workspaces
def test_the_workspace_has_the_charts_of_the_report_in_their_order(run, tmp_path):
    made = workspace(sections_of(run), project="scenes", entity="me")
    assert [section.name for section in made.sections] == [
        "Samples", "Evaluation", "Training", "Speed", "Energy",
    ]  # fmt: skip
    plots = [plot for section in made.sections[1:] for plot in section.panels]
    assert [plot.title for plot in plots] == in_report(run, tmp_path)
    assert len(plots) == 12
    assert {plot.x for plot in plots} == {"images_seen"}
    by_title = {plot.title: plot for plot in plots}
    assert by_title["All"].y == ["eval/all_frac", "eval/all_frac_low", "eval/all_frac_high"]
    assert by_title["Fid, raw weights"].y == ["eval_raw/fid"]
    assert (by_title["Power"].title_y, by_title["Power"].range_y) == ("W", (0, None))
    assert made.sections[0].panels[0].media_keys == ["samples"]


@needs_workspaces
def test_what_a_run_has_no_numbers_of_is_shown_nowhere(tmp_path):
    run = write_run(tmp_path)
    made = workspace(sections_of(run), project="scenes", entity="me")
    titles = [plot.title for section in made.sections[1:] for plot in section.panels]
    assert titles == ["Loss", "Learning rate", "Images per second"] == in_report(run, tmp_path)


@needs_workspaces
def test_dry_run_prints_what_would_be_sent_and_asks_nobody(run, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["dashboard", str(run), "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert '"chartTitle": "Gradient norm"' in printed
    assert json.loads(printed[printed.index('{\n "Energy"') :])["Energy"][0]["config"]["xAxis"]


@needs_workspaces
@needs_wandb_server
def test_the_command_saves_it_where_the_key_belongs(run, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    with WandbServer(tmp_path / "server") as server:
        wandb.teardown()
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        assert main(["dashboard", str(run)]) == 0
        (view,) = server.views()
        wandb.teardown()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert main(["dashboard", str(run)]) == 1
        assert "W&B does not take the workspace" in capsys.readouterr().err
    assert (view["entityName"], view["projectName"], view["displayName"]) == (
        "default", "scenes", "Kiln",
    )  # fmt: skip
    assert "Gradient norm" in view["spec"]
    assert "/default/scenes?nw=kiln" in caplog.text


def test_without_the_package_it_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["dashboard", str(run), "dry_run=true"]) == 2
    assert "pip install -e '.[dashboard]'" in capsys.readouterr().err
