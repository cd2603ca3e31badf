"""The way out through a proxy: who takes it, what the proxy is told, and what its refusals become."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.tls import server_side

from img_serving.backends.scripted import picture
from img_serving.backends.stub_server import Answer, Exchange, StubServer
from img_serving.domain.errors import AttemptError, Outcome
from img_serving.transport.fetch import FetchFailed, SafeFetcher
from img_serving.transport.http import HttpTransport, make_ssl_context
from img_serving.transport.proxy import Proxy, parse_proxy, proxy_from_environment

Run = Callable[[Coroutine[Any, Any, None]], None]
PNG = picture("a fox", 7, 8, 8)
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxies_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Upstream(StubServer):
    """Says which path it was asked for."""

    async def answer(self, exchange: Exchange) -> Answer:
        if exchange.path.endswith(".png"):
            return Answer(200, PNG, {"content-type": "image/png"})
        return Answer(200, exchange.path.encode())


@dataclass
class FakeProxy:
    """Tunnels to wherever `to` says, and forwards requests in absolute form there."""

    to: int
    refusal: bytes = b""
    port: int = 0
    heads: list[str] = field(default_factory=list)
    serving: set[asyncio.Task[Any]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        me = asyncio.current_task()
        assert me is not None
        self.serving.add(me)
        tasks: list[asyncio.Task[None]] = []
        back: asyncio.StreamWriter | None = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head.decode())
            if self.refusal:
                writer.write(self.refusal)
                await writer.drain()
                return
            there, back = await asyncio.open_connection("127.0.0.1", self.to)
            if head.startswith(b"CONNECT"):
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                method, target, rest = head.split(b" ", 2)
                path = b"/" + target.split(b"/", 3)[3]
                back.write(method + b" " + path + b" " + rest)
            tasks = [asyncio.create_task(_pump(reader, back)), asyncio.create_task(_pump(there, writer))]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in (writer, back):
                if one is not None:
                    one.close()
                    with suppress(OSError):
                        await one.wait_closed()
            self.serving.discard(me)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def proxied(to: int, refusal: bytes = b"") -> AsyncIterator[FakeProxy]:
    proxy = FakeProxy(to, refusal)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        if proxy.serving:  # they end when their clients have left: a cancelled one is noise to the loop
            await asyncio.wait(proxy.serving, timeout=5)


async def get(transport: HttpTransport, path: str) -> bytes:
    try:
        reply = await transport.request("GET", path, timeout_seconds=5.0, max_body_bytes=1 << 20)
        return bytes(reply.body)
    finally:
        await transport.close()


# who takes it


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "http://images.example", None),
        ({"HTTP_PROXY": "http://p:3128"}, "http://images.example", "<Proxy p:3128>"),
        ({"http_proxy": "p:3128"}, "http://images.example:8000/prefix", "<Proxy p:3128>"),
        ({"HTTP_PROXY": "http://p:3128"}, "https://images.example", None),
        ({"HTTPS_PROXY": "http://p"}, "https://images.example", "<Proxy p:80>"),
        ({"ALL_PROXY": "http://p:1"}, "https://images.example", "<Proxy p:1>"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "example"}, "http://images.example", None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "images.example:8000"}, "http://images.example:8000", None),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "*"}, "http://images.example", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://localhost:7860", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://127.0.0.1:7860", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://[::1]:7860", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://gpu.localhost:7860", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://127.1:7860", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://0.0.0.0:7860", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://10.0.0.1:7860", "<Proxy p:1>"),
    ],
)
def test_the_environment_says_who_takes_it_and_loopback_never_does(monkeypatch, environment, url, proxy):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = proxy_from_environment(url)
    assert (repr(found) if found else None) == proxy


@pytest.mark.parametrize(
    "value", ["socks5://me:secret-word@p:1", "https://p:1", "http://", "http://p:port", "http://a b"]
)
def test_another_kind_of_proxy_is_refused_by_the_name_of_the_variable_alone(monkeypatch, value):
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(ValueError, match="HTTPS_PROXY must be") as caught:
        proxy_from_environment("https://images.example")
    assert "secret-word" not in str(caught.value)


def test_a_proxys_password_is_sent_and_not_shown():
    proxy = parse_proxy("http://me:p%40ss-word@p:1", "HTTP_PROXY")
    assert proxy.authorization == "Basic " + base64.b64encode(b"me:p@ss-word").decode()
    assert proxy.url == "http://me:p%40ss-word@p:1"
    assert "ss-word" not in repr(proxy)


# what goes through it


def test_http_goes_in_absolute_form(run: Run) -> None:
    async def main() -> None:
        async with Upstream() as upstream, proxied(upstream.port) as proxy:
            way = Proxy("127.0.0.1", proxy.port, "Basic Zm9v")
            body = await get(HttpTransport("http://images.example:8000/prefix", proxy=way), "/v1/models")
            assert body == b"/prefix/v1/models"
            (head,) = proxy.heads
            assert head.startswith("GET http://images.example:8000/prefix/v1/models HTTP/1.1\r\n")
            assert "Host: images.example:8000\r\n" in head
            assert "Proxy-Authorization: Basic Zm9v\r\n" in head

    run(main())


def test_https_goes_through_a_tunnel_whose_inside_the_proxy_does_not_see(run: Run, certificate: Path) -> None:
    async def main() -> None:
        upstream = Upstream()
        server = await asyncio.start_server(upstream._serve, "127.0.0.1", 0, ssl=server_side(certificate))
        async with proxied(server.sockets[0].getsockname()[1]) as proxy:
            context = make_ssl_context(str(certificate.with_name("cert.pem")), verify=True)
            way = Proxy("127.0.0.1", proxy.port, "Basic Zm9v")
            transport = HttpTransport("https://localhost:8443", ssl_context=context, proxy=way)
            for _ in range(2):
                reply = await transport.request("GET", "/secret", timeout_seconds=5.0, max_body_bytes=1 << 20)
                assert reply.body == b"/secret"
            assert transport.statistics.connections_opened == 1
            await transport.close()
            (head,) = proxy.heads
            assert head.startswith("CONNECT localhost:8443 HTTP/1.1\r\n")
            assert "Proxy-Authorization: Basic Zm9v" in head
            assert "secret" not in head
        server.close()
        await upstream.stop()
        assert "proxy-authorization" not in upstream.exchanges[0].headers

    run(main())


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "HTTP 407"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno.", "HTTP 403"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not answer as one"),
        (b"HTTP/1.1 200 OK\r\n\r\nsurprise", "more than it was asked"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 20_000, "too long"),
        (b"HTTP/1.1 200 OK\r\n", "closed the connection"),
    ],
)
def test_a_proxy_that_refuses_has_cost_nothing(run: Run, refusal: bytes, words: str) -> None:
    async def main() -> None:
        async with proxied(1, refusal) as proxy:
            transport = HttpTransport("https://images.example", proxy=Proxy("127.0.0.1", proxy.port))
            with pytest.raises(AttemptError, match=f"by way of the proxy 127.*{words}") as caught:
                await get(transport, "/")
            assert caught.value.outcome is Outcome.NOT_STARTED

    run(main())


def test_a_proxy_that_is_not_there_has_cost_nothing(run: Run) -> None:
    async def main() -> None:
        for url in ("http://images.example", "https://images.example"):
            with pytest.raises(AttemptError, match="refused") as caught:
                await get(HttpTransport(url, proxy=Proxy("127.0.0.1", 1)), "/")
            assert caught.value.outcome is Outcome.NOT_STARTED

    run(main())


# pictures that came as URLs


def _through(way: Proxy, url: str) -> Proxy:
    return way


def test_a_picture_is_fetched_through_it_from_the_address_that_was_checked(run: Run) -> None:
    async def main() -> None:
        async def resolve(host: str, port: int) -> list[str]:
            return ["93.184.216.34"]

        async with Upstream() as upstream, proxied(upstream.port) as proxy:
            fetch = SafeFetcher(resolve=resolve, proxy_of=lambda _: Proxy("127.0.0.1", proxy.port))
            assert await fetch("http://cdn.example/a.png", 5.0, 1 << 20) == PNG
            assert proxy.heads[0].startswith("CONNECT 93.184.216.34:80 HTTP/1.1\r\n")

    run(main())


def test_nothing_that_a_proxy_says_is_taken_for_a_reply_of_the_other_side(run: Run) -> None:
    """Bytes behind its consent, on the plain part of the way, must not become the body of an https URL."""

    async def main() -> None:
        async def resolve(host: str, port: int) -> list[str]:
            return ["93.184.216.34"]

        forged = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG
        for refusal in (b"HTTP/1.1 200 Established\r\n\r\n" + forged, b"HTTP/1.1 200 " + b"x" * 400_000):
            async with proxied(1, refusal) as proxy:
                way = Proxy("127.0.0.1", proxy.port)
                fetch = SafeFetcher(resolve=resolve, proxy_of=partial(_through, way))
                with pytest.raises(FetchFailed) as caught:
                    await fetch("https://cdn.example/a.png", 5.0, 1 << 20)
                assert not caught.value.is_definite

    run(main())


def test_the_backends_own_pictures_are_fetched_by_its_name_which_the_proxy_resolves(run: Run) -> None:
    async def main() -> None:
        async def resolve(host: str, port: int) -> list[str]:
            return []

        async with Upstream() as upstream, proxied(upstream.port) as proxy:
            way = Proxy("127.0.0.1", proxy.port)
            fetch = SafeFetcher(trusted_url="http://images.inside", resolve=resolve, proxy_of=lambda _: way)
            assert await fetch("/a.png", 5.0, 1 << 20) == PNG
            assert proxy.heads[0].startswith("CONNECT images.inside:80 ")

    run(main())


def test_a_proxy_variable_that_cannot_be_used_costs_no_picture(run: Run) -> None:
    async def main() -> None:
        async def resolve(host: str, port: int) -> list[str]:
            return ["93.184.216.34"]

        def broken(url: str) -> Proxy:
            return parse_proxy("socks5://p:1", "ALL_PROXY")

        with pytest.raises(FetchFailed, match="ALL_PROXY") as caught:
            await SafeFetcher(resolve=resolve, proxy_of=broken)("https://cdn.example/a.png", 5.0, 1 << 20)
        assert not caught.value.is_definite

    run(main())


def test_a_private_address_is_not_fetched_through_a_proxy_either(run: Run) -> None:
    async def main() -> None:
        async def resolve(host: str, port: int) -> list[str]:
            return ["10.0.0.1"]

        fetch = SafeFetcher(resolve=resolve, proxy_of=lambda _: Proxy("127.0.0.1", 1))
        with pytest.raises(FetchFailed, match="not a public address"):
            await fetch("http://inside.example/a.png", 5.0, 1 << 20)

    run(main())
