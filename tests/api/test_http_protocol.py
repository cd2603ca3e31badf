"""Writing to clients that are slow: who reads is waited for, who does not is cut, and little is buffered for either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.virtual_time import run_virtual

from img_serving.api.exchange import ClientDisconnected
from img_serving.api.http_protocol import SLICE_BYTES, WRITE_SECONDS, HttpRequest

WHOLE = b"x" * (20 * SLICE_BYTES)


class _SlowClient:
    """A connection's protocol, transport and flow control in one; the client reads `rate` bytes a second."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.transport = self.flow = self.server_state = self
        self.default_headers: list[Any] = []
        self.buffered = self.most_buffered = self.received = 0
        self.aborted = False

    @property
    def write_paused(self) -> bool:
        return self.buffered > 64 * 1024

    async def drain(self) -> None:
        await asyncio.sleep(self.buffered / self.rate)
        self.received += self.buffered
        self.buffered = 0

    def write(self, data: bytes | memoryview) -> None:
        self.buffered += len(data)
        self.most_buffered = max(self.most_buffered, self.buffered)

    def abort(self) -> None:
        self.aborted = True

    def on_response_complete(self) -> None:
        self.received += self.buffered


def request_of(client: _SlowClient) -> HttpRequest:
    return HttpRequest(client, "GET", "/", b"", {}, keep_alive=True, may_chunk=True)  # type: ignore[arg-type]


async def frames() -> AsyncIterator[bytes]:
    yield WHOLE
    yield b"the end"


async def send(how: str, request: HttpRequest) -> None:
    if how == "whole":
        await request.respond(200, [(b"a", b"b")], (WHOLE, b"the end"))
    elif how == "known length":
        await request.stream(200, [(b"a", b"b")], frames())
    else:
        await request.begin(200, [(b"a", b"b")])
        async for frame in frames():
            await request.write(frame)
        await request.finish()


@pytest.mark.parametrize("how", ["whole", "known length", "open"])
def test_a_client_that_reads_slowly_gets_all_of_it_and_little_is_buffered_for_it(how: str) -> None:
    async def main() -> _SlowClient:
        client = _SlowClient(2 * SLICE_BYTES / WRITE_SECONDS)
        await send(how, request_of(client))
        return client

    client = run_virtual(main())
    assert not client.aborted
    assert client.received > len(WHOLE)
    assert client.most_buffered < SLICE_BYTES + 100 * 1024


@pytest.mark.parametrize("how", ["whole", "known length", "open"])
def test_a_client_that_does_not_read_is_cut(how: str) -> None:
    async def main() -> float:
        client = _SlowClient(1.0)
        began = asyncio.get_running_loop().time()
        with pytest.raises(ClientDisconnected):
            await send(how, request_of(client))
        assert client.aborted
        return asyncio.get_running_loop().time() - began

    assert run_virtual(main()) == pytest.approx(WRITE_SECONDS)
