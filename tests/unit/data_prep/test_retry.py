import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep.config import VerifyConfig
from data_prep.prepare import run
from data_prep.verify import run as verify
from tests.tiny_source import prepare_cfg, tree_hashes, write_rows
from trainer.data.manifest import load_manifest
from trainer.errors import BadInput

NUM_ROWS = 30


class Flaky(BaseHTTPRequestHandler):
    """Serves one picture; some paths are down, some gone, until the server is repaired."""

    def do_GET(self):
        number = int(self.path.strip("/") or -1) if self.path.strip("/").isdigit() else -1
        if number < 0:
            self.send_error(404)
        elif number % 3 == 0 and not self.server.repaired:
            self.send_error(503)
        elif number % 5 == 0:
            self.send_error(410)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.picture)))
            self.end_headers()
            self.wfile.write(self.server.picture)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(source):
    with ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as flaky:
        flaky.repaired = False
        names = sorted((source / "pictures").glob("*.png"))
        flaky.picture = max(names, key=lambda path: path.stat().st_size).read_bytes()
        thread = threading.Thread(target=flaky.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield flaky
        flaky.shutdown()
        thread.join()


def config(server, tmp_path, dataset, *more):
    pairs = [(f"http://127.0.0.1:{server.server_port}/{i}", "text") for i in range(NUM_ROWS)]
    rows = write_rows(tmp_path / "rows.parquet", *pairs)
    words = (f"rows={rows}", "shard_rows=8", "download.retries=0", *more)
    return prepare_cfg(tmp_path, dataset, *words)


def test_rows_that_failed_in_passing_move_to_new_units(server, tmp_path, capsys):
    dataset = tmp_path / "d"
    assert run(config(server, tmp_path, dataset)) == 0
    before = load_manifest(dataset)
    assert before.rejected == {"http_410": 4, "http_503": 10}
    shards = tree_hashes(dataset / "shards")

    server.repaired = True
    again = config(server, tmp_path, dataset, "retry=[http_503]")
    assert run(again) == 0
    after = load_manifest(dataset)
    assert after.rows_in == before.rows_in == NUM_ROWS
    assert after.rejected == {"http_410": 6}
    assert after.rows_kept == 24
    assert tree_hashes(dataset / "shards").items() > shards.items()
    assert verify(VerifyConfig(dataset=dataset)) == 0

    whole = tree_hashes(dataset)
    capsys.readouterr()
    assert run(again) == 0
    assert "0 rows in quarantine for http_503" in capsys.readouterr().out
    assert tree_hashes(dataset) == whole

    # A unit that is made again leaves the rows out that moved, though they would succeed now.
    records = sorted((dataset / "units").glob("*.json"))
    moved = [path for path in records if "retried" in json.loads(path.read_text())["rejected"]]
    record = moved[0]
    record.unlink()
    assert run(config(server, tmp_path, dataset)) == 0
    assert tree_hashes(dataset) == whole


def test_a_retry_that_was_cut_short_goes_on(server, tmp_path, monkeypatch):
    dataset = tmp_path / "d"
    assert run(config(server, tmp_path, dataset)) == 0
    server.repaired = True

    def interrupted(_, generations):
        if len(generations) > 1:
            raise KeyboardInterrupt

    again = config(server, tmp_path, dataset, "retry=[http_503]")
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare.mark_moved", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(again)
    assert not (dataset / "manifest.json").exists()
    assert run(config(server, tmp_path, dataset)) == 0
    assert load_manifest(dataset).rejected == {"http_410": 6}
    assert verify(VerifyConfig(dataset=dataset)) == 0


def test_opt_outs_are_never_tried_again(server, tmp_path):
    assert run(config(server, tmp_path, tmp_path / "d")) == 0
    words = "retry=[timeout,opt_out]"
    with pytest.raises(BadInput, match="rows with opt_out are never tried again"):
        run(config(server, tmp_path, tmp_path / "d", words))
    with pytest.raises(BadInput, match="rows with denied_content are never tried again"):
        run(config(server, tmp_path, tmp_path / "d", "retry=[denied_content]"))
    with pytest.raises(BadInput, match=r"retry: tiemout is no reason. .*truncated"):
        run(config(server, tmp_path, tmp_path / "d", "retry=[http_503,tiemout]"))
    with pytest.raises(BadInput, match="give it with parts=1"):
        config(server, tmp_path, tmp_path / "d", "retry=[timeout]", "parts=2")
