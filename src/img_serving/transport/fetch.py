"""Fetching a picture from a URL that somebody else named: checked before every connection, capped, and sniffed.

A URL in an upstream's reply, or in a client's request, may point into our own network (SSRF). So the name is resolved here,
every address that it has must be public, and the connection goes to the address that was checked, not to the name again
(which could resolve differently a moment later). Redirects are followed by hand, each target checked like the first.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import quote, urljoin, urlsplit

import httptools

from img_serving.media.sniff import sniff
from img_serving.transport.proxy import Proxy, open_tunnel

MAX_REDIRECTS: Final = 3
CONNECT_TIMEOUT_SECONDS: Final = 5.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its addresses, as text."""

_READ_BYTES: Final = 256 * 1024
_HEADERS_LIMIT: Final = 64 * 1024
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_HOST = re.compile(r"[a-z0-9._:%-]+")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
"""The last 32 bits are an IPv4 address that is reached through it (RFC 6052)."""


class FetchFailed(Exception):
    """The picture was not got. `is_definite`: another try would end the same (refused, not there, no picture).

    `message` is safe to show: it names neither the URL's path nor its query, which may hold a signature.
    """

    def __init__(self, message: str, *, is_definite: bool = True) -> None:
        super().__init__(message)
        self.message = message
        self.is_definite = is_definite


class UrlFetcher(Protocol):
    """Gets the bytes behind a URL."""

    async def __call__(self, url: str, timeout_seconds: float, max_bytes: int) -> bytes:
        """The body of a 200 reply: something that begins as a picture does, of at most `max_bytes`.

        Raises:
            FetchFailed: it could not be got, or may not be.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL taken apart, so far as a connection and a request line need it."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def host_header(self) -> str:
        host = f"[{self.host.partition('%')[0]}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


class SafeFetcher:
    """Implements `UrlFetcher`: a connection per request, for pictures come from anywhere and seldom.

    The operator's own upstream (`trusted_url`) is an exception by host name: it may be private, as most are. `headers` (its
    key) go to it alone: the same scheme, host and port.
    """

    def __init__(
        self,
        *,
        trusted_url: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
        ssl_context: ssl.SSLContext | None = None,
        allow_private_addresses: bool = False,
        proxy_of: Callable[[str], Proxy | None] = lambda _: None,
        resolve: Resolve | None = None,
        is_public: Callable[[str], bool] | None = None,
    ) -> None:
        """Describe what may be fetched.

        Args:
            trusted_url: the base URL of the upstream whose replies name the URLs; relative ones are meant from there.
            headers: sent to the trusted origin only.
            ssl_context: for the trusted host's https; others are checked against the system's authorities.
            allow_private_addresses: skip the check of addresses altogether.
            proxy_of: the proxy to reach a URL by, if any; addresses are checked all the same.
            resolve: finds addresses; the loop's own resolver by default.
            is_public: judges one address; `is_public_address` by default.
        """
        self._trusted_url = trusted_url
        self._trusted = _parse(trusted_url) if trusted_url else None
        self._headers = tuple(headers)
        self._ssl_context = ssl_context
        self._public_ssl_context: ssl.SSLContext | None = None
        self._allow_private_addresses = allow_private_addresses
        self._proxy_of = proxy_of
        self._resolve = resolve or _resolve
        self._is_public = is_public or is_public_address

    def __repr__(self) -> str:
        return f"<SafeFetcher trusting {self._trusted.host if self._trusted else 'nobody'}>"

    async def __call__(self, url: str, timeout_seconds: float, max_bytes: int) -> bytes:
        """Fetch, as `UrlFetcher` says; `timeout_seconds` bounds all of it, redirects included."""
        if timeout_seconds <= 0:
            raise FetchFailed("no time was left to fetch it", is_definite=False)
        try:
            async with asyncio.timeout(timeout_seconds):
                body = await self._follow(urljoin(self._trusted_url or "", url), max_bytes)
        except TimeoutError:
            raise FetchFailed("it did not come in time", is_definite=False) from None
        except (OSError, EOFError) as error:
            raise FetchFailed(f"the connection failed ({type(error).__name__})", is_definite=False) from None
        except ValueError:
            raise FetchFailed("the URL is malformed") from None
        if sniff(body) is None:
            raise FetchFailed("what is there is no picture (neither PNG, JPEG nor WebP)")
        return body

    async def _follow(self, url: str, max_bytes: int) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            target = _parse(url)
            addresses = await self._checked_addresses(target)
            status, headers, body = await self._get(target, addresses, max_bytes)
            if status == 200:
                return body
            location = headers.get("location")
            if status not in _REDIRECTS or not location:
                raise FetchFailed(f"{target.host} answered HTTP {status}", is_definite=status < 500 and status != 429)
            url = urljoin(url, location)
        raise FetchFailed(f"more than {MAX_REDIRECTS} redirects")

    async def _checked_addresses(self, target: _Target) -> Sequence[str]:
        """The addresses of the host: either every one of them may be connected to, or none is."""
        if self._is_trusted(target) and self._proxy(target) is not None:
            return (target.host,)  # the proxy may know names that nobody knows here
        addresses = await self._resolve(target.host, target.port)
        if not addresses:
            raise FetchFailed(f"{target.host} has no address", is_definite=False)
        if not (self._is_trusted(target) or self._allow_private_addresses):
            for address in addresses:
                if not self._is_public(address):
                    raise FetchFailed(f"{target.host} is not a public address, so it is not fetched from")
        return addresses

    def _is_trusted(self, target: _Target) -> bool:
        return self._trusted is not None and target.host == self._trusted.host

    def _proxy(self, target: _Target) -> Proxy | None:
        try:
            return self._proxy_of(f"{target.scheme}://{target.host_header}")
        except ValueError as error:
            raise FetchFailed(str(error), is_definite=False) from None

    async def _get(
        self, target: _Target, addresses: Sequence[str], max_bytes: int
    ) -> tuple[int, dict[str, str], bytes]:
        reader, writer = await self._connect(target, addresses)
        try:
            lines = [f"GET {target.path} HTTP/1.1", f"Host: {target.host_header}", "User-Agent: img-serving"]
            lines += ["Accept: image/png, image/jpeg, image/webp", "Accept-Encoding: identity", "Connection: close"]
            if self._trusted is not None and target.origin == self._trusted.origin:
                lines += [f"{name}: {value}" for name, value in self._headers]
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
            return await _read_reply(reader, max_bytes)
        finally:
            writer.transport.abort()  # nothing more is expected from it, and a cancelled fetch ends at once

    async def _connect(
        self, target: _Target, addresses: Sequence[str]
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

    def _context_for(self, target: _Target) -> ssl.SSLContext:
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


def is_public_address(address: str) -> bool:
    """Whether an address belongs to the public Internet: not private, loopback, link-local, multicast, metadata or reserved.

    IPv6 forms that carry an IPv4 address (mapped, 6to4, Teredo, NAT64) are judged by that one too.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped
        if translated is not None:
            return is_public_address(str(translated))
        if any(not is_public_address(str(one)) for one in (ip.sixtofour, *(ip.teredo or ())) if one is not None):
            return False
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _parse(url: str) -> _Target:
    """Take a URL apart. Raises FetchFailed for what is not fetched, ValueError for what is no URL."""
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS:
        raise FetchFailed("only http and https URLs are fetched")
    if parts.username is not None or parts.password is not None:
        raise FetchFailed("URLs with credentials in them are not fetched")
    host = (parts.hostname or "").rstrip(".")
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    if not _HOST.fullmatch(host):
        raise FetchFailed("the URL has no host that can be resolved")
    port = parts.port if parts.port is not None else _DEFAULT_PORTS[parts.scheme]
    # `%` stays as it is: quoting it again would break signatures; control characters and blanks cannot split the line
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (
        "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?") if parts.query else ""
    )
    return _Target(parts.scheme, host, port, path)


