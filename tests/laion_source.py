"""The 10,000 real LAION rows, with pictures for them on loopback and faults in known places.

The rows keep their captions and the path of their URLs; the host becomes a loopback server's.
"""

import hashlib
import json
import shutil
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.captions import clean_caption
from data_prep.config import CaptionsConfig
from data_prep.serve import DIRECT, SourceServer
from tests.tiny_source import free_port, make_source

SHARED = Path(__file__).parents[2] / "shared" / "data"
LAION = SHARED / "laion_10k.parquet"
needs_laion = pytest.mark.skipif(
    not LAION.exists(), reason=f"{LAION} is not there: the real LAION rows are optional"
)
CAPTIONS = CaptionsConfig(unescape_html=True, drop_urls=True, max_chars=4000)
FAULTS = {  # last two digits of a row's hash -> what is wrong, and the reason that it must get
    0: ("missing", "http_404"),
    1: ("missing", "http_404"),
    2: ("truncated", "truncated"),
    3: ("cut", "truncated"),
    4: ("not_an_image", "not_an_image"),
    5: ("opt_out", "opt_out"),
    6: ("redirect", None),
}


def digits(path):
    """A number that depends on the path alone."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=4).digest())


class HashedFaults(dict):
    def get(self, path, default=None):
        if path.startswith(f"{DIRECT}/"):
            return default
        kind, _ = FAULTS.get(digits(path) % 100, (None, None))
        return {"kind": kind} if kind else default


class HashedPictures(dict):
    def __init__(self, pictures):
        self.files = [pictures[name] for name in sorted(pictures)]

    def get(self, name, default=None):
        return self.files[digits("/" + name) // 100 % len(self.files)]


def make_laion_source(out, *, num_rows=10_000):
    """Write `out/rows.parquet` with loopback URLs, and pictures; give what must come of the rows.

    Returns:
        Reason -> rows, and 'kept' -> rows.
    """
    make_source(out, f"port={free_port()}")
    photos = sorted((SHARED / "photos").rglob("*.jpg"))[:100]
    for number, photo in enumerate(photos):
        shutil.copyfile(photo, out / "pictures" / f"photo-{number:03d}.jpg")
    # What was painted too small to keep would only repeat one reason.
    for small in (out / "pictures").iterdir():
        if small.stat().st_size < 1200:
            small.unlink()
    port = json.loads((out / "source.json").read_text())["port"]
    table = pq.read_table(LAION).slice(0, num_rows)
    urls, expected, seen = [], Counter(), set()
    for url, text in zip(table["URL"].to_pylist(), table["TEXT"].to_pylist(), strict=True):
        _, _, rest = url.partition("://")
        # The server sees the path unquoted.
        urls.append(f"http://127.0.0.1:{port}/{quote(rest, safe='')}" if rest else url)
        _, reason = FAULTS.get(digits("/" + rest) % 100, (None, None))
        if (urls[-1], text) in seen:
            reason = "duplicate"
        elif not rest:
            reason = "scheme_refused"
        elif not text or not clean_caption(text, CAPTIONS):
            reason = "missing_caption"
        seen.add((urls[-1], text))
        expected[reason or "kept"] += 1
    pq.write_table(pa.table({"URL": urls, "TEXT": table["TEXT"]}), out / "rows.parquet")
    return expected


@contextmanager
def serving_laion(source):
    with SourceServer(source) as server:
        server.faults = HashedFaults()
        server.pictures = HashedPictures(server.pictures)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()
