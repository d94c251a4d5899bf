"""A real DeepSpeed engine on gloo: the same numbers at every world size and ZeRO stage."""

import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from tests.forked import run_forked
from tests.multiproc.toy_rank import REPLACED, network
from tests.multiproc.toys import STEPS, assert_equal, everything, interrupted, log, run_toy
from tests.tiny import tiny_config
from trainer.errors import BadInput
from trainer.observe.accounts import close_check, totals
from trainer.observe.jsonl import read_rows
from trainer.observe.ledger import Bucket
from trainer.plan import make_plan
from trainer.runtime.checkpoint import newest_valid, read_record, verify
from trainer.runtime.comm import Comm
from trainer.runtime.compiled import build_cpu_op
from trainer.runtime.ema import Ema, decays
from trainer.runtime.engine import Engine
from trainer.runtime.env import read_rank_env
from trainer.runtime.rundir import RECORD, complete, step_of
from trainer.runtime.signals import EXIT_REQUEUE
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


def test_norm_of_every_steps_gradient_is_the_same_in_every_layout(runs):
    expected = grad_norms(runs[0, 1][0])
    assert min(expected) > tiny_config().optim.clip_grad_norm, "nothing was clipped"
    for layout, (run, _) in runs.items():
        assert grad_norms(run) == pytest.approx(expected, rel=1e-5), layout


def grad_norms(run):
    return [row["train/grad_norm"] for row in read_rows(run / "metrics.jsonl")]


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
    changes = {"faults": {"allow_fp16": True}, **changes}
    whole = run_toy(tmp_path / "whole", stage, 2, **changes)
    run = interrupted(tmp_path / "whole", tmp_path / "again", SAVE_AT)
    assert run_toy(run, stage, 2, **changes) == whole[SAVE_AT:]
    assert_equal(run, tmp_path / "whole", exact=True)


