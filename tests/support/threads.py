"""A stub server in a thread with a loop of its own, for tests whose program has the main thread to itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

Server = TypeVar("Server", bound=AbstractAsyncContextManager[Any])


@contextmanager
def in_a_thread(server: Server) -> Iterator[Server]:
    """Listening for as long as the block lasts."""
    started, ended = threading.Event(), threading.Event()
    stopping: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        stop = asyncio.Event()
        stopping.append((asyncio.get_running_loop(), stop))
        async with server:
            started.set()
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(main())
        finally:
            started.set()
            ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        for loop, stop in stopping:
            loop.call_soon_threadsafe(stop.set)
        assert ended.wait(10)
        thread.join()
