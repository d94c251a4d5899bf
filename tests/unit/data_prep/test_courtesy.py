import email.utils
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_prep.courtesy import MAX_HOSTS, Courtesy, HostWaits, backoff_s, retry_after_s


def courtesy(**kwargs):
    return Courtesy(**{"connections": None, "requests_per_s": None, "max_wait_s": 9} | kwargs)


def visit(guest, host="h", hold_s=0.0, status=200, retry_after=None):
    """Take a turn; give the time at which it came."""
    with guest.turn(host, host) as turn:
        came_s = time.monotonic()
        time.sleep(hold_s)
        turn.answered(status, retry_after)
        return came_s


def visits(guest, number, *hosts, num_threads=16, **kwargs):
    with ThreadPoolExecutor(num_threads) as threads:
        futures = [
            threads.submit(visit, guest, host, **kwargs) for host in hosts for _ in range(number)
        ]
        return sorted(future.result() for future in futures)


@pytest.mark.parametrize(("connections", "processes", "most"), [(4, 1, 4), (6, 3, 2), (2, 9, 1)])
def test_a_host_sees_as_many_at_once_as_its_share(connections, processes, most):
    guest = courtesy(connections=connections, num_processes=processes)
    lock, now, highest = threading.Lock(), [0], [0]

    def stay(_):
        with guest.turn("h", "h"):
            with lock:
                now[0] += 1
                highest[0] = max(highest[0], now[0])
            time.sleep(0.01)
            with lock:
                now[0] -= 1

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(stay, range(36)))
    assert highest[0] == most


def test_hosts_do_not_wait_for_each_other():
    guest = courtesy(connections=1)
    with guest.turn("a", "a"), ThreadPoolExecutor(1) as threads:
        assert threads.submit(visit, guest, "b").result(timeout=5)
        assert threads.submit(visit, guest, "a:81").result(timeout=5)


def test_a_failure_gives_the_turn_back():
    guest = courtesy(connections=1)
    for _ in range(3):
        with pytest.raises(KeyError), guest.turn("h", "h"):
            raise KeyError
    assert visit(guest)


@pytest.mark.parametrize(("per_s", "processes"), [(50, 1), (100, 2)])
def test_requests_come_at_their_rate_and_not_in_bursts(per_s, processes):
    guest = courtesy(requests_per_s=per_s, num_processes=processes)
    came_s = visits(guest, 26, "h")
    assert came_s[-1] - came_s[0] >= 25 / 50 - 0.01
    started_s = time.monotonic()
    visits(guest, 1, *"abcdefgh")  # each host has a rate of its own
    assert time.monotonic() - started_s < 0.3


def test_exempt_hosts_have_no_limit_but_are_obeyed():
    guest = courtesy(connections=1, requests_per_s=0.01, exempt=("h", "i:80"), max_wait_s=0.5)
    came_s = visits(guest, 8, "h", "i:80", hold_s=0.05)
    assert came_s[-1] - came_s[0] < 0.6
    visit(guest, status=503, retry_after="60")
    with pytest.raises(HostWaits):
        visit(guest)


def test_waiting_takes_no_processor_time():
    guest = courtesy(connections=1, requests_per_s=10)
    started_s = time.process_time()
    visits(guest, 10, "h", hold_s=0.05)
    assert time.process_time() - started_s < 0.3


def test_a_host_that_asks_to_wait_is_left_alone_as_long_as_it_says():
    guest = courtesy()
    visit(guest, status=429, retry_after="1")
    asked_s = time.monotonic()
    assert visit(guest, "other") - asked_s < 0.5
    assert min(visits(guest, 8, "h")) - asked_s > 0.9


def test_waits_double_until_a_host_recovers_and_late_answers_change_nothing():
    guest = courtesy(max_wait_s=0)
    late = guest.turn("h", "h")
    turn = late.__enter__()
    waits = []
    state = guest._hosts["h"]
    for _ in range(4):
        visit(guest, status=429)
        turn.answered(429, None)
        turn.answered(200, None)
        with pytest.raises(HostWaits) as caught:
            visit(guest)
        assert caught.value.status == 429
        waits.append(round(state.paused_until_s - state.paused_at_s))
        state.paused_until_s = 0.0  # the wait is over
    assert waits == [1, 2, 4, 8]
    visit(guest)
    visit(guest, status=429)
    assert round(state.paused_until_s - state.paused_at_s) == 1
    late.__exit__(None, None, None)


def test_a_503_that_asks_for_no_wait_stops_no_other_row():
    guest = courtesy(max_wait_s=0)
    visit(guest, status=503)
    assert visit(guest)
    visit(guest, status=503, retry_after="9")
    with pytest.raises(HostWaits):
        visit(guest)


def test_hosts_are_forgotten_in_bounded_memory_but_not_while_they_are_visited():
    guest = courtesy(connections=1)
    with guest.turn("held", "held"):
        for number in range(MAX_HOSTS + 100):
            visit(guest, f"h{number}")
        assert len(guest._hosts) <= MAX_HOSTS
        assert "held" in guest._hosts
        with ThreadPoolExecutor(1) as threads:
            second = threads.submit(visit, guest, "held")
            with pytest.raises(TimeoutError):
                second.result(timeout=0.1)
            guest._hosts["held"].slots.release()
            second.result(timeout=5)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("-5", 0),
        ("1.5", 0),
        ("9" * 50, 999_999_999),
        ("٣", 0),
        ("soon", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0),
        (email.utils.formatdate(4_000_000_000, usegmt=True), None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_nonsense_is_nothing(value, seconds):
    expected = 4_000_000_000 - time.time() if seconds is None else seconds
    assert retry_after_s(value) == pytest.approx(expected, abs=5)


def test_backoff_grows_with_full_jitter_and_has_a_bound():
    for attempt, most in ((1, 1), (2, 2), (3, 4), (9, 5)):
        drawn = [backoff_s(attempt, max_wait_s=5) for _ in range(400)]
        assert 0 <= min(drawn) < most / 5
        assert most * 4 / 5 < max(drawn) <= most
