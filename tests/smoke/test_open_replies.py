"""Replies of unknown length over real sockets: streams and trickled JSON, to HTTP/1.1 and to HTTP/1.0, and cut ones."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.frames import frames_of
from tests.support.programs import Program, serving

pytestmark = pytest.mark.smoke

CONFIG = """
[auth]
api_keys = ["sk-test"]
[server]
keepalive_after_seconds = 0.3
[[backends]]
name = "slow"
protocol = "scripted"
[backends.scripted]
latency_seconds = 1.2
steps = 6
previews = true
models = ["slow"]
[[backends]]
name = "failing"
protocol = "scripted"
[backends.scripted]
latency_seconds = 0.8
sequence = ["fail"]
models = ["failing"]
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serving(tmp_path_factory.mktemp("gateway"), CONFIG) as running:
        yield running


def post(
    program: Program, body: dict[str, Any], version: str = "1.1", path: str = "/v1/images/generations"
) -> socket.socket:
    drawn = body if path == "/v1/jobs" else {"prompt": "x", "size": "64x64", **body}
    raw = json.dumps(drawn).encode()
    connection = program.connect()
    head = (
        f"POST {path} HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer sk-test\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    connection.sendall(head.encode() + raw)
    return connection


def read_all(connection: socket.socket, until: bytes = b"") -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
        if until and data.endswith(until):
            break
    return data


def dechunked(body: bytes) -> bytes:
    out = b""
    while True:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert rest == b"\r\n"
            return out
        assert rest[length : length + 2] == b"\r\n"
        out += rest[:length]
        body = rest[length + 2 :]


def test_a_stream_is_chunked_and_the_connection_is_kept(program: Program) -> None:
    with post(program, {"model": "slow", "stream": True, "partial_images": 2}) as connection:
        head, _, body = read_all(connection, b"0\r\n\r\n").partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        assert b"content-length" not in head
        assert [frame.event.rpartition(".")[2] for frame in frames_of(dechunked(body))] == ["partial_image"] * 2 + [
            "completed"
        ]
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_events_come_as_they_happen(program: Program) -> None:
    with post(program, {"model": "slow", "stream": True, "partial_images": 1}) as connection:
        data = b""
        began = time.monotonic()
        while b"partial_image_index" not in data:
            data += connection.recv(65536)
        assert b".completed" not in data
        while b".completed" not in data:
            data += connection.recv(65536)
        assert time.monotonic() - began < 10


def test_waiting_json_trickles_and_parses(program: Program) -> None:
    with post(program, {"model": "slow"}) as connection:
        head, _, body = read_all(connection, b"0\r\n\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"content-type: application/json" in head
        text = dechunked(body)
        assert text.startswith(b" ")
        assert json.loads(text)["data"]
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("body", [{}, {"stream": True}])
def test_http_1_0_gets_the_same_without_chunks_to_the_end_of_the_connection(
    program: Program, body: dict[str, Any]
) -> None:
    with post(program, {"model": "slow", **body}, "1.0") as connection:
        head, _, rest = read_all(connection).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert b"connection: close" in head
        if body:
            assert frames_of(rest)[-1].event == "image_generation.completed"
        else:
            assert json.loads(rest)["data"]


def test_a_failure_after_the_head_has_no_end(program: Program) -> None:
    with post(program, {"model": "failing"}) as connection:
        try:
            data = read_all(connection)
        except ConnectionResetError:
            return
        assert b"200 OK" in data
        assert not data.endswith(b"0\r\n\r\n")


def test_a_client_that_leaves_its_stream_is_noticed(program: Program) -> None:
    with post(program, {"model": "slow", "stream": True, "partial_images": 3, "prompt": "left alone"}) as connection:
        connection.recv(100)
    until = time.monotonic() + 5
    while 'attempts_total{backend="slow",outcome="cancelled"}' not in metrics(program):
        assert time.monotonic() < until
        time.sleep(0.05)


def metrics(program: Program) -> str:
    with program.connect() as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return read_all(connection).decode()


def test_head_of_a_stream_is_a_head_and_nothing_else(program: Program) -> None:
    drawn = {"prompt": "x", "size": "64x64", "model": "slow"}
    with post(program, {"operation": "generation", "body": drawn}, path="/v1/jobs") as connection:
        job_id = json.loads(connection.recv(65536).partition(b"\r\n\r\n")[2])["id"]
    with program.connect() as connection:
        head = f"HEAD /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-test\r\n\r\n"
        connection.sendall(head.encode() + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        first, second, body = read_all(connection, b"}").split(b"\r\n\r\n")
        assert b"text/event-stream" in first
        assert second.startswith(b"HTTP/1.1 200")
        assert json.loads(body)["status"] == "ok"
        assert status_of(program, job_id) == "succeeded"


def test_jobs_survive_a_stop_and_a_kill(tmp_path: Path) -> None:
    config = CONFIG.replace("latency_seconds = 1.2", "latency_seconds = 0.5")
    ids: list[str] = []
    for round_number in range(3):
        with serving(tmp_path, config) as running:
            for _ in range(2):
                body = {"operation": "generation", "body": {"prompt": "x", "size": "64x64", "model": "slow"}}
                with post(running, body, path="/v1/jobs") as connection:
                    reply = connection.recv(65536)
                assert b" 202 " in reply.split(b"\r\n", 1)[0], reply
                ids.append(json.loads(reply.partition(b"\r\n\r\n")[2])["id"])
            if round_number == 0:
                running.process.kill()
                running.process.wait()
            elif round_number == 1:
                running.stop()
            else:
                for job_id in ids:
                    assert status_of(running, job_id) == "succeeded"


def status_of(program: Program, job_id: str) -> str:
    until = time.monotonic() + 20
    while True:
        with program.connect() as connection:
            head = f"GET /v1/jobs/{job_id} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-test\r\nConnection: close"
            connection.sendall(head.encode() + b"\r\n\r\n")
            record = json.loads(read_all(connection).partition(b"\r\n\r\n")[2])
        if record["status"] not in {"queued", "running"} or time.monotonic() > until:
            return str(record["status"])
        time.sleep(0.1)
