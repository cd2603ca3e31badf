"""Fetching from URLs that somebody else named: never from inside our own network, never more than allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from img_serving.backends.scripted import picture
from img_serving.transport.fetch import FetchFailed, SafeFetcher

PNG = picture("a fox", 7, 64, 48)


def reply(body: bytes = PNG, status: int = 200, **headers: str) -> bytes:
    lines = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body


class Site:
    """A server on loopback that plays the Internet: `resolve` sends every name to it and remembers which."""

    def __init__(self, answer: Callable[[str, str], bytes | None]) -> None:
        self.answer = answer
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.resolved: list[str] = []
        self.port = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
            }
            target = first.split(" ")[1]
            self.requests.append((target, headers))
            answer = self.answer(headers["host"].partition(":")[0], target)
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        return ["127.0.0.1"]


def fetch(answer, url="http://cdn.test:{port}/a.png", *, timeout=5.0, limit=1_000_000, **options):
    """Fetch from a site that answers so; returns the site and what came. Loopback counts as public here."""

    async def main():
        async with Site(answer if callable(answer) else lambda host, target: answer) as site:
            given = {
                name: text.format(port=site.port) if name == "trusted_url" else text for name, text in options.items()
            }
            fetcher = SafeFetcher(**{"resolve": site.resolve, "is_public": lambda address: True, **given})
            try:
                return site, await fetcher(url.format(port=site.port), timeout, limit)
            except FetchFailed as error:
                return site, error

    return asyncio.run(main())


def test_a_picture_is_fetched():
    site, body = fetch(reply(), "http://cdn.test:{port}/a%20b/c.png?sig=a%2Fb+c&x=é#frag")
    assert body == PNG
    target, headers = site.requests[0]
    assert target == "/a%20b/c.png?sig=a%2Fb+c&x=%C3%A9"
    assert headers["host"] == f"cdn.test:{site.port}"


def test_what_comes_before_the_reply_is_passed_over():
    assert fetch(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" + reply())[1] == PNG
    _, error = fetch(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert "cut short" in error.message


def test_a_body_without_a_length_or_in_chunks_is_read_to_its_end():
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG)
    assert fetch(chunked)[1] == PNG
    assert fetch(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n" + PNG)[1] == PNG


@pytest.mark.parametrize(
    ("answer", "definite", "words"),
    [
        (reply(b"<html>no</html>"), True, "no picture"),
        (reply(b""), True, "no picture"),
        (reply(status=404), True, "404"),
        (b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n" + PNG, True, "101"),
        (reply(status=403), True, "403"),
        (reply(status=500), False, "500"),
        (reply(status=429), False, "429"),
        (reply(status=302), True, "302"),
        (reply(PNG + bytes(2_000_000)), True, "larger"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + PNG + bytes(2_000_000), True, "larger"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 2_000_000, True, "larger"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", True, "larger"),
        (reply()[:-9], False, "cut short"),
        (b"", False, "cut short"),
        (b"220 mail.example ESMTP\r\n\r\n", True, "not HTTP"),
        (None, False, "in time"),
    ],
)
def test_what_is_no_good_is_refused(answer, definite, words):
    _, error = fetch(answer, timeout=0.1 if answer is None else 5.0)
    assert isinstance(error, FetchFailed)
    assert words in error.message
    assert error.is_definite is definite


def test_redirects_are_followed_three_times_at_most():
    def answer(host, target):
        left = int(target[1:])
        return reply() if left == 0 else reply(b"", 302, Location=f"/{left - 1}")

    assert fetch(answer, "http://cdn.test:{port}/3")[1] == PNG
    _, error = fetch(answer, "http://cdn.test:{port}/4")
    assert "redirects" in error.message


def test_every_hop_is_resolved_and_checked():
    def answer(host, target):
        return reply(b"", 307, Location="http://inside.test:1/secret")

    async def resolve(host, port):
        return ["127.0.0.1"] if host == "cdn.test" else ["10.0.0.5"]

    site, error = fetch(answer, resolve=resolve, is_public=lambda address: address == "127.0.0.1")
    assert "inside.test is not a public address" in error.message
    assert error.is_definite
    assert len(site.requests) == 1


def test_the_address_that_was_checked_is_the_one_connected_to():
    """A name that resolves differently the second time gains nothing: it is resolved once."""
    site, body = fetch(reply())
    assert body == PNG
    assert site.resolved == ["cdn.test"]


def test_one_private_address_among_public_ones_is_too_many():
    async def resolve(host, port):
        return ["127.0.0.1", "192.168.0.9"]

    _, error = fetch(reply(), resolve=resolve, is_public=lambda address: address == "127.0.0.1")
    assert "not a public address" in error.message


def test_an_address_where_nobody_listens_is_passed_over():
    async def resolve(host, port):
        return ["127.255.255.254", "127.0.0.1"]

    assert fetch(reply(), resolve=resolve)[1] == PNG


@pytest.mark.parametrize(
    "url",
    [
        "ftp://cdn.test/a", "file:///etc/passwd", "gopher://cdn.test/", "data:image/png;base64,AA", "a.png", "", "http://", "http:///a",
        "http://user:pw@cdn.test/a", "http://cdn.test:99999/", "http://[::1/", "http://cdn .test/", "http://cdn.test\\@evil/",
        "http://..../",
    ],
)  # fmt: skip
def test_other_urls_are_not_fetched(url):
    site, error = fetch(reply(), url)
    assert isinstance(error, FetchFailed)
    assert error.is_definite
    assert "pw" not in error.message
    assert not site.requests


def test_a_line_break_in_a_url_cannot_add_a_header():
    site, _ = fetch(reply(), "http://cdn.test:{port}/a\r\nX-Evil: 1")
    assert "x-evil" not in site.requests[0][1]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "0"])
def test_loopback_is_refused_however_it_is_written(host):
    async def main():
        async with Site(lambda host, target: reply()) as site:
            with pytest.raises(FetchFailed):
                await SafeFetcher()(f"http://{host}:{site.port}/a.png", 2.0, 1000)
            return site.requests

    assert asyncio.run(main()) == []


def test_private_addresses_are_allowed_where_the_operator_says_so():
    async def main():
        async with Site(lambda host, target: reply()) as site:
            return await SafeFetcher(allow_private_addresses=True)(f"http://127.0.0.1:{site.port}/a", 2.0, 10_000)

    assert asyncio.run(main()) == PNG


# the operator's own upstream

KEY: dict[str, Any] = {"headers": (("Authorization", "Bearer sk-1234567"),)}


def test_the_upstreams_own_host_may_be_private_and_gets_its_key():
    private = {"is_public": lambda address: False}
    site, body = fetch(reply(), "http://CDN.test.:{port}/a", trusted_url="http://cdn.test:{port}/v1", **private, **KEY)
    assert body == PNG
    assert site.requests[0][1]["authorization"] == "Bearer sk-1234567"
    _, relative = fetch(reply(), "/files/a.png", trusted_url="http://cdn.test:{port}/v1", **private)
    assert relative == PNG


def test_the_key_goes_to_the_same_origin_only():
    for url, trusted in (
        ("http://cdn.test:{port}/a", "http://other.test:{port}"),
        ("http://cdn.test:{port}/a", "http://cdn.test:1"),
        ("http://cdn.test:{port}/a", "https://cdn.test:{port}"),
    ):
        site, _ = fetch(reply(), url, trusted_url=trusted, **KEY)
        assert "authorization" not in site.requests[0][1]


def test_the_key_does_not_follow_a_redirect_elsewhere():
    def answer(host, target):
        return reply() if host == "other.test" else reply(b"", 302, Location=f"http://other.test:{site_port[0]}/b")

    site_port = [0]

    async def main():
        async with Site(answer) as site:
            site_port[0] = site.port
            trusted = f"http://cdn.test:{site.port}"
            fetcher = SafeFetcher(trusted_url=trusted, resolve=site.resolve, is_public=lambda address: True, **KEY)
            await fetcher(f"{trusted}/a", 2.0, 10_000)
            assert "sk-1234567" not in repr(fetcher)
            return ["authorization" in headers for _, headers in site.requests]

    assert asyncio.run(main()) == [True, False]


def test_nobody_listening_is_not_definite():
    async def main():
        async with Site(lambda host, target: None) as site:
            port = site.port
        with pytest.raises(FetchFailed) as caught:
            await SafeFetcher(allow_private_addresses=True)(f"http://127.0.0.1:{port}/a", 2.0, 1000)
        return caught.value.is_definite

    assert asyncio.run(main()) is False


def test_no_time_left_is_said_before_anything_is_sent():
    site, error = fetch(reply(), timeout=0.0)
    assert "no time" in error.message
    assert not site.requests


def test_cancelling_closes_the_connection_at_once():
    async def main():
        gone = asyncio.Event()

        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            started.set()
            with suppress(ConnectionError):
                await reader.read()
            gone.set()
            writer.close()

        started = asyncio.Event()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        task = asyncio.create_task(SafeFetcher(allow_private_addresses=True)(f"http://127.0.0.1:{port}/", 5.0, 1000))
        await started.wait()
        task.cancel()
        await asyncio.wait_for(gone.wait(), 0.1)
        server.close()
        return task.cancelled() or bool(await asyncio.gather(task, return_exceptions=True))

    assert asyncio.run(main())
