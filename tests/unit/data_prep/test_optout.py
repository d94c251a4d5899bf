import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from email.message import Message

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import PrepareConfig
from data_prep.guard import GuardedOpener
from data_prep.optout import (
    SiteRules,
    Sites,
    SiteUnknown,
    parse_robots,
    parse_tdmrep,
    product_token,
    wishes,
)
from data_prep.quarantine import reason_of
from tests.hostile_server import PICTURE, hostile, page, to
from tests.tiny_source import prepare_cfg, rules_hash
from trainer.errors import BadInput
from trainer.frozen import compose

CFG = replace(
    compose(
        PrepareConfig, "prepare", ["rows=x", "dataset=x", "download.allow_hosts=[127.0.0.1]"]
    ).download,
    retries=0,
    timeout_s=1,
)
OURS = wishes("kiln/0.1 (x)", ["noai", "NoImageAI "], tdm=True)
TDM = ".well-known/tdmrep.json"


def answers(cfg, server, *names):
    """For each path: what a row gets, as (reason, detail); (None, '') is the picture."""
    found = []
    with closing(GuardedOpener(cfg)) as opener:
        for name in names:
            try:
                assert opener.open(server.url(name)).read() == PICTURE
                found.append((None, ""))
            except OSError as error:
                found.append(reason_of("failed_to_download", str(error)))
    return found


def site(robots=b"", tdm=None, **more):
    files = {"robots.txt": lambda n: page(robots)}
    files |= {TDM: lambda n: page(json.dumps(tdm).encode())} if tdm is not None else {}
    pictures = {f"{folder}/p.jpg": lambda n: page(PICTURE) for folder in ("a", "b", "b/c")}
    return hostile(files | pictures | more)


def robots_allow(text, path, token="kiln"):
    return SiteRules(robots=parse_robots(text, token)).problem(f"http://h{path}", token) is None


@pytest.mark.parametrize(
    ("text", "allowed", "disallowed"),
    [
        (b"", ["/", "/x"], []),
        (b"<html>not found</html>", ["/x"], []),
        (b"User-agent: *\nDisallow: /", [], ["/", "/x"]),
        (b"\xef\xbb\xbfUSER-AGENT: *\r\ndisallow: /x\r\n", ["/"], ["/x", "/x/y"]),
        (b"User-agent: *\nDisallow:", ["/x"], []),
        (b"Disallow: /", ["/x"], []),
        (b"User-agent: kiln\nDisallow: /x\nUser-agent: *\nDisallow: /y", ["/y"], ["/x"]),
        (b"User-agent: KILN/2\nDisallow: /x", ["/y"], ["/x"]),
        (b"User-agent: other\nUser-agent: kiln\n\nDisallow: /x", ["/y"], ["/x"]),
        (b"User-agent: kiln\nCrawl-delay: 9\nUser-agent: x\nDisallow: /x", ["/y"], ["/x"]),
        (b"User-agent: kiln\nAllow: /\nUser-agent: other\nDisallow: /", ["/x"], []),
        (b"User-agent: kilnbot\nDisallow: /\nUser-agent: k\nDisallow: /", ["/x"], []),
        (b"User-agent: kiln\nDisallow: /x\nUser-agent: kiln\nDisallow: /y", ["/"], ["/x", "/y"]),
        (b"User-agent: *\nDisallow: /x # Allow: /x", ["/"], ["/x"]),
        (b"User-agent: *\nDisallow: /*.jpg$", ["/a.jpg?x", "/a.png"], ["/a.jpg", "/b/a.jpg"]),
        (b"User-agent: *\nDisallow: /x\nAllow: /x/y", ["/x/y/z"], ["/x", "/x/z"]),
        (b"User-agent: *\nDisallow: /%C3%A4", [], ["/%c3%a4", "/%C3%A4/x"]),
        (b"User-agent: *\nDisallow: /x?a=", ["/x"], ["/x?a=1"]),
    ],
)
def test_robots_txt_is_read_as_rfc_9309_says(text, allowed, disallowed):
    assert [path for path in allowed if not robots_allow(text, path)] == []
    assert [path for path in disallowed if robots_allow(text, path)] == []


