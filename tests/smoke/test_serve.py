"""The real program over real sockets: starts, serves, stops, starts again."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import sqlite3
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.support.programs import Program, serving

pytestmark = pytest.mark.smoke


def call(program: Program, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
    headers = {"Content-Type": "application/json"}
    if key or program.key:
        headers["Authorization"] = f"Bearer {key or program.key}"
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        reply = connection.getresponse()
        data = reply.read()
        assert reply.headers["x-request-id"]
        return reply.status, json.loads(data) if "json" in (reply.headers["content-type"] or "") else data
    finally:
        connection.close()


def test_it_starts_draws_and_stops_in_order(tmp_path: Path) -> None:
    with serving(tmp_path) as program:
        assert program.key
        status, body = call(
            program, "POST", "/v1/images/generations", {"prompt": "고요한 바다", "size": "96x64", "steps": 4}
        )
        assert status == 200
        with urllib.request.urlopen(body["data"][0]["url"], timeout=10) as picture:  # noqa: S310 - our own URL
            assert picture.headers["content-type"] == "image/png"
            assert picture.read().startswith(b"\x89PNG")
        before = time.monotonic()
        assert program.stop() == 0
        assert time.monotonic() - before < 5
    assert program.key not in program.log
    lines = [json.loads(line) for line in program.log.splitlines()]
    (line,) = [one for one in lines if one.get("path") == "/v1/images/generations"]
    assert line["outcome"] == "succeeded"


def test_the_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    with serving(tmp_path) as program:
        key = program.key
        assert key
    with serving(tmp_path) as program:
        assert program.key is None
        assert call(program, "GET", "/v1/models", key=key)[0] == 200
        assert call(program, "GET", "/v1/models", key="sk-wrong")[0] == 401
    for path in (tmp_path / "data").iterdir():
        assert key.encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0


def test_make_serve_puts_the_key_into_env_and_replaces_that_one_line(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("OTHER=1\nIMG_SERVING_API_KEY=stale\n# mine\n")
    env.chmod(0o644)
    with serving(tmp_path, environment={"IMG_SERVING_ENV_FILE": ".env"}) as program:
        lines = env.read_text().splitlines()
        assert lines[:2] == ["OTHER=1", "# mine"]
        assert lines[2:] == [f"IMG_SERVING_API_KEY={program.key}"]
        assert env.stat().st_mode & 0o777 == 0o600
        key = program.key
    with serving(tmp_path, environment={"IMG_SERVING_ENV_FILE": ".env"}) as program:
        assert program.key is None
        assert call(program, "GET", "/v1/models", key=key)[0] == 200
    env.unlink()
    with serving(tmp_path, environment={"IMG_SERVING_ENV_FILE": ".env"}) as program:
        assert program.key
        assert program.key != key
        assert call(program, "GET", "/v1/models", key=key)[0] == 200
        assert call(program, "GET", "/v1/models", key=program.key)[0] == 200


def test_after_a_kill_the_same_port_and_data_start_again(tmp_path: Path) -> None:
    with serving(tmp_path) as program:
        key, port = program.key, program.port
        body = {"name": "two", "protocol": "scripted", "models": ["m2"], "default_size": "16x16"}
        assert call(program, "POST", "/v1/backends", body)[0] == 201
        assert program.stop(signal.SIGKILL) == -signal.SIGKILL
    with serving(tmp_path, port=port) as program:
        assert call(program, "GET", "/v1/backends/two", key=key)[1]["models"] == ["m2"]
        assert call(program, "POST", "/v1/images/generations", {"prompt": "x", "model": "m2"}, key=key)[0] == 200
        assert call(program, "DELETE", "/v1/backends/two", key=key)[0] == 200
    with serving(tmp_path) as program:
        assert call(program, "GET", "/v1/backends/two", key=key)[0] == 404


def test_what_runs_is_finished_and_what_waits_is_answered_at_sigterm(tmp_path: Path) -> None:
    config = """
