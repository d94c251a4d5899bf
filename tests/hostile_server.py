"""A loopback web server that does to its clients what servers of the wild do, and worse."""

import gzip
import io
import socketserver
import threading
from collections import Counter
from contextlib import contextmanager, suppress

from PIL import Image

MAX_BODY_BYTES = 200_000  # what its clients are to be configured with
TIMEOUT_S = 0.6
DEADLINE_S = 1.2


def jpeg(side_px=40):
    body = io.BytesIO()
    Image.effect_noise((side_px, side_px), 80).convert("RGB").save(body, "JPEG")
    return body.getvalue()


PICTURE = jpeg()
FOREVER = 10**9


def head(status="200 OK", length=None, **headers):
    lines = [f"HTTP/1.1 {status}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {length}"] if length is not None else ["Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def page(body, status="200 OK", **headers):
    return head(status, len(body), **headers) + body


def to(location, status="302 Found"):
    return page(b"", status, Location=location)


def chunked(*chunks):
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(chunks)


HTML = b"<!doctype html><html><head>%s</head></html>"
CUT_GZIP = gzip.compress(PICTURE)[:-20]
HONEST = chunked(b"%x\r\n" % len(PICTURE), PICTURE, b"\r\n0\r\n\r\n")

# path -> (what is sent, the reason that the row must get; None: it is kept)
FIXED = {
    "good": (page(PICTURE), None),
    "chunked": (HONEST, None),
    "wrong-type": (page(PICTURE, Content_Type="text/html"), None),
    "bad-length": (head(Content_Length="abc") + PICTURE, None),
    "negative-length": (head(Content_Length="-5") + PICTURE, None),
    "gzip": (page(gzip.compress(PICTURE), Content_Encoding="gzip"), None),
    "not-gzip": (page(PICTURE, Content_Encoding="gzip"), None),
    "redirect": (to("/good"), None),
    "odd-redirect": (to("/go\xf6d"), "http_404"),
    "gzip-bomb": (page(gzip.compress(bytes(10**7)), Content_Encoding="gzip"), "too_many_bytes"),
    "cut-gzip": (page(CUT_GZIP, Content_Encoding="gzip"), "truncated"),
    "html": (page(HTML % b"", Content_Type="image/jpeg"), "not_an_image"),
    "empty": (page(b""), "not_an_image"),
    "loop": (to("/loop"), "too_many_redirects"),
    "circle": (to("/circle2"), "too_many_redirects"),
    "circle2": (to("/circle"), "too_many_redirects"),
    "nowhere": (page(b"", "302 Found"), "http_302"),
    "to-metadata": (to("http://169.254.169.254/latest/meta-data"), "address_refused"),
    "to-private": (to("http://10.0.0.1/x"), "address_refused"),
    "to-decimal": (to("http://2852039166/latest/meta-data"), "address_refused"),
    "to-mapped": (to("http://[::ffff:a9fe:a9fe]/latest"), "address_refused"),
    "to-file": (to("file:///etc/passwd"), "scheme_refused"),
    "to-nothing": (to("http://[bad/"), "scheme_refused"),
    "closed": (b"", "connection"),
    "cut-head": (b"HTTP/1.1 200 OK\r\nContent-Le", "not_an_image"),
    "no-http": (b"\x16\x03\x01 garbage\r\n\r\n", "bad_response"),
    "bad-status": (b"HTTP/1.1 abc OK\r\n\r\n", "bad_response"),
    "other-version": (b"HTTP/9.9 200 OK\r\n\r\n", "bad_response"),
    "liar": (b"HTTP/1.1 404 kiln-reason=opt_out: x\r\nContent-Length: 0\r\n\r\n", "http_404"),
    "many-headers": (head(**{f"X{i}": "y" for i in range(5000)}), "bad_response"),
    "long-header": (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10**6 + b"\r\n\r\n", "bad_response"),
    "heavy-headers": (head(**{f"X{i}": "y" * 60_000 for i in range(90)}), "bad_response"),
    "huge-length": (head(length=10**15), "too_many_bytes"),
    "short": (head(length=len(PICTURE)) + PICTURE[:-9], "truncated"),
    "huge-chunk": (chunked(b"f" * 16 + b"\r\n", PICTURE), "truncated"),
    "no-chunk": (chunked(b"zz\r\n", PICTURE), "truncated"),
    "long-chunk-line": (chunked(b"1" * 10**5), "bad_response"),
    "noai": (page(PICTURE, X_Robots_Tag="noai"), "opt_out"),
    "noai-kiln": (page(PICTURE, X_Robots_Tag="otherbot: none, kiln: noimageai"), "opt_out"),
    "noai-other": (page(PICTURE, X_Robots_Tag="otherbot: noai"), None),
    "tdm": (page(PICTURE, tdm_reservation="1"), "opt_out"),
    "tdm-free": (page(PICTURE, tdm_reservation="0"), None),
    "noai-redirect": (page(b"", "302 Found", Location="/good", X_Robots_Tag="noai"), "opt_out"),
    "noai-page": (page(HTML % b'<META content="NoAI" name=robots>'), "opt_out"),
    "tdm-page": (page(HTML % b"<meta name='tdm-reservation' content='1'>"), "opt_out"),
}
# path -> (first, again and again, pause, the reason)
REPEATED = {
    "endless": (head(), b"x" * 10_000, 0, "too_many_bytes"),
    "drip-head": (b"HTTP/1.1 200 OK\r\nX: ", b"y", 0.1, "timeout"),
    "drip-body": (head(length=10_000), b"y", 0.1, "timeout"),
    "drip-error": (head("404 Not Found", length=10_000), b"y", 0.1, "timeout"),
    "silent": (b"", b"", FOREVER, "timeout"),
    "silent-body": (head(length=10_000) + b"y", b"", FOREVER, "timeout"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0, "bad_response"),
    "endless-header": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0, "bad_response"),
    "negative-chunk": (chunked(b"-1\r\n"), b"x" * 10_000, 0, "too_many_bytes"),
    "small-chunks": (chunked(), b"64\r\n%s\r\n" % bytes(100) * 100, 0, "too_many_bytes"),
}
REASONS = {name: reason for name, (_, reason) in FIXED.items()}
REASONS |= {name: reason for name, (*_, reason) in REPEATED.items()}


