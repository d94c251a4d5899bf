"""Decide what may be fetched, how long and how often it is tried; for one whole process.

img2dataset downloads through `urllib.request.urlopen`, so the rules live in the opener that this
module installs. Redirects are followed here, hop by hop, so that each hop is judged like the plain
URL: its scheme, its address, the wishes of its host, and the courtesy owed to it.
"""

import contextlib
import errno
import functools
import http.client
import io
import itertools
import socket
import time
import urllib.error
import urllib.request
import urllib.response
from collections.abc import Iterator
from email.message import Message
from urllib.parse import quote, urljoin

from data_prep.config import DownloadConfig
from data_prep.courtesy import Courtesy, HostWaits, backoff_s
from data_prep.optout import (
    MAX_FILE_BYTES,
    ROBOTS_PATH,
    TDM_PATH,
    SiteRules,
    Sites,
    SiteUnknown,
    parse_robots,
    parse_tdmrep,
    wishes,
)
from data_prep.quarantine import Reason, marked
from data_prep.transport import URL_SAFE, Answer, Clock, Refused, Target, Transport, parse_url

_MAX_REDIRECTS = 10
_REDIRECTS = {301, 302, 303, 307, 308}
_PASSING = {429, 500, 502, 503, 504}
_PASSING_ERRNOS = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, socket.EAI_AGAIN}
_CLIENT_ERROR, _SERVER_ERROR = 400, 500
_NOT_OURS = {Reason.ADDRESS_REFUSED, Reason.SCHEME_REFUSED, Reason.TOO_MANY_REDIRECTS}

_last: "tuple[DownloadConfig, int, GuardedOpener] | None" = None


@contextlib.contextmanager
def installed(cfg: DownloadConfig, *, num_processes: int = 1) -> Iterator[None]:
    """Make `urllib.request.urlopen` obey `cfg` inside, in all threads of this process.

    What is known of hosts is kept from one unit to the next.

    Args:
        cfg: The rules.
        num_processes: How many processes download at the same time, all machines together; they
            share what a host may be burdened with.
    """
    global _last  # noqa: PLW0603 - as urllib's opener is one for the whole process
    if _last is None or _last[:2] != (cfg, num_processes):
        if _last is not None:
            _last[2].close()
        _last = cfg, num_processes, GuardedOpener(cfg, num_processes=num_processes)
    urllib.request.install_opener(_last[2])
    try:
        yield
    finally:
        urllib.request.install_opener(None)


def scheme_problem(url: str) -> str | None:
    """Say what is wrong with a URL before anything is fetched, or None."""
    try:
        parse_url(url)
    except ValueError as error:
        return str(error)
    return None


