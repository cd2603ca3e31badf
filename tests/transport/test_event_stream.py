"""Event streams: their bytes are handed on as they come, and not kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from img_serving.backends.stub_server import Answer, Exchange, StubServer
from img_serving.domain.errors import AttemptError, Outcome
from img_serving.ports import UpstreamReply
from img_serving.transport.http import HttpTransport

Run = Callable[[Coroutine[Any, Any, None]], None]
EVENTS = {"content-type": "text/event-stream; charset=utf-8"}


class Streaming(StubServer):
    """Answers everything in pieces, each when the test lets it go."""

    def __init__(self, *pieces: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        super().__init__()
        self.pieces = pieces
        self.headers = EVENTS if headers is None else headers
        self.status = status
        self.go = asyncio.Event()
        self.cut = False

    async def answer(self, exchange: Exchange) -> Answer:
        return Answer(self.status, b"", self.headers, pieces=self._pieces())

    async def _pieces(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
            await self.go.wait()
            self.go.clear()
        if self.cut:
            raise ConnectionError


async def ask(server: StubServer, told: Callable[[bytes], None] | None, limit: int = 1 << 20) -> UpstreamReply:
    transport = HttpTransport(server.url)
    try:
        return await transport.request(
            "POST", "/", body=b"{}", timeout_seconds=5.0, max_body_bytes=limit, on_event_bytes=told
        )
    finally:
        await transport.close()


def test_each_piece_is_handed_on_when_it_comes(run: Run) -> None:
    async def main() -> None:
        async with Streaming(b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n") as server:
            heard: list[bytes] = []

            def told(piece: bytes) -> None:
                heard.append(piece)
                server.go.set()  # the next one comes only because this one was heard

            reply = await ask(server, told)
            assert b"".join(heard) == b"data: 1\n\ndata: 2\n\ndata: 3\n\n"
            assert len(heard) == 3
            assert (reply.status, bytes(reply.body)) == (200, b"")

    run(main())


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"content-type": "application/json"}, 200), (EVENTS, 400), ({"content-type": "text/plain"}, 200)],
)
def test_what_is_no_good_event_stream_is_read_as_usual(run: Run, headers: dict[str, str], status: int) -> None:
    async def main() -> None:
        async with Streaming(b"whole", headers=headers, status=status) as server:
            server.go.set()
            heard: list[bytes] = []
            reply = await ask(server, heard.append)
            assert (reply.status, bytes(reply.body), heard) == (status, b"whole", [])

    run(main())


def test_a_stream_that_nobody_listens_to_is_a_body(run: Run) -> None:
    async def main() -> None:
        async with Streaming(b"data: 1\n\n") as server:
            server.go.set()
            assert bytes((await ask(server, None)).body) == b"data: 1\n\n"

    run(main())


def test_a_stream_that_is_cut_is_unknown(run: Run) -> None:
    async def main() -> None:
        async with Streaming(b"data: 1\n\n") as server:
            server.cut = True
            server.go.set()
            with pytest.raises(AttemptError) as caught:
                await ask(server, lambda _: None)
            assert caught.value.outcome is Outcome.UNKNOWN

    run(main())


def test_a_stream_is_bounded_as_a_body_is(run: Run) -> None:
    async def main() -> None:
        async with Streaming(b"x" * 600, b"x" * 600) as server:
            with pytest.raises(AttemptError, match="over 1000 bytes") as caught:
                await ask(server, lambda _: server.go.set(), limit=1000)
            assert caught.value.outcome is Outcome.FAILED

    run(main())


def test_a_stream_of_known_length_is_one_too(run: Run) -> None:
    class Plain(StubServer):
        async def answer(self, exchange: Exchange) -> Answer:
            return Answer(200, b"data: 1\n\n", EVENTS)

    async def main() -> None:
        async with Plain() as server:
            heard: list[bytes] = []
            reply = await ask(server, heard.append)
            assert (b"".join(heard), bytes(reply.body)) == (b"data: 1\n\n", b"")

    run(main())


def test_a_packed_stream_is_refused(run: Run) -> None:
    async def main() -> None:
        async with Streaming(b"x", headers={**EVENTS, "content-encoding": "gzip"}) as server:
            server.go.set()
            with pytest.raises(AttemptError, match="content coding"):
                await ask(server, lambda _: None)

    run(main())