class HostileServer(socketserver.ThreadingTCPServer):
    """Answers /NAME as FIXED and REPEATED say, or as `self.answers` does."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, answers=None):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.answers = answers or {}  # path -> function of the number of the request, from 1
        self.counts = Counter()
        self.num_connections = self.num_open = self.most_open = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class _Connection(socketserver.StreamRequestHandler):
    server: HostileServer

    def handle(self):
        with self.server.lock:
            self.server.num_connections += 1
        with suppress(OSError):
            while (request := self.rfile.readline()) and self.answer(request):
                pass

    def answer(self, request):
        while self.rfile.readline().strip():
            pass
        server, name = self.server, request.split()[1].decode().strip("/")
        with server.lock:
            server.counts[name] += 1
            server.num_open += 1
            server.most_open = max(server.most_open, server.num_open)
            number = server.counts[name]
        try:
            return self.send(name, number)
        finally:
            with server.lock:
                server.num_open -= 1

    def send(self, name, number):
        if name in self.server.answers:
            answer = self.server.answers[name](number)
        elif name in REPEATED:
            first, again, pause_s, _ = REPEATED[name]
            self.request.sendall(first)
            while not self.server.stopping.wait(pause_s):
                self.request.sendall(again)
            return False
        else:
            answer = FIXED[name][0] if name in FIXED else page(b"", "404 Not Found")
        self.request.sendall(answer)
        start, _, body = answer.partition(b"\r\n\r\n")
        return start.endswith(b"\r\nContent-Length: %d" % len(body))


@contextmanager
def hostile(answers=None):
    """Serve; give the server."""
    with HostileServer(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()
