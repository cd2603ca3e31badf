"""The server's HTTP/1.1 connection, where uvicorn's is not strict, not kind or not cheap enough.

- What cannot be parsed is answered with the four-key error object too; a request's head may be neither endless nor for ever
  in coming.
- A reply is written in one piece, its head joined once (uvicorn's own way searches every header with two regular
  expressions and costs three times as much).
- A client that leaves is told of by a callback, not by a task that waits for it.
- Idle and stalled connections are found by one sweep a second instead of a timer armed and cancelled for every request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from img_serving.api.errors import reply_to
from img_serving.api.exchange import CONNECTION
from img_serving.domain.errors import GatewayError, InvalidRequest
from img_serving.gateway.identifiers import new_id

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0
JOIN_BYTES = 64 * 1024
"""Up to here a reply's parts are joined with its head into one write; bigger parts are never copied."""

Headers = list[tuple[bytes, bytes]]


class HeadTooLarge(GatewayError):
    """The request line and headers are over the limit."""

    kind = "invalid_request_error"
    default_code = "headers_too_large"
    status = 431


class Connection:
    """What the application may do with the connection of one request, besides ASGI."""

    __slots__ = ("_cycle", "_protocol")

    def __init__(self, protocol: HttpProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Call this once when the client leaves before its reply; None takes it back."""
        self._protocol.disconnect_callback = callback

    @property
    def is_gone(self) -> bool:
        """Whether the client has left."""
        return self._cycle.disconnected

    async def respond(self, status: int, headers: Headers, parts: tuple[bytes | memoryview, ...]) -> None:
        """Write a whole reply. `headers` say its length; the parts of a reply to HEAD are left out."""
        cycle = self._cycle
        if cycle.disconnected:
            return
        cycle.response_started = True
        lines = [STATUS_LINE[status]]
        for name, value in cycle.default_headers:
            lines += (name, b": ", value, b"\r\n")
        for name, value in headers:
            if name == b"connection" and value == b"close":
                cycle.keep_alive = False
            lines += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive and (b"connection", b"close") not in headers:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != head.count(b"\r\n") or head.find(b"\r\n\r\n") != len(head) - 4:
            raise RuntimeError("a header value holds a line break")
        transport, flow = cycle.transport, cycle.flow
        if cycle.scope["method"] == "HEAD":
            parts = ()
        if sum(map(len, parts)) <= JOIN_BYTES:
            transport.write(b"".join((head, *parts)))
        else:
            transport.write(head)
            for part in parts:
                if flow.write_paused and not cycle.disconnected:
                    await flow.drain()
                transport.write(part)
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            transport.close()
        cycle.on_response()


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    `head_since` is when the head it waits for began (None while a request is being served), `idle_since` when it fell
    silent between requests, both in the loop's seconds.
    """

    head_since: float | None = None
    idle_since: float | None = None
    disconnect_callback: Callable[[], None] | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected: its first head is awaited from now on."""
        super().connection_made(transport)
        self.head_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left, or we closed."""
        super().connection_lost(exc)
        callback, self.disconnect_callback = self.disconnect_callback, None
        if callback is not None:
            callback()

    def data_received(self, data: bytes) -> None:
        """Bytes came; while they belong to a head they are counted."""
        self.idle_since = None
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

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.scope[CONNECTION] = Connection(self, cycle)  # type: ignore[literal-required]
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """The reply is written: the next pipelined request, or silence, follows."""
        self.server_state.total_requests += 1
        self.disconnect_callback = None
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self.idle_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are not HTTP."""
        self._refuse(InvalidRequest(msg.rstrip("."), code="invalid_http"))

    def _refuse(self, error: GatewayError) -> None:
        if self.transport.is_closing():
            return
        reply = reply_to(error)
        body = b"".join(bytes(part) for part in reply.parts)
        head = (
            b"%scontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %s\r\nconnection: close\r\n\r\n"
        )
        request_id = new_id("req_").encode()
        self.transport.write(head % (STATUS_LINE[reply.status], len(body), request_id) + body)
        self.transport.close()


def close_stalled(connections: Iterable[Any], now: float, keep_alive_seconds: float) -> int:
    """Close connections whose head is too long in coming, and those silent for `keep_alive_seconds` between requests."""
    stalled = [
        one
        for one in connections
        if isinstance(one, HttpProtocol)
        and (
            (one.idle_since is not None and now - one.idle_since > keep_alive_seconds)
            or (one.idle_since is None and one.head_since is not None and now - one.head_since > HEAD_SECONDS)
        )
    ]
    for one in stalled:
        one.transport.close()
    return len(stalled)
