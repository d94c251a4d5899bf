"""Ten thousand real LAION rows go the whole way, through kills, and every one is accounted for."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from data_prep.config import VerifyConfig
from data_prep.verify import run as verify
from tests.laion_source import make_laion_source, needs_laion, serving_laion
from tests.s3_server import BUCKET, S3Server, needs_s3
from tests.tiny_source import tree_hashes
from trainer.data.manifest import load_manifest

pytestmark = [pytest.mark.e2e, needs_laion]
NUM_KILLS = 10
NUM_REMOTE_ROWS, NUM_REMOTE_KILLS = 2_000, 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The rows being served: (folder, reason -> rows)."""
    out = tmp_path_factory.mktemp("laion")
    expected = make_laion_source(out)
    with serving_laion(out):
        yield out, expected


def start(source, dataset, **env):
    words = [
        f"rows={source}/rows.parquet",
        f"dataset={dataset}",
        "shard_rows=400",
        "image_side_px=32",
        "resize_mode=center_crop",
        "min_image_side_px=8",
        "download.allow_hosts=[127.0.0.1]",
        "processes=2",
        "threads=8",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", "prepare", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def finish(source, dataset, **env):
    process = start(source, dataset, **env)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def kill_one(process, dice):
    """Kill the command or one of its processes, at a random moment."""
    time.sleep(dice.uniform(1.0, 6.0))
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    victim = dice.choice(family)
    if process.poll() is None:
        os.kill(victim.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def test_ten_kills_leave_the_same_dataset_and_every_row_is_accounted_for(source, tmp_path):
    folder, expected = source
    finish(folder, tmp_path / "whole")
    whole = tree_hashes(tmp_path / "whole")
    manifest = load_manifest(tmp_path / "whole")
    assert manifest.rows_in == sum(expected.values()) == 10_000
    assert {"kept": manifest.rows_kept, **manifest.rejected} == expected

    dice = random.Random(20261123)
    dataset, progress = tmp_path / "killed", []
    for _ in range(NUM_KILLS):
        kill_one(start(folder, dataset), dice)
        progress.append(len(list(dataset.glob("units/*.json"))))
    assert progress == sorted(progress)  # nothing that was finished is lost
    finish(folder, dataset)
    assert tree_hashes(dataset) == whole
    assert verify(VerifyConfig(dataset=dataset)) == 0
    assert not any(path.name.endswith(".partial") for path in dataset.rglob(".*"))


@needs_s3
def test_kills_on_s3_leave_what_a_folder_has(tmp_path):
    folder, url = tmp_path / "source", f"s3://{BUCKET}/laion"
    expected = make_laion_source(folder, num_rows=NUM_REMOTE_ROWS)
    server, dice = S3Server(tmp_path / "s3"), random.Random(20261124)
    env = server.env() | {"TMPDIR": str(tmp_path)}
    try:
        with serving_laion(folder):
            finish(folder, tmp_path / "whole")
            for _ in range(NUM_REMOTE_KILLS):
                kill_one(start(folder, url, **env), dice)
            finish(folder, url, **env)
        assert server.hashes(url) == tree_hashes(tmp_path / "whole")
    finally:
        server.close()
    manifest = load_manifest(tmp_path / "whole")
    assert {"kept": manifest.rows_kept, **manifest.rejected} == expected
