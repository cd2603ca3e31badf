"""A small HTTP server for playing upstreams with: real sockets, and every way there is to break a reply on its way."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Self

import msgspec

_PIECE_BYTES: Final = 7
_PIECES: Final = 40
_READ_BYTES: Final = 256 * 1024
_MISSING_BYTES: Final = 1000


@dataclass(slots=True, eq=False)
class Exchange:
    """One request as it came, and what became of it. Times are the loop's; `disconnected_at`: the client left first."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    started_at: float
    ended_at: float | None = None
    disconnected_at: float | None = None

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return msgspec.json.decode(self.body)


@dataclass(slots=True)
class Answer:
    """What is written: a status, a body, and how it is spoiled on the way.

    `manner`: "" is a good reply; "hang" never answers; "close" closes instead; "not_http" speaks another protocol; "cut_body"
    ends half-way; "long_length" announces more than there is; "drip" sends the first bytes one small piece at a time.
    """

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    manner: str = ""
    pieces: AsyncIterator[bytes] | None = None
    """The body in chunks, instead of `body`, each sent when it comes; where it raises, the connection is cut."""


class StubServer(ABC):
    """`async with SomeServer() as server:` listens on a free port; see `server.url`. Those who play one give `answer`.

    It knows how many requests are in flight, and which of their clients left before they had an answer.
    """

    drip_seconds = 0.002

    def __init__(self, *, port: int = 0, tell: Callable[[Exchange], None] | None = None) -> None:
        """`port` 0 is any free one. `tell` hears of every request twice: as it came, and when it is over (`ended_at`)."""
        self.exchanges: list[Exchange] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.connections = 0
        self.port = port
        self._told = tell
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @abstractmethod
    async def answer(self, exchange: Exchange) -> Answer:
        """What this server says to a request; cancelled when its client leaves."""

    async def upgrade(  # noqa: B027 - most servers know no other protocol, and say nothing
        self, exchange: Exchange, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serve a connection that a request with `Upgrade` has taken over; the connection is closed when it returns."""

    async def start(self) -> None:
        """Listen; a stopped server listens again on the port it had."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=_READ_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - start_server runs this in a task
        self._tasks.add(task)
        self.connections += 1
        ahead = bytearray()
        try:
            while (exchange := await self._read(reader, ahead)) is not None:
                self.exchanges.append(exchange)
                if self._told is not None:
                    self._told(exchange)
                if "upgrade" in exchange.headers:
                    await self.upgrade(exchange, reader, writer)
                    break
                if not await self._attend(exchange, reader, writer, ahead):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the test is over
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, ahead: bytearray) -> Exchange | None:
        try:
            head = bytes(ahead) + await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        ahead.clear()
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        fields = (line.partition(":") for line in lines if line)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Exchange(method, path, headers, body, asyncio.get_running_loop().time())

    async def _attend(
        self, exchange: Exchange, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ahead: bytearray
    ) -> bool:
        """Answer one request while watching whether its client stays. Returns whether the connection can be kept."""
        loop = asyncio.get_running_loop()
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        answering = asyncio.ensure_future(self._answer(exchange, writer))
        watching = asyncio.ensure_future(_until_the_client_leaves(reader, ahead))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                exchange.disconnected_at = loop.time()
                return False
            return answering.result()
        finally:
            self.in_flight -= 1
            exchange.ended_at = loop.time()
            if self._told is not None:
                self._told(exchange)
            for one in (answering, watching):
                one.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)

    async def _answer(self, exchange: Exchange, writer: asyncio.StreamWriter) -> bool:
        answer = await self.answer(exchange)
        if answer.manner == "hang":
            await asyncio.get_running_loop().create_future()
        if answer.manner == "close":
            return False
        if answer.manner == "not_http":
            writer.write(b"220 mail.example ESMTP\r\n\r\n")
            await writer.drain()
            return False
        if answer.pieces is not None:
            return await self._send_pieces(answer, answer.pieces, writer)
        length = len(answer.body) + (_MISSING_BYTES if answer.manner == "long_length" else 0)
        headers = {"content-type": "application/json", "content-length": str(length), **answer.headers}
        head = f"HTTP/1.1 {answer.status} Stub\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(head.encode() + b"\r\n")
        if answer.manner in {"cut_body", "long_length"}:
            # half of what was announced, or a document that is complete but for the length it claims
            writer.write(answer.body if answer.manner == "long_length" else answer.body[: len(answer.body) // 2])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            return False
        if answer.manner == "drip":
            await self._drip(answer.body, writer)
        else:
            writer.write(answer.body)
            await writer.drain()
        return True

    async def _send_pieces(self, answer: Answer, pieces: AsyncIterator[bytes], writer: asyncio.StreamWriter) -> bool:
        headers = {"content-type": "application/json", **answer.headers, "transfer-encoding": "chunked"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {answer.status} Stub\r\n{lines}\r\n".encode())
        try:
            async for piece in pieces:
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await writer.drain()
        except ConnectionError:
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _drip(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        """The first bytes one small piece at a time, and the rest at once: a slow start, not a slow test."""
        for at in range(0, min(len(body), _PIECES * _PIECE_BYTES), _PIECE_BYTES):
            writer.write(body[at : at + _PIECE_BYTES])
            await writer.drain()
            await asyncio.sleep(self.drip_seconds)
        writer.write(body[_PIECES * _PIECE_BYTES :])
        await writer.drain()


async def _until_the_client_leaves(reader: asyncio.StreamReader, ahead: bytearray) -> None:
    """Return when the connection ends.

    A client that has the last byte of its answer before we know that it was sent may ask again at once: the first byte of
    that goes into `ahead`, for the next request. Nobody watches then whether the client leaves, for the moment that is left.
    """
    if byte := await reader.read(1):
        ahead += byte
        await asyncio.get_running_loop().create_future()