[server]
drain_timeout_seconds = 10
[auth]
api_keys = ["sk-test"]
[[backends]]
name = "slow"
protocol = "scripted"
default_size = "16x16"
[backends.scripted]
latency_seconds = 1.5
max_concurrency = 1
batch = "single"
"""
    with serving(tmp_path, config) as program:
        asked = []
        for _ in range(2):
            connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
            headers = {"Authorization": "Bearer sk-test", "Content-Type": "application/json"}
            connection.request(
                "POST", "/v1/images/generations", '{"prompt": "x", "response_format": "b64_json"}', headers
            )
            asked.append(connection)
            time.sleep(0.2)
        program.process.send_signal(signal.SIGTERM)
        statuses = []
        for one in asked:
            with closing(one):
                statuses.append(one.getresponse().status)
        assert statuses[0] == 200
        assert statuses[1] in {200, 503}
        assert program.process.wait(timeout=20) == 0


def test_a_hung_backend_does_not_hold_the_stop_longer_than_the_drain_time(tmp_path: Path) -> None:
    config = """
[server]
drain_timeout_seconds = 1
[auth]
api_keys = ["sk-test"]
[[backends]]
name = "hung"
protocol = "scripted"
[backends.scripted]
sequence = ["hang"]
"""
    with serving(tmp_path, config) as program:
        connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
        headers = {"Authorization": "Bearer sk-test", "Content-Type": "application/json"}
        connection.request("POST", "/v1/images/generations", '{"prompt": "x"}', headers)
        time.sleep(0.3)
        before = time.monotonic()
        program.process.send_signal(signal.SIGTERM)
        with closing(connection):
            reply = connection.getresponse()
            assert reply.status == 503
            assert json.loads(reply.read())["error"]["code"] == "draining"
        assert program.process.wait(timeout=10) == 0
        assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    "raw",
    [
        b"garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=range(11),
)
def test_what_is_not_http_is_an_error_object_too(raw: bytes, shared_program: Program) -> None:
    with shared_program.connect() as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(raw)
        data = b""
        with suppress(ConnectionResetError):
            while not data.endswith(b"}}") and (chunk := connection.recv(65536)):
                data += chunk
    if data:  # a peer that is cut off while it still sends may lose the answer
        head, _, body = data.partition(b"\r\n\r\n")
        assert re.match(rb"HTTP/1.1 4\d\d ", head), head
        assert b"x-request-id: " in head.lower()
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert call(shared_program, "GET", "/health")[0] == 200


def test_expect_100_continue_is_honoured_and_a_refused_caller_is_told_at_once(shared_program: Program) -> None:
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: 48\r\nExpect: 100-continue\r\n"
    )
    with shared_program.connect() as connection:
        connection.sendall(f"{head}Authorization: Bearer {shared_program.key}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b'{"prompt": "x", "size": "32x32", "steps": 1   } ')
        assert connection.recv(4000).startswith(b"HTTP/1.1 200 ")
    with shared_program.connect() as connection:
        connection.sendall(f"{head}\r\n".encode())
        reply = connection.recv(4000)
        assert reply.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" in reply.lower()


def test_a_refused_upload_gets_its_answer(shared_program: Program) -> None:
    with shared_program.connect() as connection:
        body = b"x" * 60_000
        connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + body)
        reply = b""
        while not reply.endswith(b"}}"):
            reply += connection.recv(4000)
        assert reply.startswith(b"HTTP/1.1 401 ")
        # small enough to have been read: the connection is still good
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4000).startswith(b"HTTP/1.1 200 ")


def test_who_is_refused_in_the_middle_of_an_upload_can_read_why(shared_program: Program) -> None:
    """A connection that is reset has lost the answer for some clients, Node's among them."""
    with shared_program.connect() as connection:
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n"
        connection.sendall(head + b"x" * 150_000)
        reply = b""
        while not reply.endswith(b"}}"):
            reply += connection.recv(4000)
        assert reply.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" in reply.lower()
        for _ in range(3):
            time.sleep(0.05)
            connection.sendall(b"x" * 1000)  # raises if it was reset
        with suppress(ConnectionResetError):
            assert connection.recv(4000) == b""  # it does end


