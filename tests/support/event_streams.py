"""Reads a server's event streams byte by byte, more strictly than any client does."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

COMMENT = b":"


@dataclass(frozen=True, slots=True)
class Frame:
    """One event: the lines between two blank ones. `lines` are all of them but comments."""

    lines: tuple[bytes, ...]

    def values(self, name: str) -> list[str]:
        """Those of all lines `name: value`."""
        start = f"{name}: ".encode()
        return [line.removeprefix(start).decode() for line in self.lines if line.startswith(start)]

    @property
    def event(self) -> str:
        """Its name; a frame without one, or with two, fails the test."""
        (name,) = self.values("event")
        return name

    @property
    def data(self) -> dict[str, Any]:
        """Its data; a frame without, or with some that is no JSON object, fails the test."""
        (text,) = self.values("data")
        read = json.loads(text)
        assert isinstance(read, dict)
        return read


@dataclass(slots=True)
class Reply:
    """A reply as it came: `is_whole` is false where the connection ended before the body did."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    is_whole: bool = True
    arrivals: list[float] = field(default_factory=list)
    """When each piece came, in seconds since the request was sent."""

    @property
    def error(self) -> dict[str, Any]:
        """The error of a JSON reply."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found

    @property
    def blocks(self) -> list[tuple[bytes, ...]]:
        """What stands between blank lines."""
        return [tuple(block.split(b"\n")) for block in self.body.split(b"\n\n") if block]

    @property
    def frames(self) -> list[Frame]:
        """The events, without comments."""
        kept = [tuple(line for line in block if not line.startswith(COMMENT)) for block in self.blocks]
        return [Frame(lines) for lines in kept if lines]

    @property
    def comments(self) -> list[bytes]:
        """The lines that no client shows to anybody."""
        return [line for block in self.blocks for line in block if line.startswith(COMMENT)]

    @property
    def events(self) -> list[str]:
        """The names of the events, in order."""
        return [frame.event for frame in self.frames]

    @property
    def completed(self) -> list[dict[str, Any]]:
        """The data of the finished pictures."""
        return [frame.data for frame in self.frames if frame.event.endswith(".completed")]


def post(
    url: str,
    path: str,
    key: str,
    body: bytes | dict[str, Any],
    *,
    headers: dict[str, str] | None = None,
    on_piece: Callable[[Reply], None] | None = None,
) -> Reply:
    """Send a request and read all of its reply; `on_piece` sees the reply each time that something came."""
    sent = {"authorization": f"Bearer {key}", "content-type": "application/json", **(headers or {})}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    began = time.monotonic()
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), sent)
        answered = connection.getresponse()
        reply = Reply(answered.status, {name.lower(): value for name, value in answered.getheaders()})
        try:
            while piece := answered.read1():
                reply.body += piece
                reply.arrivals.append(time.monotonic() - began)
                if on_piece is not None:
                    on_piece(reply)
        except (http.client.IncompleteRead, ConnectionError):
            reply.is_whole = False
    finally:
        connection.close()
    return reply


def form(fields: dict[str, str], files: dict[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """A multipart body of text fields and PNG files, and the header that goes with it."""
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts += [
        f'name="{name}"; filename="{name}.png"\r\ncontent-type: image/png\r\n\r\n'.encode() + data
        for name, data in files.items()
    ]
    body = (
        b"".join(b"--limit\r\ncontent-disposition: form-data; " + part + b"\r\n" for part in parts) + b"--limit--\r\n"
    )
    return body, {"content-type": "multipart/form-data; boundary=limit"}
