"""Calls an ASGI application in process, as a server would."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    header_list: list[tuple[bytes, bytes]] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, whose four keys every failure has."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str)
        assert error["message"]
        assert isinstance(error["type"], str)
        return dict(error)


class Client:
    def __init__(self, app: Any, key: str | None = None, address: str = "127.0.0.1") -> None:
        self.app = app
        self.key = key
        self.address = address

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
        chunks: list[bytes] | None = None,
        leave: asyncio.Event | None = None,
    ) -> Reply:
        """`leave` set: the client disconnects. A body that is not bytes travels as JSON."""
        data = raw if raw is not None else json.dumps(body).encode() if body is not None else b""
        sent = {"host": "gateway.test"}
        if body is not None:
            sent["content-type"] = "application/json"
        if chunks is None and data:
            sent["content-length"] = str(len(data))
        if self.key is not None:
            sent["authorization"] = f"Bearer {self.key}"
        sent.update({name.lower(): value for name, value in (headers or {}).items()})
        target, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(target),
            "raw_path": target.encode(),
            "query_string": query.encode(),
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent.items()],
            "client": (self.address, 50000),
            "server": ("127.0.0.1", 8080),
        }
        pieces = list(chunks) if chunks is not None else [data]
        started: list[dict[str, Any]] = []
        out: list[bytes] = []
        done = asyncio.Event()
        gone = leave if leave is not None else asyncio.Event()

        async def receive() -> dict[str, Any]:
            if pieces:
                piece = pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
            waits = [asyncio.ensure_future(gone.wait()), asyncio.ensure_future(done.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in waits:
                    one.cancel()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                started.append(message)
            else:
                assert started, "a body before its head"
                out.append(bytes(message.get("body", b"")))
                if not message.get("more_body"):
                    done.set()

        await self.app(scope, receive, send)
        if not started:
            return Reply(0, {}, b"")
        head = started[0]
        names = {name.decode(): value.decode("latin-1") for name, value in head["headers"]}
        content = b"".join(out)
        if method != "HEAD" and "content-length" in names:
            assert int(names["content-length"]) == len(content)
        return Reply(head["status"], names, content, head["headers"])

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Reply:
        return await self.request("POST", path, body=body, **options)

    async def draw(self, **fields: Any) -> Reply:
        return await self.post("/v1/images/generations", {"prompt": "a lighthouse", **fields})
