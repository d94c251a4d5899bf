"""Exchange one HTTP request for one answer: judged addresses, kept connections, caps, a deadline.

The address is judged when the socket connects, so a name that resolves to something private, even
if only at the second look (DNS rebinding), is refused like the plain address.
"""

import contextlib
import http.client
import io
import ipaddress
import select
import socket
import ssl
import threading
import time
import urllib.error
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from urllib.parse import quote, urlsplit

from data_prep.quarantine import Reason, marked

PORTS = {"http": 80, "https": 443}
"""The schemes that are fetched, and their ports."""
_CHUNK_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 17  # of an answer's status line and headers; servers keep to 8 to 32 KiB
_MAX_IDLE_CONNECTIONS = 128
_MAX_IDLE_S = 15.0  # web servers let go after 5 to 75 s
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What `is_global` lets pass, depending on the version of Python.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's platform, beside its metadata service
        "192.0.0.0/24",  # IETF; Oracle's metadata service is in it
        "192.88.99.0/24",  # 6to4 relays
        "3fff::/20",  # documentation
        "fec0::/10",  # site-local
    )
)
URL_SAFE = "!#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
"""Characters of a URL that are sent as they are."""
OnHead = Callable[[int, Message], None]


class Refused(OSError):
    """The guard did not allow a request or its answer; the text carries the reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(marked(reason, detail))
        self.reason, self.detail = reason, detail


class Clock:
    """How long one row may still take, and how long one wait of it."""

    def __init__(self, timeout_s: float, deadline_s: float) -> None:
        self._timeout_s, self._deadline_s = timeout_s, deadline_s
        self._ends_s = time.monotonic() + deadline_s

    def wait_s(self) -> float:
        """Give the longest time for the next wait on the network.

        Raises:
            Refused: The row has taken as long as it may.
        """
        left_s = self._ends_s - time.monotonic()
        if left_s <= 0:
            raise Refused(Reason.TIMEOUT, f"not done after {self._deadline_s:g} s")
        return min(self._timeout_s, left_s)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside, e.g. a wait that is our own courtesy."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self._ends_s += time.monotonic() - started_s


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL asks for, ready to be sent."""

    scheme: str
    host: str
    """In ASCII, lower case, without brackets."""
    port: int
    netloc: str
    """Host and, if it is not the scheme's, port."""
    path: str
    """With the query, percent-encoded."""

    @property
    def origin(self) -> str:
        """Scheme, host and port as a URL without a path."""
        return f"{self.scheme}://{self.netloc}"


def parse_url(url: str) -> Target:
    """Take a URL apart; what may not be in a request is percent-encoded.

    Raises:
        ValueError: The scheme is not http or https, or host or port are none.
    """
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    if scheme not in PORTS:
        raise ValueError(f"scheme {scheme or 'none'!r}, may be {' or '.join(PORTS)}")
    host = ascii_host(parts.hostname or "")
    if not host or not host.isprintable() or " " in host:
        raise ValueError("no host")
    port = PORTS[scheme] if parts.port is None else parts.port
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    netloc = f"[{host}]" if ":" in host else host
    netloc = netloc if port == PORTS[scheme] else f"{netloc}:{port}"
    return Target(scheme, host, port, netloc, quote(path, URL_SAFE, errors="replace"))


def ascii_host(host: str) -> str:
    """Write the name of a host in the one way in which it is looked up.

    Raises:
        ValueError: It is no name of a host.
    """
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    return host.lower().rstrip(".")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also when it hides another one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def connect(host: str, port: int, clock: Clock, allow_hosts: tuple[str, ...]) -> socket.socket:
    """Open a TCP connection to an address that was judged, trying all that the name has.

    The clock bounds the connections; the search for the name is bounded by the system's resolver,
    which nothing can interrupt.

    Raises:
        Refused: None of its addresses is public, and the host is not in `allow_hosts`.
        OSError: None of its allowed addresses answers.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    allowed = is_allowed(host, port, allow_hosts)
    judged = [entry for entry in found if allowed or is_public(str(entry[4][0]))]
    if not judged:
        raise Refused(Reason.ADDRESS_REFUSED, f"{host}:{port} is {found[0][4][0]}, not public")
    last_error: OSError | None = None
    for family, kind, protocol, _, address in judged:
        wait_s = clock.wait_s()
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(wait_s)
            sock.connect(address)
        except OSError as error:
            sock.close()
            last_error = error
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    assert last_error is not None
    raise last_error


def is_allowed(host: str, port: int, allow_hosts: tuple[str, ...]) -> bool:
    """Whether a host is in the list of those that may have any address."""
    return host in allow_hosts or f"{host}:{port}" in allow_hosts


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server sent."""

    url: str
    status: int
    headers: Message
    body: bytes
    """Of a 2xx answer, inflated if it came deflated; of others empty."""


