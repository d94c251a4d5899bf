"""Read what owners say against the use of their pictures: robots.txt, TDMRep, headers, meta tags.

Sources: robots.txt as RFC 9309 and its wildcards have it, by Protego; X-Robots-Tag and the meta
tag of the same meaning as search engines read them; TDMRep (W3C Community Group Report, 2024) as
header, file and meta tag. Where sources contradict each other the one that reserves rights wins.
"""

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from protego import Protego

ROBOTS_PATH = "/robots.txt"
TDM_PATH = "/.well-known/tdmrep.json"
MAX_FILE_BYTES = 500 * 1024
"""What RFC 9309 demands to be read of a robots.txt; the rest of a longer one is not read."""
_VALID_S = 24 * 3600.0  # RFC 9309, 2.4
_FAILURE_VALID_S = 60.0
_MAX_SITES = 4096
_MAX_TEXT_BYTES = 4 << 20  # of all files in the cache; parsed they take up to sixty times as much
_MAX_PAGE_BYTES = 1 << 16
_ROBOT = re.compile(r"user[- ]?agent\s*[:\s]\s*(\S.*)", re.IGNORECASE)
# With the misspellings that Protego understands.
_RULE = re.compile(r"(allow|diss?all?ow|diasllow|disallaw)[:\s]", re.IGNORECASE)
# Directives with a value of their own: the colon in them does not name a robot.
_VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_META = re.compile(rb"<meta\b([^>]{0,1000})>", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"""(?<![\w-])([\w-]+)\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)""")


