import email.utils
import functools
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep.config import PrepareConfig
from data_prep.courtesy import Courtesy
from data_prep.guard import GuardedOpener, scheme_problem
from data_prep.quarantine import Reason, marked, reason_of
from data_prep.transport import inflated, is_public, parse_url
from tests.hostile_server import (
    DEADLINE_S,
    MAX_BODY_BYTES,
    PICTURE,
    REASONS,
    TIMEOUT_S,
    head,
    hostile,
    page,
    to,
)
from tests.tiny_source import prepare_cfg, publish_here, write_rows
from trainer.data.manifest import load_manifest
from trainer.frozen import compose

PLAIN = compose(
    PrepareConfig, "prepare", ["rows=x", "dataset=x", "download.allow_hosts=[127.0.0.1]"]
).download
CFG = replace(
    PLAIN,
    timeout_s=TIMEOUT_S,
    deadline_s=DEADLINE_S,
    max_body_bytes=MAX_BODY_BYTES,
    retries=0,
)
QUIET = {"robots_txt": False, "tdm": False}


@pytest.fixture(scope="module")
def server():
    with hostile() as server:
        yield server


@pytest.fixture(scope="module")
def opener():
    with closing(GuardedOpener(CFG)) as opener:
        yield opener


def outcome(opener, url):
    """The body, or the reason why there is none."""
    try:
        return opener.open(url).read()
    except Exception as error:
        return reason_of("failed_to_download", str(error))[0]


def outcomes(cfg, *urls, **kwargs):
    with closing(GuardedOpener(cfg, **kwargs)) as opener:
        return [outcome(opener, url) for url in urls]


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
        ("64:ff9b::a9fe:a9fe", False),
        ("::ffff:168.63.129.16", False),
        ("168.63.129.16", False),
        ("168.63.129.17", True),
        ("192.0.0.192", False),
        ("192.88.99.1", False),
        ("fd00:ec2::254", False),
        ("fec0::1", False),
        ("3fff::1", False),
    ],
)
def test_only_the_public_internet_is_public(address, public):
    assert is_public(address) == public


def test_loopback_is_refused_unless_it_is_allowed(server):
    port = server.server_address[1]
    names = ("127.0.0.1", "localhost", "2130706433")
    urls = [f"{scheme}://{name}:{port}/good" for scheme in ("http", "https") for name in names]
    assert set(outcomes(replace(CFG, allow_hosts=()), *urls)) == {"address_refused"}
    assert outcomes(replace(CFG, allow_hosts=("127.0.0.1:1",)), urls[0]) == ["address_refused"]
    for allowed in ("127.0.0.1", f"127.0.0.1:{port}"):
        assert outcomes(replace(CFG, allow_hosts=(allowed,)), urls[0]) == [PICTURE]


def test_the_address_that_was_judged_is_the_one_that_is_asked(server, monkeypatch):
    port = server.server_address[1]
    lookups = []

    def rebound(host, *_, **__):
        lookups.append(host)
        address = "127.0.0.1" if len(lookups) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr("data_prep.transport.socket.getaddrinfo", rebound)
    monkeypatch.setattr("data_prep.transport.is_public", lambda address: address == "127.0.0.1")
    url = f"http://rebound.example:{port}/good"
    cfg = replace(CFG, allow_hosts=(), **QUIET)
    assert outcomes(cfg, url) == [PICTURE]
    assert lookups == ["rebound.example"]
    assert outcomes(cfg, url) == ["address_refused"]


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "http://127.0.0.1:x/"]
)
def test_other_schemes_are_refused(opener, url):
    assert outcome(opener, url) == "scheme_refused"
    assert scheme_problem(url)


def test_urls_that_cannot_be_fetched_are_named_before():
    assert scheme_problem("no url at all")
    assert scheme_problem("http:///path") == "no host"
    assert scheme_problem("http://a b/path") == "no host"
    assert scheme_problem("http://[::1/x")
    assert scheme_problem(f"http://{'ä' * 70}.org/x")
    assert scheme_problem("HTTPS://Example.org/x") is None


def test_urls_are_sent_in_ascii_and_encoded_once():
    target = parse_url("http://Bücher.example:8080/ä b%20c\x01?q=ü&r=%41#part")
    assert target.netloc == "xn--bcher-kva.example:8080"
    assert target.path == "/%C3%A4%20b%20c%01?q=%C3%BC&r=%41"
    assert parse_url(f"{target.origin}{target.path}") == target
    assert parse_url("https://[2606:4700::1111]/").netloc == "[2606:4700::1111]"


@pytest.mark.parametrize("name", REASONS)
def test_a_hostile_answer_ends_in_time_with_its_reason(server, opener, name):
    started_s = time.monotonic()
    found = outcome(opener, server.url(name))
    elapsed_s = time.monotonic() - started_s
    if REASONS[name] == "not_an_image":  # judged after the download
        assert isinstance(found, bytes)
    else:
        assert found == (REASONS[name] or PICTURE)
    assert elapsed_s < DEADLINE_S + TIMEOUT_S + 1


