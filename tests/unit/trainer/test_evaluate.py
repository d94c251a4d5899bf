"""Laws of the evaluation."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.scenes import is_held_out, parse
from tests.tiny_dataset import publish, sample
from tests.tiny_run import denoiser_config, encode_dataset, save_run
from trainer import evaluate, judging
from trainer.config_tools import EvaluateConfig
from trainer.frozen import compose
from trainer.models.denoisers import build_denoiser


def config(run, *words):
    few = ["sampling.num_steps=1", "sampling.solver=ddim", "threads=1", "num_captions=12"]
    rest = ["num_unseen_pairs=4", "num_reconstructions=2", "num_loss_pairs=6", "num_loss_times=3"]
    rest += ["features=none"]
    return compose(EvaluateConfig, "evaluate", [f"run={run}", *few, *rest, *words])


@given(count=st.integers(1, 10_000), data=st.data())
def test_wilsons_interval_holds_its_share_and_lies_in_bounds(count, data):
    right = data.draw(st.integers(0, count))
    share = judging.wilson(right, count)
    assert 0 <= share.low <= share.value <= share.high <= 1
    opposite = judging.wilson(count - right, count)
    assert share.low == pytest.approx(1 - opposite.high)


def test_wilsons_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for p in (0.05, 0.5, 0.9):
        for right in rng.binomial(80, p, size=2000):
            share = judging.wilson(int(right), 80)
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
    index = json.loads((run / "samples/index.json").read_text())
    assert sorted(entry["caption"] for entry in index["samples"]) == sorted(texts)
