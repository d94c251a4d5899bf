"""A real DeepSpeed engine on gloo: the same numbers at every world size and ZeRO stage."""

import shutil
import time

import pytest

from tests.multiproc.toys import STEPS, assert_equal, everything, interrupted, run_toy
from trainer.errors import BadInput, BadWorld
from trainer.runtime.checkpoint import newest_valid, read_record, verify
from trainer.runtime.compiled import build_cpu_op
from trainer.runtime.local import run_ranks
from trainer.runtime.rundir import RECORD, complete
from trainer.runtime.weights import read_weights

pytestmark = pytest.mark.multiproc
SAVE_AT = 2
LAYOUTS = [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2), (1, 4), (3, 4)]  # (ZeRO stage, ranks)
EMA = {"ema.half_life_images": [16], "ema.warmup_ratio": 1.0, "ema.power_sigma_rel": [0.05, 0.1]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Uninterrupted runs by layout: folder and losses."""
    build_cpu_op()
    root = tmp_path_factory.mktemp("toy")
    return {
        (stage, world): (
            run := root / f"stage{stage}_world{world}",
            run_toy(run, stage, world, **EMA),
        )
        for stage, world in LAYOUTS
    }


def test_loss_of_every_step_is_the_same_in_every_layout(runs):
    _, expected = runs[0, 1]
    assert len(expected) == STEPS
    for layout, (_, losses) in runs.items():
        assert losses == pytest.approx(expected, rel=1e-5), layout


def test_weights_moments_and_averages_are_the_same_in_every_layout(runs):
    expected = runs[0, 1][0]
    assert len(everything(expected)[1].averages) == 3
    for run, _ in runs.values():
        assert_equal(run, expected)


def test_interrupted_equals_uninterrupted_bit_for_bit_at_equal_layout(runs, tmp_path):
    whole, losses = runs[1, 2]
    run = interrupted(whole, tmp_path / "again", SAVE_AT)
    assert run_toy(run, 1, 2, **EMA) == losses[SAVE_AT:]
    assert_equal(run, whole, exact=True)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((1, 2), (3, 1)), ((3, 4), (0, 2)), ((2, 2), (1, 1)), ((0, 1), (2, 2)), ((0, 2), (3, 4))],
)
def test_a_checkpoint_loads_at_another_stage_and_world_size(runs, tmp_path, saved, loaded):
    source, losses = runs[saved]
    run = interrupted(source, tmp_path / "elastic", SAVE_AT)
    micro = {"batch.micro_batch_images": 8 // loaded[1] // 2}
    assert run_toy(run, *loaded, **EMA, **micro) == pytest.approx(losses[SAVE_AT:], rel=1e-5)
    assert_equal(run, source)


@pytest.mark.parametrize(
    "changes",
    [
        {"engine.precision": "bf16"},
        {"engine.precision": "fp16"},
        {"engine.offload": "optimizer"},
        {"optim.kind": "adafactor", "engine.zero_stage": 0},
        {"engine.compile": True, "engine.attention": "math", "engine.channels_last": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_interrupted_equals_uninterrupted_in_every_engine(tmp_path, changes):
    stage = changes.pop("engine.zero_stage", 1)
    settings = {"allow_fp16": True, **changes}
    whole = run_toy(tmp_path / "whole", stage, 2, **settings)
    run = interrupted(tmp_path / "whole", tmp_path / "again", SAVE_AT)
    assert run_toy(run, stage, 2, **settings) == whole[SAVE_AT:]
    assert_equal(run, tmp_path / "whole", exact=True)


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (3, 2)])
def test_a_sample_without_a_finite_loss_is_left_out_by_all_ranks(tmp_path, stage, world):
    """The third step has one, on one rank; the run equals one that never had it."""
    bad = 2 * 8 + 5
    healed = run_toy(tmp_path / "healed", stage, world, nan_ids=[bad])
    without = tmp_path / "without"
    without.mkdir()
    shutil.copy(tmp_path / "healed" / "rollbacks.jsonl", without)
    assert run_toy(without, stage, world, nan_ids=[bad]) == healed
    assert len(healed) == STEPS
    assert_equal(tmp_path / "healed", without, exact=True)


def test_a_damaged_checkpoint_is_passed_over(runs, tmp_path, caplog):
    run = tmp_path / "damaged"
    shutil.copytree(runs[1, 2][0], run)
    last = complete(run / "checkpoints")[-1]
    file = last / next(f.name for f in read_record(last).files if f.rank == 1)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "sha256" in str(verify(last))
    assert newest_valid(run / "checkpoints") == complete(run / "checkpoints")[0]
    assert "is damaged" in caplog.text
    file.write_bytes(content[:100])
    assert "100 bytes" in str(verify(last))
    file.unlink()
    assert "missing" in str(verify(last))
    (last / RECORD).write_text('{"schema": 99}')
    assert "schema 99" in str(verify(last))
    (last / RECORD).write_text('{"sch')
    assert "cut off" in str(verify(last))


def test_a_half_written_checkpoint_does_not_count(runs, tmp_path):
    run = tmp_path / "half"
    shutil.copytree(runs[1, 2][0], run)
    last = complete(run / "checkpoints")[-1]
    (last / RECORD).unlink()
    assert newest_valid(run / "checkpoints") == complete(run / "checkpoints")[-1] != last
    with pytest.raises(BadInput, match="no complete checkpoint; train it first"):
        read_weights(tmp_path / "nothing", "ema")


def test_a_rank_that_dies_ends_the_others_and_its_log_is_shown(tmp_path):
    started_s = time.monotonic()
    with pytest.raises(BadWorld, match=r"(?s)rank 1 of 2 ended with code 1.*is on fire"):
        run_ranks("tests.multiproc.dying_rank", [], num_ranks=2, log_dir=tmp_path, env={})
    assert time.monotonic() - started_s < 30
