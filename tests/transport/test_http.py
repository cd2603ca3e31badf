"""The upstream client over real sockets, against servers that misbehave on script."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tls import server_side

from img_serving.domain.errors import AttemptError, Outcome
from img_serving.ports import Transport, UpstreamReply
from img_serving.transport import http, pool
from img_serving.transport.http import HttpTransport, make_ssl_context
from img_serving.transport.reply import BadReply, ReplyReader

Run = Callable[[Coroutine[Any, Any, None]], None]
LIMIT = 16 * 1024 * 1024


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> Iterator[None]:
    """Each test collects its garbage, to hear of what was not closed: what others have left is not looked at again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass
class Request:
    line: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> Request:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = head.removesuffix("\r\n\r\n").split("\r\n")
        headers = dict(row.split(": ", 1) for row in rest)
        length = int(headers.get("Content-Length", "0"))
        return Request(line, headers, await self.reader.readexactly(length))

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def hung_up(self) -> None:
        """Return once the client has closed, cleanly or not."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass


Script = Callable[[Peer], Awaitable[None]]


@dataclass
class Upstream:
    port: int = 0
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(
    script: Script, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Upstream]:
    """A server that runs `script` on each connection and closes it when that returns."""
    upstream = Upstream()
    running: set[asyncio.Task[None]] = set()

    async def converse(peer: Peer) -> None:
        try:
            await script(peer)
        except (asyncio.IncompleteReadError, ConnectionError):
            upstream.hung_up.set()
        finally:
            peer.writer.transport.abort() if tls else peer.writer.close()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream.connections += 1
        peer = Peer(reader, writer)
        peer_request = peer.request

        async def recorded() -> Request:
            request = await peer_request()
            upstream.requests.append(request)
            return request

        peer.request = recorded  # type: ignore[method-assign]
        task = asyncio.get_running_loop().create_task(converse(peer))
        running.add(task)
        task.add_done_callback(running.discard)

    server = await asyncio.start_server(accepted, host, 0, ssl=tls, backlog=256)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()
        for task in tuple(running):
            task.cancel()
        if running:
            await asyncio.wait(tuple(running), timeout=2)
        await asyncio.sleep(0.005)  # the cancelled connections' sockets close in the loop's next rounds


@asynccontextmanager
async def client(url: str, **options: Any) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(url, **options)
    try:
        yield transport
    finally:
        await transport.close()
        assert transport.statistics.open_connections == 0
        assert transport.statistics.idle_connections == 0


def answering(*replies: bytes) -> Script:
    """Answer one request after another on a connection; the last reply stands for all further ones."""

    async def script(peer: Peer) -> None:
        left = list(replies)
        while True:
            await peer.request()
            await peer.send(left.pop(0) if len(left) > 1 else left[0])

    return script


def closing(*parts: bytes) -> Script:
    """Answer one request in parts, then close."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(*parts)

    return script


async def get(transport: HttpTransport, path: str = "/", **options: Any) -> UpstreamReply:
    return await transport.request("GET", path, **{"timeout_seconds": 5.0, "max_body_bytes": LIMIT, **options})


async def post(transport: HttpTransport, body: bytes = b"{}", **options: Any) -> UpstreamReply:
    return await transport.request(
        "POST", "/", body=body, **{"timeout_seconds": 5.0, "max_body_bytes": LIMIT, **options}
    )


async def outcome_of(attempt: Awaitable[object]) -> tuple[Outcome, str]:
    with pytest.raises(AttemptError) as caught:
        await attempt
    return caught.value.outcome, caught.value.message


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not condition():  # noqa: ASYNC110 - what is awaited is a count, which has no event
            await asyncio.sleep(0.001)


def ok(body: bytes = b"ok", *headers: str) -> bytes:
    rows = "".join(f"{row}\r\n" for row in headers)
    return f"HTTP/1.1 200 OK\r\n{rows}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_it_is_a_transport() -> None:
    transport: Transport = HttpTransport("http://127.0.0.1")
    assert repr(transport) == "<HttpTransport http://127.0.0.1:80: 0 open, 0 idle>"


# Requests


