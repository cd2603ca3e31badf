"""The way out through an HTTP proxy that the environment names: which addresses take it, and the tunnel through it."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined] # typeshed has not

HEAD_LIMIT_BYTES: Final = 16 * 1024
"""Of a proxy's answer to CONNECT."""

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")


@dataclass(frozen=True, slots=True, repr=False)
class Proxy:
    """Where a proxy listens, and what it is told to let us through."""

    host: str
    port: int
    authorization: str | None = None

    def __repr__(self) -> str:
        return f"<Proxy {self.host}:{self.port}>"

    @property
    def url(self) -> str:
        """The address, credentials included, as libraries take it: not for showing."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        login = ""
        if self.authorization is not None:
            user, _, password = base64.b64decode(self.authorization.removeprefix("Basic ")).decode().partition(":")
            login = f"{quote(user, safe='')}:{quote(password, safe='')}@"
        return f"http://{login}{host}:{self.port}"

    @property
    def header_lines(self) -> str:
        """What a request to the proxy itself carries, besides its own headers."""
        return f"Proxy-Authorization: {self.authorization}\r\n" if self.authorization is not None else ""


class ProxyRefused(OSError):
    """The proxy did not open the way; the message says what it answered, and quotes nothing."""


def proxy_from_environment(url: str) -> Proxy | None:
    """The proxy for an upstream's URL by `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` (either case).

    Loopback never goes through one: what is meant is this machine, not the proxy's.

    Raises:
        ValueError: the variable names no `http://host[:port]`; its value, which may hold a password, is not quoted.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host):
        return None
    proxies = getproxies_environment()
    configured = proxies.get(parts.scheme) or proxies.get("all")
    if not configured or proxy_bypass_environment(f"{host}:{parts.port}" if parts.port else host, proxies):
        return None
    variable = f"{parts.scheme.upper()}_PROXY" if proxies.get(parts.scheme) else "ALL_PROXY"
    return parse_proxy(configured, variable)


def parse_proxy(text: str, variable: str) -> Proxy:
    """Take a proxy's address apart. Raises ValueError naming `variable` only."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
        parts = urlsplit("")
    if parts.scheme != "http" or not host or not _HOST.fullmatch(host):
        raise ValueError(f"the environment's {variable} must be http://host:port (proxies of other kinds are not used)")
    login = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        login = "Basic " + base64.b64encode(pair.encode()).decode()
    return Proxy(host, port or 80, login)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    name = host.rstrip(".").lower()
    if name in {"localhost", "ip6-localhost"} or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(name))  # "127.1", as every resolver reads it
        except OSError:
            return False
    return address.is_loopback or address.is_unspecified


def connect_request(host: str, port: int, proxy: Proxy) -> bytes:
    """What asks a proxy for a tunnel to `host`:`port` (RFC 9110, 9.3.6)."""
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{proxy.header_lines}\r\n".encode("latin-1")


def refusal_of(head: bytes) -> str | None:
    """Why the answer to CONNECT is no consent; None if it is one."""
    status = _STATUS.match(head)
    if status is None:
        return "the proxy does not answer as one"
    if status[1][:1] == b"2":
        return None
    hint = ": it wants other credentials" if status[1] == b"407" else ""
    return f"the proxy refused (HTTP {status[1].decode()}){hint}"


async def open_tunnel(loop: asyncio.AbstractEventLoop, proxy: Proxy, host: str, port: int) -> asyncio.Transport:
    """A connection through the proxy to `host`:`port`, from which nothing was read.

    For TLS inside it, or for another protocol (`set_protocol`, `resume_reading`).

    Raises:
        OSError: the proxy is not there, or refuses (`ProxyRefused`).
    """
    raw, tunnel = await loop.create_connection(
        lambda: Tunnel(loop, connect_request(host, port, proxy)), proxy.host, proxy.port
    )
    try:
        await tunnel.opened
    except BaseException:
        tunnel.opened.cancel()
        raw.abort()
        raise
    return raw


class Tunnel(asyncio.Protocol):
    """Asks for a tunnel on a connection to the proxy; `opened` is done when there is one."""

    def __init__(self, loop: asyncio.AbstractEventLoop, request: bytes) -> None:
        self._request = request
        self._head = b""
        self.opened: asyncio.Future[None] = loop.create_future()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.transport = transport  # type: ignore[assignment] # TCP gives full transports
        assert self.transport is not None  # noqa: S101 - just set
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """The answer; nothing may follow it, for the server speaks only after we do."""
        self._head += data
        if self.opened.done():
            return
        if b"\r\n\r\n" in self._head:
            reason = refusal_of(self._head)
            if reason is None and not self._head.endswith(b"\r\n\r\n"):
                reason = "the proxy says more than it was asked"
            if reason is None:
                assert self.transport is not None  # noqa: S101 - data came over it
                self.transport.pause_reading()  # what comes next is TLS, and another protocol's
                self.opened.set_result(None)
            else:
                self.opened.set_exception(ProxyRefused(reason))
        elif len(self._head) > HEAD_LIMIT_BYTES:
            self.opened.set_exception(ProxyRefused("the proxy's answer is too long"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed before there was a tunnel."""
        if not self.opened.done():
            self.opened.set_exception(ProxyRefused("the proxy closed the connection") if exc is None else exc)
