"""A stub gateway on 127.0.0.1 that answers what a test tells it to, and an environment without anybody's settings."""

from __future__ import annotations

import base64
import http.server
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _nobodys_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("IMG_SERVING")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@dataclass
class Asked:
    """One request that the stub saw."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class StubGateway:
    """Answers each request with the next of `replies` (the last one again and again)."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    replies: list[tuple[int, bytes, dict[str, str]]] = field(default_factory=list)

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        """`body` is bytes as they are, or something to send as JSON; header names have _ for -."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.replies.append((status, content, named))

    def refuse(self, status: int, message: str, **headers: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.answer(status, {"error": error}, **headers)

    def answer_pictures(self, count: int = 1, seed: int | None = 42, **headers: str) -> None:
        data: list[dict[str, Any]] = [
            {"b64_json": base64.b64encode(png(8, 6, shade)).decode()} for shade in range(count)
        ]
        if seed is not None:
            for index, one in enumerate(data):
                one["seed"] = seed + index
        reply = {"created": 1, "data": data, "size": "8x6", "output_format": "png"}
        self.answer(200, reply, **{"x_backend": "sd", "x_request_id": "req_1", **headers})


def png(width: int, height: int, shade: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes([shade]) * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def make_png() -> Callable[..., bytes]:
    return png


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubGateway]:
    stub = StubGateway()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            stub.asked.append(Asked(self.command, self.path, headers, json.loads(body) if body else None))
            status, content, named = stub.replies.pop(0) if len(stub.replies) > 1 else stub.replies[0]
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **named}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True

        do_GET = do_POST = do_DELETE = _serve  # noqa: N815 - the base class looks for these names

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("IMG_SERVING_URL", stub.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield stub
    server.shutdown()
    thread.join()
    server.server_close()
