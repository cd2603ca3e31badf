"""Posting to URLs that clients named: never into our own network, redirects not followed, answers in bounds."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest
from tests.support.tls import server_side

from img_serving.ports import PostReply
from img_serving.transport import safe_connection
from img_serving.transport.safe_connection import ExchangeFailed
from img_serving.transport.webhook_post import SafePoster

BODY = b'{"type":"job.succeeded"}'


class Receiver:
    """Answers every call with the same bytes (None: never), and remembers what came."""

    def __init__(self, answer: bytes | None, *, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self.calls: list[tuple[str, bytes]] = []
        self.connections = 0
        self.port = 0
        self._tls = tls

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length:")
            )
            self.calls.append((head, await reader.readexactly(length)))
            if self.answer is None:
                await reader.read()
            else:
                writer.write(self.answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def post(
    answer: bytes | None,
    url: str = "http://127.0.0.1:{port}/hook?token=a%2Fb",
    *,
    timeout: float = 5.0,
    **options: Any,
) -> tuple[Receiver, PostReply | ExchangeFailed]:
    """Post to a receiver that answers so. Loopback is allowed unless the options say otherwise."""

    async def main() -> tuple[Receiver, PostReply | ExchangeFailed]:
        async with Receiver(answer) as receiver:
            poster = SafePoster(**(options or {"allow_private_addresses": True}))
            headers = [("content-type", "application/json"), ("webhook-id", "evt_1")]
            try:
                return receiver, await poster(url.format(port=receiver.port), headers, BODY, timeout)
            except ExchangeFailed as error:
                return receiver, error

    return asyncio.run(main())


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    lines = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body


def test_the_body_arrives_as_it_is_with_its_headers():
    receiver, reply = post(answer(204))
    assert reply == PostReply(204)
    head, body = receiver.calls[0]
    assert body == BODY
    lines = head.split("\r\n")
    assert lines[0] == "POST /hook?token=a%2Fb HTTP/1.1"
    assert f"Host: 127.0.0.1:{receiver.port}" in lines
    assert "webhook-id: evt_1" in lines
    assert f"Content-Length: {len(BODY)}" in lines


@pytest.mark.parametrize("status", [200, 404, 410, 500])
def test_an_answer_is_an_answer_whatever_it_says(status):
    assert post(answer(status, b"some text"))[1] == PostReply(status)


def test_an_answer_that_wants_another_protocol_is_an_answer_too():
    raw = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nnonsense"
    assert post(raw)[1] == PostReply(101)


def test_a_redirect_is_not_followed():
    receiver, reply = post(answer(307, Location="http://169.254.169.254/latest/meta-data"))
    assert reply == PostReply(307)
    assert receiver.connections == 1


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("120", 120.0),
        ("Thu, 01 Jan 1970 00:18:20 GMT", 100.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("9" * 400, 999999999999.0),
        ("٣", None),
    ],
)
def test_a_receivers_own_wait_is_read(said, seconds):
    options: dict[str, Any] = {"allow_private_addresses": True, "clock_unix": lambda: 1000.0}
    raw = b"HTTP/1.1 503 X\r\nContent-Length: 0\r\nRetry-After: %b\r\n\r\n" % said.encode()
    assert post(raw, **options)[1] == PostReply(503, seconds)


def test_the_status_stands_however_the_body_ends():
    for raw in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nnonsense",
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ):
        assert post(raw)[1] == PostReply(200), raw[:60]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "cut short"),
        (b"HTTP/1.1 200 OK\r\nContent-", "cut short"),
        (b"220 mail.example ESMTP\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 2_000_000, "too large"),
    ],
)
def test_what_is_no_answer_is_said(raw, words):
    _, error = post(raw)
    assert isinstance(error, ExchangeFailed)
    assert words in error.message


def test_a_receiver_that_hangs_is_left_in_time():
    receiver, error = post(None, timeout=0.1)
    assert isinstance(error, ExchangeFailed)
    assert error.message == "no answer within 0.1 s"
    assert len(receiver.calls) == 1


def test_a_connection_that_is_not_made_is_said_to_be_none(monkeypatch):
    monkeypatch.setattr(safe_connection, "CONNECT_TIMEOUT_SECONDS", 0.05)

    async def never(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio, "open_connection", never)
    _, error = post(answer(200), timeout=5.0)
    assert isinstance(error, ExchangeFailed)
    assert "no connection within" in error.message


def test_nobody_there_is_said_without_the_path():
    async def main() -> str:
        async with Receiver(answer(200)) as receiver:
            port = receiver.port
        with pytest.raises(ExchangeFailed) as caught:
            await SafePoster(allow_private_addresses=True)(f"http://127.0.0.1:{port}/secret-token", [], BODY, 2.0)
        return caught.value.message

    message = asyncio.run(main())
    assert "the connection failed" in message
    assert "secret-token" not in message


# our own network


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "0", "169.254.169.254", "10.0.0.1"]
)  # fmt: skip
def test_private_addresses_are_not_called_however_they_are_written(host):
    receiver, error = post(answer(200), f"http://{host}:{{port}}/hook", resolve=None)
    assert isinstance(error, ExchangeFailed)
    assert "not a public address" in error.message or "no address" in error.message
    assert receiver.connections == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.5", "169.254.169.254", "::1", "fd00:ec2::254"])
def test_a_name_that_leads_into_a_private_network_is_not_called(address):
    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34", address]

    receiver, error = post(answer(200), "http://hooks.test:{port}/", resolve=resolve)
    assert isinstance(error, ExchangeFailed)
    assert error.message == "hooks.test is not a public address, so it is not connected to"
    assert receiver.connections == 0


def test_the_address_that_was_checked_is_the_one_that_is_called():
    """A name that resolves differently the second time gains nothing: it is resolved once."""
    resolved: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        resolved.append(host)
        return ["127.0.0.1"] if len(resolved) == 1 else ["10.0.0.5"]

    receiver, reply = post(
        answer(200), "http://hooks.test:{port}/", resolve=resolve, is_public=lambda address: address == "127.0.0.1"
    )
    assert reply == PostReply(200)
    assert resolved == ["hooks.test"]
    assert f"Host: hooks.test:{receiver.port}" in receiver.calls[0][0]


@pytest.mark.parametrize(
    "url", ["ftp://hooks.test/", "http://user:pw@hooks.test/", "http://[::1/", "http://hooks.test:99999/"]
)
def test_other_urls_are_not_called(url):
    _, error = post(answer(200), url)
    assert isinstance(error, ExchangeFailed)
    assert error.is_definite
    assert "pw" not in error.message


def test_a_line_break_in_a_url_cannot_add_a_header():
    receiver, _ = post(answer(200), "http://127.0.0.1:{port}/a\r\nX-Evil: 1")
    assert "X-Evil: 1" not in receiver.calls[0][0].split("\r\n")


# TLS


@pytest.mark.parametrize(("host", "is_taken"), [("localhost", True), ("other.test", False)])
def test_a_certificate_has_to_be_of_a_known_authority_and_for_this_name(host, is_taken, certificate, monkeypatch):
    async def resolve(_: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async def main() -> tuple[PostReply | ExchangeFailed, int]:
        async with Receiver(answer(200), tls=server_side(certificate)) as receiver:
            poster = SafePoster(resolve=resolve, allow_private_addresses=True)
            try:
                return await poster(f"https://{host}:{receiver.port}/", [], BODY, 5.0), len(receiver.calls)
            except ExchangeFailed as error:
                return error, len(receiver.calls)

    outcome, calls = asyncio.run(main())
    assert isinstance(outcome, ExchangeFailed)
    assert "no secure connection" in outcome.message
    assert calls == 0
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("cert.pem")))
    outcome, calls = asyncio.run(main())
    assert (outcome == PostReply(200)) is is_taken
    assert calls == is_taken