def test_a_precision_that_the_device_has_not_is_refused(tmp_path):
    settings = {"engine.precision": "fp16"}
    run_toy(tmp_path / "run", 1, 1, code=2, **settings)
    assert "computes no fp16 on this cpu. Try engine.precision=fp32" in log(tmp_path / "run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_to_one_rank_saves_and_stops_all(runs, tmp_path, name):
    whole, losses = runs[1, 2]
    run = tmp_path / "run"
    told = (8 + 3, signal.Signals[name])  # of the second step
    assert run_toy(run, 1, 2, faults={"told": told}, code=EXIT_REQUEUE, **EMA) == losses[:2]
    assert step_of(newest_valid(run / "checkpoints")) == 2
    assert run_toy(run, 1, 2, **EMA) == losses
    assert_equal(run, whole, exact=True)


def test_a_continue_signal_alone_stops_nobody(tmp_path):
    told = {"told": (11, signal.SIGCONT)}
    assert len(run_toy(tmp_path / "run", 1, 2, faults=told)) == STEPS


def test_averages_of_fragments_are_those_of_whole_weights_bit_for_bit(tmp_path):
    settings = {**EMA, "checkpoint.every_images": 8, "checkpoint.keep_last": 9}
    run = tmp_path / "run"
    run_toy(run, 1, 2, **settings)
    cfg = replace(tiny_config().ema, half_life_images=(16,), warmup_ratio=1.0)
    cfg = replace(cfg, power_sigma_rel=(0.05, 0.1))
    live = dict(network().named_parameters())
    whole = {average: {n: p.detach().clone() for n, p in live.items()} for average in decays(cfg)}
    for folder in complete(run / "checkpoints"):
        images = 8 * step_of(folder)
        raw = read_weights(run, "raw", checkpoint=folder)[0]
        for average, decay in decays(cfg).items():
            for name, tensor in whole[average].items():
                tensor.lerp_(raw[name], 1.0 - decay(8, images))
            kept = read_weights(run, average, checkpoint=folder)[0]
            assert all(torch.equal(kept[name], tensor) for name, tensor in whole[average].items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_averages_although_all_others_are_gone(tmp_path, stage):
    """So no step of the averages takes part in a collective."""
    codes = run_forked(average_alone, tmp_path, stage, num_ranks=2, log_dir=tmp_path, others_s=60)
    assert codes == [0, 0], log(tmp_path, 1)


def average_alone(folder, stage):
    env = read_rank_env()
    cfg = tiny_config(
        run=str(folder),
        cluster__ranks_per_node=2,
        batch__global_batch_images=8,
        batch__micro_batch_images=4,
        engine__zero_stage=stage,
    )
    engine = Engine(network(), cfg, make_plan(cfg), Comm(env, "cpu"))
    ema = Ema(engine.fragments, decays(cfg.ema))
    gone = folder / "gone"
    if env.rank == 0:
        gone.touch()
        return
    while not gone.exists():
        time.sleep(0.01)
    time.sleep(0.5)
    for fragment in engine.fragments:
        fragment.weight.add_(1.0)
    before = [[t.clone() for t in some] for some in ema.tensors().values()]
    ema.update(images_per_step=8, images_seen=8)
    for some, were in zip(ema.tensors().values(), before, strict=True):
        assert all((now > then).all() for now, then in zip(some, were, strict=True))


def test_bf16_weights_do_not_freeze_the_averages(tmp_path):
    """A step too small for bf16 moves the fp32 weights, and the averages with them."""
    run = tmp_path / "run"
    settings = {"engine.precision": "bf16", "optim.learning_rate": 1e-6, "optim.weight_decay": 0.0}
    run_toy(run, 1, 2, **settings, **EMA)
    raw, averaged = (read_weights(run, which)[0] for which in ("raw", "ema"))
    for name, first in network().named_parameters():
        if name.endswith("weight"):
            assert torch.equal(raw[name].bfloat16(), first.bfloat16())
            assert (raw[name] != first).any()
            assert (averaged[name] != first).any()
            assert (averaged[name] != raw[name]).any()


BAD = 3 * 8 + 5  # a sample of the fourth step, behind the checkpoint of the second


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (3, 2), (1, 1)])
def test_a_sample_without_a_finite_loss_is_left_out_by_all_ranks(tmp_path, stage, world):
    """One rank meets it; the run equals one that never had it."""
    faults = {"faults": {"nan_ids": [BAD]}}
    healed, without = tmp_path / "healed", tmp_path / "without"
    losses = run_toy(healed, stage, world, **faults)
    (row,) = read_rows(healed / "rollbacks.jsonl")
    assert (row["step"], row["back_to_step"], row["excluded_ids"]) == (4, 2, [BAD])
    without.mkdir()
    shutil.copy(healed / "rollbacks.jsonl", without)
    assert run_toy(without, stage, world, **faults) == losses
    assert len(losses) == STEPS
    assert len(read_rows(without / "rollbacks.jsonl")) == 1
    assert_equal(healed, without, exact=True)


def test_a_leap_of_the_loss_leaves_its_whole_step_out(tmp_path):
    settings = {"rollback.spike_sigmas": 20.0, "rollback.window_steps": 16}
    bad = 17 * 8 + 2
    run = tmp_path / "run"
    losses = run_toy(run, 1, 2, steps=20, faults={"wild_ids": [bad]}, **settings)
    (row,) = read_rows(run / "rollbacks.jsonl")
    assert "leapt to" in row["fault"]
    assert row["excluded_ids"] == list(range(17 * 8, 18 * 8))
    assert len(losses) == 20
    assert max(losses) < 100
    ledger = read_rows(run / "ledger.jsonl")
    assert all(closure.holds() for closure in close_check(ledger))
    assert totals(ledger)["train", Bucket.LOST_WORK].seconds > 0


def test_a_run_that_cannot_be_healed_ends_and_says_so(tmp_path):
    run = tmp_path / "run"
    everything_bad = range(16, 24)
    replaced = [n + REPLACED * k for n in everything_bad for k in (0, 1)]
    run_toy(run, 1, 2, faults={"nan_ids": replaced}, code=1, **{"rollback.max_tries": 2})
    for rank in (0, 1):
        said = log(run, rank)
        assert "the loss is nan at step 3. It was rolled back 2 times" in said
        assert "rollback.max_tries" in said
    assert step_of(newest_valid(run / "checkpoints")) == 2


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