class GuardedOpener(urllib.request.OpenerDirector):
    """Opens http and https only, through judged connections, and says honestly who asks.

    A proxy would resolve names out of our sight, so none is taken from the environment.

    One row has `deadline_s` for all that the network does: connections, answers, redirects,
    further attempts, the files with the host's wishes, and the body. Waits that are our own
    courtesy do not count: for a turn at the host, for the end of a pause that it asked for, before
    a further attempt, and for another row that is fetching the files of the same host.
    """

    def __init__(
        self,
        cfg: DownloadConfig,
        *,
        num_processes: int = 1,
        courtesy: Courtesy | None = None,
    ) -> None:
        """Set up; nothing is opened.

        Args:
            cfg: The rules.
            num_processes: Processes that share what a host may be burdened with.
            courtesy: Instead of one that follows `cfg`.
        """
        super().__init__()
        self._cfg = cfg
        self._courtesy = courtesy or Courtesy(
            connections=cfg.host_connections,
            requests_per_s=cfg.host_requests_per_s,
            max_wait_s=cfg.max_wait_s,
            num_processes=num_processes,
            exempt=cfg.allow_hosts,
        )
        self._wishes = wishes(cfg.user_agent, cfg.robots_directives, tdm=cfg.tdm)
        self._sites = Sites()
        self._transport = Transport(user_agent=cfg.user_agent, allow_hosts=cfg.allow_hosts)

    def open(  # type: ignore[override]
        self,
        fullurl: str | urllib.request.Request,
        data: None = None,
        timeout: float | None = None,
    ) -> urllib.response.addinfourl:
        """Fetch a URL with its whole body, as `urlopen` hands it on.

        Args:
            fullurl: What to fetch; of a request only the URL counts.
            data: Nothing is ever sent.
            timeout: Longest single wait in seconds; `timeout_s` of the configuration by default.

        Raises:
            Refused: The URL, an address on the way or the answer is not allowed.
            urllib.error.HTTPError: The answer is no success.
            OSError: The network failed.
        """
        assert data is None, "the guard only fetches"
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        timeout_s = timeout if isinstance(timeout, int | float) else self._cfg.timeout_s
        clock = Clock(timeout_s, self._cfg.deadline_s)
        answer = self._try(url, clock, max_bytes=self._cfg.max_body_bytes)
        if answer.status // 100 != 2:
            raise _http_error(answer.url, answer.status)
        if said := self._wishes.in_page(answer.body):
            raise Refused(Reason.OPT_OUT, said)
        body = io.BytesIO(answer.body)
        return urllib.response.addinfourl(body, answer.headers, answer.url, answer.status)

    def close(self) -> None:
        """Close the kept connections."""
        self._transport.close()
        super().close()

    def _try(self, url: str, clock: Clock, *, max_bytes: int, site_file: bool = False) -> Answer:
        """Fetch, and try again after failures that may pass."""
        for attempt in itertools.count(1):
            is_last = attempt > self._cfg.retries
            try:
                answer = self._follow(url, clock, max_bytes, site_file=site_file)
            except OSError as error:
                if is_last or not is_passing(error):
                    raise
            else:
                if is_last or answer.status not in _PASSING:
                    return answer
            with clock.paused():
                time.sleep(backoff_s(attempt, self._cfg.max_wait_s))
        raise AssertionError  # the loop has no end

    def _follow(self, url: str, clock: Clock, max_bytes: int, *, site_file: bool) -> Answer:
        """Fetch what a URL leads to."""
        seen: set[Target] = set()
        while True:
            target = _target(url, is_redirect=bool(seen))
            if target in seen or len(seen) > _MAX_REDIRECTS:
                how = "in a circle" if target in seen else f"more than {_MAX_REDIRECTS}"
                raise Refused(Reason.TOO_MANY_REDIRECTS, how)
            seen.add(target)
            if not site_file:
                self._ask_site(target, clock)
            answer = self._exchange(target, clock, max_bytes, site_file=site_file)
            location = answer.headers.get("location") or answer.headers.get("uri")
            if answer.status not in _REDIRECTS or not location:
                return answer
            # Header bytes are read as Latin-1; they are sent back as they came.
            url = _joined(answer.url, quote(location.encode("latin-1"), URL_SAFE))

    def _exchange(self, target: Target, clock: Clock, max_bytes: int, *, site_file: bool) -> Answer:
        """Wait for a turn and ask a host once."""
        with contextlib.ExitStack() as held:
            try:
                with clock.paused():
                    turn = held.enter_context(self._courtesy.turn(target.host, target.netloc))
            except HostWaits as waits:
                raise _http_error(target.origin, waits.status) from waits

            def judge(status: int, headers: Message) -> None:
                turn.answered(status, headers.get("retry-after"))
                said = None if site_file else self._wishes.in_headers(headers)
                if status < _CLIENT_ERROR and said:
                    raise Refused(Reason.OPT_OUT, said)

            return self._transport.get(
                target, clock, max_bytes=max_bytes, cut=site_file, on_head=judge
            )

    def _ask_site(self, target: Target, clock: Clock) -> None:
        """Refuse what the files of its host forbid."""
        if not (self._cfg.robots_txt or self._cfg.tdm):
            return
        load = functools.partial(self._load_site, target.origin, clock)
        rules = self._sites.rules(target.origin, load, waiting=clock.paused)
        if said := rules.problem(target.origin + target.path, self._wishes.token):
            raise Refused(Reason.OPT_OUT, said)

    def _load_site(self, origin: str, clock: Clock) -> SiteRules:
        """Fetch the wishes of a host.

        RFC 9309, 2.3.1: no robots.txt means that nothing is forbidden, and a server that fails
        that nothing is allowed for now. TDMRep has no such rule, so a failure is no reservation.
        """
        robots = tdm = None
        if self._cfg.robots_txt:
            robots = self._site_file(origin + ROBOTS_PATH, clock)
        if self._cfg.tdm:
            with contextlib.suppress(SiteUnknown):
                tdm = self._site_file(origin + TDM_PATH, clock)
        return SiteRules(
            robots=None if robots is None else parse_robots(robots, self._wishes.token),
            tdm=None if tdm is None else parse_tdmrep(tdm),
            num_bytes=len(robots or b"") + len(tdm or b""),
        )

    def _site_file(self, url: str, clock: Clock) -> bytes | None:
        """Fetch a file; None if the host has none, or leads us astray."""
        try:
            answer = self._try(url, clock, max_bytes=MAX_FILE_BYTES, site_file=True)
        except Refused as error:
            if error.reason in _NOT_OURS:
                return None
            raise SiteUnknown(marked(error.reason, f"{url}: {error.detail}")) from error
        except (OSError, http.client.HTTPException) as error:
            raise SiteUnknown(f"{url}: {error}") from error
        if answer.status >= _SERVER_ERROR or answer.status == http.HTTPStatus.TOO_MANY_REQUESTS:
            raise SiteUnknown(f"{url}: {_http_error(url, answer.status)}")
        return answer.body if answer.status // 100 == 2 else None


def is_passing(error: OSError) -> bool:
    """Whether another attempt may succeed where this failed: no connection, or a cut one.

    Answers that came too slowly are not asked for again: they would cost a thread their time twice.
    """
    if isinstance(error, urllib.error.HTTPError):
        return False
    if not isinstance(error, urllib.error.URLError):
        return isinstance(error, ConnectionError)
    cause = error.reason
    return isinstance(cause, ConnectionError | TimeoutError) or (
        isinstance(cause, OSError) and cause.errno in _PASSING_ERRNOS
    )


def _target(url: str, *, is_redirect: bool) -> Target:
    try:
        return parse_url(url)
    except ValueError as error:
        what = "redirect to " if is_redirect else ""
        raise Refused(Reason.SCHEME_REFUSED, f"{what}{error}") from error


def _joined(base: str, location: str) -> str:
    try:
        return urljoin(base, location)
    except ValueError as error:
        raise Refused(Reason.SCHEME_REFUSED, f"redirect to {error}") from error


def _http_error(url: str, status: int) -> urllib.error.HTTPError:
    """Build the error of an answer, without the server's own words, which may say anything."""
    phrase = http.client.responses.get(status, "")
    return urllib.error.HTTPError(url, status, phrase, Message(), io.BytesIO())
