"""Connections to URLs that somebody else named: resolved here, checked before every connection, and answered in bounds.

A URL in an upstream's reply, or in a client's request, may point into our own network (SSRF). So the name is resolved here,
every address that it has must be public, and the connection goes to the address that was checked, not to the name again
(which could resolve differently a moment later). Nothing here follows a redirect.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlsplit

import httptools

from img_serving.policy.public_addresses import is_public_address
from img_serving.transport.proxy import Proxy, open_tunnel

CONNECT_TIMEOUT_SECONDS: Final = 5.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its addresses, as text."""

_READ_BYTES: Final = 256 * 1024
_HEADERS_LIMIT: Final = 64 * 1024
_HOST = re.compile(r"[a-z0-9._:%-]+")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class ExchangeFailed(Exception):
    """There is no answer that may be used. `is_definite`: another try would end the same (refused, not there, no good).

    `message` is safe to show: it names neither the URL's path nor its query, which may hold a signature.
    """

    def __init__(self, message: str, *, is_definite: bool = True) -> None:
        super().__init__(message)
        self.message = message
        self.is_definite = is_definite


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart, so far as a connection and a request line need it."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> tuple[str, str, int]:
        """What a key may be sent to: scheme, host and port."""
        return self.scheme, self.host, self.port

    @property
    def host_header(self) -> str:
        """The value of the request's Host header."""
        host = f"[{self.host.partition('%')[0]}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_target(url: str) -> Target:
    """Take a URL apart.

    Raises:
        ExchangeFailed: it is none that we connect to.
        ValueError: it is no URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS:
        raise ExchangeFailed("only http and https URLs are used")
    if parts.username is not None or parts.password is not None:
        raise ExchangeFailed("URLs with credentials in them are not used")
    host = (parts.hostname or "").rstrip(".")
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    if not _HOST.fullmatch(host):
        raise ExchangeFailed("the URL has no host that can be resolved")
    port = parts.port if parts.port is not None else _DEFAULT_PORTS[parts.scheme]
    # `%` stays as it is: quoting it again would break signatures; control characters and blanks cannot split the line
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (
        "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?") if parts.query else ""
    )
    return Target(parts.scheme, host, port, path)


class SafeConnector:
    """Opens connections to public addresses; one host, the operator's own, may be exempt (`trusted`)."""

    def __init__(
        self,
        *,
        trusted: Target | None = None,
        ssl_context: ssl.SSLContext | None = None,
        allow_private_addresses: bool = False,
        proxy_of: Callable[[str], Proxy | None] = lambda _: None,
        resolve: Resolve | None = None,
        is_public: Callable[[str], bool] | None = None,
    ) -> None:
        """Describe what may be connected to.

        Args:
            trusted: its host may be private.
            ssl_context: for the trusted host's https; others are checked against the system's authorities.
            allow_private_addresses: skip the check of addresses altogether.
            proxy_of: the proxy to reach a URL by, if any; addresses are checked all the same.
            resolve: finds addresses; the loop's own resolver by default.
            is_public: judges one address; `is_public_address` by default.
        """
        self._trusted = trusted
        self._ssl_context = ssl_context
        self._public_ssl_context: ssl.SSLContext | None = None
        self._allow_private_addresses = allow_private_addresses
        self._proxy_of = proxy_of
        self._resolve = resolve or _resolve
        self._is_public = is_public or is_public_address

    async def open(self, target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to one of the target's checked addresses, with TLS where its scheme says so.

        Raises:
            ExchangeFailed: it has no address, or one that may not be connected to.
            OSError: no address answered.
        """
        return await self._connect(target, await self._checked_addresses(target))

    async def _checked_addresses(self, target: Target) -> Sequence[str]:
        """The addresses of the host: either every one of them may be connected to, or none is."""
        if self._is_trusted(target) and self._proxy(target) is not None:
            return (target.host,)  # the proxy may know names that nobody knows here
        addresses = await self._resolve(target.host, target.port)
        if not addresses:
            raise ExchangeFailed(f"{target.host} has no address", is_definite=False)
        if not (self._is_trusted(target) or self._allow_private_addresses):
            for address in addresses:
                if not self._is_public(address):
                    raise ExchangeFailed(f"{target.host} is not a public address, so it is not connected to")
        return addresses

    def _is_trusted(self, target: Target) -> bool:
        return self._trusted is not None and target.host == self._trusted.host

    def _proxy(self, target: Target) -> Proxy | None:
        try:
            return self._proxy_of(f"{target.scheme}://{target.host_header}")
        except ValueError as error:
            raise ExchangeFailed(str(error), is_definite=False) from None

    async def _connect(
        self, target: Target, addresses: Sequence[str]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Try the addresses one after the other: where there is no IPv6 route, the first is often one of those."""
        context = self._context_for(target) if target.scheme == "https" else None
        name = target.host if context else None
        proxy = self._proxy(target)
        failure: OSError = OSError("no address")
        for address in addresses:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                    if proxy is not None:
                        return await _connect_through(proxy, address, target.port, context, name)
                    return await asyncio.open_connection(
                        address, target.port, ssl=context, server_hostname=name, limit=_READ_BYTES
                    )
            except OSError as error:  # TimeoutError is one too
                failure = error
        raise failure

    def _context_for(self, target: Target) -> ssl.SSLContext:
        """The operator's CA, or leniency, is for the operator's host: elsewhere it must not weaken anything."""
        if self._ssl_context is not None and self._trusted is not None and target.host == self._trusted.host:
            return self._ssl_context
        if self._public_ssl_context is None:
            self._public_ssl_context = ssl.create_default_context()
        return self._public_ssl_context


async def _connect_through(
    proxy: Proxy, host: str, port: int, context: ssl.SSLContext | None, name: str | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A tunnel to `host`, with TLS inside it where there is a context."""
    loop = asyncio.get_running_loop()
    raw = await open_tunnel(loop, proxy, host, port)
    reader = asyncio.StreamReader(limit=_READ_BYTES, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    try:
        if context is None:
            raw.set_protocol(protocol)
            protocol.connection_made(raw)
            raw.resume_reading()
            return reader, asyncio.StreamWriter(raw, protocol, reader, loop)
        # what the proxy says between its consent and the handshake goes into the handshake, and breaks it
        inside = await loop.start_tls(raw, protocol, context, server_hostname=name)
    except BaseException:
        raw.abort()
        raise
    if inside is None:  # uvloop's answer where the connection was closed meanwhile
        raise ConnectionAbortedError
    protocol.connection_made(inside)
    return reader, asyncio.StreamWriter(inside, protocol, reader, loop)


async def _resolve(host: str, port: int) -> Sequence[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(place[0]) for *_, place in found))


class _Collector:
    """Gathers one reply from httptools' callbacks. Interim ones (1xx) that come before it are passed over."""

    def __init__(self, max_bytes: int) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.is_complete = False
        self.is_too_large = False
        self._max_bytes = max_bytes
        self._header_bytes = 0

    def has_head(self) -> bool:
        return self.status != 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value) + len(b": \r\n")
        self.is_too_large = self.is_too_large or self._header_bytes > _HEADERS_LIMIT
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self.headers.clear()
            return
        self.status = status
        length = self.headers.get("content-length", "")
        self.is_too_large = self.is_too_large or (length.isdecimal() and int(length) > self._max_bytes)

    def on_body(self, piece: bytes) -> None:
        self.body += piece
        self.is_too_large = self.is_too_large or len(self.body) > self._max_bytes

    def on_message_complete(self) -> None:
        self.is_complete = self.has_head()


async def read_reply(reader: asyncio.StreamReader, max_bytes: int) -> tuple[int, dict[str, str], bytes]:
    """A complete reply: its status, headers (lower-case names) and body.

    Raises:
        ExchangeFailed: it is not HTTP, was cut short, or has more than `max_bytes`.
    """
    reply = _Collector(max_bytes)
    received = 0
    while not reply.is_complete:
        piece = await reader.read(_READ_BYTES)
        received += len(piece)
        if not piece:
            framed = "content-length" in reply.headers or "transfer-encoding" in reply.headers
            if not reply.has_head() or framed:
                raise ExchangeFailed("it was cut short", is_definite=False)
            break  # a body without a length ends where the connection does (RFC 9112, 6.3)
        _feed(reply, piece)
        # the second is for heads without end, which no callback sees growing
        if reply.is_too_large or received - len(reply.body) > max_bytes + _HEADERS_LIMIT:
            raise ExchangeFailed(f"it is larger than {max_bytes} bytes")
    return reply.status, reply.headers, bytes(reply.body)


async def read_head(
    reader: asyncio.StreamReader, *, drop_bytes: int, linger_seconds: float
) -> tuple[int, dict[str, str]]:
    """A reply's status and headers (lower-case names): what there is of a body is dropped.

    The server may finish its body, up to `drop_bytes` and for `linger_seconds`: a connection that is cut while it writes would
    look like a failure to it. However the body ends, the status stands.

    Raises:
        ExchangeFailed: it is not HTTP, was cut short, or its head has no end.
    """
    reply = _Collector(drop_bytes)
    received = 0
    while not reply.has_head():
        piece = await reader.read(_READ_BYTES)
        if not piece:
            raise ExchangeFailed("it was cut short", is_definite=False)
        received += len(piece)
        try:
            _feed(reply, piece)
        except ExchangeFailed:
            if not reply.has_head():
                raise
            break  # nonsense after the head
        if not reply.has_head() and received > _HEADERS_LIMIT:
            raise ExchangeFailed("its head is too large")
    with suppress(TimeoutError, OSError, ExchangeFailed):
        async with asyncio.timeout(linger_seconds):
            while not (reply.is_complete or reply.is_too_large) and (piece := await reader.read(_READ_BYTES)):
                _feed(reply, piece)
    return reply.status, reply.headers


def _feed(reply: _Collector, piece: bytes) -> None:
    try:
        reply.parser.feed_data(piece)
    except httptools.HttpParserUpgrade:
        reply.is_complete = True  # 101, which nobody asked for: what follows is not ours
    except httptools.HttpParserError:
        raise ExchangeFailed("the answer is not HTTP") from None
