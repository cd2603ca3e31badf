"""The client of the commands: where it calls, and what it says when that goes wrong."""

from __future__ import annotations

import http.client
import socket
from typing import TYPE_CHECKING

import pytest

from img_serving.cli import client, main
from img_serving.cli.client import Client
from img_serving.cli.endings import CommandFailed

if TYPE_CHECKING:
    from tests.cli.conftest import StubGateway

Out = pytest.CaptureFixture[str]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ("localhost:9000", "http://localhost:9000"),
        ("http://localhost:9000/", "http://localhost:9000"),
        ("http://localhost:9000/v1", "http://localhost:9000"),
        ("https://example.com/images/v1/", "https://example.com/images"),
    ],
)
def test_the_url_may_be_written_in_many_ways(given: str, called: str) -> None:
    assert Client(given, None).url == called


@pytest.mark.parametrize(
    "url", ["ftp://a", "http://me:secret@a", "http://a?x=1", "http://", "http://a:port", "http://a b"]
)
def test_a_url_that_cannot_be_is_wrong_usage_and_not_repeated(url: str) -> None:
    with pytest.raises(CommandFailed, match="the gateway's URL") as failed:
        Client(url, None)
    assert failed.value.exit_code == 2
    assert "secret" not in str(failed.value)


def test_a_path_prefix_is_kept(gateway: StubGateway) -> None:
    gateway.answer(200, {})
    Client(gateway.url + "/images/v1", None).call("GET", "/v1/models")
    assert gateway.asked[0].path == "/images/v1/models"


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(capsys: Out) -> None:
    assert main(["backends", "list", "--api-key", "sk-secret\nX: y"]) == 2
    err = capsys.readouterr().err
    assert "API key" in err
    assert "secret" not in err


def test_nobody_listening_hints_at_the_start(capsys: Out) -> None:
    assert main(["backends", "list", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    err = capsys.readouterr().err
    assert "is the gateway running?" in err
    assert "make serve" in err
    assert "Traceback" not in err


def test_a_refused_key_is_hinted_at_and_never_shown(gateway: StubGateway, capsys: Out) -> None:
    gateway.refuse(401, "that API key is not known here", x_request_id="req_1")
    assert main(["backends", "list", "--api-key", "sk-secret"]) == 1
    err = capsys.readouterr().err
    assert "that API key is not known here (401, request req_1)" in err
    assert "hint: the key that was sent" in err
    assert "sk-secret" not in err


def test_a_missing_key_is_hinted_at(gateway: StubGateway, capsys: Out) -> None:
    gateway.refuse(401, "an API key is needed")
    assert main(["backends", "list"]) == 1
    assert "--api-key" in capsys.readouterr().err


def test_a_key_that_may_not_is_hinted_at(gateway: StubGateway, capsys: Out) -> None:
    gateway.refuse(403, "this route needs an admin key")
    assert main(["backends", "list"]) == 1
    assert "role admin" in capsys.readouterr().err


def test_a_busy_gateway_says_when_to_come_back(gateway: StubGateway, capsys: Out) -> None:
    gateway.refuse(503, "the queue is full", retry_after="7")
    assert main(["backends", "list"]) == 1
    assert "try again in 7 s" in capsys.readouterr().err


def test_a_redirect_names_the_address_to_call(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(301, b"", location="https://example.com/v1/backends")
    assert main(["backends", "list"]) == 1
    assert "https://example.com" in capsys.readouterr().err


def test_an_error_page_of_a_proxy_is_told_by_its_status(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(502, b"<html>Bad Gateway</html>")
    assert main(["backends", "list"]) == 1
    assert "the server answered 502 Bad Gateway" in capsys.readouterr().err


def test_an_answer_cut_short_is_told(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, b"{", content_length="100")
    gateway.replies[0][2]["Content-Length"] = "100"
    assert main(["backends", "list"]) == 1
    assert "closed the connection" in capsys.readouterr().err


def test_a_silent_gateway_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert main(["backends", "list", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}"]) == 1
    assert "did not answer within" in capsys.readouterr().err


def test_something_that_is_not_http_is_told() -> None:
    failure = http.client.UnknownProtocol("HTTP/9")
    assert "does not answer in HTTP" in Client("http://a", None)._unreachable(failure, 1.0)


def test_what_a_server_says_cannot_command_the_terminal(gateway: StubGateway, capsys: Out) -> None:
    gateway.refuse(400, "bad \x1b]0;title\x07")
    assert main(["backends", "list"]) == 1
    assert "\x1b" not in capsys.readouterr().err
