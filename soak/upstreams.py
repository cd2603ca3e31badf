"""Upstream servers in a process of their own: they draw small real PNGs, finish what they began, and tell of each.

Every line out is written at once with one system call, so that nothing is lost, whenever somebody looks. It ends when its
standard input does, so it never outlives whoever started it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pybase64

from img_serving.backends.scripted import picture
from img_serving.backends.stub_server import Answer, Exchange, StubServer

REFUSED = "refuse-"
"""Prompts that begin so are refused, as a hosted API's safety system does: the job's own failure, and not the server's."""

_PART = re.compile(rb'name="(prompt|n|seed|size)"\r\n(?:[^\r\n]+\r\n)*\r\n(.*?)\r\n--', re.DOTALL)


def say(**fields: object) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


def fields_of(exchange: Exchange) -> dict[str, Any]:
    """What was asked for, of a JSON body or of a form."""
    if exchange.headers.get("content-type", "").startswith("multipart/"):
        return {name.decode(): value.decode() for name, value in _PART.findall(exchange.body)}
    return dict(exchange.json)


class Painter(StubServer):
    """One OpenAI-compatible server. A picture takes between `least` and `most` seconds.

    It draws to the end also when its client is gone, as a hosted API does, which then sends the bill. The prompt is the tag by
    which whoever asked tells the pictures apart.
    """

    def __init__(self, name: str, port: int, seconds: tuple[float, float], rng: random.Random) -> None:
        super().__init__(port=port)
        self.name = name
        self._least, self._most = seconds
        self._rng = rng
        self._drawing: set[asyncio.Task[Answer]] = set()

    async def answer(self, exchange: Exchange) -> Answer:
        """Pictures to a POST, the model's name to a GET."""
        self.exchanges.clear()  # each was told of: a long run must not keep them
        if exchange.method != "POST":
            data = [{"id": self.name, "object": "model", "created": 0, "owned_by": "soak"}]
            return Answer(200, json.dumps({"object": "list", "data": data}).encode())
        asked = fields_of(exchange)
        if asked["prompt"].startswith(REFUSED):
            error = {"message": "refused", "type": "invalid_request_error", "param": None, "code": "moderation_blocked"}
            return Answer(400, json.dumps({"error": error}).encode())
        say(event="asked", server=self.name, tag=asked["prompt"], at=time.monotonic())
        return await asyncio.shield(self._keep(self._draw(asked)))

    def _keep(self, drawing: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
        task = asyncio.ensure_future(drawing)
        assert isinstance(task, asyncio.Task)
        self._drawing.add(task)
        task.add_done_callback(self._drawing.discard)
        return task

    async def _draw(self, asked: dict[str, Any]) -> Answer:
        await asyncio.sleep(self._rng.uniform(self._least, self._most))
        width, height = (int(side) for side in str(asked.get("size", "32x32")).split("x"))
        count, seed = int(asked.get("n", 1)), int(asked.get("seed", 1))
        drawn = [picture(asked["prompt"], seed + index, width, height) for index in range(count)]
        say(event="drawn", server=self.name, tag=asked["prompt"], pictures=count, at=time.monotonic())
        data = [{"b64_json": pybase64.b64encode(png).decode()} for png in drawn]
        return Answer(200, json.dumps({"created": 1, "data": data}).encode())


async def main(plan: dict[str, Any]) -> None:
    """Serve until standard input ends."""
    rng = random.Random(plan["seed"])
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    async with AsyncExitStack() as servers:
        ports = {}
        for name, seconds in plan["servers"].items():
            server = await servers.enter_async_context(Painter(name, 0, tuple(seconds), rng))
            ports[name] = server.port
        say(event="ready", ports=ports)
        await orders.read()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
