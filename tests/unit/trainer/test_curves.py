"""Laws of the curves of quality against steps and guidance."""

import json

import pytest
from PIL import Image

from tests.tiny_dataset import publish, sample
from tests.tiny_run import denoiser_config, encode_dataset, save_run
from trainer import evaluate
from trainer.config_tools import EvaluateConfig
from trainer.curves import curve_passes, points
from trainer.errors import BadInput
from trainer.frozen import compose
from trainer.labels import XMP
from trainer.models.denoisers import build_denoiser

CURVES = "curves={steps: [2, 1], guidance: [1, 3], solvers: [heun, dpm_2m], num_captions: 5}"


def config(run, *words):
    few = ["sampling.num_steps=1", "sampling.solver=ddim", "threads=1", "num_captions=8"]
    few += ["num_unseen_pairs=0", "num_reconstructions=0", "num_loss_pairs=0", "features=none"]
    return compose(EvaluateConfig, "evaluate", [f"run={run}", *few, CURVES, *words])


def read(run):
    return json.loads((run / "evaluations/curves.json").read_text())


def test_every_point_is_drawn_scored_and_shown(tiny_run):
    assert evaluate.run(config(tiny_run)) == 0
    told = read(tiny_run)
    assert (told["step"], told["num_captions"]) == (8, 5)
    found = [(row["curve"], row["solver"], row["x"]) for row in told["points"]]
    assert found == [
        ("steps", "heun", 1), ("steps", "dpm_2m", 1), ("steps", "heun", 2), ("steps", "dpm_2m", 2),
        ("guidance", "ddim", 1), ("guidance", "ddim", 3),
    ]  # fmt: skip
    for row in told["points"]:
        score = row["scores"]["shape_and_colour_frac"]
        assert score["low"] <= score["value"] <= score["high"]
        assert score["count"] == 5
    folder = tiny_run / "evaluations"
    for name in ("curves_steps", "curves_guidance", "grid_steps", "grid_guidance"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200
            assert name.startswith("curves") or "trainedAlgorithmicMedia" in picture.text[XMP]
    strip = folder / "curves" / told["points"][0]["pictures"]
    with Image.open(strip) as picture:
        assert picture.text["steps"] == "1"


def test_a_second_command_draws_only_what_is_missing(tiny_run):
    evaluate.run(config(tiny_run))
    first = read(tiny_run)
    folder = tiny_run / "evaluations/curves"
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    gone = folder / first["points"][2]["pictures"]
    gone.unlink()
    evaluate.run(config(tiny_run))
    assert read(tiny_run) == first
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    changed = {name for name in after if after[name] != stamps.get(name)}
    assert changed - {".lock"} == {gone.name, gone.with_suffix(".json").name}


def test_a_point_of_other_settings_is_another_point(tiny_run):
    evaluate.run(config(tiny_run))
    count = len(list((tiny_run / "evaluations/curves").glob("*.json")))
    evaluate.run(config(tiny_run, "sampling.seed=3"))
    assert len(list((tiny_run / "evaluations/curves").glob("*.json"))) == 2 * count


def test_the_picture_of_one_step_of_a_solver_is_that_of_an_evaluation(tiny_run):
    evaluate.run(config(tiny_run, "sampling.guidance_scale=3"))
    (row,) = [r for r in read(tiny_run)["points"] if (r["curve"], r["x"]) == ("guidance", 3)]
    with Image.open(tiny_run / "evaluations/curves" / row["pictures"]) as strip:
        left = strip.crop((0, 0, strip.height, strip.height)).tobytes()
    with Image.open(tiny_run / "samples/sample_0000.png") as picture:
        assert picture.convert("RGB").tobytes() == left


def test_a_negative_prompt_goes_where_guidance_does(tiny_run):
    cfg = config(tiny_run, "sampling.negative=blurry", "sampling.guidance_scale=2")
    told = {p.x: p.sampling.negative for p in points(cfg) if p.curve == "guidance"}
    assert told == {1: "", 3: "blurry"}
    # 5 captions: heun asks twice a step, and guidance twice that.
    assert curve_passes(cfg) == 5 * (2 * (1 + 2) * 2 + 2 * (1 + 2) + 1 + 2)


def test_a_solver_that_cannot_is_refused_before_anything_is_drawn(tiny_run):
    words = [CURVES.replace("dpm_2m", "euler_maruyama")]
    with pytest.raises(BadInput, match="solver=euler_maruyama"):
        evaluate.run(config(tiny_run, *words))
    assert not (tiny_run / "evaluations").exists()


def test_curves_without_points_are_refused(tiny_run):
    with pytest.raises(BadInput, match="no points"):
        config(tiny_run, "curves={steps: [4], guidance: [], solvers: []}")


def test_pictures_that_nothing_can_score_have_no_curves(tmp_path, tiny_encoder_section):
    dataset = publish(tmp_path / "data", [[sample(i, text=f"{i} potatoes") for i in range(9)]])
    encode_dataset(dataset, tiny_encoder_section)
    cfg = denoiser_config(tmp_path / "run", dataset, tiny_encoder_section)
    run = save_run(cfg, tmp_path / "run", build_denoiser(cfg.model))
    with pytest.raises(BadInput, match="curves= needs something to score"):
        evaluate.run(config(run))
    words = ["features=efficientnet_lite0", "features.side_px=32"]
    words += [CURVES.replace("num_captions: 5", "num_captions: 8")]
    evaluate.run(config(run, *words))
    for row in read(run)["points"]:
        assert {"frechet_distance", "kernel_distance"} <= set(row["scores"])
