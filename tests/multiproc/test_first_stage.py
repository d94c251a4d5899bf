"""An autoencoder and its discriminator under one engine: the same numbers in every layout."""

import pytest

from tests.multiproc.toys import STEPS, assert_equal, everything, interrupted, run_toy
from trainer.runtime.compiled import build_cpu_op

pytestmark = pytest.mark.multiproc
MIXED, CROPS = 0.5, 0.0  # share of the pictures that are learned whole
# (ZeRO stage, ranks) and that share; the first of a share is the reference of the others.
LAYOUTS = [(0, 1, MIXED), (1, 1, MIXED), (2, 2, MIXED), (0, 1, CROPS), (3, 2, CROPS)]
SAVE_AT = 2
SETTINGS = {
    "optim.learning_rate": 1e-3,
    "encoders.image_side_px": 16,
    "model": {
        "kind": "autoencoder_kl",
        "latent_channels": 3,
        "block_channels": [6, 10],
        "layers_per_block": 1,
        "norm_groups": 2,
        "mid_attention": False,
        "num_parameters": 10_000,
    },
    "objective": {
        "kind": "reconstruction",
        "absolute_weight": 0.1,
        "kl_weight": 0.01,
        "crop_side_px": 12,
        "whole_frac": MIXED,
        "discriminator": {
            "weight": 0.5,
            "start_images": 8 * SAVE_AT,
            "block_channels": [5, 6, 7],
            "norm_groups": 1,
        },
    },
}


def train(run, stage, world, whole_frac):
    return run_toy(run, stage, world, **SETTINGS, **{"objective.whole_frac": whole_frac})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Uninterrupted runs by layout: folder and losses."""
    build_cpu_op()
    root = tmp_path_factory.mktemp("first_stage")
    return {
        layout: (run := root / "-".join(map(str, layout)), train(run, *layout))
        for layout in LAYOUTS
    }


@pytest.mark.parametrize(("stage", "world", "whole_frac"), LAYOUTS)
def test_both_networks_are_trained_alike_in_every_layout(runs, stage, world, whole_frac):
    reference, expected = runs[0, 1, whole_frac]
    run, losses = runs[stage, world, whole_frac]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_equal(run, reference)


@pytest.mark.parametrize("layout", [(2, 2, MIXED), (3, 2, CROPS)])
def test_interrupted_equals_uninterrupted_bit_for_bit(runs, tmp_path, layout):
    """The checkpoint between them is from where the discriminator starts."""
    whole, losses = runs[layout]
    run = interrupted(whole, tmp_path / "again", SAVE_AT)
    assert train(run, *layout) == losses[SAVE_AT:]
    assert_equal(run, whole, exact=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_discriminator_learns_from_its_start_on(runs, tmp_path, layout):
    before, _ = everything(interrupted(runs[layout][0], tmp_path / "cut", SAVE_AT))
    after, _ = everything(runs[layout][0])
    moments = [name for name in before if "exp_avg/discriminator." in name]
    assert len(moments) == 10
    for name in moments:
        assert not before[name].any(), name
        # Pictures and reconstructions pull the last bias to opposite sides, equally.
        assert after[name].any() or name.endswith("8.bias"), name