@dataclass(frozen=True, slots=True)
class Wishes:
    """Which opt-outs count, and who is spoken to."""

    token: str
    """The product token of the user agent, lower case, e.g. 'kiln'."""
    directives: frozenset[str]
    """Of X-Robots-Tag and the robots meta tag; lower case; none: both are ignored."""
    tdm: bool
    """Whether TDMRep counts."""

    def in_headers(self, headers: Message) -> str | None:
        """Give the header that forbids the use, or None."""
        for value in headers.get_all("X-Robots-Tag", []) if self.directives else []:
            if found := self._forbidden(value):
                return f"header X-Robots-Tag: {found}"
        reserved = (value.strip() == "1" for value in headers.get_all("TDM-Reservation", []))
        if self.tdm and any(reserved):
            return "header TDM-Reservation: 1"
        return None

    def in_page(self, body: bytes) -> str | None:
        """Give the meta tag that forbids the use, if the body is an HTML page, or None."""
        if not body[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            return None
        for match in _META.finditer(body[:_MAX_PAGE_BYTES]):
            found = _ATTRIBUTE.findall(match[1].decode("latin-1"))
            meta = {name.lower(): value.strip("\"' ").lower() for name, value in found}
            name, content = meta.get("name", ""), meta.get("content", "")
            if name in {"robots", self.token} and (said := self._forbidden(content)):
                return f"meta {name}: {said}"
            if self.tdm and name == "tdm-reservation" and content == "1":
                return "meta tdm-reservation: 1"
        return None

    def _forbidden(self, value: str) -> str | None:
        """Give the directive of a list that forbids the use, e.g. of 'noai, otherbot: noindex'.

        A robot's name holds for the rest of the list.
        """
        robot = ""
        for word in value.lower().split(","):
            name, colon, rest = word.partition(":")
            directive = word.strip()
            if colon and name.strip() not in _VALUED:
                robot, directive = name.strip(), rest.strip()
            if robot in {"", "*", self.token} and directive in self.directives:
                return directive
        return None


def product_token(user_agent: str) -> str:
    """Give the name by which robots.txt calls a user agent: 'kiln' of 'kiln/0.1 (...)'."""
    words = user_agent.partition("/")[0].split()
    return words[0].lower() if words else ""


@dataclass(frozen=True, slots=True)
class SiteRules:
    """What the files of one origin say; None where it has no such file."""

    robots: Protego | None = None
    tdm: Protego | None = None
    num_bytes: int = 0
    """Length of the files."""

    def problem(self, url: str, token: str) -> str | None:
        """Give the file that forbids the use of a URL, or None."""
        if self.robots is not None and not self.robots.can_fetch(url, "*"):
            return f"{ROBOTS_PATH} disallows it for {token}"
        if self.tdm is not None and not self.tdm.can_fetch(url, "*"):
            return f"{TDM_PATH} reserves it"
        return None


def parse_robots(body: bytes, token: str) -> Protego:
    """Read what a robots.txt says to one robot; what is no robots.txt says nothing.

    The group that names it counts, else that of `*`. Protego judges this group alone: a file of
    many robots and many rules would make it multiply the two.
    """
    rules: dict[str, list[str]] = {}
    spoken_to: set[str] = set()
    in_rules = False
    for full in body[:MAX_FILE_BYTES].decode("utf-8-sig", errors="replace").splitlines():
        line = full.partition("#")[0].strip()
        if found := _ROBOT.match(line):
            spoken_to, in_rules = (set() if in_rules else spoken_to), False
            name = found[1].lower().partition("/")[0].rstrip("* ") or "*"
            if name in {token, "*"}:
                spoken_to.add(name)
                rules.setdefault(name, [])
        elif _RULE.match(line):
            in_rules = True
            for name in spoken_to:
                rules[name].append(line)
    return _group(rules.get(token, rules.get("*", [])))


def parse_tdmrep(body: bytes) -> Protego:
    """Read a tdmrep.json; what is none has no rules.

    Its locations are patterns as in robots.txt, so they are judged by the same code; of several
    that match the longest decides.
    """
    return _group(
        f"{'Disallow' if reserved else 'Allow'}: {location}"
        for location, reserved in _reservations(body)
    )


def _group(rules: Iterable[str]) -> Protego:
    return Protego.parse("\n".join(["User-agent: *", *dict.fromkeys(rules)]))


def _reservations(body: bytes) -> Iterator[tuple[str, bool]]:
    try:
        rules: Any = json.loads(body[:MAX_FILE_BYTES])
    except (ValueError, RecursionError):
        return
    for rule in rules if isinstance(rules, list) else [rules]:
        if isinstance(rule, dict) and isinstance(location := rule.get("location"), str):
            pattern = location if location.startswith(("/", "*")) else f"/{location}"
            if pattern.isprintable() and "#" not in pattern:
                yield pattern, str(rule.get("tdm-reservation")) == "1"


class SiteUnknown(OSError):
    """Nobody knows what a site allows, as its robots.txt could not be fetched."""


@dataclass(slots=True)
class _Entry:
    outcome: Future[SiteRules | str] = field(default_factory=Future)  # str: why it failed
    expires_s: float = float("inf")
    num_bytes: int = 0


class Sites:
    """Remembers the rules of origins in bounded memory; all threads ask each origin once."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def rules(
        self,
        origin: str,
        load: Callable[[], SiteRules],
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> SiteRules:
        """Give an origin's rules; the first thread that asks loads them, the others wait.

        Args:
            origin: Scheme, host and port.
            load: Fetches and parses them; an OSError of it is remembered for a minute.
            waiting: Entered while another thread loads them.

        Raises:
            SiteUnknown: They could not be loaded, now or a short time ago.
        """
        entry, is_mine = self._entry(origin)
        if is_mine:
            outcome: SiteRules | str = "interrupted"
            try:
                outcome = load()
            except OSError as error:
                outcome = str(error)
            finally:
                self._finish(origin, entry, outcome)
        with nullcontext() if entry.outcome.done() else waiting():
            found = entry.outcome.result()
        if isinstance(found, str):
            raise SiteUnknown(found)
        return found

    def _entry(self, origin: str) -> tuple[_Entry, bool]:
        with self._lock:
            entry = self._entries.get(origin)
            if entry is not None and entry.expires_s > time.monotonic():
                self._entries.move_to_end(origin)
                return entry, False
            self._drop(origin)
            entry = self._entries[origin] = _Entry()
            return entry, True

    def _finish(self, origin: str, entry: _Entry, outcome: SiteRules | str) -> None:
        failed = isinstance(outcome, str)
        with self._lock:
            entry.expires_s = time.monotonic() + (_FAILURE_VALID_S if failed else _VALID_S)
            if self._entries.get(origin) is entry:
                entry.num_bytes = 0 if isinstance(outcome, str) else outcome.num_bytes
                self._num_bytes += entry.num_bytes
            while len(self._entries) > _MAX_SITES or self._num_bytes > _MAX_TEXT_BYTES:
                self._drop(next(iter(self._entries)))
        entry.outcome.set_result(outcome)

    def _drop(self, origin: str) -> None:
        entry = self._entries.pop(origin, None)
        if entry is not None:
            self._num_bytes -= entry.num_bytes

    def __len__(self) -> int:
        return len(self._entries)


def wishes(user_agent: str, directives: Iterable[str], *, tdm: bool) -> Wishes:
    """Build `Wishes` from the configuration."""
    words = frozenset(word.strip().lower() for word in directives)
    if "noindex" in words:
        words |= {"none"}  # which is short for noindex, nofollow
    return Wishes(product_token(user_agent), words, tdm)
