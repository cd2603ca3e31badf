"""The clients of the fault bench: requests at a fixed rate over kept-alive connections, each answer checked byte by byte."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import httptools

from img_serving.backends.scripted import picture

ROUTE = "/v1/images/generations"
SIDE = 32
PROMPT = "a lighthouse"
PATIENCE_SECONDS = 30.0
# Far less than the gateway keeps an idle connection: no request of ours may meet its close.
_IDLE_SECONDS = 5.0


@dataclass(frozen=True)
class Answer:
    """What one request came to. `problem` is empty for a right picture; `seconds` count from when it was due."""

    request_id: str
    due_at: float
    seconds: float
    status: int
    problem: str
    attempts: int

    @property
    def is_right(self) -> bool:
        return not self.problem


class _Reply:
    """Collects one reply from httptools' parser."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.complete = False
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True

    @property
    def status(self) -> int:
        return int(self.parser.get_status_code())


class Pending:
    """A request that was sent and not answered yet."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request_id: str) -> None:
        self.request_id = request_id
        self.reader = reader
        self.writer = writer

    async def reply(self) -> _Reply:
        """The whole reply; ConnectionError where the connection ends before it does."""
        reply = _Reply()
        while not reply.complete:
            data = await self.reader.read(256 * 1024)
            if not data:
                raise ConnectionError("the connection was closed before the whole reply")
            reply.parser.feed_data(data)
        return reply

    def leave(self) -> float:
        """Close the connection at once; returns when."""
        self.writer.transport.abort()
        return time.monotonic()


class Client:
    """Everybody who asks the gateway. Connections are kept alive, and the newest idle one is used first."""

    def __init__(self, port: int, key: str, model: str) -> None:
        self.port = port
        self.key = key
        self.model = model
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._asked = 0

    async def load(self, count: int, per_second: float) -> list[Answer]:
        """Ask `count` times at a steady rate, whatever becomes of it; returns when all are answered."""
        begun = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            asked = []
            for index in range(count):
                due = begun + index / per_second
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                asked.append(tasks.create_task(self.draw(due)))
        return [task.result() for task in asked]

    async def draw(self, due_at: float | None = None) -> Answer:
        """One picture, checked. Nothing is asked twice: what goes wrong is the answer's `problem`."""
        due_at = time.monotonic() if due_at is None else due_at
        self._asked += 1
        seed, request_id = self._asked, f"{self.model}-{self._asked}"
        status, attempts = 0, 0
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                pending = await self.send(request_id, seed=seed)
                try:
                    reply = await pending.reply()
                except BaseException:
                    pending.leave()
                    raise
            status, attempts = reply.status, int(reply.headers.get("x-attempts", 0))
            problem = problem_of(reply, seed)
            if reply.parser.should_keep_alive():
                self._idle.append((time.monotonic(), pending.reader, pending.writer))
            else:
                pending.leave()
        except TimeoutError:
            problem = f"no answer within {PATIENCE_SECONDS:g} s"
        except (OSError, httptools.HttpParserError) as error:
            problem = f"{type(error).__name__}: {error}"
        return Answer(request_id, due_at, time.monotonic() - due_at, status, problem, attempts)

    async def send(self, request_id: str, *, seed: int, prompt: str = PROMPT) -> Pending:
        """Send a request for a picture, and do not wait for it."""
        wanted = {
            "model": self.model,
            "prompt": prompt,
            "seed": seed,
            "size": f"{SIDE}x{SIDE}",
            "response_format": "b64_json",
        }
        body = json.dumps(wanted).encode()
        head = (
            f"POST {ROUTE} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nX-Request-Id: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await self._connection()
        writer.write(head.encode() + body)
        return Pending(reader, writer, request_id)

    async def get(self, path: str) -> bytes:
        """A GET on a connection of its own, which is closed again."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self.key}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            reply = await Pending(reader, writer, "").reply()
            return bytes(reply.body)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def close(self) -> None:
        """Close all idle connections."""
        for _, _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            since, reader, writer = self._idle.pop()
            if time.monotonic() - since < _IDLE_SECONDS and not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self.port)


def problem_of(reply: _Reply, seed: int) -> str:
    """Why a reply is not the very picture that was asked for; empty if it is."""
    try:
        document = json.loads(reply.body)
        if reply.status != 200:
            error = document["error"]
            return f"{error['code']}: {error['message']}"
        drawn = base64.b64decode(document["data"][0]["b64_json"], validate=True)
    except (ValueError, LookupError, TypeError) as error:
        return f"a reply of another shape ({error!r})"
    return "" if drawn == _expected(seed) else "another picture than was asked for"


@lru_cache(maxsize=64)
def _expected(seed: int) -> bytes:
    return picture(PROMPT, seed, SIDE, SIDE)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed; 0 where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
