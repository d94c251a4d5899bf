"""Adapters under a real engine: the same numbers in every layout, and the base stays as it is."""

import math
import shutil

import pytest

from tests.lora_base import BASES, lora_keys, save_base, section
from tests.multiproc.toys import STEPS, assert_equal, everything, interrupted, log, run_toy
from tests.tiny import tiny_config
from trainer.models.layers import num_adapter_parameters
from trainer.plan import num_trained
from trainer.runtime.checkpoint import newest_valid

pytestmark = pytest.mark.multiproc
# (ZeRO stage, ranks)
LAYOUTS = {
    "transformer": [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2)],
    "unet": [(0, 1), (1, 2), (2, 2), (3, 2)],
}
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
        for stage, world in LAYOUTS[kind]
    }


def resumed(runs, layout, tmp_path):
    """A run that stopped in the middle, in its own folder with what it knows of its base."""
    source, _ = runs[layout]
    run = interrupted(source, tmp_path / "again", SAVE_AT)
    shutil.copy(source / "base.json", run)
    return run


def test_losses_and_adapters_are_the_same_in_every_layout(runs):
    reference, expected = runs[0, 1]
    assert len(expected) == STEPS
    for layout, (run, losses) in runs.items():
        assert losses == pytest.approx(expected, rel=1e-5), layout
        assert_equal(run, reference)


def test_interrupted_equals_uninterrupted_bit_for_bit(kind, base, runs, tmp_path):
    """The base is read again from its folder, so training cannot have changed it either."""
    whole, losses = runs[1, 2]
    run = resumed(runs, (1, 2), tmp_path)
    assert run_toy(run, 1, 2, **lora_keys(kind, base)) == losses[SAVE_AT:]
    assert_equal(run, whole, exact=True)


def test_adapters_load_at_another_stage_and_world_size(kind, base, runs, tmp_path):
    source, losses = runs[3, 2]
    run = resumed(runs, (3, 2), tmp_path)
    assert run_toy(run, 0, 1, **lora_keys(kind, base)) == pytest.approx(losses[SAVE_AT:], rel=1e-5)
    assert_equal(run, source)


def test_checkpoints_hold_adapters_and_nothing_else(kind, base, runs):
    keys = lora_keys(kind, base)
    cfg = tiny_config(**{key.replace(".", "__"): value for key, value in keys.items()})
    count = num_adapter_parameters(section(BASES[kind]), cfg.lora)
    assert num_trained(cfg) == count
    tensors, record = everything(runs[2, 2][0])
    assert sum(map(math.prod, record.shapes.values())) == count
    assert all(".lora_" in name for name in tensors)
    by_kind = {
        each: sum(t.numel() for n, t in tensors.items() if n.startswith(each)) / count
        for each in ("weight", "ema", "optim")
    }
    assert by_kind == {"weight": 1, "ema": 1, "optim": 2}


def test_another_base_is_refused_at_resume(kind, base, runs, tmp_path):
    run = resumed(runs, (0, 1), tmp_path)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (weights,) = (other / kind).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run_toy(run, 0, 1, code=2, **lora_keys(kind, other))
    said = log(run)
    assert "has weights with fingerprint" in said
    assert "were trained on" in said
    assert "Bring those back, or choose another run=." in said


def test_adapters_stay_on_a_run_that_trains_on(tmp_path):
    """They sit on adapters here; the base run has newer checkpoints when its heir resumes."""
    save_base(BASES["transformer"], tmp_path / "base")
    first, heir, whole = (tmp_path / name for name in ("first", "heir", "whole"))
    keys = lora_keys("transformer", tmp_path / "base")
    run_toy(first, 0, 1, **keys)
    on_first = {**keys, "start_from": str(first)}
    losses = run_toy(whole, 0, 1, **on_first)
    begun = run_toy(heir, 0, 1, steps=SAVE_AT, **on_first)
    assert begun == losses[:SAVE_AT]
    at = newest_valid(first / "checkpoints")
    run_toy(first, 0, 1, steps=STEPS + 2, **keys)
    assert newest_valid(first / "checkpoints") != at
    assert run_toy(heir, 0, 1, **on_first) == losses
    shutil.rmtree(at)
    run_toy(heir, 0, 1, steps=STEPS + 2, code=2, **on_first)
    assert f"of step {STEPS}. Bring those back" in log(heir)
