"""Find out whether anything of a source can be reached, and say what to do if nothing can."""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from urllib.parse import urlsplit

from data_prep.config import DownloadConfig
from data_prep.guard import connect, is_public, scheme_problem
from data_prep.quarantine import Reason, reason_of
from trainer.errors import BadWorld

NUM_HOSTS = 16
_TIMEOUT_S = 3.0
_PATIENCE_S = 3.0  # a server that was started together with the command may need a moment


def check_reachable(urls: Iterable[str], cfg: DownloadConfig) -> None:
    """Connect to the first few hosts of `urls`; nothing is requested.

    Raises:
        BadWorld: Not one of them takes a connection, so starting the work would be in vain.
    """
    hosts: dict[tuple[str, int], str] = {}
    for url in islice((url for url in urls if scheme_problem(url) is None), 1000):
        parts = urlsplit(url)
        with suppress(ValueError):  # a port that is no number
            port = parts.port or {"http": 80, "https": 443}[parts.scheme.lower()]
            hosts.setdefault((parts.hostname or "", port), url)
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
                raise unreachable(what, next(iter(hosts.values())), reason, detail)
            time.sleep(0.2)


def _problem(address: tuple[str, int], cfg: DownloadConfig) -> str | None:
    host, port = address
    try:
        timeout_s = min(cfg.timeout_s, _TIMEOUT_S)
        connect(host, port, timeout_s=timeout_s, allow_hosts=cfg.allow_hosts).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        return str(error) or type(error).__name__
    return None


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
