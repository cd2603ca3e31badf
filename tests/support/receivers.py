"""A webhook receiver over real sockets that answers as it is told to and remembers what came."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Call:
    """One call as it came. Header names are in lower case."""

    headers: dict[str, str]
    body: bytes


class Receiver:
    """Answers every call with a status (None: never)."""

    def __init__(self, status: int | None = 204) -> None:
        self.status = status
        self.calls: list[Call] = []
        self.called = asyncio.Event()
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/hook"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[1:]
            pairs: Any = (line.partition(": ") for line in lines if line)
            headers = {name.lower(): value for name, _, value in pairs}
            self.calls.append(Call(headers, await reader.readexactly(int(headers["content-length"]))))
            self.called.set()
            if self.status is None:
                await reader.read()
            else:
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % self.status)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
