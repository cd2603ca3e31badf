"""Big replies: an adapter holds a picture at most twice, as it came and as what proves it."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from img_serving.backends.a1111 import A1111Backend
from img_serving.backends.comfyui import ComfyUIBackend
from img_serving.backends.grpc import GrpcBackend
from img_serving.backends.openai import OpenAIBackend
from img_serving.domain.images import Artifact, Call, ImageRequest, Item
from img_serving.ports import Backend
from img_serving.transport.http import HttpTransport

SLACK_BYTES = 16 << 20
"""Parsers, buffers and the interpreter's own."""

ADAPTERS: dict[str, Callable[[str], Backend]] = {
    "openai": lambda url: OpenAIBackend(HttpTransport(url)),
    "a1111": lambda url: A1111Backend(HttpTransport(url), max_batch_size=8),
    "grpc": GrpcBackend,
    "comfyui": lambda url: ComfyUIBackend(HttpTransport(url), websocket_url=f"ws{url.removeprefix('http')}/ws"),
}


@contextmanager
def serving(side: int, count: int, *kind: str) -> Iterator[str]:
    """The address of a big server in another process."""
    command = [sys.executable, "-m", "tests.support.big_server", str(side), str(count), *kind]
    here = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.stdin.close()


@pytest.mark.parametrize(("side", "count"), [(4096, 1), (1024, 8)], ids=["16 megapixels", "8 pictures"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_big_reply_is_held_at_most_twice(name: str, side: int, count: int) -> None:
    make = ADAPTERS[name]
    request = ImageRequest("a fox", seed=7, n=count, width=side, height=side)
    call = Call(request, None, side, side, tuple(Item("a fox", None, 7 + index) for index in range(count)), 60.0)

    async def main(url: str) -> tuple[int, int]:
        backend = make(url)
        try:
            await backend.check(5.0)
            gc.collect()
            tracemalloc.start()
            drawn = await backend.generate(call, lambda progress: None)
            _, peak = tracemalloc.get_traced_memory()
            assert all(isinstance(one, Artifact) and (one.width, one.height) == (side, side) for one in drawn)
            assert len(drawn) == count
            return peak, sum(len(one.encoded or one.data or b"") for one in drawn if isinstance(one, Artifact))
        finally:
            tracemalloc.stop()
            await backend.close()

    with serving(side, count, *([name] if name in {"comfyui", "grpc"} else [])) as url:
        peak, size = asyncio.run(main(url))
    assert size > count * side * side * 3
    assert peak < 2 * size + SLACK_BYTES
