import json

import pytest

from trainer.cli import main
from trainer.errors import BadInput
from trainer.plan_compare import pairs

PREDICTED = {"tensors_gib": 4.0, "images_per_s": [80, 100, 120], "mfu_frac": 0.3, "wall_h": 2.0}


def make_run(folder, predicted, rows):
    folder.mkdir()
    plan = {"total_steps": 10} | ({"predicted": predicted} if predicted else {})
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(count=10, **more):
    return [
        {"step": n, "speed/images_per_s": 90.0, "memory/peak_gib": 3.0, "time_unix_s": 360.0 * n}
        | more
        for n in range(count + 1)
    ]


def test_planned_stands_beside_measured(tmp_path, capsys):
    run = make_run(tmp_path / "run", PREDICTED, rows())
    found = {pair.name: pair for pair in pairs(run)}
    assert found["images/s"].ratio == pytest.approx(0.9)
    assert found["tensors of a rank"].ratio == pytest.approx(0.75)
    assert found["wall time so far"].measured == pytest.approx(1.0)
    assert found["energy"].ratio is None
    for words in (["--compare", str(run)], [f"--compare={run}"], [f"compare={run}"]):
        assert main(["plan", *words]) == 0
        out = capsys.readouterr().out
        assert "0.9" in out
        assert "100 (80 to 120)" in out
        assert "unknown" in out


def test_of_cpus_tensors_are_not_compared_with_a_process(tmp_path):
    run = make_run(tmp_path / "run", {"tensors_gib": 0.1, "on_host": True}, rows())
    found = {pair.name: pair for pair in pairs(run)}
    assert (found["tensors of a rank"].planned, found["tensors of a rank"].measured) == (0.1, None)
    process = found["process of a rank, libraries too"]
    assert (process.planned, process.measured, process.ratio) == (None, 3.0, None)
    assert found["images/s"].ratio is None


def test_a_comparison_without_a_run_is_refused(capsys):
    for words in (["--compare"], ["compare="], ["compare=", "experiment=x"], ["compare", "run"]):
        assert main(["plan", *words]) == 2
        form = "--compare RUN" if words[0] == "--compare" else "compare=RUN"
        said = capsys.readouterr().err
        assert f"{words[0]} has no run. Give it: kiln plan {form}" in said


@pytest.mark.parametrize(
    ("predicted", "logged", "refusal"),
    [(None, rows(), "has no predictions"), (PREDICTED, [], "has logged no step yet")],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, predicted, logged, refusal):
    run = make_run(tmp_path / "run", predicted, logged)
    with pytest.raises(BadInput, match=refusal):
        pairs(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"has no plan\.json"):
        pairs(tmp_path)