def test_a_request_is_written_as_given(run: Run) -> None:
    async def main() -> None:
        async with serving(answering(ok())) as upstream, client(f"{upstream.url}/prefix/") as transport:
            reply = await transport.request(
                "POST",
                "/v1/images?x=%20",
                headers=[("Authorization", "Bearer k"), ("X-Latin", "café")],
                body=b'{"a":1}',
                timeout_seconds=5,
                max_body_bytes=10,
            )
            assert (reply.status, reply.body) == (200, b"ok")
            (request,) = upstream.requests
            assert request.line == "POST /prefix/v1/images?x=%20 HTTP/1.1"
            assert request.body == b'{"a":1}'
            assert request.headers == {
                "Host": f"127.0.0.1:{upstream.port}",
                "User-Agent": "img-serving",
                "Accept": "*/*",
                "Accept-Encoding": "identity",
                "Authorization": "Bearer k",
                "X-Latin": "café",
                "Content-Length": "7",
            }

    run(main())


def test_given_defaults_replace_ours_and_an_empty_post_has_a_length(run: Run) -> None:
    async def main() -> None:
        async with serving(answering(ok())) as upstream, client(upstream.url) as transport:
            await transport.request(
                "POST", "/", headers=[("host", "other"), ("user-agent", "me")], timeout_seconds=5, max_body_bytes=10
            )
            await get(transport)
            given, plain = upstream.requests
            assert given.headers == {
                "Accept": "*/*",
                "Accept-Encoding": "identity",
                "host": "other",
                "user-agent": "me",
                "Content-Length": "0",
            }
            assert plain.headers["User-Agent"] == "img-serving"
            assert "Content-Length" not in plain.headers

    run(main())


@pytest.mark.parametrize("path", ["", "a", "/a b", "/a\r\nX: y", "/a\n", "/ä", "/a\0", "/a#b", "http://x/"])
def test_a_path_that_could_break_out_of_its_line_is_refused(run: Run, path: str) -> None:
    async def main() -> None:
        async with client("http://127.0.0.1:1") as transport:
            with pytest.raises(ValueError, match="path"):
                await get(transport, path)

    run(main())


@pytest.mark.parametrize(
    "header",
    [
        ("X", "secret\r\nY: b"),
        ("X", "secret\nb"),
        ("X", "secret\0"),
        ("X", "secret\r"),
        ("X", "secret 한"),
        ("X\r\n", "a"),
        ("X:", "a"),
        ("", "a"),
        ("X y", "a"),
        ("Content-Length", "3"),
        ("transfer-encoding", "chunked"),
        ("Connection", "close"),
    ],
)
def test_a_header_that_could_break_out_of_its_line_is_refused(run: Run, header: tuple[str, str]) -> None:
    async def main() -> None:
        async with client("http://127.0.0.1:1") as transport:
            for _ in range(2):  # the second time nothing is remembered as checked
                with pytest.raises(ValueError, match="header") as caught:
                    await get(transport, headers=(header,))
                assert "secret" not in str(caught.value)
            with pytest.raises(ValueError, match="method"):
                await transport.request("GET /x", "/", timeout_seconds=1, max_body_bytes=1)

    run(main())


@pytest.mark.parametrize(
    ("url", "host", "port", "host_header", "prefix"),
    [
        ("http://Example.org", "example.org", 80, "example.org", ""),
        ("https://example.org/", "example.org", 443, "example.org", ""),
        ("https://example.org:80/a/b/", "example.org", 80, "example.org:80", "/a/b"),
        ("http://[::1]:8000/x", "::1", 8000, "[::1]:8000", "/x"),
        ("http://[fe80::1%eth0]", "fe80::1%eth0", 80, "[fe80::1]", ""),
        ("http://bücher.example", "xn--bcher-kva.example", 80, "xn--bcher-kva.example", ""),
    ],
)
def test_an_origin_is_read_from_its_url(url: str, host: str, port: int, host_header: str, prefix: str) -> None:
    origin = http._parse_origin(url)
    assert (origin.host, origin.port, origin.host_header, origin.prefix) == (host, port, host_header, prefix)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x",
        "x:80",
        "http://",
        "http://x:99999",
        "http://user:secret@x",
        "http://secret@x",
        "http://x/?secret=1",
        "http://x/#secret",
        "http://x/ä",
        "http://" + "a" * 64,
        "http://[secret",
        "http://a b",
    ],
)
def test_other_urls_are_refused_without_quoting_them(url: str) -> None:
    with pytest.raises(ValueError, match="base URL") as caught:
        HttpTransport(url)
    assert "secret" not in str(caught.value)


def test_an_ipv6_origin_is_reached(run: Run) -> None:
    async def main() -> None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 here")
        async with (
            serving(answering(ok()), host="::1") as upstream,
            client(f"http://[::1]:{upstream.port}") as transport,
        ):
            assert (await get(transport)).body == b"ok"
            assert upstream.requests[0].headers["Host"] == f"[::1]:{upstream.port}"

    run(main())


