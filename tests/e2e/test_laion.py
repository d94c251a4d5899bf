"""Ten thousand real LAION rows go the whole way, on disk and on S3, through kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.laion_source import make_laion_source, needs_laion, serving_laion
from tests.s3_server import BUCKET, S3Server, needs_s3
from tests.tiny_encoders import save_kl, save_t5
from tests.tiny_source import tree_hashes
from trainer.data.manifest import load_manifest

pytestmark = [pytest.mark.e2e, needs_laion]
NUM_KILLS, NUM_REMOTE_KILLS = 10, 3
PREPARE = (
    "shard_rows=400",
    "image_side_px=32",
    "resize_mode=center_crop",
    "min_image_side_px=8",
    "download.allow_hosts=[127.0.0.1]",
    "download.timeout_s=60",
    "processes=2",
    "threads=8",
    "wandb=off",
)
ENCODE = ("encoders.image_side_px=32", "probe_s=0", "wandb=off")


def go_on(dataset, encoders, **env):
    """Do what a data engineer does with a published dataset."""
    kl, t5 = encoders
    encode = ("text=t5_base", f"encoders.autoencoder.path={kl}", f"encoders.text.path={t5}")
    finish(kiln("dedup", f"dataset={dataset}", **env))
    finish(kiln("encode", f"dataset={dataset}", *encode, *ENCODE, **env))
    finish(kiln("verify", f"dataset={dataset}", **env))
    finish(kiln("stats", f"dataset={dataset}", **env))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The rows being served: (folder, reason -> rows)."""
    out = tmp_path_factory.mktemp("laion")
    expected = make_laion_source(out)
    with serving_laion(out):
        yield out, expected


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What an undisturbed prepare publishes: (folder, path -> hash)."""
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    finish(start(source, folder))
    return folder, tree_hashes(folder)


def kiln(*words, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def start(source, dataset, **env):
    return kiln("prepare", f"rows={source[0]}/rows.parquet", f"dataset={dataset}", *PREPARE, **env)


def finish(process):
    said = process.communicate(timeout=600)[0]
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


def test_every_row_is_accounted_for(source, whole):
    manifest = load_manifest(whole[0])
    assert manifest.rows_in == sum(source[1].values()) == 10_000
    assert {"kept": manifest.rows_kept, **manifest.rejected} == source[1]


def test_ten_kills_leave_the_same_dataset(source, whole, tmp_path):
    dice, progress = random.Random(20261123), []
    dataset = tmp_path / "killed"
    for _ in range(NUM_KILLS):
        kill_one(start(source, dataset), dice)
        progress.append(len(list(dataset.glob("units/*.json"))))
    assert progress == sorted(progress)  # nothing that was finished is lost
    finish(start(source, dataset))
    assert tree_hashes(dataset) == whole[1]
    assert not any(path.name.endswith(".partial") for path in dataset.rglob(".*"))


@needs_s3
def test_the_whole_path_on_s3_leaves_what_a_folder_has(source, whole, tmp_path):
    url = f"s3://{BUCKET}/laion"
    encoders = save_kl(tmp_path / "kl"), save_t5(tmp_path / "t5")
    server, dice = S3Server(tmp_path / "s3"), random.Random(20261124)
    env = server.env() | {"TMPDIR": str(tmp_path)}
    try:
        for _ in range(NUM_REMOTE_KILLS):
            kill_one(start(source, url, **env), dice)
        finish(start(source, url, **env))
        assert server.hashes(url) == whole[1]
        go_on(url, encoders, **env)
        remote = server.hashes(url)
    finally:
        server.close()
    go_on(whole[0], encoders)
    # The pages name the place.
    assert remote.keys() == tree_hashes(whole[0]).keys()
    assert {name for name, sha256 in tree_hashes(whole[0]).items() if remote[name] != sha256} <= {
        "dedup.html",
        "stats.html",
        "stats.json",
    }

    manifest = load_manifest(whole[0])
    assert manifest.rows_kept == source[1]["kept"]  # removal rewrites no tar
    assert 0 < manifest.rows_live < manifest.rows_kept
    stats = json.loads((whole[0] / "stats.json").read_text())
    assert stats["rows"]["in"] == 10_000