@pytest.mark.parametrize(
    "text",
    [
        b"".join(b"User-agent: a%d\n" % i for i in range(10_000)) + b"Disallow: /x\n" * 24_000,
        b"User-agent: *\nDisallow: /" + b"*a" * 250_000,
        b"User-agent: *\n" + b"".join(b"Disallow: /%d/*x$\n" % i for i in range(26_000)),
        b"User-agent" + b" " * 500_000,
        b"dis" * 150_000,
    ],
)
def test_a_hostile_robots_txt_costs_seconds_at_most(text):
    started_s = time.process_time()
    robots_allow(text, "/" + "a" * 2000)
    assert time.process_time() - started_s < 8


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([b"User-agent: ", b"kiln", b"*", b"Disallow: ", b"/", b"$", b"\n"]))
    | st.lists(st.binary())
)
def test_no_text_makes_the_readers_fail(parts):
    text = b"".join(parts)
    robots_allow(text, "/x")
    SiteRules(tdm=parse_tdmrep(text)).problem("http://h/x", "kiln")
    OURS.in_page(b"<" + text)


@pytest.mark.parametrize(
    ("rules", "free", "reserved"),
    [
        ([{"location": "/b/", "tdm-reservation": 1}], ["/a", "/b"], ["/b/", "/b/c"]),
        ([{"location": "*", "tdm-reservation": "1"}], [], ["/", "/a"]),
        ({"location": "/*.jpg", "tdm-reservation": 1, "tdm-policy": "x"}, ["/a"], ["/a.jpg"]),
        (
            [{"location": "/", "tdm-reservation": 1}, {"location": "/a", "tdm-reservation": 0}],
            ["/a", "/a/b"],
            ["/b"],
        ),
        ([{"location": "/\nDisallow: /", "tdm-reservation": 0}, 3, {}, {"location": 3}], ["/"], []),
        (["x"], ["/"], []),
    ],
)
def test_tdmrep_reserves_what_its_patterns_match(rules, free, reserved):
    read = SiteRules(tdm=parse_tdmrep(json.dumps(rules).encode()))
    assert [path for path in free if read.problem(f"http://h{path}", "kiln")] == []
    assert [path for path in reserved if not read.problem(f"http://h{path}", "kiln")] == []


@pytest.mark.parametrize("body", [b"", b"no json", b"[" * 100_000, b"1" * 9999, b"\xff\xfe"])
def test_what_is_no_tdmrep_reserves_nothing(body):
    assert SiteRules(tdm=parse_tdmrep(body)).problem("http://h/", "kiln") is None


@pytest.mark.parametrize(
    ("value", "forbids"),
    [
        ("noai", True),
        ("NOAI", True),
        ("noarchive, NoImageAI", True),
        ("kiln: noai", True),
        ("Kiln: noarchive, noai", True),
        ("*: noai", True),
        ("otherbot: noarchive, kiln: noai", True),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noai", True),
        ("max-snippet:20, noai", True),
        ("otherbot: noai", False),
        ("otherbot: noarchive, noai", False),
        ("noindex", False),
        ("noaix", False),
        ("", False),
    ],
)
def test_directives_speak_to_all_or_to_the_robot_they_name(value, forbids):
    headers = Message()
    headers["x-robots-tag"] = "noarchive"
    headers["X-Robots-Tag"] = value
    assert bool(OURS.in_headers(headers)) == forbids
    assert bool(OURS.in_page(b"<meta name=robots content='%s'>" % value.encode())) == forbids
    none = wishes("kiln", [], tdm=True)
    assert none.in_headers(headers) is None