# Replies


def test_header_names_are_lower_case_and_the_last_value_stands(run: Run) -> None:
    async def main() -> None:
        raw = ok(b"", "X-A: 1", "Content-Type: image/png", "x-a:  2 ")
        async with serving(answering(raw)) as upstream, client(upstream.url) as transport:
            reply = await get(transport)
        assert reply.headers == {"x-a": "2", "content-type": "image/png", "content-length": "0"}

    run(main())


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;ext=1\r\nabc\r\n5\r\ndefgh\r\n0\r\nX-Trailer: t\r\n\r\n"
)


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (ok(b"hello world"), b"hello world"),
        (CHUNKED, b"abcdefgh"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + ok(b"late"), b"late"),
        (ok(b""), b""),
    ],
)
def test_a_reply_that_comes_byte_by_byte_is_whole_and_the_connection_reused(run: Run, raw: bytes, body: bytes) -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            for byte in raw:
                await peer.send(bytes([byte]))
                await asyncio.sleep(0)

    async def main() -> None:
        async with serving(script) as upstream, client(upstream.url) as transport:
            for _ in range(2):
                reply = await get(transport)
                assert (reply.status, bytes(reply.body)) == (200, body)
                assert "x-trailer" not in reply.headers
                assert "link" not in reply.headers
            assert upstream.connections == 1

    run(main())


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.0 200\r\nContent-Length: 6\r\n\r\n",
    ],
)
def test_a_body_may_last_until_the_close(run: Run, head: bytes) -> None:
    async def main() -> None:
        async with serving(closing(head, b"abc", b"def")) as upstream, client(upstream.url) as transport:
            for _ in range(2):
                assert bytes((await get(transport)).body) == b"abcdef"
            assert upstream.connections == 2

    run(main())


def test_replies_without_a_body_leave_the_connection_clean(run: Run) -> None:
    replies = [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        ok(b"body"),
    ]

    async def main() -> None:
        async with serving(answering(*replies)) as upstream, client(upstream.url) as transport:
            assert (await post(transport)).status == 204
            assert (await get(transport)).status == 304
            for _ in range(2):
                reply = await transport.request("HEAD", "/", timeout_seconds=5, max_body_bytes=10)
                assert (reply.status, reply.body) == (200, b"")
            assert (await get(transport)).body == b"body"
            assert upstream.connections == 1

    run(main())


def test_an_8_mb_body_goes_and_comes_back_unchanged(run: Run) -> None:
    async def echo(peer: Peer) -> None:
        while True:
            body = (await peer.request()).body
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body)

    async def main() -> None:
        async with serving(echo) as upstream, client(upstream.url) as transport:
            for size in (8 * 1024 * 1024, 65_536, 65_537, 1):
                body = random.Random(size).randbytes(size)
                reply = await post(transport, body)
                assert bytes(reply.body) == body
            assert upstream.connections == 1

    run(main())


def test_a_large_chunked_body_is_whole(run: Run) -> None:
    body = random.Random(1).randbytes(3_000_000)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:1], body[1:2_000_000], body[2_000_000:]))

    async def main() -> None:
        raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
        async with serving(answering(raw)) as upstream, client(upstream.url) as transport:
            for _ in range(2):
                assert bytes((await get(transport)).body) == body
            assert upstream.connections == 1

    run(main())


def test_an_idle_connection_holds_no_picture(run: Run) -> None:
    async def main() -> None:
        async with serving(answering(ok(b"x" * 300_000))) as upstream, client(upstream.url) as transport:
            body = (await get(transport)).body
            assert not [holder for holder in gc.get_referrers(body) if isinstance(holder, ReplyReader)]

    run(main())


def test_a_closed_connection_needs_no_garbage_collector(run: Run) -> None:
    """Cycles through connections would keep their pictures until a full collection."""

    async def main() -> None:
        gc.disable()
        try:
            async with serving(answering(ok(b"x" * 1000))) as upstream, client(upstream.url, max_idle=0) as transport:
                await post(transport)
                with contextlib.suppress(AttemptError):
                    await post(transport, max_body_bytes=10)
                await until(lambda: transport.statistics.open_connections == 0)
                assert not [thing for thing in gc.get_objects() if isinstance(thing, pool.Connection | ReplyReader)]
        finally:
            gc.enable()

    run(main())


