"""The lean HTTP/1.1 client for one origin: a pool of kept-alive connections, each serving one exchange at a time."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from img_serving.domain.errors import AttemptError, Outcome
from img_serving.ports import UpstreamReply
from img_serving.transport.pool import Connection, ConnectionPool, TransportStatistics
from img_serving.transport.proxy import Proxy, ProxyRefused, open_tunnel

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_TARGET = re.compile(r"/[\x21\x22\x24-\x7e]*")

_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS"})
_BODY_EXPECTED = frozenset({"POST", "PUT", "PATCH"})
_REQUEST_LINES_KEPT = 64
_OF_ONE_REQUEST = frozenset({"x-request-id", "traceparent"})
"""Headers that change from request to request; callers put them last."""

_OURS = frozenset({"connection", "content-length", "transfer-encoding", "upgrade", "trailer", "te", "expect"})


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a transport connects to. `peer` is host:port for messages; `prefix` has no slash at its end."""

    tls: bool
    host: str
    port: int
    peer: str
    prefix: str
    host_header: str


class HttpTransport:
    """HTTP to one origin (implements `ports.Transport`).

    No task per request, and one future: the reply is parsed in the loop's callbacks. Idle connections are taken newest
    first, so that the ones a burst has left behind grow old and go. To be used from one event loop.

    A request whose kept-alive connection turns out closed before the first reply byte is repeated once on a new
    connection if its method is GET, HEAD or OPTIONS; a POST may have cost money already and ends `UNKNOWN`. That is made
    rare by three rules: connections closed while idle are dropped at once, none is used that was idle for longer than
    `keepalive_seconds` or the server's own `Keep-Alive: timeout`, and one that was quiet for a second is polled first.
    """

    def __init__(
        self,
        base_url: str,
        *,
        ssl_context: ssl.SSLContext | None = None,
        connect_timeout_seconds: float = 5.0,
        keepalive_seconds: float = 55.0,
        max_idle: int = 64,
        proxy: Proxy | None = None,
    ) -> None:
        """`base_url` is http(s)://host[:port][/prefix]; without a context, https trusts the system's authorities.

        With a `proxy`, http goes to it in absolute form, and https through a tunnel that it opens (RFC 9112, 3.2.2 and 3.2.3).

        Raises:
            ValueError: `base_url` is not that, or holds credentials, a query or a fragment.
        """
        self._origin = _parse_origin(base_url)
        self._ssl_context = (ssl_context or make_ssl_context(None, verify=True)) if self._origin.tls else None
        self._connect_timeout_seconds = connect_timeout_seconds
        self._proxy = proxy
        self._absolute = f"http://{self._origin.host_header}" if proxy is not None and not self._origin.tls else ""
        self._pool = ConnectionPool(keepalive_seconds=keepalive_seconds, max_idle=max_idle)
        self._default_lines = {
            "host": f"Host: {self._origin.host_header}\r\n",
            "user-agent": "User-Agent: img-serving\r\n",
            "accept": "Accept: */*\r\n",
            "accept-encoding": "Accept-Encoding: identity\r\n",
        }
        # An adapter sends the same headers with every request: they are checked and joined when they change.
        self._request_lines: dict[tuple[str, str], str] = {}
        self._last_headers: tuple[tuple[str, str], ...] = ()
        self._last_lines = self._header_lines(())

    def __repr__(self) -> str:
        scheme = "https" if self._origin.tls else "http"
        now = self.statistics
        state = "closed" if self._pool.is_closed else f"{now.open_connections} open, {now.idle_connections} idle"
        return f"<HttpTransport {scheme}://{self._origin.peer}: {state}>"

    @property
    def statistics(self) -> TransportStatistics:
        """How many connections there are now."""
        return self._pool.statistics

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        timeout_seconds: float,
        max_body_bytes: int,
        on_event_bytes: Callable[[bytes], None] | None = None,
    ) -> UpstreamReply:
        """One request and its complete reply, as the port says; redirects are not followed.

        Host, User-Agent, Accept and Accept-Encoding may be given to replace ours; what frames the message is not the
        caller's to say.

        Raises:
            AttemptError: see `ports.Transport.request`.
            ValueError: a method, path or header that could break out of its line, or that this client owns.
        """
        head = self._head(method, path, headers, body)
        if self._pool.is_closed:
            raise self._not_started("the transport is closed")
        if timeout_seconds <= 0:
            raise self._not_started("no time was left to begin")
        loop = asyncio.get_running_loop()
        now = loop.time()
        deadline = now + timeout_seconds
        connection = self._pool.take(now)
        while True:
            reused = connection is not None
            if connection is None:
                connection = await self._connect(loop, deadline)
            waiter = connection.send(
                head,
                body,
                deadline,
                head_only=method == "HEAD",
                limit_bytes=max_body_bytes,
                on_event_bytes=on_event_bytes,
            )
            try:
                ending = await waiter
            finally:
                connection.leave(waiter)
            if isinstance(ending, UpstreamReply):
                return ending
            if not (reused and ending.unanswered and method in _REPEATABLE):
                raise self._error(ending.outcome, ending.reason)
            connection = None

    async def close(self) -> None:
        """Close every connection; requests in flight end `UNKNOWN`. Returns when the sockets are closed."""
        await self._pool.close()

    def _head(self, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes | None) -> bytes:
        """The request's head, checked: what is in it came from configuration and callers."""
        request_line = self._request_lines.get((method, path))
        if request_line is None:
            request_line = self._request_line(method, path)
        given = tuple(headers)
        count = len(self._last_headers)
        if given[:count] != self._last_headers or not count:
            # what is the same for every request comes first, so its lines are made once
            count = len(given)
            while count and given[count - 1][0].lower() in _OF_ONE_REQUEST:
                count -= 1
            self._last_lines = self._header_lines(given[:count])
            self._last_headers = given[:count]
        elif any(name.lower() not in _OF_ONE_REQUEST for name, _ in given[count:]):
            count = len(given)
            self._last_lines = self._header_lines(given)
            self._last_headers = given
        lines = self._last_lines
        if len(given) > count:
            lines += "".join([_line(name, value) for name, value in given[count:]])
        if body is not None:
            length = f"Content-Length: {len(body)}\r\n"
        else:
            length = "Content-Length: 0\r\n" if method in _BODY_EXPECTED else ""
        return f"{request_line}{lines}{length}\r\n".encode("latin-1")

    def _request_line(self, method: str, path: str) -> str:
        if not _TOKEN.fullmatch(method):
            raise ValueError("the method is not an HTTP token")
        if not _TARGET.fullmatch(path):
            raise ValueError("the path must begin with '/' and be percent-encoded ASCII, without a fragment")
        line = f"{method} {self._absolute}{self._origin.prefix}{path} HTTP/1.1\r\n"
        if self._absolute and self._proxy is not None:
            line += self._proxy.header_lines
        if len(self._request_lines) < _REQUEST_LINES_KEPT:
            self._request_lines[method, path] = line
        return line

    def _header_lines(self, headers: tuple[tuple[str, str], ...]) -> str:
        defaults = dict(self._default_lines)
        lines = []
        for name, value in headers:
            lines.append(_line(name, value))
            defaults.pop(name.lower(), None)
        return "".join([*defaults.values(), *lines])

    async def _connect(self, loop: asyncio.AbstractEventLoop, deadline: float) -> Connection:
        origin = self._origin
        limit = min(deadline, loop.time() + self._connect_timeout_seconds)
        connection = Connection(self._pool, loop)
        try:
            async with asyncio.timeout_at(limit):
                if self._proxy is not None:
                    await self._connect_through(self._proxy, connection, loop)
                else:
                    await loop.create_connection(
                        lambda: connection,
                        origin.host,
                        origin.port,
                        ssl=self._ssl_context,
                        server_hostname=origin.host if origin.tls else None,
                    )
        except BaseException as error:
            # uvloop, cancelled between the connection and its waiter, closes it and never says so: the pool must hear
            connection.drop()
            self._pool.ended(connection)
            if isinstance(error, (OSError, UnicodeError)):
                reason = _why_not_connected(error)
                if self._proxy is not None:
                    reason = f"by way of the proxy {self._proxy.host}:{self._proxy.port}: {reason}"
                raise self._not_started(reason) from error
            raise
        if self._pool.is_closed or not connection.is_usable(0.0):
            connection.drop()
            raise self._not_started("the connection was closed before anything was sent")
        return connection

    async def _connect_through(self, proxy: Proxy, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Connect by way of the proxy: plainly for http, by a tunnel and TLS inside it for https."""
        origin, context = self._origin, self._ssl_context
        if context is None:
            await loop.create_connection(lambda: connection, proxy.host, proxy.port)
            return
        raw = await open_tunnel(loop, proxy, origin.host, origin.port)
        try:
            inside = await loop.start_tls(raw, connection, context, server_hostname=origin.host)
        except BaseException:
            raw.abort()
            raise
        if inside is None:  # uvloop's answer where the connection was closed meanwhile
            raise ConnectionAbortedError
        connection.connection_made(inside)

    def _not_started(self, reason: str) -> AttemptError:
        return self._error(Outcome.NOT_STARTED, reason)

    def _error(self, outcome: Outcome, reason: str) -> AttemptError:
        return AttemptError(outcome, f"{self._origin.peer}: {reason}")


def _line(name: str, value: str) -> str:
    """One header's line, checked."""
    if not _TOKEN.fullmatch(name):
        raise ValueError("a header's name is not an HTTP token")
    if not _FIELD_VALUE.fullmatch(value):
        raise ValueError(f"the value of header {name!r} has characters that HTTP does not carry")
    if name.lower() in _OURS:
        raise ValueError(f"header {name!r} is set by the transport alone")
    return f"{name}: {value}\r\n"


def make_ssl_context(ca_file: str | None, verify: bool) -> ssl.SSLContext:
    """TLS settings for upstreams: trusts `ca_file` (PEM), or the system's authorities where it is None.

    `verify=False` accepts any certificate: for self-signed ones on a private network only.

    Raises:
        OSError: `ca_file` cannot be read, or holds no certificate (`ssl.SSLError`).
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _parse_origin(base_url: str) -> _Origin:
    """Raises ValueError without quoting the URL: it may hold a password."""
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError:
        raise ValueError("the base URL's host or port is malformed") from None
    host = parts.hostname
    if parts.scheme not in {"http", "https"} or not host:
        raise ValueError("the base URL must be http://host[:port][/path] or https://…")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the base URL must not hold credentials: send them as a header")
    if parts.query or parts.fragment:
        raise ValueError("the base URL must not have a query or fragment")
    prefix = parts.path.rstrip("/")
    if prefix and not _TARGET.fullmatch(prefix):
        raise ValueError("the base URL's path must be percent-encoded ASCII")
    try:
        name = host.encode("idna").decode("ascii")
    except UnicodeError:
        raise ValueError("the base URL's host is not a name that DNS can hold") from None
    tls = parts.scheme == "https"
    default_port = 443 if tls else 80
    port = default_port if port is None else port
    # A zone ("fe80::1%eth0") says which of *our* links to use: no business of the server's (RFC 6874, 4).
    shown = f"[{name.partition('%')[0]}]" if ":" in name else name
    if not re.fullmatch(r"[\x21-\x7e]+", shown):
        raise ValueError("the base URL's host is malformed")
    return _Origin(
        tls=tls,
        host=name,
        port=port,
        peer=f"{shown}:{port}",
        prefix=prefix,
        host_header=shown if port == default_port else f"{shown}:{port}",
    )


def _why_not_connected(error: Exception) -> str:
    """In few safe words: what a library's message would quote is not known."""
    if isinstance(error, TimeoutError):
        return "no connection in time"
    if isinstance(error, ProxyRefused):
        return str(error)
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror | UnicodeError):
        return "the host name was not found"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the TLS certificate was not accepted ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"the TLS handshake failed ({error.reason})"
    if isinstance(error, ConnectionResetError | ConnectionAbortedError | BrokenPipeError):
        return "the connection was closed while being made"
    return "the host could not be reached"