@pytest.mark.parametrize(
    ("body", "forbids"),
    [
        (b"<html><meta name='robots' content='noai'>", True),
        (b"\xef\xbb\xbf \n<!DOCTYPE html><META\nCONTENT=noai NAME=Robots >", True),
        (b'<html><meta name="kiln" content="x,noai"/>', True),
        (b'<html><meta name="tdm-reservation" content="1">', True),
        (b'<html><meta name="tdm-reservation" content="0">', False),
        (b"<html><meta name='otherbot' content='noai'>", False),
        (b"<html><meta name='description' content='noai'>", False),
        (b"\xff\xd8<meta name='robots' content='noai'>", False),
        (b"<html>" + b"<meta " * 10_000, False),
        (b"<html>" + b"<meta " + b"a" * 10**6, False),
    ],
)
def test_pages_speak_in_meta_tags(body, forbids):
    started_s = time.process_time()
    assert bool(OURS.in_page(body)) == forbids
    assert time.process_time() - started_s < 2


def test_none_is_no_index_and_one_reservation_of_several_counts():
    headers = Message()
    headers["X-Robots-Tag"] = "None"
    assert OURS.in_headers(headers) is None
    strict = wishes("kiln", ["noindex"], tdm=True)
    assert strict.in_headers(headers) == "header X-Robots-Tag: none"
    headers = Message()
    headers["TDM-Reservation"] = "0"
    headers["TDM-Reservation"] = " 1 "
    assert OURS.in_headers(headers) == "header TDM-Reservation: 1"


@pytest.mark.parametrize(
    ("user_agent", "token"),
    [("kiln/0.1 (x)", "kiln"), ("My Bot/2", "my"), ("LabBot", "labbot"), ("/", "")],
)
def test_the_first_word_of_the_user_agent_is_its_name(user_agent, token):
    assert product_token(user_agent) == token


@pytest.mark.parametrize("user_agent", ["", " x", "x\r\nCookie: y", "käse"])
def test_a_user_agent_that_cannot_be_sent_is_refused(user_agent, tmp_path):
    with pytest.raises(ValueError, match="user_agent"):
        replace(CFG, user_agent=user_agent)
    with pytest.raises(BadInput, match=r"download.user_agent"):
        prepare_cfg(tmp_path, tmp_path, "download.user_agent='käse'")


def test_a_row_is_left_alone_for_what_the_files_of_its_host_say():
    robots = b"User-agent: kiln\nDisallow: /b/c"
    tdm = [{"location": "/a/*", "tdm-reservation": 1}]
    paths = ("a/p.jpg", "b/p.jpg", "b/c/p.jpg")
    with site(robots, tdm) as server:
        (reserved, free, disallowed) = answers(CFG, server, *paths)
        assert reserved == ("opt_out", "/.well-known/tdmrep.json reserves it")
        assert free == (None, "")
        assert disallowed == ("opt_out", "/robots.txt disallows it for kiln")
        assert (server.counts["a/p.jpg"], server.counts["b/c/p.jpg"]) == (0, 0)
        assert (server.counts["robots.txt"], server.counts[TDM]) == (1, 1)
        got = [r for r, _ in answers(replace(CFG, robots_txt=False), server, *paths)]
        assert got == ["opt_out", None, None]
        got = [r for r, _ in answers(replace(CFG, tdm=False), server, *paths)]
        assert got == [None, None, "opt_out"]
        got = [r for r, _ in answers(replace(CFG, robots_txt=False, tdm=False), server, *paths)]
        assert got == [None] * 3


def test_the_files_of_every_host_on_the_way_count():
    with (
        site(b"User-agent: *\nDisallow: /a") as second,
        hostile({"x": lambda n: to(second.url("a/p.jpg"))}) as first,
    ):
        assert [reason for reason, _ in answers(CFG, first, "x")] == ["opt_out"]
        assert second.counts["a/p.jpg"] == 0