@given(cuts=st.lists(st.integers(0, 400), max_size=12), raw=st.sampled_from([CHUNKED, ok(b"y" * 300, "A: b"), ok(b"")]))
def test_a_reply_is_the_same_however_it_is_cut(cuts: list[int], raw: bytes) -> None:
    reader = ReplyReader(memoryview(bytearray(65536)))
    reader.begin(head_only=False, limit_bytes=1000)
    edges = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    for start, stop in itertools.pairwise(edges):
        reader.room()[: stop - start] = raw[start:stop]
        assert reader.received(stop - start) == (stop == len(raw))
    whole = ReplyReader(memoryview(bytearray(raw)))
    whole.begin(head_only=False, limit_bytes=1000)
    assert whole.received(len(raw))
    assert reader.reusable
    assert reader.reply() == whole.reply()


def test_a_huge_claimed_length_is_given_room_only_as_bytes_come() -> None:
    reader = ReplyReader(memoryview(bytearray(65536)))
    reader.begin(head_only=False, limit_bytes=1 << 40)
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nx" % (1 << 40)
    reader.room()[: len(raw)] = raw
    assert not reader.received(len(raw))
    first = len(reader.room())
    assert first < 5 * 1024 * 1024
    assert not reader.received(first)
    assert 0 < len(reader.room()) < 5 * 1024 * 1024


# Keep-alive


def test_a_connection_is_reused_and_the_newest_first(run: Run) -> None:
    async def main() -> None:
        async with serving(answering(ok())) as upstream, client(upstream.url) as transport:
            for _ in range(5):
                await post(transport)
            assert upstream.connections == 1
            assert transport.statistics == pool.TransportStatistics(1, 1, 1)
            assert repr(transport) == f"<HttpTransport http://127.0.0.1:{upstream.port}: 1 open, 1 idle>"
            await asyncio.gather(post(transport), post(transport))
            assert transport.statistics == pool.TransportStatistics(2, 2, 2)

    run(main())


def test_the_connection_that_became_free_last_is_used_first(run: Run) -> None:
    """A burst's other connections so grow old and go."""

    async def main() -> None:
        numbers = itertools.count(1)

        async def script(peer: Peer) -> None:
            number = next(numbers)
            while True:
                request = await peer.request()
                await asyncio.sleep(float(request.body))
                await peer.send(ok(b"%d" % number))

        async with serving(script) as upstream, client(upstream.url) as transport:
            slow, fast = await asyncio.gather(post(transport, b"0.02"), post(transport, b"0"))
            assert {slow.body, fast.body} == {b"1", b"2"}
            for _ in range(3):
                assert (await post(transport, b"0")).body == slow.body

    run(main())


def test_a_hundred_at_once_are_all_answered_and_at_most_max_idle_kept(run: Run) -> None:
    async def echo(peer: Peer) -> None:
        while True:
            await peer.send(ok((await peer.request()).body))

    async def main() -> None:
        async with serving(echo) as upstream, client(upstream.url, max_idle=10) as transport:
            bodies = [b"%d" % index for index in range(100)]
            for _ in range(2):
                replies = await asyncio.gather(*(post(transport, body) for body in bodies))
                assert [reply.body for reply in replies] == bodies
            await until(lambda: transport.statistics.open_connections == 10)
            assert transport.statistics == pool.TransportStatistics(10, 10, 190)

    run(main())


@pytest.mark.parametrize("header", ["Connection: close", "Keep-Alive: timeout=1", "keep-alive: max=5, Timeout=0"])
def test_a_connection_the_server_will_close_is_not_kept(run: Run, header: str) -> None:
    async def main() -> None:
        async with serving(answering(ok(b"ok", header))) as upstream, client(upstream.url) as transport:
            for _ in range(2):
                assert (await post(transport)).body == b"ok"
                assert transport.statistics.idle_connections == 0
            assert upstream.connections == 2

    run(main())


def test_the_server_s_own_limit_is_kept_to_less_a_second() -> None:
    reader = ReplyReader(memoryview(bytearray(65536)))
    for header, limit in [("timeout=5, max=100", 4.0), ("max=100", None), ("x", None), ("timeout=75", 74.0)]:
        raw = ok(b"", f"Keep-Alive: {header}")
        reader.begin(head_only=False, limit_bytes=0)
        reader.room()[: len(raw)] = raw
        assert reader.received(len(raw))
        assert reader.idle_limit_seconds() == limit


