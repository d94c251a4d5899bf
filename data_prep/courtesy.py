"""Be a polite guest: connections and requests per host, and waits that hosts ask for."""

import email.utils
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

MAX_HOSTS = 4096
"""Hosts that are remembered; the one unused for longest is forgotten first."""
_FIRST_WAIT_S = 1.0  # of a host that asked to wait and did not say how long
_LONGEST_WAIT_S = 3600.0


class HostWaits(Exception):
    """The host asked to be left alone for longer than a row waits; `status` is its answer."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass(slots=True)
class _Host:
    slots: threading.Semaphore
    users: int = 0
    next_s: float = 0.0  # monotonic time at which the rate allows the next request
    paused_until_s: float = 0.0
    paused_at_s: float = 0.0
    num_pauses: int = 0  # since the last answer that was none
    status: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Courtesy:
    """What all threads of this process owe to hosts.

    Limits are per machine and command; each of `num_processes` takes an equal part of them, at
    least one connection. The processes do not talk to each other: rows reach them in random order,
    so each meets a host equally often.

    Hosts in `exempt` have neither limit: they are the user's own, named in download.allow_hosts,
    and one that serves a demo or a benchmark is meant to be driven as hard as it can. When such a
    host asks to wait, it is obeyed all the same.

    Waiting is sleeping; a row that waits here does not use up its deadline.
    """

    def __init__(
        self,
        *,
        connections: int | None,
        requests_per_s: float | None,
        max_wait_s: float,
        num_processes: int = 1,
        exempt: tuple[str, ...] = (),
    ) -> None:
        """Set up for one process.

        Args:
            connections: Per host at once; None is no limit.
            requests_per_s: Per host; None is no limit.
            max_wait_s: Longest wait for a host that asked for one.
            num_processes: Among how many processes the limits are shared.
            exempt: HOST or HOST:PORT without limits.
        """
        self._slots = max(1, connections // num_processes) if connections else None
        self._interval_s = num_processes / requests_per_s if requests_per_s else 0.0
        self._max_wait_s = max_wait_s
        self._exempt = frozenset(exempt)
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def turn(self, host: str, netloc: str) -> Iterator["Turn"]:
        """Wait for this row's turn at a host, and hold one of its connections inside.

        Args:
            host: Its name.
            netloc: Name and port; limits are per netloc.

        Raises:
            HostWaits: The host wants to be left alone for longer than `max_wait_s`.
        """
        is_limited = not {host, netloc} & self._exempt
        with self._used(netloc) as state:
            if is_limited and self._slots is not None:
                with state.slots:
                    yield self._wait(state, is_limited)
            else:
                yield self._wait(state, is_limited)

    @contextmanager
    def _used(self, netloc: str) -> Iterator[_Host]:
        with self._lock:
            state = self._hosts.get(netloc)
            if state is None:
                state = self._hosts[netloc] = _Host(threading.Semaphore(self._slots or 1))
            self._hosts.move_to_end(netloc)
            state.users += 1
            if len(self._hosts) > MAX_HOSTS:
                idle = next((name for name, host in self._hosts.items() if not host.users), None)
                if idle is not None:
                    del self._hosts[idle]
        try:
            yield state
        finally:
            with self._lock:
                state.users -= 1

    def _wait(self, state: _Host, is_limited: bool) -> "Turn":
        if is_limited and self._interval_s:
            with state.lock:
                start_s = max(time.monotonic(), state.next_s)
                state.next_s = start_s + self._interval_s
            time.sleep(max(0.0, start_s - time.monotonic()))
        while (wait_s := state.paused_until_s - time.monotonic()) > 0:
            if wait_s > self._max_wait_s:
                raise HostWaits(state.status)
            time.sleep(wait_s)
        return Turn(state, time.monotonic())


class Turn:
    """One request to a host, which may ask everybody to wait."""

    def __init__(self, state: _Host, started_s: float) -> None:
        self._state, self._started_s = state, started_s

    def answered(self, status: int, retry_after: str | None) -> None:
        """Take note of an answer; 429, and 503 with Retry-After, make all threads wait for a host.

        A 503 that asks for nothing may be of one path alone, so the others need not wait.
        They wait as long as the host says. If it does not say, or says the same again and again,
        each wait is twice the one before, so that a host that never recovers costs few requests.

        Args:
            status: Of the answer.
            retry_after: Its Retry-After header.
        """
        state = self._state
        with state.lock:
            if self._started_s < state.paused_at_s:
                return  # it was under way when the host asked to wait
            if status != 429 and not (status == 503 and retry_after):
                state.num_pauses = 0
                return
            now_s = time.monotonic()
            doubled_s = _FIRST_WAIT_S * 2**state.num_pauses
            wait_s = max(retry_after_s(retry_after), min(doubled_s, _LONGEST_WAIT_S))
            state.num_pauses, state.status = min(state.num_pauses + 1, 20), status
            state.paused_at_s, state.paused_until_s = now_s, now_s + min(wait_s, _LONGEST_WAIT_S)


def retry_after_s(value: str | None) -> float:
    """Read a Retry-After header (RFC 9110, 10.2.3): seconds, or a date; 0 if it says nothing."""
    text = (value or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def backoff_s(attempt: int, max_wait_s: float) -> float:
    """Draw the wait before a further attempt: exponential, with full jitter.

    Nothing that is published depends on it.

    Args:
        attempt: Failed attempts of this row, from 1.
        max_wait_s: The longest wait.

    References:
        Brooker, "Exponential Backoff And Jitter", 2015.
    """
    return random.uniform(0, min(max_wait_s, 0.5 * 2**attempt))  # noqa: S311 - no secret
