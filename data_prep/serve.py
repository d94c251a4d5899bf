"""Serve a source folder on loopback, with its faults, for the demo and the tests."""

import errno
import json
import logging
import shutil
import socketserver
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_prep.config import ServeConfig
from trainer.command import run_command
from trainer.errors import BadInput, BadWorld

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
DIRECT = "/direct"  # a path below it is served without faults: the target of redirects
_KINDS = {".jpg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
_PAGE = b"<!doctype html><title>Moved</title><p>This picture is not here any more.</p>\n"


def main(argv: Sequence[str]) -> int:
    """Run `kiln serve`."""
    return run_command(run, ServeConfig, "serve", argv)


def run(cfg: ServeConfig) -> int:
    """Serve until interrupted."""
    with SourceServer(cfg.source) as server:
        log.info("serving %s at %s; Ctrl-C stops it", cfg.source, server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("stopped")
    return 0


@contextmanager
def serving(source: Path) -> Iterator[str]:
    """Serve a source in a background thread; give its URL, e.g. 'http://127.0.0.1:8763'."""
    with SourceServer(source) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


class SourceServer(ThreadingHTTPServer):
    """A loopback server of one source folder."""

    daemon_threads = True
    block_on_close = False  # slow answers must not hold up the end
    request_queue_size = 256  # as many downloads begin at once; a full queue costs them a second

    def __init__(self, source: Path) -> None:
        """Bind the port that the source's URLs name."""
        try:
            self.port = int(json.loads((source / "source.json").read_text())["port"])
            self.faults: dict[str, dict[str, Any]] = json.loads(
                (source / "faults.json").read_text()
            )
        except FileNotFoundError as error:
            raise BadInput(
                f"source={source} is no source folder: {error.filename} is not there. "
                f"Make one: kiln source kind=scenes out={source}"
            ) from error
        self.pictures = {path.name: path for path in (source / "pictures").iterdir()}
        self.stopping = threading.Event()
        try:
            super().__init__((HOST, self.port), _Handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise BadWorld(
                f"port {self.port} of {HOST} is taken, and the URLs of {source} name it. Stop what "
                "listens there (served already?), or make the source again with another port=."
            ) from error

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name, as the parent class does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.port

    def server_close(self) -> None:
        """Close, and wake the slow answers."""
        self.stopping.set()
        super().server_close()


class _Handler(BaseHTTPRequestHandler):
    server: SourceServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault: dict[str, Any] = self.server.faults.get(path, {})
        name = path.removeprefix(DIRECT).removeprefix("/")
        picture = self.server.pictures.get(name)
        kind = fault.get("kind", "none")
        if picture is None or kind == "missing":
            self.send_error(404)
            return
        if kind == "slow" and self.server.stopping.wait(fault["seconds"]):
            return
        try:
            self._answer(kind, path, picture)
        except (BrokenPipeError, ConnectionResetError):
            log.debug("the client left before %s was sent", path)

    def _answer(self, kind: str, path: str, picture: Path) -> None:
        if kind == "redirect":
            self._head(302, "text/html", 0, Location=f"{DIRECT}{path}")
            return
        if kind == "not_an_image":
            self._head(200, "text/html", len(_PAGE))
            self.wfile.write(_PAGE)
            return
        num_bytes = picture.stat().st_size
        sent_bytes = num_bytes // 2 if kind in {"truncated", "cut"} else num_bytes
        length = sent_bytes if kind == "cut" else num_bytes
        extra = {"X-Robots-Tag": "noai"} if kind == "opt_out" else {}
        self._head(200, _KINDS.get(picture.suffix, "application/octet-stream"), length, **extra)
        with picture.open("rb") as file:
            if sent_bytes == num_bytes:
                shutil.copyfileobj(file, self.wfile)
            else:
                self.wfile.write(file.read(sent_bytes))

    def _head(self, code: int, kind: str, num_bytes: int, **extra: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": num_bytes, **extra}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)
