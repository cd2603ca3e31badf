"""The server's HTTP/1.1 connection: uvicorn's protocol with a request object of our own instead of an ASGI cycle.

uvicorn keeps the parser's loop, the lifecycle and TLS. What it does for ASGI's sake (a scope, an event and a wrapper for
every request, two regular expressions for every header, a timer armed and cancelled for every silence) costs more than the
rest of a small request, and a client that leaves can only be noticed by a task that waits for it. Besides:

- what cannot be parsed is answered with the four-key error object too;
- a request's head may be neither endless nor for ever in coming;
- idle and stalled connections are found by one sweep a second (`close_stalled`).

It leans on names of `HttpToolsProtocol` that are not documented but old (`flow`, `parser`, `tasks`, `connections`,
`server_state`); the tests below `tests/smoke` hold them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Protocol
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from img_serving.api.errors import reply_to
from img_serving.api.exchange import ClientDisconnected, Connection, Headers
from img_serving.domain.errors import GatewayError, InvalidRequest
from img_serving.gateway.identifiers import new_id

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0
WRITE_SECONDS = 60.0
"""How long a client may take to read what is buffered for it."""

SLICE_BYTES = 256 * 1024
"""So much is buffered for a client at a time: one that is slow but reads has its time for each slice, not for all of it."""

LINGER_SECONDS = 1.0
"""How long a connection is held after a reply to a client that is sending still."""

MAX_PIPELINED = 16
"""Requests that may wait behind the one being answered before the connection is not read any more."""

JOIN_BYTES = 64 * 1024
"""Up to here a reply's parts are joined with its head into one write; bigger parts are never copied."""


class Application(Protocol):
    """What the protocol needs of the application."""

    def serve(self, connection: Connection) -> Coroutine[Any, Any, None]:
        """Answer one request."""
        ...


_TOO_LARGE = f"the request's head is over {MAX_HEAD_BYTES} bytes"


class HeadTooLarge(GatewayError):
    """The request line and headers are over the limit."""

    kind = "invalid_request_error"
    default_code = "headers_too_large"
    status = 431


