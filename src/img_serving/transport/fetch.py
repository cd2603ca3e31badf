"""Fetching a picture from a URL that somebody else named: over a checked connection, capped, and sniffed.

Redirects are followed by hand, each target checked like the first.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import Final, Protocol
from urllib.parse import urljoin

from img_serving.media.sniff import sniff
from img_serving.transport.proxy import Proxy
from img_serving.transport.safe_connection import (
    ExchangeFailed,
    Resolve,
    SafeConnector,
    Target,
    parse_target,
    read_reply,
)

MAX_REDIRECTS: Final = 3

FetchFailed = ExchangeFailed
"""The picture was not got."""

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


class UrlFetcher(Protocol):
    """Gets the bytes behind a URL."""

    async def __call__(self, url: str, timeout_seconds: float, max_bytes: int) -> bytes:
        """The body of a 200 reply: something that begins as a picture does, of at most `max_bytes`.

        Raises:
            FetchFailed: it could not be got, or may not be.
        """
        ...


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
        self._trusted = parse_target(trusted_url) if trusted_url else None
        self._headers = tuple(headers)
        self._connector = SafeConnector(
            trusted=self._trusted,
            ssl_context=ssl_context,
            allow_private_addresses=allow_private_addresses,
            proxy_of=proxy_of,
            resolve=resolve,
            is_public=is_public,
        )

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
            target = parse_target(url)
            status, headers, body = await self._get(target, max_bytes)
            if status == 200:
                return body
            location = headers.get("location")
            if status not in _REDIRECTS or not location:
                raise FetchFailed(f"{target.host} answered HTTP {status}", is_definite=status < 500 and status != 429)
            url = urljoin(url, location)
        raise FetchFailed(f"more than {MAX_REDIRECTS} redirects")

    async def _get(self, target: Target, max_bytes: int) -> tuple[int, dict[str, str], bytes]:
        reader, writer = await self._connector.open(target)
        try:
            lines = [f"GET {target.path} HTTP/1.1", f"Host: {target.host_header}", "User-Agent: img-serving"]
            lines += ["Accept: image/png, image/jpeg, image/webp", "Accept-Encoding: identity", "Connection: close"]
            if self._trusted is not None and target.origin == self._trusted.origin:
                lines += [f"{name}: {value}" for name, value in self._headers]
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
            return await read_reply(reader, max_bytes)
        finally:
            writer.transport.abort()  # nothing more is expected from it, and a cancelled fetch ends at once
