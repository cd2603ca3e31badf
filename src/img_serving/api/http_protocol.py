"""The server's HTTP/1.1 connection, where uvicorn's is not strict or not kind enough.

What cannot be parsed is answered with the four-key error object too, a request's head may be neither endless nor for ever
in coming, and connections that never ask anything are closed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from img_serving.api.errors import reply_to
from img_serving.domain.errors import GatewayError, InvalidRequest

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0


class HeadTooLarge(GatewayError):
    """The request line and headers are over the limit."""

    kind = "invalid_request_error"
    default_code = "headers_too_large"
    status = 431


class HttpProtocol(HttpToolsProtocol):
    """One connection. `head_since` is when the head it waits for began (None while a request is being served)."""

    head_since: float | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected: its first head is awaited from now on."""
        super().connection_made(transport)
        self.head_since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """Bytes came; while they belong to a head they are counted."""
        if self.head_since is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge(f"the request's head is over {MAX_HEAD_BYTES} bytes"))
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins."""
        self.head_since = self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is complete."""
        self.head_since = None
        self._head_bytes = 0
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are not HTTP."""
        self._refuse(InvalidRequest(msg.rstrip("."), code="invalid_http"))

    def _refuse(self, error: GatewayError) -> None:
        if self.transport.is_closing():
            return
        reply = reply_to(error)
        body = b"".join(bytes(part) for part in reply.parts)
        head = b"%scontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: req_%s\r\nconnection: close\r\n\r\n"
        request_id = os.urandom(12).hex().encode()
        self.transport.write(head % (STATUS_LINE[reply.status], len(body), request_id) + body)
        self.transport.close()


def close_stalled(connections: Iterable[Any], now: float) -> int:
    """Close the connections that have waited for a head for too long (idle kept-alive ones have their own limit)."""
    stalled = [
        one
        for one in connections
        if isinstance(one, HttpProtocol)
        and one.head_since is not None
        and now - one.head_since > HEAD_SECONDS
        and one.timeout_keep_alive_task is None
    ]
    for one in stalled:
        one.transport.close()
    return len(stalled)