def test_pipelined_requests_are_answered_in_order(shared_program: Program) -> None:
    with shared_program.connect() as connection:
        one = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
        two = b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n"
        last = b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        connection.sendall(one + two + one + last)
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
        assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", b"404", b"200", b"200"]


def test_a_taken_port_is_told_without_a_traceback(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AssertionError, match=f"cannot listen on 127.0.0.1:{port}") as caught:  # noqa: SIM117
            with serving(tmp_path, port=port):
                pass
        assert "Traceback" not in str(caught.value)


def test_a_corrupt_state_file_is_told_and_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    database = tmp_path / "data" / "img-serving.db"
    database.write_bytes(b"not a database" * 1000)
    with pytest.raises(AssertionError, match=r"img-serving\.db") as caught, serving(tmp_path):
        pass
    assert "Traceback" not in str(caught.value)
    assert database.read_bytes() == b"not a database" * 1000
    database.unlink()
    with serving(tmp_path) as program:
        assert program.key
    connection = sqlite3.connect(database)
    assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_big_body_in_one_write_with_its_head_is_no_big_head(shared_program: Program) -> None:
    prompt = "바다" * 14_000
    status, _ = call(shared_program, "POST", "/v1/images/generations", {"prompt": prompt, "size": "32x32", "steps": 1})
    assert status == 200
    body = json.dumps({"prompt": "x" * 900_000}).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {shared_program.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with shared_program.connect() as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(4000).startswith(b"HTTP/1.1 400 ")


def test_a_request_to_upgrade_is_answered_as_it_stands(shared_program: Program) -> None:
    body = b'{"prompt": "x", "size": "32x32", "steps": 1}'
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
        f"Authorization: Bearer {shared_program.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    for pieces in ([head.encode() + body], [head.encode(), body[:10], body[10:]]):
        with shared_program.connect() as connection:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.05)
            data = b""
            while chunk := connection.recv(65536):
                data += chunk
            assert data.startswith(b"HTTP/1.1 200 "), data
            assert b"connection: close" in data.lower()


def test_clients_that_leave_at_once_do_not_keep_it_from_stopping(tmp_path: Path) -> None:
    config = '[auth]\napi_keys = ["sk-test"]\n[[backends]]\nname = "up"\nprotocol = "openai"\nmodels = ["m"]\n'
    with socket.socket() as upstream:
        upstream.bind(("127.0.0.1", 0))
        upstream.listen(128)
        config += f'endpoints = ["http://127.0.0.1:{upstream.getsockname()[1]}"]\n'
        with serving(tmp_path, config) as program:
            body = b'{"prompt": "x", "model": "m"}'
            head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            head += b"Authorization: Bearer sk-test\r\nContent-Length: %d\r\n\r\n" % len(body)
            for _ in range(40):
                with program.connect() as connection:
                    connection.sendall(head + body)
            time.sleep(0.5)
            before = time.monotonic()
            assert program.stop() == 0
            assert time.monotonic() - before < 5


def test_pictures_that_are_being_encoded_at_sigterm_still_arrive(tmp_path: Path) -> None:
    with serving(tmp_path, '[auth]\napi_keys = ["sk-test"]\n') as program, ThreadPoolExecutor(2) as pool:
        fields = {
            "prompt": "바다",
            "size": "1200x1200",
            "steps": 1,
            "n": 2,
            "output_format": "webp",
            "response_format": "b64_json",
        }
        asked = [pool.submit(call, program, "POST", "/v1/images/generations", fields, "sk-test") for _ in range(2)]
        time.sleep(1.0)
        program.process.send_signal(signal.SIGTERM)
        for one in asked:
            status, body = one.result(timeout=30)
            assert status == 200, body
            assert len(body["data"]) == 2
        assert program.process.wait(timeout=20) == 0