class HttpRequest:
    """One request on a connection of ours (see `exchange.Connection`), and its reply."""

    __slots__ = (
        "_callback",
        "_chunked",
        "_may_chunk",
        "_protocol",
        "_waiter",
        "body",
        "disconnected",
        "expects_continue",
        "headers",
        "keep_alive",
        "method",
        "more_body",
        "path",
        "query",
        "response_complete",
        "response_started",
    )

    def __init__(
        self,
        protocol: HttpProtocol,
        method: str,
        path: str,
        query: bytes,
        headers: dict[bytes, bytes],
        *,
        keep_alive: bool,
        may_chunk: bool,
    ) -> None:
        self._may_chunk = may_chunk
        self._protocol = protocol
        self._callback: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.keep_alive = keep_alive
        self.expects_continue = headers.get(b"expect", b"").lower() == b"100-continue"
        self.body = bytearray()
        self.more_body = True
        self.disconnected = False
        self._chunked = False
        self.response_started = False
        self.response_complete = False

    @property
    def scheme(self) -> str:
        """`http` or `https`."""
        return self._protocol.scheme or "http"

    @property
    def client(self) -> tuple[str, int] | None:
        """Who connected."""
        return self._protocol.client

    @property
    def server(self) -> tuple[str, int | None] | None:
        """What was connected to."""
        return self._protocol.server

    def whole_body(self) -> bytes | None:
        """The body, if all of it is here already; see `Connection`."""
        if self.more_body or self.disconnected:
            return None
        return bytes(self.body)

    async def receive(self) -> tuple[bytes, bool]:
        """The next piece of the body, and whether there is more; see `Connection`."""
        if self.more_body and not self.body and not self.disconnected:
            if self.expects_continue:
                self.expects_continue = False
                self._protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._protocol.flow.resume_reading()
            self._waiter = self._protocol.loop.create_future()
            await self._waiter
        if self.disconnected:
            raise ClientDisconnected
        chunk = bytes(self.body)
        self.body.clear()
        return chunk, self.more_body

    def wake(self) -> None:
        """Something came, or the client left: whoever waits in `receive` goes on."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def leave(self) -> None:
        """The client left."""
        if self.response_complete:
            return
        self.disconnected = True
        self.wake()
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Call this once if the client leaves; see `Connection`."""
        self._callback = callback
        if callback is None:
            return
        if self.disconnected:
            self._callback = None
            callback()
        elif len(self._protocol.waiting) < MAX_PIPELINED:
            # a connection that is not read is not heard to close; the body was paused while it was too much at once
            self._protocol.flow.resume_reading()

    async def respond(self, status: int, headers: Headers, parts: tuple[bytes | memoryview, ...]) -> None:
        """Send a whole reply; see `Connection`."""
        if self.disconnected:
            return
        head = self._head(status, headers)
        protocol = self._protocol
        if self.method == "HEAD":
            parts = ()
        if len(parts) <= 1 or sum(map(len, parts)) <= JOIN_BYTES:
            protocol.transport.write(b"".join((head, *parts)))
        else:
            protocol.transport.write(head)
            for part in parts:
                await self._write(part)
        self._finish()

    async def stream(self, status: int, headers: Headers, chunks: AsyncIterator[bytes | memoryview]) -> None:
        """Send a reply piece by piece; see `Connection`."""
        if self.disconnected:
            return
        self._protocol.transport.write(self._head(status, headers))
        if self.method != "HEAD":
            async for chunk in chunks:
                await self._write(chunk)
                if self.disconnected:
                    raise ClientDisconnected
        self._finish()

    async def begin(self, status: int, headers: Headers) -> None:
        """Send the head of a reply of unknown length; see `Connection`."""
        if self.disconnected:
            raise ClientDisconnected
        if self.method == "HEAD":
            pass  # its reply ends with its head: a last chunk would be taken for the next reply
        elif self._may_chunk:
            self._chunked = True
            headers.append((b"transfer-encoding", b"chunked"))
        else:
            self.keep_alive = False  # HTTP/1.0 has no chunks: the end of the connection is the end of the reply
        self._protocol.transport.write(self._head(status, headers))

    async def write(self, piece: bytes | memoryview) -> None:
        """Send one piece; see `Connection`."""
        if not piece:
            return  # an empty chunk would be the last
        if not self._chunked:
            await self._write(piece)
        elif len(piece) <= JOIN_BYTES:
            await self._write(b"".join((b"%x\r\n" % len(piece), piece, b"\r\n")))
        else:
            for part in (b"%x\r\n" % len(piece), piece, b"\r\n"):
                await self._write(part)
        if self.disconnected:
            raise ClientDisconnected

    async def finish(self) -> None:
        """It is complete; see `Connection`."""
        if self.disconnected:
            return
        if self._chunked:
            await self._write(b"0\r\n\r\n")
        self._finish()

    def abort(self) -> None:
        """Cut it; see `Connection`."""
        self.response_complete = True
        self._callback = None
        self._protocol.transport.abort()

    async def _write(self, part: bytes | memoryview) -> None:
        """A big part goes out in slices: for each of them the client has time to make room."""
        if len(part) <= SLICE_BYTES:
            await self._write_slice(part)
            return
        whole = memoryview(part)
        for start in range(0, len(whole), SLICE_BYTES):
            await self._write_slice(whole[start : start + SLICE_BYTES])

    async def _write_slice(self, part: bytes | memoryview) -> None:
        flow = self._protocol.flow
        if flow.write_paused and not self.disconnected:
            try:
                async with asyncio.timeout(WRITE_SECONDS):
                    await flow.drain()
            except TimeoutError:
                # a client that does not read holds its picture in memory for no longer than this
                self._protocol.transport.abort()
                raise ClientDisconnected from None
        if not self.disconnected:
            self._protocol.transport.write(part)

    def _head(self, status: int, headers: Headers) -> bytes:
        self.response_started = True
        self.expects_continue = False
        if (b"connection", b"close") in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            headers.append((b"connection", b"close"))
        headers += self._protocol.server_state.default_headers
        head = b"\r\n".join([b": ".join(one) for one in headers])
        # every value is ours or was checked; should one ever hold a line break, the reply is not sent
        if head.count(b"\n") != len(headers) - 1:
            raise RuntimeError("a header value holds a line break")
        return b"%b%b\r\n\r\n" % (STATUS_LINE[status], head)

    def _finish(self) -> None:
        self.response_complete = True
        self._callback = None
        self.wake()
        if not self.keep_alive:
            self._protocol.close_after_reply(is_sending=self.more_body)
        self._protocol.on_response_complete()


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    `head_since` is when the head it waits for began (None while there is none), `idle_since` when it fell silent between
    requests, both in the loop's seconds. `cycle` (uvicorn's name) is the newest request, `serving` the one that is being
    answered; requests that came meanwhile wait in `waiting`.
    """

    head_since: float | None = None
    idle_since: float | None = None
    cycle: HttpRequest | None  # type: ignore[assignment]
    serving: HttpRequest | None = None
    is_closing = False
    _head_bytes = 0
    _unended_bytes = 0
    _heads = 0
    _raw_body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected: its first head is awaited from now on."""
        super().connection_made(transport)
        self.waiting: deque[HttpRequest] = deque()
        self.head_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left, or we closed."""
        self.connections.discard(self)
        for request in (self.serving, self.cycle):
            if request is not None:
                request.leave()
        self.waiting.clear()
        self.flow.resume_writing()
        if exc is None:
            self.transport.close()
        self.parser = None  # type: ignore[assignment] # it holds a reference to this

    def data_received(self, data: bytes) -> None:
        """Bytes came; while they belong to a head they are counted."""
        if self._raw_body_bytes:
            self._take_raw_body(data)
            return
        heads = self._heads
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, HeadTooLarge):
                self._refuse(error.__context__)
                return
            if not isinstance(error.__context__, (type(None), UnicodeDecodeError, httptools.HttpParserError)):
                log.error("unexpected error in a parser callback", exc_info=error.__context__)  # noqa: TRY400
            self._refuse(InvalidRequest("this is not valid HTTP", code="invalid_http"))
        else:
            if self.head_since is not None and self._heads == heads:
                # all of it belongs to a head that has not ended; a header that has not ended either is not counted yet
                self._unended_bytes += len(data)
                if self._unended_bytes > MAX_HEAD_BYTES:
                    self._refuse(HeadTooLarge(_TOO_LARGE))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """No other protocol is spoken here, so the request is answered as it stands (RFC 9110, 7.8).

        The parser reads nothing after an upgrade: a body of known length is taken by hand, and the connection is not kept.
        Java's and curl's HTTP/2 clients ask like that with every first request.
        """
        request = self.cycle
        if request is None:
            return
        request.keep_alive = False
        length = request.headers.get(b"content-length", b"")
        if length.isdigit() and int(length):
            request.more_body = True
            self._raw_body_bytes = int(length)
            if rest:
                self._take_raw_body(rest)
        elif b"transfer-encoding" in request.headers:
            self._refuse(InvalidRequest("a request to upgrade cannot have a chunked body", code="invalid_http"))

    def _take_raw_body(self, data: bytes) -> None:
        piece = data[: self._raw_body_bytes]
        self._raw_body_bytes -= len(piece)
        self.on_body(piece)
        if not self._raw_body_bytes:
            self.on_message_complete()

    # what the parser calls

    def on_message_begin(self) -> None:
        """A request begins."""
        self.idle_since = None
        self.head_since = self.loop.time()
        self._heads += 1
        self._head_bytes = self._unended_bytes = 0
        self.url = b""
        self.head: dict[bytes, bytes] = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; of repeated ones the first stands."""
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLarge(_TOO_LARGE)
        self.head.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        """The head is complete: the request is served, or waits behind the one before it."""
        self.head_since = None
        self._head_bytes = 0
        parser = self.parser
        path = self.url.decode("ascii")
        query = b""
        if not path.startswith("/") or "?" in path or "#" in path:
            # another form of target, or a query
            parsed = httptools.parse_url(self.url)
            path = (parsed.path or b"*").decode("ascii")
            query = parsed.query or b""
        if "%" in path:
            path = unquote(path)
        is_new = parser.get_http_version() != "1.0"
        request = HttpRequest(
            self,
            parser.get_method().decode("ascii"),
            path,
            query,
            self.head,
            keep_alive=is_new and parser.should_keep_alive(),
            may_chunk=is_new,
        )
        self.cycle = request
        if self.serving is None:
            self._serve(request)
        else:
            self.waiting.append(request)
            if len(self.waiting) >= MAX_PIPELINED:
                self.flow.pause_reading()

    def on_body(self, body: bytes) -> None:
        """A piece of the newest request's body."""
        request = self.cycle
        if request is None or request.response_complete:
            return
        request.body += body
        if len(request.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        request.wake()

    def on_message_complete(self) -> None:
        """The newest request's body is complete."""
        if self.cycle is not None:
            self.cycle.more_body = False
            self.cycle.wake()

    # serving

    def _serve(self, request: HttpRequest) -> None:
        self.serving = request
        application: Application = self.app  # uvicorn takes it for an ASGI callable
        task = self.loop.create_task(application.serve(request))
        self.tasks.add(task)
        task.add_done_callback(partial(self._on_served, request))

    def _on_served(self, request: HttpRequest, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        broke = task.cancelled() or task.exception() is not None
        if broke and not request.response_complete:
            # nothing can be said any more: the client sees that the reply is not complete
            self.transport.close()

    def close_after_reply(self, *, is_sending: bool) -> None:
        """Close when the reply is written; a client that is sending still has a moment to see it first.

        Closing with bytes unread resets the connection, and some clients (Node's) then drop the reply that they have already.
        Nothing more is read meanwhile.
        """
        if is_sending:
            self.is_closing = True
            self.flow.pause_reading()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        """The reply is written: the next request that waits, or silence, follows."""
        self.server_state.total_requests += 1
        self.serving = None
        if self.is_closing or self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.waiting:
            self._serve(self.waiting.popleft())
        else:
            self.idle_since = self.loop.time()

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
        and one.serving is None
        and (
            (one.idle_since is not None and now - one.idle_since > keep_alive_seconds)
            or (one.idle_since is None and one.head_since is not None and now - one.head_since > HEAD_SECONDS)
        )
    ]
    for one in stalled:
        one.transport.abort()  # `close` would wait for a client that does not read
    return len(stalled)
