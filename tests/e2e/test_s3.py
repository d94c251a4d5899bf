"""A dataset on a real S3 server is the same as in a folder, whatever is killed on the way."""

import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from data_prep.serve import serving
from tests.s3_server import BUCKET, S3Server, needs_s3
from tests.streams import latents, load, pictures
from tests.tiny import SMALL_NETWORK
from tests.tiny_source import make_source, prepare_cfg, prepare_overrides, publish_here, tree_hashes
from trainer.data.manifest import load_manifest
from trainer.data.publish import publish_bytes
from trainer.errors import BadInput, BadWorld
from trainer.observe.jsonl import read_rows
from trainer.place import place, storage

S3FileSystem = pytest.importorskip("s3fs").S3FileSystem
pytestmark = [pytest.mark.e2e, needs_s3]
URL = f"s3://{BUCKET}/laion"
# One download at a time and small units, so that there is time to stop in the middle.
# A busy machine must not make time-outs.
SLOWLY = ("shard_rows=8", "threads=1", "processes=1", "download.timeout_s=60")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("source")
    make_source(out, "faults.slow_frac=0")
    with serving(out):
        yield out


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = S3Server(tmp_path_factory.mktemp("s3"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def local(source, tmp_path_factory):
    """The same rows, published into a folder in one go."""
    cfg = prepare_cfg(source, tmp_path_factory.mktemp("local"), *SLOWLY)
    publish_here(cfg)
    return cfg.dataset


def start(server, tmp_path, *words, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            **server.env(),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(tmp_path),
            **env,
        },
    )


def finish(process, code=0):
    said = process.communicate(timeout=240)[0]
    assert process.returncode == code, said
    assert "Traceback" not in said
    return said


def prepare(server, source, url, tmp_path, *more, **env):
    return start(
        server, tmp_path, "prepare", *prepare_overrides(source, url, *SLOWLY, *more), **env
    )


def num_units(server, url):
    return len(server.client("reader").glob(f"{url.removeprefix('s3://')}/units/*.json"))


def wait_for_units(server, url, process, count):
    ends_s = time.monotonic() + 120
    while num_units(server, url) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends_s
        time.sleep(0.05)


@pytest.fixture(scope="module")
def published(server, source, tmp_path_factory):
    """A dataset that came about through the death of the command, of a worker and of the server."""
    scratch = tmp_path_factory.mktemp("scratch")
    process = prepare(server, source, URL, scratch)
    wait_for_units(server, URL, process, 2)
    process.kill()
    process.communicate()
    assert "manifest.json" not in server.tree(URL)

    process = prepare(server, source, URL, scratch)
    wait_for_units(server, URL, process, 4)
    for child in psutil.Process(process.pid).children(recursive=True):
        if any("spawn_main" in word for word in child.cmdline()):
            child.kill()
    assert "a worker process died" in finish(process, code=1)

    process = prepare(server, source, URL, scratch)
    wait_for_units(server, URL, process, 6)
    server.kill()
    time.sleep(1)
    server.start()
    said = process.communicate(timeout=240)[0]
    assert process.returncode in {0, 1}, said
    assert "Traceback" not in said
    if process.returncode:
        assert "the storage" in said
        assert "the same command" in said
    server.wait()
    finish(prepare(server, source, URL, scratch))
    return scratch


def test_through_kills_of_everything_a_bucket_gets_what_a_folder_has(server, published, local):
    assert server.hashes(URL) == tree_hashes(local)
    names = set(server.tree(URL))
    assert not [name for name in names if ".partial" in name or name.endswith("/")]
    assert any(name.startswith("ledger/") for name in names)
    left = [path for path in published.rglob("*") if path.is_file() and path.stat().st_size]
    assert {path.suffix for path in left} <= {".jsonl"}  # only this machine's account


def test_verify_reads_a_bucket_and_finds_what_is_wrong(server, published, tmp_path):
    assert "no problems" in finish(start(server, tmp_path, "verify", f"dataset={URL}"))
    fs, tar = server.client("writer"), f"{BUCKET}/laion/shards/00000.tar"
    whole = fs.cat_file(tar)
    try:
        fs.pipe_file(tar, whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
        said = finish(start(server, tmp_path, "verify", f"dataset={URL}"), code=1)
        assert f"{URL}/shards/00000.tar has sha256" in said
        fs.rm_file(tar)
        said = finish(start(server, tmp_path, "verify", f"dataset={URL}"), code=1)
        assert f"{URL}/shards/00000.tar is not there" in said
    finally:
        fs.pipe_file(tar, whole)


def test_encodings_in_a_bucket_are_those_of_a_folder_and_can_be_read(
    server, published, local, tmp_path, as_user
):
    for dataset in (URL, local):
        finish(
            start(
                server,
                tmp_path,
                "encode",
                f"dataset={dataset}",
                "encoders.image_side_px=32",
                "wandb=off",
            )
        )
    assert server.hashes(URL) == tree_hashes(local)
    as_user("reader")
    batches = []
    for dataset in (place(URL), local):
        positions = np.arange(0, load_manifest(dataset).rows_kept, 3)
        with pictures(dataset, side_px=32) as some, latents(dataset) as others:
            batches.append((load(some, positions), load(others, positions)))
    (remote_pictures, remote_latents), (local_pictures, local_latents) = batches
    assert remote_pictures.pictures_BCHW.equal(local_pictures.pictures_BCHW)
    assert remote_latents.mean_BCHW.equal(local_latents.mean_BCHW)
    assert remote_latents.text_BLD.equal(local_latents.text_BLD)
    said = finish(start(server, tmp_path, "encode", f"dataset={URL}", "encoders.image_side_px=32"))
    assert "nothing to do" in said
    # Training: by ranges, through a cache, and from the folder.
    learned = []
    for name, dataset, more in (
        ("ranges", URL, ["data.order=ranges"]),
        ("local", local, ["data.order=ranges"]),
        ("cache", URL, [f"data.cache={tmp_path}/cache", "data.cache_gb=1"]),
        ("shards", local, []),
    ):
        run = tmp_path / name
        small = ["encoders.image_side_px=32", "model.latent_side=8", "total_images=24"]
        finish(
            start(
                server,
                tmp_path,
                "train",
                f"data.dataset={dataset}",
                f"run={run}",
                *SMALL_NETWORK,
                *small,
                *more,
            )
        )
        learned.append([row["train/loss"] for row in read_rows(run / "metrics.jsonl")])
    assert learned[0] == learned[1]
    assert learned[2] == learned[3] != learned[0]
    assert len(list((tmp_path / "cache").iterdir())) > 1
    # What tells the order reads indexes alone, wherever they lie; kills are survived there, too.
    told = [
        finish(start(server, tmp_path, "order", f"run={tmp_path / name}", "steps=0:3"))
        for name in ("ranges", "local")
    ]
    assert told[0] == told[1]
    key = told[0].split()[1].partition("@")[0]
    said = finish(start(server, tmp_path, "where", f"run={tmp_path / 'ranges'}", f"key={key}"))
    assert "  step 0, epoch 0" in said
    small = ["global_batch_images=8", "worlds=[1,2]", "kills=1", "steps=6"]
    said = finish(start(server, tmp_path, "verify-resume", f"dataset={URL}", *small))
    assert "identical: 6 steps of 8 latents, 1 kills, worlds " in said


@pytest.fixture
def as_user(server, monkeypatch):
    """Become another user of the server, in this process."""

    def become(name="writer", **env):
        for key, value in (server.env(name) | env).items():
            monkeypatch.setenv(key, value)
        S3FileSystem.clear_instance_cache()  # they took the credentials when they were made

    yield become
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("user", "env", "bucket", "cls", "says"),
    [
        ("writer", {}, "other", BadInput, "AccessDenied"),
        ("admin", {}, "other", BadInput, "NoSuchBucket.*Make the bucket.*AWS_ENDPOINT_URL"),
        ("writer", {"AWS_SECRET_ACCESS_KEY": "no"}, BUCKET, BadInput, "Signature.*AWS_SECRET"),
        ("writer", {"AWS_ACCESS_KEY_ID": "no"}, BUCKET, BadInput, "InvalidAcc.*AWS_ACCESS_KEY_ID"),
        (
            "writer",
            {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"},
            BUCKET,
            BadWorld,
            "cannot be reached.*AWS_ENDPOINT_URL",
        ),
        ("reader", {}, BUCKET, BadInput, "AccessDenied.*to put and delete"),
    ],
)
def test_a_storage_that_refuses_says_what_to_do(server, as_user, user, env, bucket, cls, says):
    as_user(user, **env)
    where = place(f"s3://{bucket}/new")
    started_s = time.monotonic()
    with pytest.raises(cls, match=says), storage(where):
        publish_bytes(where / "x", b"x")
    assert time.monotonic() - started_s < 20
    assert not server.tree(f"s3://{BUCKET}/new")


def test_a_user_sees_one_line_and_no_traceback(server, source, tmp_path):
    said = finish(prepare(server, source, URL, tmp_path, **server.env("reader")), code=2)
    assert len(said.strip().splitlines()) == 1
    assert said.startswith(f"kiln prepare: {URL}: the storage says AccessDenied")

    empty = {name: "" for name in server.env() if "KEY" in name}
    nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    process = start(server, tmp_path, "verify", f"dataset={URL}", **empty, **nowhere)
    said = finish(process, code=2)
    assert "no credentials found. Set AWS_ACCESS_KEY_ID" in said