def test_an_idle_connection_is_closed_when_its_time_is_over(run: Run) -> None:
    async def main() -> None:
        async with serving(answering(ok())) as upstream, client(upstream.url, keepalive_seconds=0.05) as transport:
            await post(transport)
            assert transport.statistics.idle_connections == 1
            async with asyncio.timeout(1):
                await upstream.hung_up.wait()
            assert transport.statistics.open_connections == 0
            await post(transport)
            assert upstream.connections == 2

    run(main())


def test_a_connection_closed_while_idle_is_dropped_at_once(run: Run) -> None:
    async def main() -> None:
        async with serving(closing(ok())) as upstream, client(upstream.url) as transport:
            for _ in range(2):
                assert (await post(transport)).body == b"ok"
                await until(lambda: transport.statistics == pool.TransportStatistics(0, 0, upstream.connections))
            assert upstream.connections == 2

    run(main())


def test_a_close_the_loop_has_not_seen_yet_is_found_by_asking(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer closes and a POST follows before the loop polls: it is sent on a new connection, not lost."""
    monkeypatch.setattr(pool, "_QUIET_SECONDS", 0.0)

    def serve_one(listener: socket.socket) -> socket.socket:
        peer, _ = listener.accept()
        peer.settimeout(5)
        got = b""
        while not got.endswith(b"{}"):
            got += peer.recv(65536)
        peer.sendall(ok())
        return peer

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(5)
            async with client(f"http://127.0.0.1:{listener.getsockname()[1]}") as transport:
                for count in (1, 2):
                    serving_one = loop.run_in_executor(None, serve_one, listener)
                    assert (await post(transport)).body == b"ok"
                    peer = await serving_one
                    assert transport.statistics == pool.TransportStatistics(1, 1, count)
                    peer.close()

    run(main())


def test_a_reused_connection_that_dies_without_a_reply_is_retried_for_get_alone(run: Run) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())
        await peer.request()

    async def main() -> None:
        async with serving(script) as upstream, client(upstream.url) as transport:
            await get(transport)
            assert (await get(transport)).body == b"ok"
            assert upstream.connections == 2
            assert await outcome_of(post(transport)) == (
                Outcome.UNKNOWN,
                f"127.0.0.1:{upstream.port}: the connection was closed without a reply",
            )
            assert upstream.connections == 2

    run(main())


def test_a_get_on_a_new_connection_is_not_retried(run: Run) -> None:
    async def main() -> None:
        async with serving(closing()) as upstream, client(upstream.url) as transport:
            outcome, _ = await outcome_of(get(transport))
            assert outcome is Outcome.UNKNOWN
            assert upstream.connections == 1

    run(main())


def test_a_reused_connection_cut_within_a_reply_is_not_retried(run: Run) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())
        await peer.request()
        await peer.send(b"HTTP/1.1 2")

    async def main() -> None:
        async with serving(script) as upstream, client(upstream.url) as transport:
            await get(transport)
            outcome, message = await outcome_of(get(transport))
            assert (outcome, upstream.connections) == (Outcome.UNKNOWN, 1)
            assert message.endswith("the reply was cut short")

    run(main())


def test_bytes_nobody_asked_for_end_the_connection(run: Run) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())
        await asyncio.sleep(0.01)
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await peer.hung_up()

    async def main() -> None:
        async with serving(script) as upstream, client(upstream.url) as transport:
            for count in (1, 2):
                assert (await post(transport)).status == 200
                await until(lambda: transport.statistics.open_connections == 0)
                assert upstream.connections == count

    run(main())


@pytest.mark.parametrize("extra", [b"rubbish", ok(b"second"), b"HTTP/1.1 204 No Content\r\n\r\n"])
@pytest.mark.parametrize("raw", [ok(), ok(b"", "Connection: close"), CHUNKED])
def test_a_good_reply_with_more_behind_it_is_taken_but_not_its_connection(run: Run, raw: bytes, extra: bytes) -> None:
    async def main() -> None:
        async with serving(answering(raw + extra)) as upstream, client(upstream.url) as transport:
            for _ in range(2):
                assert (await post(transport)).body in [b"ok", b"", b"abcdefgh"]
                assert transport.statistics.idle_connections == 0
            assert upstream.connections == 2

    run(main())


def test_a_reply_before_the_request_is_sent_whole_ends_the_connection(run: Run) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await peer.hung_up()

    async def main() -> None:
        async with serving(script) as upstream, client(upstream.url) as transport:
            assert (await post(transport, bytes(32 * 1024 * 1024))).status == 413
            assert transport.statistics.idle_connections == 0

    run(main())


# Failures


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (b"HTTP/1.1 200 OK\r\nContent-Le",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", b"123456789"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n", b"x" * 1_999_999),
        (CHUNKED[:-2],),
        (b"HTTP/1.1 100 Continue\r\n\r\n",),
    ],
)
def test_a_reply_cut_short_is_unknown(run: Run, parts: tuple[bytes, ...]) -> None:
    async def main() -> None:
        async with serving(closing(*parts)) as upstream, client(upstream.url) as transport:
            outcome, message = await outcome_of(post(transport))
            assert outcome is Outcome.UNKNOWN
            assert message.startswith(f"127.0.0.1:{upstream.port}: ")

    run(main())


def test_a_reset_does_not_end_a_body_that_lasts_until_the_close(run: Run) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await asyncio.sleep(0.01)
        raw = peer.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.writer.transport.abort()

    async def main() -> None:
        async with serving(script) as upstream, client(upstream.url) as transport:
            assert (await outcome_of(post(transport)))[0] is Outcome.UNKNOWN

    run(main())


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345"])
def test_silence_ends_at_the_deadline_as_unknown(run: Run, sent: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(sent)
        await peer.hung_up()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with serving(script) as upstream, client(upstream.url) as transport:
            start = loop.time()
            outcome, message = await outcome_of(post(transport, timeout_seconds=0.1))
            assert (outcome, message.endswith("in time")) == (Outcome.UNKNOWN, True)
            assert 0.09 < loop.time() - start < 0.5
            await until(lambda: transport.statistics.open_connections == 0)

    run(main())


def test_each_request_has_its_own_deadline_though_the_timer_is_shared(run: Run) -> None:
    async def script(peer: Peer) -> None:
        for delay in (0.0, 0.0, 0.25):
            await peer.request()
            await asyncio.sleep(delay)
            await peer.send(ok())
        await peer.request()
        await peer.hung_up()

    async def main() -> None:
        async with serving(script) as upstream, client(upstream.url) as transport:
            for limit in (5.0, 0.15, 5.0):
                assert (await post(transport, timeout_seconds=limit)).body == b"ok"
            assert (await outcome_of(post(transport, timeout_seconds=0.1)))[0] is Outcome.UNKNOWN
            assert upstream.connections == 1

    run(main())


def test_no_time_left_means_nothing_was_sent(run: Run) -> None:
    async def main() -> None:
        async with serving(answering(ok())) as upstream, client(upstream.url) as transport:
            await post(transport)
            assert (await outcome_of(post(transport, timeout_seconds=0.0)))[0] is Outcome.NOT_STARTED
            assert len(upstream.requests) == 1

    run(main())


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x15\x03\x01\x00\x02\x02\x50",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n12",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 140_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 6000,
        CHUNKED[:-2] + b"X: " + b"y" * 140_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"y" * 140_000,
    ],
)
def test_what_is_not_http_or_has_too_large_headers_failed(run: Run, raw: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(raw)
        await peer.hung_up()

    async def main() -> None:
        async with serving(script) as upstream, client(upstream.url) as transport:
            outcome, message = await outcome_of(post(transport))
            assert outcome is Outcome.FAILED
            assert message.startswith(f"127.0.0.1:{upstream.port}: ")
            assert " reply" in message
            assert len(message) < 120

    run(main())


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_a_body_over_the_limit_failed_and_one_at_it_did_not(run: Run, head: bytes) -> None:
    async def main() -> None:
        async with serving(closing(head, b"x" * 1001)) as upstream, client(upstream.url) as transport:
            outcome, message = await outcome_of(post(transport, max_body_bytes=1000))
            assert (outcome, message.endswith("the reply is over 1000 bytes")) == (Outcome.FAILED, True)
        async with serving(answering(ok(b"x" * 1000))) as upstream, client(upstream.url) as transport:
            assert len((await post(transport, max_body_bytes=1000)).body) == 1000

    run(main())


def test_a_length_over_the_limit_is_refused_before_any_of_the_body_comes(run: Run) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n")
        await peer.hung_up()

    async def main() -> None:
        async with serving(script) as upstream, client(upstream.url) as transport:
            assert (await outcome_of(post(transport, max_body_bytes=1000)))[0] is Outcome.FAILED

    run(main())


def _squeezed(plain: bytes, window_bits: int) -> bytes:
    squeezer = zlib.compressobj(9, zlib.DEFLATED, window_bits)
    return squeezer.compress(plain) + squeezer.flush()


@pytest.mark.parametrize(("coding", "window_bits"), [("gzip", 31), ("X-GZip", 31), ("deflate", 15), ("deflate", -15)])
def test_a_body_compressed_unasked_is_decoded_within_the_limit(run: Run, coding: str, window_bits: int) -> None:
    plain = random.Random(2).randbytes(70_000) * 3
    bomb = _squeezed(bytes(16 * 1024 * 1024), window_bits)

    async def main() -> None:
        replies = [
            ok(_squeezed(plain, window_bits), f"Content-Encoding: {coding}"),
            ok(bomb, f"Content-Encoding: {coding}"),
        ]
        async with serving(answering(*replies)) as upstream, client(upstream.url) as transport:
            reply = await get(transport)
            assert reply.body == plain
            assert reply.headers == {"content-length": str(len(plain))}
            outcome, message = await outcome_of(get(transport, max_body_bytes=1_000_000))
            assert outcome is Outcome.FAILED
            assert message.endswith("over 1000000 bytes when decompressed")

    run(main())


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("br", b"x"),
        ("gzip", b"not gzip"),
        ("deflate", b"\xff\xff"),
        ("gzip", _squeezed(b"x" * 100, 31)[:-4]),
        ("gzip", _squeezed(b"x", 31) * 2),
    ],
)
def test_an_unreadable_coding_failed(run: Run, coding: str, body: bytes) -> None:
    async def main() -> None:
        until_close = b"HTTP/1.0 200 OK\r\nContent-Encoding: %b\r\n\r\n" % coding.encode() + body
        for script in (answering(ok(body, f"Content-Encoding: {coding}")), closing(until_close)):
            async with serving(script) as upstream, client(upstream.url) as transport:
                assert (await outcome_of(get(transport)))[0] is Outcome.FAILED

    run(main())


def test_a_bug_of_ours_is_not_taken_for_a_bad_reply() -> None:
    reader = ReplyReader(memoryview(bytearray(65536)))
    reader.begin(head_only=False, limit_bytes=None)  # type: ignore[arg-type]
    raw = ok()
    reader.room()[: len(raw)] = raw
    with pytest.raises(TypeError):
        reader.received(len(raw))
    assert not issubclass(TypeError, BadReply)


# Connecting


def test_a_refused_connection_was_not_started(run: Run) -> None:
    async def main() -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]
            async with client(f"http://127.0.0.1:{port}") as transport:
                assert await outcome_of(post(transport)) == (
                    Outcome.NOT_STARTED,
                    f"127.0.0.1:{port}: connection refused",
                )

    run(main())


@asynccontextmanager
async def deaf_port() -> AsyncIterator[int]:
    """A listening port whose queue is full: further connections hang."""
    loop = asyncio.get_running_loop()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        knocking = [socket.socket() for _ in range(3)]
        tasks = []
        for knock in knocking:
            knock.setblocking(False)
            tasks.append(loop.create_task(loop.sock_connect(knock, listener.getsockname())))
        await asyncio.sleep(0.02)
        try:
            yield listener.getsockname()[1]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for knock in knocking:
                knock.close()


def test_connecting_has_a_time_limit_and_was_not_started(run: Run) -> None:
    async def main() -> None:
        async with deaf_port() as port:
            for limit in (0.1, 5.0):
                async with client(f"http://127.0.0.1:{port}", connect_timeout_seconds=0.15) as transport:
                    start = asyncio.get_running_loop().time()
                    outcome, message = await outcome_of(post(transport, timeout_seconds=limit))
                    assert outcome is Outcome.NOT_STARTED
                    assert message.endswith("no connection in time")
                    assert asyncio.get_running_loop().time() - start < 0.5

    run(main())


def test_a_cancelled_connect_leaves_nothing_behind(run: Run) -> None:
    async def main() -> None:
        async with deaf_port() as port, client(f"http://127.0.0.1:{port}") as transport:
            task = asyncio.get_running_loop().create_task(post(transport))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "the host name was not found"),
        (ConnectionResetError(104, "x"), "the connection was closed while being made"),
        (OSError(113, "No route to host"), "the host could not be reached"),
    ],
)
def test_why_a_connection_failed_is_said_in_few_words(error: Exception, words: str) -> None:
    assert http._why_not_connected(error) == words


# Cancelling and closing


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n12345"])
def test_cancelling_closes_the_upstream_at_once(run: Run, sent: bytes) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        reading = asyncio.Event()
        closed_at: list[float] = []

        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.send(sent)
            reading.set()
            await peer.hung_up()
            closed_at.append(loop.time())

        async with serving(script) as upstream, client(upstream.url) as transport:
            task = loop.create_task(post(transport))
            await reading.wait()
            await asyncio.sleep(0.02)
            start = loop.time()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert transport.statistics.idle_connections == 0
            await until(lambda: bool(closed_at))
            assert closed_at[0] - start < 0.1

    run(main())


def test_cancelling_as_the_reply_arrives_does_no_harm(run: Run) -> None:
    """Whenever the cancellation falls, the connection is either clean in the pool or closed."""

    async def echo(peer: Peer) -> None:
        while True:
            await peer.send(ok((await peer.request()).body))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with serving(echo) as upstream, client(upstream.url) as transport:
            for rounds in range(60):
                task = loop.create_task(post(transport, b"cancelled"))
                for _ in range(rounds % 20):
                    await asyncio.sleep(0)
                task.cancel()
                other = b"other %d" % rounds
                reply, _ = await asyncio.gather(post(transport, other), task, return_exceptions=True)
                assert isinstance(reply, UpstreamReply)
                assert reply.body == other

    run(main())


def test_closing_ends_requests_in_flight_as_unknown_and_later_ones_not_started(run: Run) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.hung_up()

    async def main() -> None:
        async with serving(script) as upstream, client(upstream.url) as transport:
            attempts = [asyncio.ensure_future(outcome_of(post(transport))) for _ in range(3)]
            await until(lambda: len(upstream.requests) == 3)
            await transport.close()
            assert [outcome for outcome, _ in await asyncio.gather(*attempts)] == [Outcome.UNKNOWN] * 3
            assert (await outcome_of(post(transport)))[0] is Outcome.NOT_STARTED
            assert repr(transport) == f"<HttpTransport http://127.0.0.1:{upstream.port}: closed>"

    run(main())


# TLS


def test_tls_is_spoken_and_connections_kept(run: Run, certificate: Path) -> None:
    big = random.Random(3).randbytes(5_000_000)

    async def main() -> None:
        trusting = make_ssl_context(str(certificate.with_name("cert.pem")), verify=True)
        careless = make_ssl_context(None, verify=False)
        async with serving(answering(ok(), ok(big)), tls=server_side(certificate)) as upstream:
            for count, (host, context) in enumerate(
                [("127.0.0.1", trusting), ("localhost", trusting), ("127.0.0.1", careless)]
            ):
                async with client(f"https://{host}:{upstream.port}", ssl_context=context) as transport:
                    assert (await post(transport)).body == b"ok"
                    assert bytes((await post(transport, big)).body) == big
                    assert upstream.connections == count + 1
                    assert upstream.requests[-1].body == big
                    assert repr(transport).startswith("<HttpTransport https://")

    run(main())


def test_an_unknown_certificate_was_not_started(run: Run, certificate: Path) -> None:
    async def main() -> None:
        server = serving(answering(ok()), tls=server_side(certificate))
        async with server as upstream, client(f"https://127.0.0.1:{upstream.port}") as transport:
            outcome, message = await outcome_of(post(transport))
            assert outcome is Outcome.NOT_STARTED
            assert "certificate was not accepted (self-signed certificate)" in message

    run(main())


def test_tls_towards_a_plain_server_was_not_started(run: Run) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.read(100)
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.hung_up()

    async def main() -> None:
        async with serving(script) as upstream, client(f"https://127.0.0.1:{upstream.port}") as transport:
            outcome, message = await outcome_of(post(transport))
            assert outcome is Outcome.NOT_STARTED
            assert "TLS handshake failed" in message

    run(main())


def test_cancelling_over_tls_closes_at_once(run: Run, certificate: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        closed: list[float] = []

        async def script(peer: Peer) -> None:
            await peer.request()
            await peer.hung_up()
            closed.append(loop.time())

        async with serving(script, tls=server_side(certificate)) as upstream:
            context = make_ssl_context(None, verify=False)
            async with client(f"https://127.0.0.1:{upstream.port}", ssl_context=context) as transport:
                task = loop.create_task(post(transport))
                await until(lambda: len(upstream.requests) == 1)
                start = loop.time()
                task.cancel()
                await asyncio.wait([task])
                await until(lambda: bool(closed))
                assert closed[0] - start < 0.1

    run(main())
