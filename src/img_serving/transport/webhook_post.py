"""Posting a webhook to a URL that a client named: over a checked connection, answered in bounds, redirects not followed."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Final

from img_serving.ports import PostReply
from img_serving.transport.proxy import Proxy
from img_serving.transport.safe_connection import (
    CONNECT_TIMEOUT_SECONDS,
    ExchangeFailed,
    Resolve,
    SafeConnector,
    Target,
    parse_target,
    read_head,
)

DROP_BYTES: Final = 64 * 1024
"""How much of an answer's body is read and dropped, so that its sender sees it taken."""

LINGER_SECONDS: Final = 1.0
"""How long that may take: the status is known by then."""


class SafePoster:
    """Implements `WebhookPoster`: a connection per call, for events are few and their receivers many."""

    def __init__(
        self,
        *,
        allow_private_addresses: bool = False,
        proxy_of: Callable[[str], Proxy | None] = lambda _: None,
        resolve: Resolve | None = None,
        is_public: Callable[[str], bool] | None = None,
        clock_unix: Callable[[], float] = time.time,
    ) -> None:
        """Describe what may be called.

        Args:
            allow_private_addresses: skip the check of addresses: receivers stand in the operator's own network.
            proxy_of: the proxy to reach a URL by, if any; addresses are checked all the same.
            resolve: finds addresses; the loop's own resolver by default.
            is_public: judges one address; `is_public_address` by default.
            clock_unix: for a Retry-After that is a date.
        """
        self._connector = SafeConnector(
            allow_private_addresses=allow_private_addresses, proxy_of=proxy_of, resolve=resolve, is_public=is_public
        )
        self._clock_unix = clock_unix

    async def __call__(
        self, url: str, headers: Sequence[tuple[str, str]], body: bytes, timeout_seconds: float
    ) -> PostReply:
        """Post, as `WebhookPoster` says."""
        try:
            async with asyncio.timeout(timeout_seconds):
                status, answered = await self._post(parse_target(url), headers, body)
        except TimeoutError:
            raise ExchangeFailed(f"no answer within {timeout_seconds:g} s", is_definite=False) from None
        except ssl.SSLError as error:
            raise ExchangeFailed(f"no secure connection ({error.reason or type(error).__name__})") from None
        except (OSError, EOFError) as error:
            raise ExchangeFailed(f"the connection failed ({type(error).__name__})", is_definite=False) from None
        except ValueError:
            raise ExchangeFailed("the URL is malformed") from None
        return PostReply(status, self._retry_after(answered.get("retry-after", "").strip()))

    async def _post(
        self, target: Target, headers: Sequence[tuple[str, str]], body: bytes
    ) -> tuple[int, dict[str, str]]:
        try:
            reader, writer = await self._connector.open(target)
        except TimeoutError:  # the connector's own: ours comes as a cancellation in here
            raise ExchangeFailed(f"no connection within {CONNECT_TIMEOUT_SECONDS:g} s", is_definite=False) from None
        try:
            lines = [f"POST {target.path} HTTP/1.1", f"Host: {target.host_header}"]
            lines += [f"{name}: {value}" for name, value in headers]
            lines += [f"Content-Length: {len(body)}", "Accept: */*", "Connection: close", "", ""]
            writer.write("\r\n".join(lines).encode("latin-1") + body)
            return await read_head(reader, drop_bytes=DROP_BYTES, linger_seconds=LINGER_SECONDS)
        finally:
            writer.transport.abort()  # nothing more is expected from it, and a cancelled call ends at once

    def _retry_after(self, text: str) -> float | None:
        """Seconds, or a date (RFC 9110, 10.2.3)."""
        if text.isascii() and text.isdigit():
            return float(text[:12])
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - self._clock_unix())
        except (ValueError, IndexError, OverflowError):
            return None
