"""A worker in this process, over a real socket, with an engine that does what a test wants."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from img_serving.backends.scripted import picture
from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.vocabulary import Vocabulary
from img_serving.engines.engine import Engine
from img_serving.wire.generation import SERVICE
from img_serving.wire.v1 import generation_pb2 as pb
from img_serving.wire.v1 import generation_pb2_grpc
from img_serving.worker.options import WorkerOptions
from img_serving.worker.program import serve

ABLE = Capabilities(
    operations=frozenset({"generation", "edit"}),
    batch="items",
    max_batch_size=4,
    honours=frozenset({"seed", "size", "num_inference_steps", "sampler"}),
    sizes=SizeRule(multiple=8, min_side=8, max_side=4096),
    default_size=(64, 48),
    max_steps=50,
    masks=True,
    samplers=Vocabulary(["euler"], {"Euler plain": "euler"}),
    formats=("png",),
)


@dataclass
class ToyEngine:
    """Draws scripted pictures in `steps` steps; `mishap` is raised, `gate` holds it until it is set."""

    mishap: BaseException | None = None
    steps: int = 3
    gate: threading.Event | None = None
    loads: int = 0
    batches: list[Any] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    drawing: threading.Event = field(default_factory=threading.Event)
    result: Callable[[Any], Any] | None = None

    def load(self) -> Any:
        yield 0.5, "the weights"
        self.loads += 1

    def capabilities(self) -> Capabilities:
        return ABLE

    def generate(self, batch: Any, on_step: Any) -> Any:
        self.batches.append(batch)
        self.drawing.set()
        try:
            while self.gate is not None and not self.gate.wait(0.005):
                on_step.check()
            for done in range(1, self.steps + 1):
                on_step(done, self.steps)
        except BaseException:
            self.stopped.set()
            raise
        if self.mishap is not None:
            raise self.mishap
        if self.result is not None:
            return self.result(batch)
        return [picture(one.prompt, one.seed, batch.width, batch.height) for one in batch.items]


@dataclass
class Running:
    """A worker that serves, and a way to talk to it."""

    engine: Any
    port: int
    stop: asyncio.Event
    serving: asyncio.Task[None]
    channel: grpc.aio.Channel
    lines: list[str]

    @property
    def stub(self) -> Any:
        return generation_pb2_grpc.ImageGenerationStub(self.channel)

    async def health(self, service: str = SERVICE) -> str:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

    async def draw(self, request: pb.GenerateRequest, **arguments: Any) -> list[pb.GenerateEvent]:
        return [event async for event in self.stub.Generate(request, **arguments)]

    async def metrics(self) -> str:
        """What the metrics page says, of a worker that has one."""
        url = next(one for one in self.lines if one.startswith("metrics: ")).removeprefix("metrics: ")
        return await asyncio.to_thread(_read, url)

    async def refused(self, request: pb.GenerateRequest, **arguments: Any) -> tuple[str, str, dict[str, Any]]:
        """Code, words and trailing metadata of a call that fails."""
        try:
            await self.draw(request, **arguments)
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details() or "", dict(error.trailing_metadata() or ())
        raise AssertionError("it was drawn")


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310 - our own
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        return str(reply.read().decode())


@asynccontextmanager
async def running(
    engine: Engine | None = None,
    *,
    wait_until_ready: bool = True,
    credentials: grpc.ChannelCredentials | None = None,
    **options: Any,
) -> AsyncIterator[Running]:
    made: Any = engine if engine is not None else ToyEngine()
    lines: list[str] = []
    listening, ready = asyncio.Event(), asyncio.Event()

    def announce(line: str) -> None:
        lines.append(line)
        if " listens on " in line:
            listening.set()
        if line.startswith("ready"):
            ready.set()

    stop = asyncio.Event()
    chosen = WorkerOptions(**{"port": 0, "model": "toy", **options})
    serving = asyncio.create_task(serve(lambda: made, chosen, announce=announce, stop=stop))
    await _first(listening.wait(), serving)
    port = next(
        int(line.split(" listens on ")[1].split()[0].rpartition(":")[2]) for line in lines if " listens on " in line
    )
    if credentials is not None:
        channel = grpc.aio.secure_channel(f"localhost:{port}", credentials)
    else:
        big = 300 * 1024 * 1024
        limits = [("grpc.max_receive_message_length", big), ("grpc.max_send_message_length", big)]
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", limits)
    try:
        if wait_until_ready:
            await _first(ready.wait(), serving)
        yield Running(made, port, stop, serving, channel, lines)
    finally:
        stop.set()
        await channel.close()
        await serving


async def _first(happens: Any, serving: asyncio.Task[None]) -> None:
    """Wait for something, or for the worker to fail."""
    waiting = asyncio.ensure_future(happens)
    await asyncio.wait({waiting, serving}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if serving.done():
        serving.result()


def request_of(*seeds: int, prompt: str = "a quiet harbour", **fields: Any) -> pb.GenerateRequest:
    items = [pb.Item(prompt=prompt, seed=seed) for seed in seeds]
    return pb.GenerateRequest(**{"width": 64, "height": 48, "items": items, "request_id": "req-1", **fields})
