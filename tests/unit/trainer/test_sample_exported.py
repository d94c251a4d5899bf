"""Laws of sampling from what `kiln export` wrote, without the run and its dataset."""

import json
import shutil

import numpy as np
import pytest

from tests.unit.trainer.test_sample import CAPTIONS, config, load, pixels
from trainer import export
from trainer import sample as command
from trainer.config_tools import ExportConfig
from trainer.errors import BadInput

PROMPTS = "prompts=[{}]".format(",".join(f'"{caption}"' for caption in CAPTIONS))


@pytest.fixture
def exported(tiny_run, tmp_path):
    out = tmp_path / "exported"
    assert export.run(ExportConfig(run=str(tiny_run), out=str(out), weights="ema")) == 0
    return out


def test_an_exported_folder_draws_what_its_run_draws(tiny_run, exported, tmp_path):
    command.run(config(tiny_run, PROMPTS, f"out={tmp_path / 'a'}"))
    shutil.rmtree(tiny_run)
    before = sorted(path for path in exported.rglob("*"))
    command.run(config(exported, PROMPTS, f"out={tmp_path / 'b'}"))
    assert sorted(path for path in exported.rglob("*")) == before
    for number in range(len(CAPTIONS)):
        ours, theirs = (pixels(tmp_path / x / f"sample_{number:04d}.png") for x in "ab")
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    a, b = (json.loads((tmp_path / x / "sample_0000.json").read_text()) for x in "ab")
    for key in ("step", "images_seen", "dataset_fingerprint", "weights", "prompt", "solver"):
        assert a[key] == b[key]
    assert (tmp_path / "b" / "grid.png").exists()


def test_an_exported_folder_stays_as_it_is(exported):
    with pytest.raises(BadInput, match="Give out="):
        command.run(config(exported, PROMPTS))


def test_an_exported_folder_has_one_set_of_weights(exported, tmp_path):
    words = [PROMPTS, f"out={tmp_path / 'o'}"]
    with pytest.raises(BadInput, match="has but one set of weights"):
        command.run(config(exported, *words, "uncertainty={over:weights,count:2}"))
    assert command.run(config(exported, *words, "uncertainty={over:seeds,count:2}")) == 0


def test_what_needs_the_dataset_asks_for_the_run(exported):
    with pytest.raises(BadInput, match="Give the run"):
        load(exported).untrained()
