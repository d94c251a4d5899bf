"""Find out whether anything of a source can be reached, and say what to do if nothing can."""

import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from data_prep.config import DownloadConfig
from data_prep.guard import scheme_problem
from data_prep.quarantine import Reason, reason_of
from data_prep.transport import Clock, connect, is_public, parse_url
from trainer.errors import BadWorld

NUM_HOSTS = 16
_RESOLVER = Path("/etc/resolv.conf")
_TIMEOUT_S = 3.0
_PATIENCE_S = 3.0  # a server that was started together with the command may need a moment


def check_reachable(urls: Iterable[str], cfg: DownloadConfig) -> None:
    """Connect to the first few hosts of `urls`; nothing is requested.

    Raises:
        BadWorld: Not one of them takes a connection, so starting the work would be in vain.
    """
    hosts: dict[tuple[str, int], str] = {}
    for url in islice((url for url in urls if scheme_problem(url) is None), 1000):
        target = parse_url(url)
        hosts.setdefault((target.host, target.port), url)
        if len(hosts) == NUM_HOSTS:
            break
    if not hosts:
        return
    ends_s = time.monotonic() + _PATIENCE_S
    with ThreadPoolExecutor(NUM_HOSTS) as threads:
        while all(problems := list(threads.map(lambda host: _problem(host, cfg), hosts))):
            reason, detail = reason_of("failed_to_download", f"<urlopen error {problems[0]}>")
            if reason == Reason.ADDRESS_REFUSED or time.monotonic() > ends_s:
                what = f"not one of {len(hosts)} host(s) can be reached"
                if unnamed := _names_problem(problems):
                    what = f"{what}: {unnamed}"
                raise unreachable(what, next(iter(hosts.values())), reason, detail)
            time.sleep(0.2)


def _problem(address: tuple[str, int], cfg: DownloadConfig) -> Exception | None:
    clock = Clock(min(cfg.timeout_s, _TIMEOUT_S), deadline_s=_TIMEOUT_S)
    try:
        connect(*address, clock, cfg.allow_hosts).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        return error
    return None


def _names_problem(problems: Sequence[Exception | None]) -> str | None:
    """Say what is wrong if not one name has an address; None if a host has one and is down."""
    if not all(isinstance(problem, socket.gaierror) for problem in problems):
        return None
    try:
        lines = _RESOLVER.read_text().splitlines()
    except OSError:
        lines = []
    words = [line.split() for line in lines]
    servers = [word[1] for word in words if word[:1] == ["nameserver"] and word[1:]]
    asked = f"{_RESOLVER} names {', '.join(servers) or 'none'}"
    if any(problem.errno == socket.EAI_NONAME for problem in problems):  # type: ignore[union-attr]
        return f"the name server knows none of them ({asked})"
    return f"no name server answers ({asked})"


def unreachable(what: str, url: str, reason: str, detail: str) -> BadWorld:
    """Build the error for a source of which nothing can be reached.

    Args:
        what: What was tried.
        url: An example.
        reason: The example's reason for quarantine.
        detail: The message behind it.
    """
    parts = urlsplit(url)
    text = f"{what}; the first: {url}: {reason} ({detail}). "
    if reason == Reason.ADDRESS_REFUSED:
        return BadWorld(
            f"{text}To fetch from an address that is not public, allow it: "
            f"download.allow_hosts=[{parts.hostname}]"
        )
    with suppress(ValueError):
        if not is_public(parts.hostname or ""):
            return BadWorld(
                f"{text}Nothing answers at {parts.netloc}: start the server of the source "
                "(`kiln serve source=DIR`) and give the same command again."
            )
    return BadWorld(
        f"{text}Check the network and the name server, then give the same command again; if these "
        "pages are gone for good, add download.accept_unreachable=true."
    )
