"""Decide what may be fetched: schemes, addresses, sizes, times; installed for one whole process.

img2dataset downloads through `urllib.request.urlopen`, so the rules live in the opener that this
module installs. The address is judged when the socket connects, so a redirect and a name that
resolves to something private are refused like the plain URL.
"""

import functools
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.request
from typing import IO, Any
from urllib.parse import urlsplit

from data_prep.config import DownloadConfig
from data_prep.quarantine import Reason, marked

SCHEMES = ("http", "https")
_CHUNK_BYTES = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(OSError):
    """The guard did not allow a request or its answer; the text carries the reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(marked(reason, detail))


def install(cfg: DownloadConfig) -> None:
    """Make `urllib.request.urlopen` obey `cfg` in this process, for all threads."""
    urllib.request.install_opener(guarded_opener(cfg))


def guarded_opener(cfg: DownloadConfig) -> urllib.request.OpenerDirector:
    """Build an opener that knows http and https only and takes no proxy from the environment.

    A proxy would resolve names out of our sight, so none is used.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        _GuardedHttp(cfg),
        _SameSchemes(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def scheme_problem(url: str) -> str | None:
    """Say what is wrong with a URL before anything is fetched, or None."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        return str(error)
    if parts.scheme.lower() not in SCHEMES:
        return f"scheme {parts.scheme or 'none'!r}, may be {' or '.join(SCHEMES)}"
    return None if host else "no host"


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also when it hides another one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def connect(
    host: str, port: int, *, timeout_s: float | None, allow_hosts: tuple[str, ...]
) -> socket.socket:
    """Open a TCP connection to an address that was judged, trying all that the name has.

    Raises:
        Refused: None of its addresses is public, and the host is not in `allow_hosts`.
        OSError: None of its allowed addresses answers.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    allowed = host in allow_hosts or f"{host}:{port}" in allow_hosts
    judged = [entry for entry in found if allowed or is_public(str(entry[4][0]))]
    if not judged:
        raise Refused(Reason.ADDRESS_REFUSED, f"{host}:{port} is {found[0][4][0]}, not public")
    last_error: OSError | None = None
    for family, kind, protocol, _, address in judged:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
        except OSError as error:
            sock.close()
            last_error = error
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    assert last_error is not None
    raise last_error


class _Response(http.client.HTTPResponse):
    """A response whose whole body has a largest size and a deadline."""

    def __init__(self, *args: Any, limits: DownloadConfig, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._limits = limits

    def read(self, amt: int | None = None) -> bytes:
        """Read the body; the sizes announced and the sizes sent are both judged."""
        if amt is not None:
            return super().read(amt)
        limit_bytes, expected_bytes = self._limits.max_body_bytes, self.length
        if expected_bytes is not None and expected_bytes > limit_bytes:
            raise Refused(Reason.TOO_MANY_BYTES, f"{expected_bytes} bytes announced")
        ends_s = time.monotonic() + self._limits.deadline_s
        body = bytearray()
        while expected_bytes is None or len(body) < expected_bytes:
            piece = self.read1(_CHUNK_BYTES)
            if not piece:
                break
            body += piece
            if len(body) > limit_bytes:
                raise Refused(Reason.TOO_MANY_BYTES, f"more than {limit_bytes} bytes")
            if time.monotonic() > ends_s:
                raise Refused(Reason.TIMEOUT, f"not whole after {self._limits.deadline_s:g} s")
        if expected_bytes is not None and len(body) < expected_bytes:
            raise http.client.IncompleteRead(bytes(body), expected_bytes - len(body))
        self.close()
        return bytes(body)


class _HttpConnection(http.client.HTTPConnection):
    def __init__(self, host: str, *, limits: DownloadConfig, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(host, **kwargs)
        self._limits = limits
        self.response_class = functools.partial(_Response, limits=limits)  # type: ignore[assignment]

    def connect(self) -> None:
        self.sock = connect(
            self.host, self.port, timeout_s=self.timeout, allow_hosts=self._limits.allow_hosts
        )


class _HttpsConnection(_HttpConnection):
    default_port = http.client.HTTPS_PORT

    def __init__(self, host: str, *, context: ssl.SSLContext, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(host, **kwargs)
        self._context = context

    def connect(self) -> None:
        super().connect()
        self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)


class _GuardedHttp(urllib.request.AbstractHTTPHandler):
    """Opens http and https through judged connections, and says honestly who asks."""

    def __init__(self, cfg: DownloadConfig) -> None:
        super().__init__()
        self._cfg = cfg
        context = ssl.create_default_context()  # one for all: each costs CPU milliseconds
        self._http = functools.partial(_HttpConnection, limits=cfg)
        self._https = functools.partial(_HttpsConnection, limits=cfg, context=context)

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        request.add_header("User-agent", self._cfg.user_agent)  # img2dataset would say Firefox
        return self.do_request_(request)

    https_request = http_request

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._http, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._https, request)


class _SameSchemes(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only; the address is judged when it connects."""

    def http_error_302(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> Any:  # noqa: ANN401 - urllib's
        scheme = urlsplit(headers.get("location") or headers.get("uri") or "").scheme.lower()
        if scheme and scheme not in SCHEMES:
            fp.close()
            raise Refused(Reason.SCHEME_REFUSED, f"redirect to scheme {scheme!r}")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302
