"""Adapters under a real engine: the same numbers in every layout, and the base stays as it is."""

import json
import shutil

import pytest
import torch

from tests.lora_base import BASES, lora_keys, save_base, section
from tests.multiproc.toys import STEPS, assert_equal, everything, interrupted, log, run_toy
from trainer.begin import load_trained
from trainer.config import TrainConfig
from trainer.frozen import read_yaml
from trainer.models.denoisers import build_denoiser
from trainer.models.layers import num_adapter_parameters
from trainer.runtime.checkpoint import newest_valid
from trainer.runtime.weights import read_weights

pytestmark = pytest.mark.multiproc
LAYOUTS = [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2)]  # (ZeRO stage, ranks)
SAVE_AT = 2


@pytest.fixture(scope="module", params=BASES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / kind
    save_base(BASES[kind], folder)
    return folder


@pytest.fixture(scope="module")
def runs(kind, base, tmp_path_factory):
    root = tmp_path_factory.mktemp(kind)
    return {
        (stage, world): (
            run := root / f"stage{stage}_world{world}",
            run_toy(run, stage, world, **lora_keys(kind, base)),
        )
        for stage, world in LAYOUTS
    }


def test_loss_of_every_step_is_the_same_in_every_layout(runs):
    _, expected = runs[0, 1]
    assert len(expected) == STEPS
    assert expected[-1] != expected[0]
    for layout, (run, losses) in runs.items():
        assert losses == pytest.approx(expected, rel=1e-5), layout
        assert_equal(run, runs[0, 1][0])
