"""A server in a process of its own whose replies are big, so that the memory measured elsewhere is the adapter's alone.

Run as `python -m tests.support.big_server SIDE COUNT [comfyui|grpc]`: COUNT pictures of SIDE x SIDE incompressible pixels a
reply. It prints its address, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import random
import struct
import sys
import zlib
from typing import Any

import msgspec
import pybase64

from img_serving.backends.stub_server import Answer, Exchange, StubServer
from img_serving.media.png import SIGNATURE
from tests.support.fake_comfyui import FakeComfyUI
from tests.support.fake_worker import FakeWorker


def big_picture(side: int, seed: int = 0) -> bytes:
    """An RGB PNG of `side` x `side` pixels that does not compress: three bytes a pixel."""
    row = side * 3
    noise = random.Random(seed).randbytes(row)
    pixels = b"".join(b"\0" + noise[at % row :] + noise[: at % row] for at in range(side))
    parts = [SIGNATURE]
    header = struct.pack(">II", side, side) + bytes((8, 2, 0, 0, 0))
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(pixels, 0)), (b"IEND", b"")):
        parts += (struct.pack(">I", len(content)), kind, content, struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(parts)


class BigServer(StubServer):
    """Speaks as much of OpenAI's and A1111's protocols as a drawing needs."""

    def __init__(self, side: int, count: int) -> None:
        super().__init__()
        png = big_picture(side)
        text = pybase64.b64encode(png).decode()
        info = msgspec.json.encode({"all_seeds": list(range(7, 7 + count))}).decode()
        self.replies: dict[str, bytes] = {
            "/v1/images/generations": msgspec.json.encode({"created": 1, "data": [{"b64_json": text}] * count}),
            "/sdapi/v1/txt2img": msgspec.json.encode({"images": [text] * count, "parameters": {}, "info": info}),
        }

    async def answer(self, exchange: Exchange) -> Answer:
        """The same to everybody."""
        body = self.replies.get(exchange.path.partition("?")[0])
        return Answer(404, b"{}") if body is None else Answer(200, body)


async def _serve(server: Any) -> None:
    async with server:
        print(server.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


def _comfyui(side: int) -> FakeComfyUI:
    server = FakeComfyUI()
    server.file = big_picture(side)
    return server


class BigWorker(FakeWorker):
    """Draws big pictures over gRPC."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.file = big_picture(side)


def _server(side: int, count: int, kind: str = "") -> Any:
    if kind == "comfyui":
        return _comfyui(side)
    return BigWorker(side) if kind == "grpc" else BigServer(side, count)


if __name__ == "__main__":
    side, count, *kind = sys.argv[1:]
    asyncio.run(_serve(_server(int(side), int(count), *kind)))
