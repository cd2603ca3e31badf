"""Proxies between a client and the gateway, as the internet has them: they pass bytes on, and cut at their own limits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Self


class Proxy:
    """Passes bytes both ways and knows nothing of HTTP.

    `idle_seconds`: a connection is cut when the gateway has sent no byte for so long; `most_seconds`: it is cut when it is so
    old, whatever happens. None: never.
    """

    def __init__(self, target: int, *, idle_seconds: float | None = None, most_seconds: float | None = None) -> None:
        self.port = 0
        self.cuts: list[float] = []
        """The ages in seconds at which connections were cut."""
        self._target = target
        self._idle_seconds = idle_seconds
        self._most_seconds = most_seconds
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        begun = time.monotonic()
        there: asyncio.StreamWriter | None = None
        forth: asyncio.Task[None] | None = None
        try:
            back, there = await asyncio.open_connection("127.0.0.1", self._target)
            forth = asyncio.create_task(_pump(reader, there))
            async with asyncio.timeout(self._most_seconds):
                await self._pass_back(back, writer)
        except TimeoutError:
            self.cuts.append(time.monotonic() - begun)
        except OSError:
            pass  # one of the two is gone: so is the other, below
        finally:
            if forth is not None:
                forth.cancel()
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the gateway ends the connection. Raises TimeoutError when it is silent for too long."""
        while True:
            async with asyncio.timeout(self._idle_seconds):
                data = await reader.read(64 * 1024)
            if not data:
                with contextlib.suppress(OSError):
                    writer.close()
                    await writer.wait_closed()
                return
            writer.write(data)
            await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Everything that the client says, until it says no more."""
    with contextlib.suppress(OSError):
        while data := await reader.read(64 * 1024):
            writer.write(data)
            await writer.drain()
        writer.close()
