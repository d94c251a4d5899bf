"""A loopback web server of files in ranges that counts what it sends and fails when told to."""

import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class RangeServer(ThreadingHTTPServer):
    """`files` maps a path without its first slash to bytes.

    `faults` are taken by the next requests, one each: a status, "cut" (half of the body, then the
    end of the connection), "hang" (as long as the server lives), "whole" (no range, all of it).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files = {}
        self.faults = []
        self.ranges = []
        self.sent_bytes = Counter()
        self.bytes_per_s = None
        self.stopped = threading.Event()
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, name = self.server, self.path.removeprefix("/")
        with server.lock:
            fault = server.faults.pop(0) if server.faults else None
        if fault == "hang":
            server.stopped.wait()
        content = server.files.get(name)
        if isinstance(fault, int) or content is None:
            self.answer(404 if content is None else fault, b"")
            return
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        with server.lock:
            server.ranges.append((name, start))
        if fault == "whole":
            self.answer(200, content)
        elif start >= len(content):
            self.answer(416, b"")
        else:
            self.answer(206, content[start : end + 1], cut=fault == "cut")

    def answer(self, status, body, *, cut=False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cut:
            body = body[: len(body) // 2]
            self.close_connection = True
        step = 1 << 16
        for at in range(0, len(body), step):
            part = body[at : at + step]
            self.wfile.write(part)
            with self.server.lock:
                self.server.sent_bytes[self.path.removeprefix("/")] += len(part)
            if self.server.bytes_per_s:
                time.sleep(len(part) / self.server.bytes_per_s)

    def handle(self):
        try:
            super().handle()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True


@contextmanager
def range_server():
    """Serve until the block ends."""
    with RangeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.stopped.set()
            server.shutdown()
            thread.join()