def test_all_hostile_answers_in_one_unit_add_up_and_kill_nobody(server, tmp_path):
    busy = {
        "busy": lambda n: page(b"", "429 Wait", Retry_After="1") if n == 1 else page(PICTURE),
        "down": lambda n: page(b"", "503 Down"),
    }
    expected = Counter({reason or "kept": 0 for reason in REASONS.values()})
    with hostile(busy) as other, hostile(busy) as another:
        rows = [(server.url(name), f"picture {name}") for name in REASONS]
        rows += [(other.url("busy"), "busy"), (another.url("down"), "down")]
        for reason in [*REASONS.values(), None, "http_503"]:
            expected[reason or "kept"] += 1
        cfg = prepare_cfg(
            tmp_path,
            tmp_path / "d",
            f"rows={write_rows(tmp_path / 'rows.parquet', *rows)}",
            "shard_rows=1000",
            f"download.timeout_s={TIMEOUT_S}",
            f"download.deadline_s={DEADLINE_S}",
            f"download.max_body_bytes={MAX_BODY_BYTES}",
            "download.retries=1",
            "download.max_wait_s=2",
        )
        publish_here(cfg)
    manifest = load_manifest(tmp_path / "d")
    kept = expected.pop("kept")
    assert (manifest.rows_in, manifest.rows_kept) == (len(rows), kept)
    assert manifest.rejected == dict(expected)
    assert manifest.rows_rejected == len(rows) - kept


def test_bodies_have_a_largest_size_announced_or_not(server):
    for name in ("good", "chunked", "bad-length"):
        fitting = replace(CFG, max_body_bytes=len(PICTURE))
        assert outcomes(fitting, server.url(name)) == [PICTURE]
        tighter = replace(CFG, max_body_bytes=len(PICTURE) - 1)
        assert outcomes(tighter, server.url(name)) == ["too_many_bytes"]


def test_what_is_inflated_has_a_largest_size(server):
    assert inflated(b"plain", "gzip", 9) == b"plain"
    assert inflated(b"plain", "br", 9) == b"plain"
    assert outcomes(replace(CFG, max_body_bytes=len(PICTURE) + 99), server.url("gzip")) == [PICTURE]
    with hostile() as other:
        other.answers["bomb"] = lambda n: page(bytes(10), Content_Encoding="deflate")
        assert outcomes(CFG, other.url("bomb")) == [bytes(10)]


def test_a_chain_of_redirects_is_followed_to_a_length():
    steps = {f"{n}": lambda count, n=n: to(f"/{n - 1}") for n in range(1, 12)}
    with hostile({**steps, "0": lambda count: page(PICTURE)}) as server:
        found = outcomes(CFG, server.url("10"), server.url("11"))
        assert found == [PICTURE, "too_many_redirects"]


def test_the_deadline_covers_redirects_and_further_attempts():
    def slowly(answer):
        time.sleep(0.4)
        return answer

    steps = {f"{n}": lambda count, n=n: slowly(to(f"/{n - 1}")) for n in range(1, 12)}
    steps |= {"fails": lambda count: slowly(page(b"", "500 No"))}
    with hostile(steps) as server:
        started_s = time.monotonic()
        cfg = replace(CFG, retries=50, max_wait_s=0.1)
        assert outcomes(cfg, server.url("10"), server.url("fails")) == ["timeout"] * 2
        assert time.monotonic() - started_s < 2 * (DEADLINE_S + TIMEOUT_S) + 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_failures_that_may_pass_are_tried_again(status):
    def answer(number):
        return page(PICTURE) if number == 2 else page(b"", f"{status} No", Retry_After="0")

    with hostile({"x": answer, "y": answer}) as server:
        cfg = replace(CFG, retries=1, max_wait_s=1.1)
        assert outcomes(cfg, server.url("x")) == [PICTURE]
        assert outcomes(replace(cfg, retries=0), server.url("y")) == [f"http_{status}"]
        assert (server.counts["x"], server.counts["y"]) == (2, 1)


def test_a_connection_cut_before_the_answer_is_tried_again():
    answers = {"x": lambda number: page(PICTURE) if number == 3 else b""}
    cfg = replace(CFG, retries=1, **QUIET)
    with hostile(answers) as server:
        assert outcomes(cfg, server.url("x"), server.url("x")) == ["connection", PICTURE]


@pytest.mark.parametrize("name", ["noai", "tdm", "noai-page", "to-private", "missing", "short"])
def test_what_will_not_pass_is_asked_for_once(name):
    with hostile() as server:
        outcomes(replace(CFG, retries=3), server.url(name))
        assert server.counts[name] == 1


