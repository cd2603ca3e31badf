"""HTTP calls to the gateway over connections that may die at any moment: what came, or why nothing did."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httptools

_READ_BYTES = 64 * 1024


class NoAnswer(Exception):
    """The connection could not be made, or ended before the whole answer. `was_sent`: the request may have arrived."""

    def __init__(self, why: str, *, was_sent: bool) -> None:
        super().__init__(why)
        self.was_sent = was_sent


@dataclass(frozen=True)
class Reply:
    """One whole answer. `first_seconds`: when its head came, `seconds`: when its end did, both since the call began."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    first_seconds: float
    seconds: float

    @property
    def json(self) -> Any:
        """The body, decoded; ValueError where it is no JSON."""
        return json.loads(self.body)

    @property
    def is_final(self) -> bool:
        """Whether a client of good manners would not send the same request again."""
        if (told := self.headers.get("x-should-retry")) is not None:
            return told == "false"
        return self.status not in {408, 409, 429} and self.status < 500

    def __str__(self) -> str:
        return f"{self.status}: {self.body[:300].decode(errors='replace')}"


class Arriving:
    """An answer that is on its way: its head and what came of its body so far."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.has_head = False
        self.is_complete = False
        self.parser = httptools.HttpResponseParser(self)

    # called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.has_head = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = True

    @property
    def status(self) -> int:
        return int(self.parser.get_status_code())


def request_bytes(method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """A request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is closed at once at the end, whatever became of it.

    Raises:
        NoAnswer: nobody listens.
    """
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        raise NoAnswer(f"no connection: {error}", was_sent=False) from None
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@dataclass(frozen=True)
class Caller:
    """Calls one port with one key, each on a connection of its own: no call meets another one's broken connection."""

    port: int
    key: str
    patience_seconds: float = 30.0

    async def get(self, path: str) -> Reply:
        """Raises NoAnswer; see `call`."""
        return await self.call("GET", path)

    async def post(self, path: str, document: object, **headers: str) -> Reply:
        """JSON; `_` in the headers' names are hyphens. Raises NoAnswer; see `call`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        body = json.dumps(document).encode()
        return await self.call("POST", path, body, {"Content-Type": "application/json", **named})

    async def call(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Send a request and wait for the whole answer.

        Raises:
            NoAnswer: the connection failed, the answer was cut, or patience ended.
        """
        begun = time.monotonic()
        fields = {"Authorization": f"Bearer {self.key}", "Connection": "close", **(headers or {})}
        was_sent = False
        try:
            async with asyncio.timeout(self.patience_seconds), connected(self.port) as (reader, writer):
                was_sent = True
                writer.write(request_bytes(method, path, fields, body))
                return await whole(reader, begun)
        except TimeoutError:
            raise NoAnswer(f"no answer within {self.patience_seconds:g} s", was_sent=was_sent) from None


async def whole(reader: asyncio.StreamReader, begun: float) -> Reply:
    """The answer that a connection brings.

    Raises:
        NoAnswer: it ends, or speaks no HTTP, before the answer is whole.
    """
    arriving = Arriving()
    first = 0.0
    try:
        while not arriving.is_complete:
            if not (data := await reader.read(_READ_BYTES)):
                what = f"{len(arriving.body)} bytes of the body" if arriving.has_head else "the head"
                raise NoAnswer(f"cut after {what}" if arriving.has_head else f"cut before {what}", was_sent=True)
            arriving.parser.feed_data(data)
            if arriving.has_head and not first:
                first = time.monotonic() - begun
    except (OSError, httptools.HttpParserError) as error:
        raise NoAnswer(f"{type(error).__name__}: {error}", was_sent=True) from None
    return Reply(arriving.status, arriving.headers, bytes(arriving.body), first, time.monotonic() - begun)
