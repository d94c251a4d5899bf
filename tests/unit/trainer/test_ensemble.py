"""Laws of the variance beside a picture."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.unit.trainer.test_sample import CAPTIONS, config, load, pixels
from trainer import sample as command
from trainer.config_tools import UncertaintyConfig
from trainer.ensemble import heat_map, members

PROMPTS = "prompts=[{}]".format(",".join(f'"{caption}"' for caption in CAPTIONS))
SEEDS, WEIGHTS = (f"uncertainty={{over:{over},count:3}}" for over in ("seeds", "weights"))


def draw(run, out, *words):
    assert command.run(config(run, PROMPTS, f"out={out}", "num_reconstructions=0", *words)) == 0


def test_variance_over_seeds_is_that_of_the_prompts_pictures(tiny_run, tmp_path):
    draw(tiny_run, tmp_path, "images_per_prompt=3", SEEDS, "sampling.batch_images=2")
    for number in range(len(CAPTIONS)):
        name = f"sample_{number:04d}"
        files = [tmp_path / f"{name}{suffix}.png" for suffix in ("", "_01", "_02")]
        expected = np.stack([pixels(file) / 255 for file in files]).var(0, ddof=1)
        found = np.load(tmp_path / f"{name}_variance.npy")
        assert found.dtype == np.float32
        assert found.max() > 0
        # Batches of others differ by rounding, that is by up to a 255th.
        np.testing.assert_allclose(found, expected, atol=3 / 255 * np.sqrt(expected.max()))


def test_the_scale_of_the_heat_map_is_beside_it(tiny_run, tmp_path):
    draw(tiny_run, tmp_path, SEEDS)
    facts = json.loads((tmp_path / "sample_0000_variance.json").read_text())
    variance = np.load(tmp_path / "sample_0000_variance.npy")
    brightest = np.sqrt(variance.mean(2)).max()
    assert facts["heat_map"]["brightest"] == pytest.approx(brightest, rel=1e-6)
    assert facts["uncertainty"] == ["noise 0", "noise 1", "noise 2"]
    with Image.open(tmp_path / "sample_0000_variance.png") as picture:
        assert json.loads(picture.text["heat_map"]) == facts["heat_map"]
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["samples"][1]["variance"] == "sample_0001_variance.png"


def test_over_weights_every_kept_checkpoint_draws_the_same_noise(tiny_run, tmp_path):
    draw(tiny_run, tmp_path, WEIGHTS)
    facts = json.loads((tmp_path / "sample_0000_variance.json").read_text())
    assert [name.split()[0] for name in facts["uncertainty"]] == [
        "step_00000008/ema",
        "step_00000008/raw",
    ]
    sampler = load(tiny_run)
    every = members(sampler, tiny_run, UncertaintyConfig(over="weights", count=2))
    sampling = config(tiny_run).sampling
    drawn = [each.sampler().sample(CAPTIONS[:1], sampling)[0] / 255 for each in every]
    found = np.load(tmp_path / "sample_0000_variance.npy")
    expected = np.stack(drawn).var(0, ddof=1)
    np.testing.assert_allclose(found, expected, atol=3 / 255 * np.sqrt(expected.max()))
    assert (pixels(tmp_path / "sample_0000.png") / 255 - drawn[0]).max() <= 1 / 255


def test_a_variance_that_is_there_is_kept_and_one_not_asked_for_goes(tiny_run, tmp_path):
    draw(tiny_run, tmp_path, SEEDS)
    before = (tmp_path / "sample_0001_variance.npy").stat().st_mtime_ns
    draw(tiny_run, tmp_path, SEEDS)
    assert (tmp_path / "sample_0001_variance.npy").stat().st_mtime_ns == before
    draw(tiny_run, tmp_path)
    assert not list(tmp_path.glob("*variance*"))


def test_nothing_that_varies_is_black():
    picture, brightest = heat_map(np.zeros((4, 4, 3)))
    assert brightest == 0
    assert picture.max() < 10
    variance = np.zeros((4, 4, 3))
    variance[1, 2] = 0.04
    picture, brightest = heat_map(variance)
    assert brightest == pytest.approx(0.2)
    assert picture[1, 2].sum() > picture[0, 0].sum() + 300
