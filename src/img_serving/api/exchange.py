"""One HTTP exchange: the request's head, its body on demand, and the reply.

No framework object stands between: on the hot route every allocation counts, and on the others it is no loss. An exchange
runs over a `Connection`: the server's own (`http_protocol`) or any ASGI server's (`asgi`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol
from urllib.parse import parse_qsl

from img_serving.domain.errors import InvalidRequest, PayloadTooLarge
from img_serving.domain.jobs import Job
from img_serving.domain.tenants import ANONYMOUS, Tenant
from img_serving.gateway.identifiers import new_id

Headers = list[tuple[bytes, bytes]]

DISCARD_BYTES = 64 * 1024
"""How much of a refused caller's body is read and dropped so that the answer arrives on a connection worth keeping."""

BODY_SECONDS = 60.0
"""How long the rest of a body may take once its first piece was there: a client that drips holds nothing for longer."""

MAX_QUERY_FIELDS = 64

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class ClientDisconnected(Exception):
    """The client left before its answer."""


class Connection(Protocol):
    """One request as a server has it, and the way back. Header names are lower case; of repeated ones the first stands."""

    @property
    def method(self) -> str:
        """GET, POST, …."""
        ...

    @property
    def path(self) -> str:
        """The path, percent-decoded, without the query."""
        ...

    @property
    def query(self) -> bytes:
        """What stands behind the path's question mark, as it came."""
        ...

    @property
    def headers(self) -> Mapping[bytes, bytes]:
        """The request's headers."""
        ...

    @property
    def scheme(self) -> str:
        """`http` or `https`, as the connection itself is."""
        ...

    @property
    def client(self) -> tuple[str, int] | None:
        """Who connected: address and port."""
        ...

    @property
    def server(self) -> tuple[str, int | None] | None:
        """What was connected to: address and port."""
        ...

    def whole_body(self) -> bytes | None:
        """The body, if all of it is here already; None means `receive` it."""
        ...

    async def receive(self) -> tuple[bytes, bool]:
        """The next piece of the body, and whether there is more.

        Raises:
            ClientDisconnected: the client left.
        """
        ...

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Call this once if the client leaves before its reply; None takes it back. The body must have been read."""
        ...

    async def respond(self, status: int, headers: Headers, parts: tuple[bytes | memoryview, ...]) -> None:
        """Send a whole reply. `headers` say its length; a reply to HEAD leaves the parts out."""
        ...

    async def stream(self, status: int, headers: Headers, chunks: AsyncIterator[bytes | memoryview]) -> None:
        """Send a reply piece by piece. `headers` say its length."""
        ...

    async def begin(self, status: int, headers: Headers) -> None:
        """Send the head of a reply whose length nobody knows yet: `write` its pieces, then `finish`."""
        ...

    async def write(self, piece: bytes | memoryview) -> None:
        """Send one piece of it.

        Raises:
            ClientDisconnected: the client has left, or does not read.
        """
        ...

    async def finish(self) -> None:
        """It is complete."""
        ...

    def abort(self) -> None:
        """Cut it: the client must not take it for complete."""
        ...


class Trickle(Protocol):
    """What sends the head of a reply, and then blanks, while its handler works (see `keep_alive`)."""

    is_out: bool
    """Whether the head was sent."""

    async def stop(self) -> None:
        """No more of it before the rest of the reply; it is known then whether the head was sent."""
        ...

    def end(self) -> None:
        """No more of it: the exchange is over. Asking twice is fine."""
        ...


class Reply:
    """Status, extra headers (lower-case names) and a body: parts in memory, or a stream of known length."""

    __slots__ = ("headers", "is_open", "length", "media_type", "parts", "status", "stream")

    def __init__(
        self,
        status: int,
        parts: tuple[bytes | memoryview, ...] = (),
        *,
        media_type: bytes | None = b"application/json",
        headers: Headers | None = None,
        stream: AsyncIterator[bytes | memoryview] | None = None,
        length: int | None = None,
    ) -> None:
        """`length` in bytes is known of a `stream`, or it ends when it ends; for HEAD without a body it is needed."""
        self.status = status
        self.parts = parts
        self.media_type = media_type
        self.headers = headers if headers is not None else []
        self.stream = stream
        self.is_open = stream is not None and length is None
        self.length = length if length is not None else sum(map(len, parts))


class Exchange:
    """What a handler sees of one request. Header names and values are bytes, names in lower case."""

    __slots__ = (
        "_headers",
        "body_read",
        "bytes_in",
        "bytes_out",
        "connection",
        "disconnected",
        "extra_headers",
        "job",
        "method",
        "on_end",
        "path",
        "reply_started",
        "request_id",
        "route",
        "started",
        "status",
        "tenant",
        "trickle",
        "variables",
    )

    def __init__(self, connection: Connection, started: float) -> None:
        """`started` in seconds of the gateway's clock. A caller's X-Request-Id that is fit for a log is adopted."""
        self.connection = connection
        self._headers = connection.headers
        theirs = self._headers.get(b"x-request-id")
        self.request_id = theirs.decode() if theirs and _REQUEST_ID.fullmatch(theirs) else new_id("req_")
        self.started = started
        self.method = connection.method
        self.path = connection.path
        self.route = "unknown"
        self.variables: dict[str, str] = {}
        self.tenant: Tenant = ANONYMOUS
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.reply_started = False
        self.body_read = False
        self.disconnected = False
        self.extra_headers: Headers = []
        self.job: Job | None = None
        self.trickle: Trickle | None = None
        self.on_end: Callable[[], None] | None = None
        """Called once when the exchange is over, however it ends."""

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters, decoded; of repeated ones the first stands.

        Raises:
            InvalidRequest: there are too many of them.
        """
        raw = self.connection.query
        if not raw:
            return {}
        try:
            pairs = parse_qsl(raw.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS)
        except ValueError:
            raise InvalidRequest(f"the query has more than {MAX_QUERY_FIELDS} fields") from None
        return dict(reversed(pairs))

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, or None."""
        return self._headers.get(name)

    @property
    def client_address(self) -> str:
        """The address of whoever opened the connection ("" over a Unix socket)."""
        client = self.connection.client
        return client[0] if client else ""

    def body_at_hand(self, limit: int) -> bytes | None:
        """The whole body, if it is here already; None means: await `body`.

        Raises:
            PayloadTooLarge: it is over `limit` bytes.
        """
        chunk = self.connection.whole_body()
        if chunk is None:
            return None
        self.body_read = True
        self.bytes_in = len(chunk)
        if len(chunk) > limit:
            raise PayloadTooLarge(f"the body has {len(chunk)} bytes; this route reads at most {limit}")
        return chunk

    async def body(self, limit: int, on_bytes: Callable[[int], None] | None = None) -> bytes:
        """The whole body. `on_bytes` hears of every piece's size before it is kept, and may refuse it.

        Raises:
            PayloadTooLarge: it is over `limit` bytes.
            ClientDisconnected: the client left in the middle of it.
            InvalidRequest: it did not arrive in time.
        """
        length = self.declared_length
        if length is not None and length > limit:
            raise PayloadTooLarge(f"the body has {length} bytes; this route reads at most {limit}")
        pieces: list[bytes] = []
        more = True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    if self.bytes_in > limit:
                        raise PayloadTooLarge(f"the body is over the {limit} bytes that this route reads")
                    chunk, more = await self.connection.receive()
                    self.bytes_in += len(chunk)
                    if on_bytes is not None:
                        on_bytes(len(chunk))
                    pieces.append(chunk)
        except TimeoutError:
            raise InvalidRequest(f"the body did not arrive within {BODY_SECONDS:g} s", code="body_timeout") from None
        self.body_read = True
        if self.bytes_in > limit:
            raise PayloadTooLarge(f"the body is over the {limit} bytes that this route reads")
        return b"".join(pieces)

    async def discard_body(self) -> bool:
        """Read and drop a small rest of the body; returns whether the connection may be kept."""
        if self.body_read:
            return True
        length = self.declared_length
        if length is None and self.header(b"transfer-encoding") is None:
            return True
        if self.header(b"expect") is not None or length is None or length > DISCARD_BYTES:
            # nobody has asked for that body yet, or there is too much of it
            return False
        try:
            async with asyncio.timeout(1.0):
                while (await self.connection.receive())[1]:
                    pass
        except (TimeoutError, ClientDisconnected):
            return False
        return True

    async def send(self, reply: Reply, headers: Headers) -> None:
        """Send a complete reply; `headers` come before the reply's own."""
        self.status = reply.status
        if self.trickle is not None:
            await self.trickle.stop()
            if self.trickle.is_out:
                await self._send_late(reply)
                return
        self.reply_started = True
        head = [*headers, *reply.headers]
        if reply.is_open:
            if reply.media_type is not None:
                head.append((b"content-type", reply.media_type))
            await self._send_open(reply, head)
            return
        if reply.status not in {204, 304}:
            head.append((b"content-length", b"%d" % reply.length))
            if reply.media_type is not None:
                head.append((b"content-type", reply.media_type))
        self.bytes_out = reply.length
        if reply.stream is None:
            await self.connection.respond(reply.status, head, reply.parts)
        else:
            await self.connection.stream(reply.status, head, reply.stream)

    async def _send_open(self, reply: Reply, head: Headers) -> None:
        """A reply that ends when its stream does."""
        connection = self.connection
        if reply.stream is None:
            raise AssertionError("an open reply has a stream")
        await connection.begin(reply.status, head)
        if self.method != "HEAD":
            async for chunk in reply.stream:
                self.bytes_out += len(chunk)
                await connection.write(chunk)
        await connection.finish()

    async def _send_late(self, reply: Reply) -> None:
        """The head went out while the handler was still at work: only a success can still be told."""
        if reply.status != 200:
            self.connection.abort()
            return
        for part in reply.parts:
            self.bytes_out += len(part)
            await self.connection.write(part)
        await self.connection.finish()

    @property
    def declared_length(self) -> int | None:
        """What Content-Length says, in bytes."""
        text = self._headers.get(b"content-length")
        # isdigit of bytes is ASCII only; the server has refused anything else before
        return int(text) if text is not None and text.isdigit() and len(text) < 21 else None
