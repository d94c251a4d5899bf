"""Serve a report on loopback while its run goes on."""

import errno
import json
import logging
import math
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trainer.errors import BadInput, BadWorld
from trainer.observe.evaluations import is_held
from trainer.observe.story import Story

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
_SLOW_S, _REST = 1.0, 9
"""An answer that takes longer to make is given again for so many times as long."""


def state_of(stories: Sequence[Story]) -> str:
    """Say whether runs go on: one of them does, all have reached their last step, or neither."""
    if any(is_held(story.run_dir) for story in stories):
        return "running"
    return "finished" if all(map(_is_finished, stories)) else "stopped"


def _is_finished(story: Story) -> bool:
    total_steps = story.plan.get("total_steps")
    return total_steps is not None and story.metrics.newest().get("step", 0) >= total_steps


class PageServer(ThreadingHTTPServer):
    """A loopback server of one page and its data."""

    daemon_threads = True

    def __init__(self, port: int, page: Callable[[], str], data: Callable[[], Any]) -> None:
        """Bind a port; 0 is any free one.

        Args:
            port: To listen on.
            page: Makes the page.
            data: Makes what its script draws, plain JSON.
        """
        self._makers = {"/": lambda: page().encode(), "/data.json": lambda: _json(data())}
        self._one_at_a_time = threading.Lock()
        self._kept: dict[str, tuple[float, bytes]] = {}
        """Until when an answer is good enough, and it."""
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in {errno.EADDRINUSE, errno.EACCES}:
                raise
            raise BadWorld(
                f"port {port} of {HOST} cannot be had ({error.strerror}). "
                "Give another port=, or port=0 for any free one."
            ) from error

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.server_port}/"

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name, as the parent class does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def is_own_name(self, host: str | None) -> bool:
        """Whether a Host header names this server: another page's name may lead here as well."""
        return host in {f"{HOST}:{self.server_port}", f"localhost:{self.server_port}"}

    def make(self, path: str) -> bytes | None:
        """Make what a path names; None for an unknown one."""
        maker = self._makers.get(path)
        if maker is None:
            return None
        with self._one_at_a_time:
            began_s = time.monotonic()
            until_s, content = self._kept.get(path, (-math.inf, b""))
            if began_s >= until_s:
                content = maker()
                took_s = time.monotonic() - began_s
                until_s = began_s + (took_s * (1 + _REST) if took_s > _SLOW_S else 0.0)
                # The other answer would be older: a page that sees its state change asks for both.
                self._kept = {path: (until_s, content)}
            return content


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        if not self.server.is_own_name(self.headers.get("Host")):
            self.send_error(421)
            return
        try:
            content = self.server.make(self.path)
        except (BadInput, BadWorld, OSError) as error:
            log.warning("%s cannot be made: %s", self.path, error)
            self.send_error(503, explain=str(error))
            return
        if content is None:
            self.send_error(404)
            return
        kind = "text/html; charset=utf-8" if self.path == "/" else "application/json"
        self.send_response(200)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            log.debug("the browser left before %s was sent", self.path)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


def _json(data: Any) -> bytes:  # noqa: ANN401 - plain JSON
    return json.dumps(data, allow_nan=False, separators=(",", ":")).encode()
