"""A power sweep of the real trainer, on GPUs that the test plays: what it measures, how it ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.training import NETWORK, publish
from tests.multiproc.power_sweep import UUIDS
from tests.recorded_gpus import DEFAULT_W, FORBIDDEN, RecordedGpus, SharedGpus
from trainer.cli import main
from trainer.config_power import PowerSweepConfig
from trainer.errors import BadInput
from trainer.frozen import compose
from trainer.observe.nvml import NvmlReader
from trainer.power_sweep import sweep

pytestmark = pytest.mark.multiproc
BEFORE_W = {"GPU-a": DEFAULT_W, "GPU-b": 320.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"))


def words(dataset, folder, *more):
    return [
        *(f"data.dataset={dataset}", f"run={folder}/sweep", *NETWORK),
        *("batch.global_batch_images=8", "batch.micro_batch_images=4", "steps=4"),
        *("warmup_steps=1", "window_s=1", "watts=[200,300,250]", *more),
    ]


@contextlib.contextmanager
def sweeping(folder, *told):
    """Start a sweep; one of its GPUs has another limit than its default."""
    gpus = SharedGpus(folder, *UUIDS)
    gpus.set_limit_w("GPU-b", BEFORE_W["GPU-b"])
    command = [sys.executable, "-m", "tests.multiproc.power_sweep", *told]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process, gpus
    finally:
        process.kill()
        process.wait()


def ranks_of(process):
    return sorted(psutil.Process(process.pid).children(), key=lambda each: each.create_time())


def wait_for_limit(gpus, watts, process):
    deadline_s = time.monotonic() + 120
    while (UUIDS[1], watts) not in gpus.history():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def measured(folder):
    return json.loads((folder / "sweep/power_sweep.json").read_text())


def test_what_is_measured_is_what_the_gpus_draw_and_the_limits_are_set_back(dataset, tmp_path):
    with sweeping(tmp_path, *words(dataset, tmp_path)) as (process, gpus):
        said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    points = measured(tmp_path)["points"]
    assert [point["limit_w"] for point in points] == [None, 300, 250, 200]
    for point, drawn_w in zip(points, (350, 300, 250, 200), strict=True):
        assert point["w"] == pytest.approx(2 * drawn_w, rel=0.02)
        assert point["num_steps"] >= 4
        assert point["seconds"] >= 1
        assert point["images"] == 8 * point["num_steps"]
    assert "GPU GPU-b is limited to 320 W, and its default is 400 W" in said
    assert "limit 250 W: " in said
    assert "energy at 95 % of the speed" in said
    assert gpus.limits == BEFORE_W
    given = gpus.history()[3:]  # after the test's own, and after it was asked whether it may
    expected = [(u, w) for w in (DEFAULT_W, 300, 250, 200) for u in UUIDS]
    assert given == [*expected, *BEFORE_W.items()]


def test_a_sweep_that_is_stopped_sets_the_limits_back_even_if_a_rank_hangs(dataset, tmp_path):
    with sweeping(tmp_path, *words(dataset, tmp_path)) as (process, gpus):
        wait_for_limit(gpus, 250, process)
        ranks = ranks_of(process)
        ranks[1].suspend()
        process.send_signal(signal.SIGTERM)
        began_s = time.monotonic()
        said = process.communicate(timeout=120)[0]
    assert time.monotonic() - began_s < 30  # Slurm's KillWait, where a site has left it alone
    assert process.returncode == 130
    assert "stopped by SIGTERM" in said
    assert not any(rank.is_running() for rank in ranks)
    assert gpus.history()[-2:] == list(BEFORE_W.items())
    assert [point["limit_w"] for point in measured(tmp_path)["points"]] == [None, 300]
    assert "not all limits were measured; all GPUs have the limits again that they had" in said


def test_a_rank_that_is_killed_leaves_no_limit(dataset, tmp_path):
    with sweeping(tmp_path, *words(dataset, tmp_path)) as (process, gpus):
        wait_for_limit(gpus, 300, process)
        os.kill(ranks_of(process)[0].pid, signal.SIGKILL)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "ended with signal SIGKILL" in said
    assert gpus.history()[-2:] == list(BEFORE_W.items())


def test_without_a_driver_it_says_that_it_cannot(dataset, tmp_path, capsys):
    if NvmlReader.open() is not None:
        pytest.skip("this machine has an NVIDIA driver")
    assert main(["power-sweep", *words(dataset, tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "kiln power-sweep: there is no NVIDIA driver on this machine" in said
    assert not any(tmp_path.iterdir())


def test_only_gpus_are_given_limits(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(NvmlReader, "open", lambda: RecordedGpus(*UUIDS))
    assert main(["power-sweep", *words(dataset, tmp_path)]) == 2
    assert "cluster.device=cpu: only GPUs get a power limit" in capsys.readouterr().err


def test_a_run_is_not_swept_over(dataset, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/config.yaml").touch()
    cfg = compose(PowerSweepConfig, "power-sweep", words(dataset, tmp_path))
    with pytest.raises(BadInput, match=r"is a training run\. Choose another run="):
        sweep(cfg, RecordedGpus(*UUIDS), None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["cluster=example", "cluster.ranks_per_node=1", "cluster.device_memory_gib=4"],
         "cluster.kind=slurm: a power sweep measures the GPUs of the machine"),
        (["cluster.ranks_per_node=4", "batch.micro_batch_images=2"], "this job has 2 GPUs"),
        (["watts=[300,600]"], "watts has 600, and GPU GPU-a takes limits from 100 to 500 W"),
        (["data.dataset=/nowhere"], "/nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused_before_a_limit_is_set(dataset, tmp_path, more, message):
    gpus = RecordedGpus(*UUIDS)
    cfg = compose(PowerSweepConfig, "power-sweep", words(dataset, tmp_path, *more))
    with pytest.raises(BadInput, match=message):
        sweep(cfg, gpus, None)
    assert set(gpus.log) <= {(uuid, DEFAULT_W) for uuid in UUIDS}
    assert not any(tmp_path.iterdir())


def test_a_user_without_the_right_is_told_what_the_site_must_allow(dataset, tmp_path):
    gpus = RecordedGpus(*UUIDS)
    gpus.refuses = {"GPU-a": FORBIDDEN}
    cfg = compose(PowerSweepConfig, "power-sweep", words(dataset, tmp_path))
    with pytest.raises(BadInput, match=r"may not set the power limit of GPU GPU-a .*ask the site"):
        sweep(cfg, gpus, None)
