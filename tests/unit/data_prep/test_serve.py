import json
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import IncompleteRead

import pyarrow.parquet as pq
import pytest

from data_prep.config import ServeConfig
from data_prep.serve import run, serving
from tests.tiny_source import free_port
from trainer.errors import BadInput, BadWorld


@pytest.fixture
def paths_of(served):
    faults = json.loads((served / "faults.json").read_text())
    port = json.loads((served / "source.json").read_text())["port"]

    def find(kind):
        path = next(path for path, fault in faults.items() if fault["kind"] == kind)
        return f"http://127.0.0.1:{port}{path}", (served / f"pictures{path}").read_bytes()

    return find


def get(url, timeout_s=2.0):
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        return response.read(), response.headers


def test_every_row_without_a_fault_is_served_as_it_is(served):
    faults = json.loads((served / "faults.json").read_text())
    for url in pq.read_table(served / "rows.parquet")["URL"].to_pylist()[:20]:
        name = url.rsplit("/", 1)[1]
        if f"/{name}" not in faults:
            assert get(url)[0] == (served / "pictures" / name).read_bytes()


def test_faults_are_what_they_say(paths_of):
    url, _ = paths_of("missing")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(url)
    url, picture = paths_of("truncated")
    with pytest.raises(IncompleteRead):
        get(url)
    url, picture = paths_of("cut")
    assert get(url)[0] == picture[: len(picture) // 2]
    url, _ = paths_of("not_an_image")
    assert get(url)[0].startswith(b"<!doctype html>")
    url, picture = paths_of("redirect")
    assert get(url)[0] == picture
    url, picture = paths_of("opt_out")
    body, headers = get(url)
    assert (body, headers["X-Robots-Tag"]) == (picture, "noai")
    url, _ = paths_of("slow")
    with pytest.raises(TimeoutError):
        get(url, timeout_s=0.2)


def test_nothing_outside_the_pictures_is_served(served, paths_of):
    base = paths_of("missing")[0].rsplit("/", 1)[0]
    for path in ("/../source.json", "/%2e%2e/source.json", "/etc/passwd", "/", "/direct/../x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(base + path)


def test_a_taken_port_is_named_with_the_way_out(served):
    with pytest.raises(BadWorld, match=r"port \d+ of 127.0.0.1 is taken.*port="), serving(served):
        pass


def test_a_folder_that_is_no_source_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"no source folder.*kiln source"):
        run(ServeConfig(source=tmp_path))


def test_the_server_ends_at_once_though_an_answer_is_slow(source, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "pictures").symlink_to(source / "pictures")
    faults = json.loads((source / "faults.json").read_text())
    slow = next(path for path, fault in faults.items() if fault["kind"] == "slow")
    (copy / "faults.json").write_text(json.dumps({slow: {"kind": "slow", "seconds": 60}}))
    (copy / "source.json").write_text(json.dumps({"port": free_port()}))
    started_s = time.monotonic()
    with serving(copy) as url, suppress(TimeoutError):
        get(url + slow, timeout_s=0.1)
    assert time.monotonic() - started_s < 5
