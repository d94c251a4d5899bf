import contextlib
import http.client
import shutil
import ssl
import subprocess
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep.config import PrepareConfig
from data_prep.guard import GuardedOpener, scheme_problem
from data_prep.quarantine import reason_of
from data_prep.transport import is_public
from trainer.frozen import compose

SEEN = []


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        SEEN.append(self.headers)
        path = self.path.strip("/")
        if path.startswith("to/"):
            self.send_response(302)
            self.send_header("Location", path[3:])
            self.end_headers()
            return
        self.send_response(200)
        if path != "unknown_length":
            self.send_header("Content-Length", "5000" if path != "small" else "5")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(50 if path == "drip" else 1):
                self.wfile.write(b"x" * {"small": 5, "drip": 100, "short": 3000}.get(path, 5000))
                time.sleep(0.05 if path == "drip" else 0)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def open_url(url, *overrides, allow="127.0.0.1"):
    words = ["rows=x", "dataset=x", f"download.allow_hosts=[{allow}]", *overrides]
    cfg = compose(PrepareConfig, "prepare", words)
    with closing(GuardedOpener(cfg.download)) as opener:
        return opener.open(url, timeout=2).read()


def refusal(url, *overrides, **kwargs):
    with pytest.raises((OSError, http.client.HTTPException)) as caught:
        open_url(url, *overrides, **kwargs)
    return reason_of("failed_to_download", str(caught.value))[0]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:0001::", False),
    ],
)
def test_only_the_public_internet_is_public(address, public):
    assert is_public(address) == public


def test_loopback_is_refused_unless_it_is_allowed(port):
    url = f"http://127.0.0.1:{port}/small"
    assert refusal(url, allow="") == "address_refused"
    assert refusal(f"http://localhost:{port}/small", allow="") == "address_refused"
    assert refusal(f"http://2130706433:{port}/small", allow="") == "address_refused"
    assert refusal(f"https://127.0.0.1:{port}/small", allow="") == "address_refused"
    assert open_url(url) == b"xxxxx"
    assert open_url(url, allow=f"127.0.0.1:{port}") == b"xxxxx"
    assert refusal(url, allow="127.0.0.1:1") == "address_refused"


def test_redirects_are_judged_like_plain_urls(port):
    base = f"http://127.0.0.1:{port}/to"
    assert open_url(f"{base}//small") == b"xxxxx"
    assert open_url(f"{base}/http://127.0.0.1:{port}/small") == b"xxxxx"
    assert refusal(f"{base}/http://127.0.0.2:{port}/small") == "address_refused"
    assert refusal(f"{base}/http://169.254.169.254/latest/meta-data") == "address_refused"
    assert refusal(f"{base}/file:///etc/passwd") == "scheme_refused"
    assert refusal(f"{base}/ftp://127.0.0.1/x") == "scheme_refused"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x"])
def test_other_schemes_are_refused(url):
    assert refusal(url) == "scheme_refused"
    assert scheme_problem(url)


def test_urls_that_cannot_be_fetched_are_named_before():
    assert scheme_problem("no url at all")
    assert scheme_problem("http:///path") == "no host"
    assert scheme_problem("http://[::1/x")
    assert scheme_problem("HTTPS://Example.org/x") is None


def test_bodies_have_a_largest_size_announced_or_not(port):
    for path in ("known_length", "unknown_length"):
        url = f"http://127.0.0.1:{port}/{path}"
        assert len(open_url(url, "download.max_body_bytes=5000")) == 5000
        assert refusal(url, "download.max_body_bytes=4999") == "too_many_bytes"


def test_a_dripping_body_has_a_deadline(port):
    started_s = time.monotonic()
    assert refusal(f"http://127.0.0.1:{port}/drip", "download.deadline_s=0.3") == "timeout"
    assert time.monotonic() - started_s < 1.5


def test_a_body_shorter_than_announced_is_truncated(port):
    assert refusal(f"http://127.0.0.1:{port}/short") == "truncated"


def test_a_closed_port_is_a_connection_failure():
    assert refusal("http://127.0.0.1:9/x") == "connection"


def test_servers_learn_who_asks(port):
    SEEN.clear()
    open_url(f"http://127.0.0.1:{port}/to//small", "download.user_agent=kiln/test")
    # robots.txt, tdmrep.json, the redirect and the picture
    assert [headers.get_all("User-Agent") for headers in SEEN] == [["kiln/test"]] * 4


def test_no_proxy_is_used(port, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert open_url(f"http://127.0.0.1:{port}/small") == b"xxxxx"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https_checks_certificates(tmp_path, monkeypatch):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem"]
    subprocess.run(
        [*make, "-out", "cert.pem", "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"https://127.0.0.1:{server.server_port}/small"
        try:
            with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
                open_url(url)
            monkeypatch.setenv("SSL_CERT_FILE", str(cert))
            assert open_url(url) == b"xxxxx"
        finally:
            server.shutdown()
            thread.join()