@pytest.mark.parametrize("dated", [False, True])
def test_a_host_that_asks_to_wait_is_left_alone_by_all_threads(dated):
    asked_s = []

    def busy(number):
        asked_s.append(time.monotonic())
        when = email.utils.formatdate(time.time() + 2, usegmt=True) if dated else "1"
        return page(b"", "429 Wait", Retry_After=when) if number == 1 else page(PICTURE)

    cfg = replace(CFG, retries=1, max_wait_s=5, **QUIET)
    with hostile({"x": busy}) as server, closing(GuardedOpener(cfg)) as opener:
        first = threading.Thread(target=outcome, args=(opener, server.url("x")))
        first.start()
        while not asked_s:
            time.sleep(0.01)
        time.sleep(0.1)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: outcome(opener, server.url("x")), range(8)))
        first.join()
    assert found == [PICTURE] * 8
    assert len(asked_s) == 10
    # The waits were longer than the deadline, and did not count.
    assert min(asked_s[1:]) - asked_s[0] > 0.9


def test_a_host_that_asks_for_too_much_gets_no_further_request():
    busy = {"x": lambda number: page(b"", "503 Down", Retry_After="100")}
    with hostile(busy) as server:
        started_s = time.monotonic()
        found = outcomes(replace(CFG, retries=3, max_wait_s=1, **QUIET), *[server.url("x")] * 20)
        assert found == ["http_503"] * 20
        assert server.counts["x"] == 1
        assert time.monotonic() - started_s < 3


def test_a_host_sees_no_more_connections_at_once_than_it_should():
    def slow(number):
        time.sleep(0.05)
        return page(PICTURE)

    polite = Courtesy(connections=6, requests_per_s=None, max_wait_s=9, num_processes=2)
    for courtesy, most in ((polite, 3), (None, 16)):
        with (
            hostile({"x": slow}) as server,
            closing(GuardedOpener(replace(CFG, **QUIET), courtesy=courtesy)) as opener,
            ThreadPoolExecutor(16) as threads,
        ):
            urls = [server.url("x")] * 48
            assert list(threads.map(functools.partial(outcome, opener), urls)) == [PICTURE] * 48
        assert 2 <= server.most_open <= most
    assert server.most_open > 3  # allow_hosts are exempt


def test_connections_are_kept_and_those_that_went_stale_are_replaced():
    def sometimes(number):
        return page(PICTURE) + (b"" if number % 3 else b"rubbish behind")

    with hostile({"x": sometimes}) as server, closing(GuardedOpener(CFG)) as opener:
        for _ in range(4):
            assert outcome(opener, server.url("good")) == PICTURE
        # robots.txt, tdmrep.json and the pictures: all over one
        assert (server.num_connections, server.counts["robots.txt"]) == (1, 1)
        before = server.num_connections
        for _ in range(9):
            assert outcome(opener, server.url("x")) == PICTURE
        assert 1 <= server.num_connections - before <= 3
        assert outcome(opener, server.url("short")) == "truncated"  # closes
        assert outcome(opener, server.url("good")) == PICTURE


def test_a_kept_connection_that_ends_with_the_request_is_asked_again_on_a_new_one():
    answers = {"closes": lambda number: b"" if number == 1 else page(PICTURE)}
    with hostile(answers) as server:
        # The first request to it goes over the connection of the one before.
        found = outcomes(replace(CFG, **QUIET), server.url("good"), server.url("closes"))
        assert found == [PICTURE] * 2
        assert server.counts["closes"] == 2


def test_servers_learn_who_asks_and_may_compress_nothing():
    seen = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers))
            self.wfile.write(to("/b") if self.path == "/a" else head(length=0))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        port = server.server_port
        outcomes(replace(CFG, user_agent="kiln/test"), f"http://127.0.0.1:{port}/a")
        server.shutdown()
        thread.join()
    paths = ["/robots.txt", "/.well-known/tdmrep.json", "/a", "/b"]
    assert [path for path, _ in seen] == paths
    for _, headers in seen:
        assert headers.get_all("User-Agent") == ["kiln/test"]
        assert headers.get_all("Host") == [f"127.0.0.1:{port}"]
        assert headers["Accept-Encoding"] == "identity"


def test_no_proxy_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert outcomes(CFG, server.url("good")) == [PICTURE]


def test_a_closed_port_is_a_connection_failure_known_to_all_rows_of_the_host(opener):
    started_s = time.monotonic()
    found = outcomes(replace(CFG, retries=2), *[f"http://127.0.0.1:9/{i}" for i in range(200)])
    assert found == ["connection"] * 200
    assert time.monotonic() - started_s < 4


def test_reasons_of_ours_cannot_be_forged():
    assert reason_of("failed_to_download", "HTTP Error 404: kiln-reason=x: y")[0] == "http_404"
    spoken = "HTTP Error 404: kiln-reason=opt_out: y"
    assert reason_of("failed_to_download", marked(Reason.BAD_RESPONSE, spoken))[0] == "bad_response"


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
    with hostile() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = server.url("good").replace("http:", "https:")
        with (
            closing(GuardedOpener(CFG)) as opener,
            pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            opener.open(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        assert outcomes(CFG, url, url) == [PICTURE] * 2