@pytest.mark.parametrize(
    ("robots", "reason"),
    [
        (page(b"User-agent: *\nDisallow: /", "404 Not Found"), None),
        (page(b"", "403 Forbidden"), None),
        (page(b"", "500 Down"), "http_500"),
        (page(b"", "503 Down"), "http_503"),
        (page(b"", "429 Wait"), "http_429"),
        (b"", "connection"),
        (b"garbage\r\n\r\n", "bad_response"),
        (to("/robots.txt"), None),
        (to("/a/rules"), "opt_out"),
        (to("file:///etc/passwd"), None),
        (to("http://10.0.0.1/robots.txt"), None),
        (page(b"User-agent: *\nDisallow: /\n" + b"#" * 10**6), "opt_out"),
    ],
)
def test_a_robots_txt_that_is_missing_allows_and_one_that_fails_forbids_for_now(robots, reason):
    answered = {
        "robots.txt": lambda n: robots,
        "a/rules": lambda n: page(b"User-agent: *\nDisallow: /"),
        "a/p.jpg": lambda n: page(PICTURE),
    }
    with hostile(answered) as server:
        found = answers(replace(CFG, max_wait_s=0), server, "a/p.jpg", "a/p.jpg")
        assert [why for why, _ in found] == [reason] * 2
        assert server.counts["robots.txt"] <= 2
        if reason not in {None, "opt_out"}:
            assert all("/robots.txt" in detail for _, detail in found)
            assert server.counts["a/p.jpg"] == 0


@pytest.mark.parametrize("tdm", [page(b"", "500 Down"), b"", page(b"x"), to("/" + TDM)])
def test_a_tdmrep_that_fails_reserves_nothing(tdm):
    with site(**{TDM: lambda n: tdm}) as server:
        assert answers(CFG, server, "a/p.jpg") == [(None, "")]


def test_thirty_two_threads_ask_a_host_once_and_a_slow_file_has_the_deadline_of_a_row():
    def slow(number):
        time.sleep(0.3)
        return page(b"User-agent: *\nDisallow: /a")

    with site(**{"robots.txt": slow}) as server:
        with ThreadPoolExecutor(32) as threads, closing(GuardedOpener(CFG)) as opener:

            def reason(number):
                try:
                    return len(opener.open(server.url("ab"[number % 2] + "/p.jpg")).read())
                except OSError as error:
                    return reason_of("failed_to_download", str(error))[0]

            assert set(threads.map(reason, range(0, 64, 2))) == {"opt_out"}
            assert set(threads.map(reason, range(1, 64, 2))) == {len(PICTURE)}
        assert server.counts["robots.txt"] == 1
    with site(**{"robots.txt": lambda n: to("drip-head")}) as server:
        started_s = time.monotonic()
        cfg = replace(CFG, deadline_s=0.5)
        assert [why for why, _ in answers(cfg, server, "a/p.jpg", "b/p.jpg")] == ["timeout"] * 2
        assert time.monotonic() - started_s < 2.5


def test_sites_are_forgotten_in_bounded_memory_and_failures_soon():
    sites = Sites()
    big = SiteRules(num_bytes=500 * 1024)
    for number in range(100):
        assert sites.rules(f"http://h{number}", lambda: big) is big
    assert len(sites) <= 8
    for number in range(6000):
        sites.rules(f"http://i{number}", SiteRules)
    assert len(sites) <= 4096
    asked = []

    def fails():
        asked.append(1)
        raise OSError("no name server")

    for _ in range(3):
        with pytest.raises(SiteUnknown, match="no name server"):
            sites.rules("http://down", fails)
    assert len(asked) == 1


def test_a_reader_that_is_interrupted_leaves_no_thread_waiting():
    sites, entered, go = Sites(), threading.Event(), threading.Event()

    def interrupted():
        entered.set()
        go.wait()
        raise KeyboardInterrupt

    def first():
        with pytest.raises(KeyboardInterrupt):
            sites.rules("http://h", interrupted)

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(first)
        entered.wait()
        two = threads.submit(sites.rules, "http://h", SiteRules)
        go.set()
        one.result()
        with pytest.raises(SiteUnknown, match="interrupted"):
            two.result()


def test_opt_outs_are_rules_and_courtesy_is_not(tmp_path):
    plain = rules_hash(prepare_cfg(tmp_path, tmp_path))
    for rule in ("robots_txt=false", "tdm=false", "robots_directives=[]", "deadline_s=9"):
        assert rules_hash(prepare_cfg(tmp_path, tmp_path, f"download.{rule}")) != plain
    courtesy = ("retries=9", "max_wait_s=9", "host_connections=null", "host_requests_per_s=1")
    words = [f"download.{rule}" for rule in courtesy]
    assert rules_hash(prepare_cfg(tmp_path, tmp_path, *words)) == plain