class _Raw(io.RawIOBase):
    """The receiving side of a socket; every wait is bounded by the clock of the row at hand."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self._sock, self._clock = sock, clock
        self.head_bytes_left: int | None = _MAX_HEAD_BYTES
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        if self.ended:
            return None
        self._sock.settimeout(self._clock.wait_s())
        num_bytes = self._sock.recv_into(buffer)
        if self.head_bytes_left is not None:
            self.head_bytes_left -= num_bytes
            if self.head_bytes_left < 0:
                raise Refused(Reason.BAD_RESPONSE, f"more than {_MAX_HEAD_BYTES} bytes of headers")
        return num_bytes


class _Buffered(io.BufferedReader):
    """Tells after it was closed whether bytes were left that nobody asked for."""

    raw: _Raw
    has_rest = True

    def close(self) -> None:
        if not self.closed:
            self.raw.ended = True
            self.has_rest = bool(self.peek(1))
        super().close()


class _Connection:
    """One socket, used for one exchange after the other."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.idle_since_s = 0.0
        self.received: _Buffered | None = None
        self._clock: Clock | None = None

    def send(self, request: bytes, clock: Clock) -> http.client.HTTPResponse:
        """Send a request and receive the head of its answer; a failure closes the connection."""
        self._clock = clock
        try:
            self.sock.settimeout(clock.wait_s())
            self.sock.sendall(request)
            response = http.client.HTTPResponse(self, method="GET")  # type: ignore[arg-type]
            response.begin()
        except BaseException:
            self.close()
            raise
        assert self.received is not None
        self.received.raw.head_bytes_left = None
        return response

    def makefile(self, mode: str) -> io.BufferedReader:
        """Give HTTPResponse what it reads from."""
        assert self._clock is not None
        self.received = _Buffered(_Raw(self.sock, self._clock), _CHUNK_BYTES)
        return self.received

    def is_usable(self) -> bool:
        """Whether an idle connection is still open, and silent as it should be."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        self.sock.close()


class Transport:
    """Fetches bodies over connections that are kept for the next request to the same origin.

    robots.txt, tdmrep.json and the pictures of a host share connections, also between threads. A
    connection is kept only after an answer that came whole, with nothing behind it.
    """

    def __init__(self, *, user_agent: str, allow_hosts: tuple[str, ...]) -> None:
        """Set up; nothing is opened.

        Args:
            user_agent: Who asks.
            allow_hosts: HOST or HOST:PORT that may have private addresses.
        """
        self._user_agent, self._allow_hosts = user_agent, allow_hosts
        self._tls = ssl.create_default_context()  # one for all: each costs CPU milliseconds
        self._idle: OrderedDict[_Connection, str] = OrderedDict()  # the longest idle first
        self._by_origin: dict[str, list[_Connection]] = {}
        self._lock = threading.Lock()

    def get(
        self, target: Target, clock: Clock, *, max_bytes: int, cut: bool = False, on_head: OnHead
    ) -> Answer:
        """Fetch what a target names; redirects are not followed.

        Args:
            target: What to ask for.
            clock: Bounds every wait and their sum.
            max_bytes: The largest body.
            cut: Return the start of a longer body instead of refusing it.
            on_head: Told status and headers before the body is read; may raise.

        Raises:
            Refused: The address or the answer is not allowed.
            urllib.error.URLError: No connection could be made.
            OSError: The connection failed later.
            http.client.IncompleteRead: The body ended too early.
        """
        request = (
            f"GET {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\n"
            f"User-Agent: {self._user_agent}\r\nAccept-Encoding: identity\r\n\r\n"
        ).encode("ascii")
        try:
            connection, response = self._ask(target, request, clock)
        except ConnectionError:  # http.client has one that is an HTTPException, too
            raise
        except http.client.HTTPException as error:
            raise _bad_response(error) from error
        whole = False
        try:
            on_head(response.status, response.headers)
            body, whole = _read_body(response, max_bytes, cut=cut)
            if response.headers.get("content-encoding") and body:
                body = inflated(body, response.headers["content-encoding"], max_bytes, cut=cut)
            return Answer(target.origin + target.path, response.status, response.headers, body)
        except http.client.IncompleteRead:
            raise
        except (http.client.HTTPException, ValueError) as error:  # of the sizes of chunks
            raise _bad_response(error) from error
        finally:
            response.close()
            assert connection.received is not None
            if whole and not response.will_close and not connection.received.has_rest:
                self._keep(target.origin, connection)
            else:
                connection.close()

    def _ask(
        self, target: Target, request: bytes, clock: Clock
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        kept = self._take(target.origin)
        if kept is not None:
            # If it was closed while it was idle, a GET may be asked again.
            with contextlib.suppress(ConnectionError):
                return kept, kept.send(request, clock)
        connection = self._connect(target, clock)
        return connection, connection.send(request, clock)

    def _connect(self, target: Target, clock: Clock) -> _Connection:
        try:
            sock = connect(target.host, target.port, clock, self._allow_hosts)
            if target.scheme == "https":
                try:
                    sock.settimeout(clock.wait_s())
                    sock = self._tls.wrap_socket(sock, server_hostname=target.host)
                except BaseException:
                    sock.close()
                    raise
        except Refused:
            raise
        except UnicodeError as error:
            raise urllib.error.URLError(f"no name of a host: {error}") from error
        except OSError as error:
            raise urllib.error.URLError(error) from error
        return _Connection(sock)

    def _take(self, origin: str) -> _Connection | None:
        while True:
            with self._lock:
                kept = self._by_origin.get(origin)
                if not kept:
                    return None
                connection = kept.pop()
                self._forget(connection)
            if connection.is_usable():
                return connection
            connection.close()

    def _keep(self, origin: str, connection: _Connection) -> None:
        now_s = connection.idle_since_s = time.monotonic()
        dropped = []
        with self._lock:
            self._idle[connection] = origin
            self._by_origin.setdefault(origin, []).append(connection)
            while True:
                oldest = next(iter(self._idle))
                is_stale = now_s - oldest.idle_since_s > _MAX_IDLE_S
                if not is_stale and len(self._idle) <= _MAX_IDLE_CONNECTIONS:
                    break
                self._by_origin[self._idle[oldest]].remove(oldest)
                self._forget(oldest)
                dropped.append(oldest)
        for oldest in dropped:
            oldest.close()

    def _forget(self, connection: _Connection) -> None:
        origin = self._idle.pop(connection)
        if not self._by_origin[origin]:
            del self._by_origin[origin]

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            connections = list(self._idle)
            self._idle.clear()
            self._by_origin.clear()
        for connection in connections:
            connection.close()


def _bad_response(error: Exception) -> Refused:
    return Refused(Reason.BAD_RESPONSE, f"{type(error).__name__}: {error}"[:200])


def _read_body(
    response: http.client.HTTPResponse, max_bytes: int, *, cut: bool
) -> tuple[bytes, bool]:
    """Read a body; the sizes announced and the sizes sent are both judged.

    Returns:
        The body (of an answer that is no success: nothing), and whether it was read to its end.
    """
    expected_bytes = response.length
    if response.status // 100 != 2:
        # Short pages are read so that the connection can be kept.
        if expected_bytes is None or expected_bytes > _CHUNK_BYTES:
            return b"", False
        max_bytes, cut = _CHUNK_BYTES, True
    elif expected_bytes is not None and expected_bytes > max_bytes and not cut:
        raise Refused(Reason.TOO_MANY_BYTES, f"{expected_bytes} bytes announced")
    body = bytearray()
    # read1, as read() believes the sizes of chunks: one of -1 would read on for ever.
    while expected_bytes is None or len(body) < expected_bytes:
        piece = response.read1(_CHUNK_BYTES)
        if not piece:
            break
        body += piece
        if len(body) > max_bytes:
            if cut:
                return bytes(body[:max_bytes]), False
            raise Refused(Reason.TOO_MANY_BYTES, f"more than {max_bytes} bytes")
    if expected_bytes is not None and len(body) < expected_bytes:
        raise http.client.IncompleteRead(bytes(body), expected_bytes - len(body))
    return (bytes(body) if response.status // 100 == 2 else b""), True


def inflated(body: bytes, encoding: str, max_bytes: int, *, cut: bool = False) -> bytes:
    """Undo gzip or deflate, which some servers send though nobody asked, up to a largest size.

    Bodies in other encodings, and those that are not what the header says, stay as they are.

    Raises:
        Refused: It would be larger than `max_bytes`, or ends too early; not raised with `cut`.
    """
    if encoding.strip().lower() not in {"gzip", "x-gzip", "deflate"}:
        return body
    inflater = zlib.decompressobj(wbits=47)  # 32 + 15: gzip or zlib, as the body starts
    try:
        plain = inflater.decompress(body, max_bytes + 1)
    except zlib.error:
        return body
    if cut:
        return plain[:max_bytes]
    if len(plain) > max_bytes:
        raise Refused(Reason.TOO_MANY_BYTES, f"inflates to more than {max_bytes} bytes")
    if not inflater.eof:
        raise Refused(Reason.TRUNCATED, f"{encoding} of {len(body)} bytes has no end")
    return plain
