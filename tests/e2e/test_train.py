"""Training as a user meets it: killed, interrupted, given again, given wrong."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.e2e.conftest import kiln
from tests.tiny import SMALL_NETWORK
from tests.wandb_server import WandbServer, needs_wandb_server
from trainer.data.manifest import load_manifest
from trainer.observe.accounts import close_check
from trainer.observe.jsonl import read_rows
from trainer.runtime.rundir import complete
from trainer.runtime.weights import read_weights

pytestmark = pytest.mark.e2e


def words(dataset: Path, run: Path, **changes: object) -> list[str]:
    settings = {"total_images": 160, "checkpoint.every_images": 40, "checkpoint.keep_last": 9}
    settings.update(changes)
    return [
        f"data.dataset={dataset}",
        f"run={run}",
        *SMALL_NETWORK,
        *(f"{key}={value}" for key, value in settings.items()),
    ]


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", "train", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        if any(row["step"] >= step for row in rows):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come")


def losses(run: Path) -> dict[int, float]:
    """Loss by step; of a step that was trained again, the last one."""
    return {row["step"]: row["train/loss"] for row in read_rows(run / "metrics.jsonl")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(run, "ema")[0]


@pytest.fixture(scope="module")
def whole(encoded, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    kiln("train", *words(encoded, run))
    return run


def test_a_run_leaves_its_whole_story(whole):
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["images_seen"] == 160
    assert [p.name for p in complete(whole / "checkpoints")] == [
        f"step_{step:08d}" for step in (5, 10, 15, 20)
    ]
    ledger = read_rows(whole / "ledger.jsonl")
    assert all(closure.holds() for closure in close_check(ledger))
    assert {"init", "productive", "checkpoint_stall", "data_stall"} <= {r["bucket"] for r in ledger}
    # Of the joules of the start a step has at most those since the last reading, a second before.
    init_j = sum(row["joules"] for row in ledger if row["bucket"] == "init")
    assert rows[0]["images_seen"] * (rows[0]["energy/j_per_image"] or 0) < init_j / 2
    assert (whole / "config.yaml").exists()
    assert (whole / "attempts/000/rank_00001.log").exists()


def test_a_run_starts_from_an_export_and_goes_on_without_it(encoded, whole, tmp_path):
    exported, run = tmp_path / "exported", tmp_path / "run"
    kiln("export", f"run={whole}", f"out={exported}")
    still = {"start_from": exported, "optim.learning_rate": 1e-12}
    kiln("train", *words(encoded, run, total_images=8, **still))
    now, before = read_weights(run, "raw")[0], weights(whole)
    for name, value in before.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=1e-6)
    shutil.rmtree(exported)
    kiln("train", *words(encoded, run, total_images=16, **still))
    other = words(encoded, tmp_path / "other", total_images=8, start_from=exported)
    assert "which is no folder" in kiln("train", *other, code=2)
    assert not (tmp_path / "other" / "config.yaml").exists()


def test_which_samples_each_step_took_can_be_told_afterwards(encoded, whole):
    plan = " ".join(kiln("stream-plan", *words(encoded, whole)).split())
    num_samples = load_manifest(encoded).rows_live
    assert f"{num_samples:,} samples in" in plan
    said = kiln("order", f"run={whole}", "steps=0:20", "format=json")
    steps = [json.loads(line) for line in said.splitlines()]
    assert [len(step["samples"]) for step in steps] == [8] * 20
    seen = [(sample["key"], sample["epoch"]) for step in steps for sample in step["samples"]]
    assert len({key for key, epoch in seen if epoch == 0}) == num_samples
    assert len(set(seen)) == 160
    key, epoch = seen[100]
    said = kiln("where", f"run={whole}", f"key={key}")
    assert f"  step 12, epoch {epoch}" in said
    assert "in the 20 steps so far" in said


def test_kill_9_of_everything_then_the_same_command_equals_the_uninterrupted_run(
    encoded, whole, tmp_path
):
    run = tmp_path / "run"
    process = start(*words(encoded, run))
    wait_for_step(run, 7, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.kill()
    process.communicate()
    _gone, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive, "the ranks outlived the kill -9 of what started them"
    said = kiln("train", *words(encoded, run))
    assert "attempt 1, step" in said
    assert losses(run) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(run).items())


@needs_wandb_server
def test_a_killed_run_is_one_wandb_run_that_lacks_nothing_after_a_sync(
    encoded, whole, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with WandbServer(tmp_path / "server") as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        online = {"logging.wandb": "auto"}
        process = start(*words(encoded, run, **online))
        wait_for_step(run, 7, process)
        process.kill()
        process.communicate()
        kiln("train", *words(encoded, run, **online))
        assert "it lacked 0" in kiln("sync", str(run))
        history = server.history(json.loads((run / "wandb.json").read_text())["id"])
    told = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]
    assert told == read_rows(run / "metrics.jsonl")
    assert losses(run) == losses(whole)


def test_ctrl_c_saves_and_the_same_command_continues(encoded, whole, tmp_path):
    run = tmp_path / "run"
    process = start(*words(encoded, run))
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "stopped by SIGINT" in said
    assert "the same command continues" in said
    stopped_at = int(complete(run / "checkpoints")[-1].name.removeprefix("step_"))
    assert 3 <= stopped_at < 20
    said = kiln("train", *words(encoded, run))
    assert f"attempt 1, step {stopped_at} of 20" in said
    # Nothing is trained twice after a clean stop.
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, 21))
    assert losses(run) == losses(whole)
    orders = [kiln("order", f"run={where}", "steps=0:20") for where in (run, whole)]
    assert orders[0] == orders[1]


def test_a_stopped_rank_is_named_and_all_are_ended(encoded, tmp_path):
    run = tmp_path / "run"
    process = start(*words(encoded, run, **{"watchdog.timeout_s": 4}))
    wait_for_step(run, 7, process)
    psutil.Process(process.pid).children()[1].send_signal(signal.SIGSTOP)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 85, said
    assert "held up by rank 1 on " in said
    assert "the same command continues" in said.splitlines()[-1]


def test_one_rank_gives_the_losses_of_two_and_may_take_over_in_the_middle(encoded, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("step_00000015", "step_00000020"))
    said = kiln("train", *words(encoded, run, **{"cluster.ranks_per_node": 1}))
    assert "changed since the run began: cluster.ranks_per_node: 2 -> 1" in said
    assert "step 10 of 20" in said
    expected = losses(whole)
    for step, loss in losses(run).items():
        assert loss == pytest.approx(expected[step], rel=1e-4)


def test_a_finished_run_has_nothing_to_do(encoded, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    assert "nothing to do, all 20 steps are done" in kiln("train", *words(encoded, whole))
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_two_trainers_of_one_run_are_refused(encoded, tmp_path):
    long = words(encoded, tmp_path / "run", total_images=100_000)
    process = start(*long)
    try:
        wait_for_step(tmp_path / "run", 1, process)
        assert "is being trained by process" in kiln("train", *long, code=2)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_unet_trains_through_the_same_commands(encoded, tmp_path):
    network = [
        "model=unet_tiny",
        "model.block_channels=[16,32]",
        "model.norm_groups=4",
        "model.head_width=[8,8]",
        "model.cross_attention=[false,true]",
    ]
    every = words(encoded, tmp_path / "run", total_images=24)
    base = [word for word in every if not word.startswith("model")]
    kiln("train", *base, *network, "engine.zero_stage=2")
    assert len(losses(tmp_path / "run")) == 3


def test_a_diverging_run_stops_and_its_checkpoint_stands(encoded, tmp_path):
    run = tmp_path / "run"
    hot = {"optim.learning_rate": 1e30, "optim.warmup_images": 0, "total_images": 400}
    said = kiln("train", *words(encoded, run, **hot), code=1)
    assert "rolled back 3 times (rollback.max_tries)" in said
    assert "optim.learning_rate" in said


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_stands(encoded, tiny_disk):
    run = tiny_disk / "run"
    said = kiln("train", *words(encoded, run, **{"checkpoint.every_images": 8}), code=1)
    assert "could not" in said or "disk is full" in said
    assert "same command" in said
    assert complete(run / "checkpoints")
    assert read_weights(run, "ema")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.dataset=nowhere"], "the dataset nowhere is not there"),
        (["autoencoder.path=nowhere"], "autoencoder.path"),
        (["encoders.text.max_tokens=8"], "has no latents of this config's encoders"),
        (["model.latent_channels=5"], "Give model.latent_channels="),
        (
            ["batch.global_batch_images=9"],
            "Try batch.global_batch_images=8 or batch.global_batch_images=16",
        ),
        (["experiment=sd2_256"], "`kiln launch` renders their sbatch script"),
    ],
)
def test_what_cannot_work_is_refused_before_a_rank_starts(encoded, tmp_path, change, message):
    base = [
        w for w in words(encoded, tmp_path / "run") if w.split("=")[0] != change[0].split("=")[0]
    ]
    if change[0].startswith("experiment"):
        base = [w for w in base if w.startswith(("data.", "run="))]
    assert message in kiln("train", *base, *change, code=2)
    assert not (tmp_path / "run/attempts").exists()


def test_changing_what_is_learned_in_an_old_run_is_refused(encoded, whole):
    said = kiln("train", *words(encoded, whole, seed=3), code=2)
    assert "seed: 0 -> 3" in said
    assert "another run=" in said