async def _resolve(host: str, port: int) -> Sequence[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(place[0]) for *_, place in found))


class _Collector:
    """Gathers one reply from httptools' callbacks."""

    def __init__(self, max_bytes: int) -> None:
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.is_complete = False
        self.is_too_large = False
        self._max_bytes = max_bytes
        self._header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value) + len(b": \r\n")
        self.is_too_large = self.is_too_large or self._header_bytes > _HEADERS_LIMIT
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        length = self.headers.get("content-length", "")
        self.is_too_large = self.is_too_large or (length.isdecimal() and int(length) > self._max_bytes)

    def on_body(self, piece: bytes) -> None:
        self.body += piece
        self.is_too_large = self.is_too_large or len(self.body) > self._max_bytes

    def on_message_complete(self) -> None:
        self.is_complete = True


async def _read_reply(reader: asyncio.StreamReader, max_bytes: int) -> tuple[int, dict[str, str], bytes]:
    reply = _Collector(max_bytes)
    parser = httptools.HttpResponseParser(reply)
    received = 0
    while not reply.is_complete:
        piece = await reader.read(_READ_BYTES)
        received += len(piece)
        if not piece:
            framed = "content-length" in reply.headers or "transfer-encoding" in reply.headers
            if not reply.headers or framed:
                raise FetchFailed("it was cut short", is_definite=False)
            break  # a body without a length ends where the connection does (RFC 9112, 6.3)
        try:
            parser.feed_data(piece)
        except httptools.HttpParserError:
            raise FetchFailed("the answer is not HTTP") from None
        # the second is for heads without end, which no callback sees growing
        if reply.is_too_large or received - len(reply.body) > max_bytes + _HEADERS_LIMIT:
            raise FetchFailed(f"it is larger than {max_bytes} bytes")
    return parser.get_status_code(), reply.headers, bytes(reply.body)
