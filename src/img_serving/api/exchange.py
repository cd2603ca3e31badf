"""One HTTP exchange over ASGI: the request's head, its body on demand, and the reply.

No framework object stands between: on the hot route every allocation counts, and on the others it is no loss.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from img_serving.domain.errors import InvalidRequest, PayloadTooLarge
from img_serving.domain.tenants import ANONYMOUS, Tenant
from img_serving.gateway.identifiers import new_id

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CONNECTION = "img_serving.connection"
"""The key in the ASGI scope under which our own server's protocol leaves its `Connection` (see `http_protocol`)."""

DISCARD_BYTES = 64 * 1024
"""How much of a refused caller's body is read and dropped so that the answer arrives on a connection worth keeping."""

BODY_SECONDS = 60.0
"""How long the rest of a body may take once its first piece was there: a client that drips holds nothing for longer."""


_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class ClientDisconnected(Exception):
    """The client left before its answer."""


class Reply:
    """Status, extra headers (lower-case names) and a body: parts in memory, or a stream of known length."""

    __slots__ = ("headers", "length", "media_type", "parts", "status", "stream")

    def __init__(
        self,
        status: int,
        parts: tuple[bytes | memoryview, ...] = (),
        *,
        media_type: bytes | None = b"application/json",
        headers: list[tuple[bytes, bytes]] | None = None,
        stream: AsyncIterator[bytes] | None = None,
        length: int | None = None,
    ) -> None:
        """`length` in bytes is needed with `stream`, and for a reply to HEAD without a body."""
        self.status = status
        self.parts = parts
        self.media_type = media_type
        self.headers = headers if headers is not None else []
        self.stream = stream
        self.length = length if length is not None else sum(map(len, parts))


class Exchange:
    """What a handler sees of one request. Header names and values are bytes, names in lower case."""

    __slots__ = (
        "_headers",
        "_receive",
        "_send",
        "body_read",
        "bytes_in",
        "bytes_out",
        "content_length",
        "disconnected",
        "extra_headers",
        "job_fields",
        "method",
        "path",
        "reply_started",
        "request_id",
        "route",
        "scope",
        "started",
        "status",
        "tenant",
        "variables",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, started: float) -> None:
        """`started` in seconds of the gateway's clock. A caller's X-Request-Id that is fit for a log is adopted."""
        self.scope = scope
        self._receive = receive
        self._send = send
        # reversed: of a repeated header the first value stands
        self._headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        theirs = self._headers.get(b"x-request-id")
        self.request_id = theirs.decode() if theirs and _REQUEST_ID.fullmatch(theirs) else new_id("req_")
        self.started = started
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.route = "unknown"
        self.variables: dict[str, str] = {}
        self.tenant: Tenant = ANONYMOUS
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.reply_started = False
        self.body_read = False
        self.disconnected = False
        self.content_length: int | None = None
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self.job_fields: dict[str, object] = {}

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, or None."""
        return self._headers.get(name)

    @property
    def client_address(self) -> str:
        """The address of whoever opened the connection ("" over a Unix socket)."""
        client = self.scope.get("client")
        return client[0] if client else ""

    async def body(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            PayloadTooLarge: it is over `limit` bytes.
            ClientDisconnected: the client left in the middle of it.
            InvalidRequest: it did not arrive in time.
        """
        length = self._declared_length()
        if length is not None and length > limit:
            raise PayloadTooLarge(f"the body has {length} bytes; this route reads at most {limit}")
        message = await self._receive()
        chunk = _chunk_of(message)
        if not message.get("more_body"):
            self.body_read = True
            self.bytes_in = len(chunk)
            if len(chunk) > limit:
                raise PayloadTooLarge(f"the body has {len(chunk)} bytes; this route reads at most {limit}")
            return chunk
        pieces = [chunk]
        self.bytes_in = len(chunk)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while message.get("more_body"):
                    if self.bytes_in > limit:
                        raise PayloadTooLarge(f"the body is over the {limit} bytes that this route reads")
                    message = await self._receive()
                    chunk = _chunk_of(message)
                    self.bytes_in += len(chunk)
                    pieces.append(chunk)
        except TimeoutError:
            raise InvalidRequest(f"the body did not arrive within {BODY_SECONDS:g} s", code="body_timeout") from None
        if self.bytes_in > limit:
            raise PayloadTooLarge(f"the body is over the {limit} bytes that this route reads")
        self.body_read = True
        return b"".join(pieces)

    def watch(self, on_gone: Callable[[], None]) -> Callable[[], None]:
        """Call `on_gone` once if the client leaves; returns what ends the watch. The body must have been read before."""
        connection = self.scope.get(CONNECTION)
        if connection is not None:
            if connection.is_gone:
                on_gone()
            connection.on_disconnect(on_gone)
            return lambda: connection.on_disconnect(None)
        return self._watch_by_task(on_gone)

    def _watch_by_task(self, on_gone: Callable[[], None]) -> Callable[[], None]:
        """The same for a server that is not ours: plain ASGI tells only those who wait for it."""

        async def wait() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            on_gone()

        task = asyncio.get_running_loop().create_task(wait())

        def stop() -> None:
            task.cancel()

        return stop

    async def discard_body(self) -> bool:
        """Read and drop a small rest of the body; returns whether the connection may be kept."""
        if self.body_read:
            return True
        length = self._declared_length()
        if length is None and self.header(b"transfer-encoding") is None:
            return True
        if self.header(b"expect") is not None or length is None or length > DISCARD_BYTES:
            # nobody has asked for that body yet, or there is too much of it
            return False
        try:
            async with asyncio.timeout(1.0):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        return False
                    if not message.get("more_body"):
                        return True
        except TimeoutError:
            return False

    async def send(self, reply: Reply, headers: list[tuple[bytes, bytes]]) -> None:
        """Send a complete reply; `headers` come before the reply's own."""
        self.status = reply.status
        self.reply_started = True
        head = [*headers, *reply.headers]
        if reply.status not in {204, 304}:
            head.append((b"content-length", b"%d" % reply.length))
            if reply.media_type is not None:
                head.append((b"content-type", reply.media_type))
        self.bytes_out = reply.length
        connection = self.scope.get(CONNECTION)
        if connection is not None and reply.stream is None:
            await connection.respond(reply.status, head, reply.parts)
            return
        await self._send({"type": "http.response.start", "status": reply.status, "headers": head})
        if reply.stream is not None:
            async for chunk in reply.stream:
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        last = len(reply.parts) - 1
        for index in range(last):
            await self._send({"type": "http.response.body", "body": reply.parts[index], "more_body": True})
        await self._send({"type": "http.response.body", "body": reply.parts[last] if last >= 0 else b""})

    def _declared_length(self) -> int | None:
        text = self.header(b"content-length")
        # isdigit of bytes is ASCII only; the server has refused anything else before
        return int(text) if text is not None and text.isdigit() and len(text) < 19 else None


def _chunk_of(message: Message) -> bytes:
    if message["type"] == "http.disconnect":
        raise ClientDisconnected
    return message.get("body") or b""
