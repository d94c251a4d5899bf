"""Pillow's own collection of broken, huge and odd files, with captions to match."""

import io
import re
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.prepare import run
from data_prep.quarantine import Reason, read_quarantine
from tests.tiny_source import prepare_cfg, publish_here, tree_hashes
from trainer.data.manifest import check_files, load_manifest
from trainer.data.shards import Shard, read_index
from trainer.errors import BadInput

CAPTIONS = (
    "a plain caption {}",
    "../../etc/passwd {}",
    "/etc/passwd\0{}",
    "control \x01\x1b[2J\r\n characters {}",
    "right-to-left \u202e and invisible \u200b\ufeff {}",
    "<script>alert({})</script> &lt;b&gt; &amp;amp;",
    "'; DROP TABLE rows; -- {}",
    "x" * 1_000_000 + " {}",
    "\u200b\u200b&nbsp;",
    "",
    None,
)
REASONS = {*Reason, "http_404"}


@pytest.fixture(scope="module")
def files(request):
    """Name -> content of every file in `Tests/images` of Pillow's source distribution."""
    folder = request.config.cache.mkdir(f"pillow-{PIL.__version__}")
    if not list(folder.glob("*.tar.gz")):
        source = ["--no-deps", "--no-binary", "pillow", f"pillow=={PIL.__version__}"]
        words = [sys.executable, "-m", "pip", "download", *source, "-d", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"Pillow's source distribution is not to be had: {done.stderr[-200:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        found = {
            info.name.partition("/images/")[2]: tar.extractfile(info).read()
            for info in tar
            if "/Tests/images/" in info.name and info.isfile()
        }
    assert len(found) > 500
    return found


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        number = re.match(r"/(\d+)", self.path)
        body = self.server.bodies[int(number[1])] if number else None
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@pytest.fixture(scope="module")
def url(files):
    with Server(("127.0.0.1", 0), Handler) as server:
        server.bodies = list(files.values())
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def source(files, url, tmp_path_factory):
    """A parquet of one row per file; its URLs and captions are hostile as well."""
    ends = ("", "/../../../etc/passwd", "?x=%00", "/a%2F..%2Fb.tar")
    texts = [CAPTIONS[i % len(CAPTIONS)] for i in range(len(files))]
    rows = {
        "URL": [f"{url}/{i}{ends[i % len(ends)]}" for i in range(len(files))],
        "TEXT": [text and text.format(i) for i, text in enumerate(texts)],
    }
    folder = tmp_path_factory.mktemp("torture")
    pq.write_table(pa.table(rows), folder / "rows.parquet")
    return folder


def config(source, dataset, *more):
    return prepare_cfg(source, dataset, "shard_rows=400", "download.timeout_s=30", *more)


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_kept_or_has_a_reason_and_two_runs_are_equal(files, source, tmp_path):
    before = everything(source)
    assert run(config(source, tmp_path / "a" / "d", "processes=2")) == 0
    manifest = load_manifest(tmp_path / "a" / "d")
    assert manifest.rows_in == len(files)
    assert manifest.rows_in == manifest.rows_kept + sum(manifest.rejected.values())
    assert manifest.rows_kept > 200
    assert set(manifest.rejected) <= REASONS
    assert not {Reason.OTHER, Reason.CONNECTION, Reason.TIMEOUT} & set(manifest.rejected)
    check_files(tmp_path / "a" / "d", manifest.shards)
    # Nothing is left outside the dataset, and nothing there was changed.
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["d"]
    assert everything(source) == before

    publish_here(config(source, tmp_path / "b", "threads=3"))
    assert tree_hashes(tmp_path / "b") == tree_hashes(tmp_path / "a" / "d")

    told = Counter()
    for quarantine in (tmp_path / "b" / "quarantine").glob("*.jsonl"):
        told.update(row.reason for row in read_quarantine(quarantine))
    assert told[Reason.ANIMATED] > 10
    assert told[Reason.TRUNCATED] > 3
    assert told[Reason.FORMAT_REFUSED] > 100
    sides = set()
    for entry in manifest.shards:
        dataset = tmp_path / "b"
        with Shard(entry.tar(dataset), read_index(entry.index(dataset))) as shard:
            assert all(re.fullmatch("[0-9a-f]{16}", key) for key in shard.keys)
            for number in range(entry.count):
                picture = Image.open(io.BytesIO(shard.read(number, "jpg")))
                sides.add((picture.mode, picture.size))
                caption = shard.read(number, "txt").decode()
                assert 0 < len(caption) <= 4000
                assert caption.isprintable() or "\u200c" in caption
    assert sides == {("RGB", (32, 32))}


def test_columns_of_wrong_types_are_refused_row_by_row(tmp_path):
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"URL": [1, 2, None], "TEXT": [["a", "b"], [], None]}), rows)
    publish_here(config(tmp_path, tmp_path / "d"))
    manifest = load_manifest(tmp_path / "d")
    assert manifest.rows_kept == 0
    assert sum(manifest.rejected.values()) == manifest.rows_in == 3
    assert set(manifest.rejected) <= {Reason.SCHEME_REFUSED, Reason.MISSING_URL}


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(BadInput, match=r"rows\.parquet is no readable parquet file"):
        run(config(tmp_path, tmp_path / "d"))
