"""A `Connection` over any ASGI server: for tests, and for those who mount the application elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from img_serving.api.exchange import ClientDisconnected, Headers

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AsgiConnection:
    """One HTTP request as ASGI gives it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._waiting: asyncio.Task[None] | None = None
        self.is_cut = False
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.scheme: str = scope.get("scheme", "http")
        self.client: tuple[str, int] | None = scope.get("client")
        self.server: tuple[str, int | None] | None = scope.get("server")
        # reversed: of a repeated header the first value stands
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))

    def whole_body(self) -> bytes | None:
        """ASGI tells only those who wait."""
        return None

    async def receive(self) -> tuple[bytes, bool]:
        """The next piece of the body, and whether there is more; see `Connection`."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        return message.get("body") or b"", bool(message.get("more_body"))

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Plain ASGI tells of a disconnect only those who wait for it, so a task does."""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        if callback is not None:
            self._waiting = asyncio.get_running_loop().create_task(self._wait(callback))

    async def _wait(self, callback: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        callback()

    async def respond(self, status: int, headers: Headers, parts: tuple[bytes | memoryview, ...]) -> None:
        """Send a whole reply."""
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        last = len(parts) - 1
        for index in range(last):
            await self._send({"type": "http.response.body", "body": parts[index], "more_body": True})
        await self._send({"type": "http.response.body", "body": parts[last] if parts else b""})

    async def begin(self, status: int, headers: Headers) -> None:
        """Send the head; the server finds a way to say where the reply ends."""
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, piece: bytes | memoryview) -> None:
        """Send one piece."""
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def finish(self) -> None:
        """It is complete."""
        await self._send({"type": "http.response.body", "body": b""})

    def abort(self) -> None:
        """A server cuts what its application does not finish."""
        self.is_cut = True

    async def stream(self, status: int, headers: Headers, chunks: AsyncIterator[bytes | memoryview]) -> None:
        """Send a reply piece by piece."""
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        async for chunk in chunks:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})
