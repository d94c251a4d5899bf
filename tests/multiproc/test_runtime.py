"""A real DeepSpeed engine on gloo: the same numbers at every world size and ZeRO stage."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from trainer.errors import BadInput, BadWorld
from trainer.runtime.checkpoint import complete, newest_valid, read_weights, verify
from trainer.runtime.compiled import build_cpu_op
from trainer.runtime.local import run_ranks

pytestmark = pytest.mark.multiproc
STEPS, SAVE_AT = 4, 2
LAYOUTS = [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2)]  # (ZeRO stage, ranks)


def run_toy(run: Path, stage: int, world: int, *, accumulate: int = 1) -> list[float]:
    run.mkdir(exist_ok=True)
    args = {
        "run": str(run),
        "stage": stage,
        "accumulate": accumulate,
        "steps": STEPS,
        "save_at": SAVE_AT,
        "keep": 3,
    }
    code = run_ranks(
        "tests.multiproc.toy_rank",
        [json.dumps(args)],
        num_ranks=world,
        log_dir=run,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert code == 0
    return json.loads((run / "losses.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Uninterrupted runs by layout: folder and losses."""
    build_cpu_op()
    root = tmp_path_factory.mktemp("toy")
    return {
        (stage, world): (run := root / f"stage{stage}_world{world}", run_toy(run, stage, world))
        for stage, world in LAYOUTS
    }


def interrupted(source: Path, target: Path) -> Path:
    """Make a run that stopped at SAVE_AT of the given one."""
    name = f"checkpoints/step_{SAVE_AT:08d}"
    shutil.copytree(source / name, target / name)
    return target


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    out = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            out.update({key: handle.get_tensor(key) for key in handle.keys()})  # noqa: SIM118
    return out


def test_loss_of_every_step_is_the_same_in_every_layout(runs):
    _, expected = runs[0, 1]
    assert len(expected) == STEPS
    for layout, (_, losses) in runs.items():
        assert losses == pytest.approx(expected, rel=1e-5), layout


def test_ema_is_the_same_in_every_layout_and_read_without_the_model(runs):
    expected, state = read_weights(runs[0, 1][0], "ema")
    assert state.step == STEPS
    for layout, (run, _) in runs.items():
        weights, _ = read_weights(run, "ema")
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=str(layout))


def test_interrupted_equals_uninterrupted_bit_for_bit_at_equal_layout(runs, tmp_path):
    whole, losses = runs[1, 2]
    run = interrupted(whole, tmp_path / "again")
    assert run_toy(run, 1, 2) == losses[SAVE_AT:]
    name = f"checkpoints/step_{STEPS:08d}"
    first, second = tensors(whole / name), tensors(run / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("saved", "loaded"), [((1, 2), (3, 1)), ((3, 2), (0, 2)), ((2, 2), (1, 1)), ((0, 1), (2, 2))]
)
def test_a_checkpoint_loads_at_another_stage_and_world_size(runs, tmp_path, saved, loaded):
    source, losses = runs[saved]
    run = interrupted(source, tmp_path / "elastic")
    assert run_toy(run, *loaded, accumulate=2) == pytest.approx(losses[SAVE_AT:], rel=1e-5)


def test_a_damaged_checkpoint_is_passed_over(runs, tmp_path, caplog):
    run = tmp_path / "damaged"
    shutil.copytree(runs[1, 2][0], run)
    last = complete(run / "checkpoints")[-1]
    file = last / "rank_00001.safetensors"
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
    (last / "checkpoint.json").write_text('{"schema": 99}')
    assert "schema 99" in str(verify(last))
    (last / "checkpoint.json").write_text('{"sch')
    assert "cut off" in str(verify(last))


def test_a_half_written_checkpoint_does_not_count(runs, tmp_path):
    run = tmp_path / "half"
    shutil.copytree(runs[1, 2][0], run)
    last = complete(run / "checkpoints")[-1]
    (last / "checkpoint.json").unlink()
    assert newest_valid(run / "checkpoints") == complete(run / "checkpoints")[-1] != last
    with pytest.raises(BadInput, match="no complete checkpoint; train it first"):
        read_weights(tmp_path / "nothing", "ema")


def test_a_rank_that_dies_ends_the_others_and_its_log_is_shown(tmp_path):
    started_s = time.monotonic()
    with pytest.raises(BadWorld, match=r"(?s)rank 1 of 2 ended with code 1.*is on fire"):
        run_ranks("tests.multiproc.dying_rank", [], num_ranks=2, log_dir=tmp_path, env={})
    assert time.monotonic() - started_s < 30
