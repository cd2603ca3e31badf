"""A worker that speaks `img_serving.v1` over a real socket and misbehaves when told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from img_serving.backends.scripted import picture
from img_serving.backends.scripted_server import HUGE_BYTES
from img_serving.wire.generation import CHUNK_BYTES, SERVICE
from img_serving.wire.v1 import generation_pb2 as pb
from img_serving.wire.v1 import generation_pb2_grpc

CODES = {
    "refuse": (grpc.StatusCode.INVALID_ARGUMENT, (("img-serving-param", "size"),)),
    "moderation": (grpc.StatusCode.INVALID_ARGUMENT, (("img-serving-code", "moderation_blocked"),)),
    "model_not_found": (grpc.StatusCode.NOT_FOUND, ()),
    "busy": (grpc.StatusCode.RESOURCE_EXHAUSTED, (("retry-after-ms", "7000"),)),
    "busy_silent": (grpc.StatusCode.RESOURCE_EXHAUSTED, ()),
    "draining": (grpc.StatusCode.UNAVAILABLE, (("img-serving-not-started", "1"),)),
    "unavailable": (grpc.StatusCode.UNAVAILABLE, ()),
    "401": (grpc.StatusCode.UNAUTHENTICATED, ()),
    "403": (grpc.StatusCode.PERMISSION_DENIED, ()),
    "500": (grpc.StatusCode.INTERNAL, ()),
    "unimplemented": (grpc.StatusCode.UNIMPLEMENTED, ()),
    "unknown": (grpc.StatusCode.UNKNOWN, ()),
    "deadline": (grpc.StatusCode.DEADLINE_EXCEEDED, ()),
}
"""What ends a call at once, and what goes with it."""

MODEL = pb.Model(
    id="toy",
    operations=[pb.OPERATION_GENERATION, pb.OPERATION_EDIT, pb.OPERATION_VARIATION],
    max_batch_size=8,
    honours=["negative_prompt", "seed", "num_inference_steps", "guidance_scale", "size", "strength", "sampler"],
    sizes=pb.Sizes(multiple=8, rounding=pb.ROUNDING_DOWN, min_side=8, max_side=2048),
    default_width=64,
    default_height=48,
    max_steps=50,
    max_images=2,
    masks=True,
    samplers=["euler", "euler_a"],
    formats=["png"],
    previews=True,
)


class FakeWorker(generation_pb2_grpc.ImageGenerationServicer, health_pb2_grpc.HealthServicer):
    """`step` is what every call meets; `requests` and `metadata` are what came."""

    def __init__(self, step: str = "ok") -> None:
        self.step = step
        self.words = "as told"
        self.file: bytes | None = None  # what is drawn, whatever is asked for
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.cancelled = 0
        self.in_flight = 0
        self.told = pb.CapabilitiesResponse(name="toy worker", version="1", models=[MODEL], slots=2)
        self.statuses = {SERVICE: health_pb2.HealthCheckResponse.SERVING}
        self.has_health = self.has_capabilities = True
        self.options: tuple[tuple[str, int], ...] = ()
        self.credentials: grpc.ServerCredentials | None = None
        self.port = 0
        self.gate = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    @property
    def echo(self) -> str:
        """What its errors say."""
        return self.words

    @echo.setter
    def echo(self, words: str) -> None:
        self.words = words

    @property
    def seen(self) -> list[Any]:
        """The calls that came, each with its `metadata`."""
        return [SimpleNamespace(metadata=one) for one in self.metadata]

    @property
    def texts(self) -> str:
        """Every prompt that came, a line each."""
        items = [item for request in self.requests for item in request.items]
        return "\n".join(text for item in items for text in (item.prompt, item.negative_prompt))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        big = 300 * 1024 * 1024
        limits = (("grpc.max_receive_message_length", big), ("grpc.max_send_message_length", big))
        server = self._server = grpc.aio.server(options=(*limits, ("grpc.so_reuseport", 0), *self.options))
        generation_pb2_grpc.add_ImageGenerationServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self, server)
        address = f"127.0.0.1:{self.port}"
        if self.credentials is not None:
            self.port = server.add_secure_port(address, self.credentials)
        else:
            self.port = server.add_insecure_port(address)
        await server.start()

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def Check(self, request: Any, context: Any) -> Any:
        if not self.has_health:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        if request.service not in self.statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, "")
        return health_pb2.HealthCheckResponse(status=self.statuses[request.service])

    async def Capabilities(self, request: Any, context: Any) -> Any:
        if not self.has_capabilities:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        return self.told

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateEvent]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.in_flight += 1
        try:
            if self.step in CODES:
                code, trailers = CODES[self.step]
                await context.abort(code, self.words, trailers)
            await context.send_initial_metadata(())
            async for event in self._drawn(request):
                yield event
        except (asyncio.CancelledError, GeneratorExit):  # the second where it was just handing an event on
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1

    async def _drawn(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        step = self.step
        for done in (1, 2, 3):
            if request.previews:
                shown = picture("a preview", done, 16, 16)
                yield pb.GenerateEvent(preview=pb.Preview(index=0, data=shown, media_type="image/png"))
            yield pb.GenerateEvent(progress=pb.Progress(done=done, total=3))
            if step == "hang":
                await asyncio.Event().wait()
            if step == "gate":
                await self.gate.wait()
        count = len(request.items) - (step == "few")
        for index in range(count):
            item = request.items[index]
            if step == "item_error" and index == 0:
                yield pb.GenerateEvent(error=pb.ItemError(index=0, message=self.words, refused=True))
                continue
            side = 32 if step == "wrong_size" else request.width
            high = 32 if step == "wrong_size" else request.height
            data = self.file or picture(item.prompt, item.seed, side, high)
            for event in self._sent(index, data, item):
                yield event
        if step == "extra":
            yield pb.GenerateEvent(picture=pb.Picture(index=count, data=picture("x", 1, 8, 8)))
        if step != "no_done":
            yield pb.GenerateEvent(done=pb.Done())

    def _sent(self, index: int, data: bytes, item: pb.Item) -> list[pb.GenerateEvent]:
        step = self.step
        if step == "junk":
            data = b"GIF89a, or so they say"
        if step == "truncated":
            data = data[: len(data) // 2]
        if step == "huge":
            data += bytes(HUGE_BYTES)
        size = len(data) + {"short": 10, "long": -10}.get(step, 0)
        if step == "boast":
            size = 2**40
        if step == "drip":
            events = [pb.GenerateEvent(picture=pb.Picture(index=index, media_type="image/png", size_bytes=size))]
            return events + [
                pb.GenerateEvent(chunk=pb.Chunk(index=index, data=data[at : at + 1])) for at in range(size)
            ]
        head = pb.Picture(index=index, media_type="image/png", size_bytes=size, data=data[:CHUNK_BYTES])
        if step == "told":
            head.seed, head.revised_prompt = item.seed + 100, "a better one"
            head.ignored.append("guidance_scale")
        events = [pb.GenerateEvent(picture=head)]
        for start in range(CHUNK_BYTES, len(data), CHUNK_BYTES):
            chunk = pb.Chunk(index=index, data=data[start : start + CHUNK_BYTES])
            events.append(pb.GenerateEvent(chunk=chunk))
        if step == "twice":
            events.append(pb.GenerateEvent(picture=head))
        if step == "stray":
            events.insert(0, pb.GenerateEvent(chunk=pb.Chunk(index=index, data=b"x")))
        return events
