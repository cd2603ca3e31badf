"""The gRPC face of a worker: messages in, events out, errors as status codes."""

from __future__ import annotations

import asyncio
import hmac
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import chain
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from img_serving import __version__
from img_serving.domain.errors import (
    AttemptError,
    BackendRefusal,
    GatewayError,
    InvalidRequest,
    NotFound,
    QueueFull,
)
from img_serving.domain.images import Artifact, Call, ItemFailure, Progress
from img_serving.wire.generation import SERVICE, call_of, check_counts, model_message, progress_events, result_events
from img_serving.wire.pictures import event_bytes
from img_serving.wire.swarm import has_too_many_fields
from img_serving.wire.v1 import generation_pb2 as pb
from img_serving.worker.workshop import Workshop

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = tuple[tuple[str, str], ...]

WAITING_SECONDS: Final = 5.0
"""How often a call that waits for a slot is told that it is not forgotten. While it is drawn, only steps count."""

READING_SECONDS: Final = 60.0
"""How long a caller may take for one event of at most a mebibyte."""

PREVIEWS_KEPT: Final = 4
"""Of one picture, that nobody has read yet."""

NO_HURRY_SECONDS: Final = 86_400.0
_NOT_STARTED: Final = (("img-serving-not-started", "1"),)
_HEALTH: Final = "/grpc.health.v1.Health/"


class GenerationService:
    """`img_serving.v1.ImageGeneration` in front of one workshop."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self.is_draining = False

    async def Capabilities(self, request: pb.CapabilitiesRequest, context: Context) -> pb.CapabilitiesResponse:  # noqa: ARG002, N802 - gRPC's names
        """What the model can do, and how far it is loaded."""
        shop = self._workshop
        options, loading = shop.options, shop.loading
        return pb.CapabilitiesResponse(
            name="img-serving worker",
            version=__version__,
            models=[model_message(options.model, shop.capabilities)] if loading is None else [],
            any_model=options.any_model,
            slots=options.slots,
            queue_size=options.queue_size,
            loading=None
            if loading is None
            else pb.Loading(doing=loading.doing, share=loading.share, failed=loading.failed),
        )

    async def Generate(self, request: bytes, context: Context) -> None:  # noqa: N802
        """Draw a batch; `request` is a `GenerateRequest` as it came."""
        try:
            with self._workshop.seat() as is_free:
                if not is_free:
                    await _refuse(context, self._workshop.full())
                call = await self._taken(request, context)
                del request  # input images are held once
                await self._drawn(call, context)
        except _NobodyReads:
            # even this waits until somebody reads, but nothing is held meanwhile: neither pictures nor a seat
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"nobody read for {READING_SECONDS:g} s")

    async def _drawn(self, call: Call, context: Context) -> None:
        news = _News()
        drawing = asyncio.ensure_future(self._workshop.draw(call, news.progress, news.started))
        del call
        drawing.add_done_callback(lambda _: news.ring())
        try:
            while not drawing.done():
                if not await news.wait():
                    await _send(context, pb.GenerateEvent(progress=pb.Progress(done=0, total=0)))
                # a step that was the last is told by the picture itself
                for progress in news.take() if not drawing.done() else ():
                    for event in progress_events(progress):
                        await _send(context, event)
            results = await _result(drawing, context)
            for result in result_events(results):
                await _send(context, result)
        finally:
            # who cancelled the call does not want the rest; a task that is done does not mind
            drawing.cancel()

    async def _taken(self, raw: bytes, context: Context) -> Call:
        """The call, if it can be drawn; else the RPC ends here."""
        shop = self._workshop
        loading = shop.loading
        if self.is_draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is stopping", _NOT_STARTED)
        if loading is not None:
            told = f"the model is not loaded yet ({loading.share:.0%}, {loading.doing})"
            await context.abort(grpc.StatusCode.UNAVAILABLE, told, _NOT_STARTED)
        try:
            request = _unpacked(raw)
            can = shop.capabilities
            check_counts(request, max_items=can.max_batch_size, max_images=max(1, can.max_images))
            # a picture's structure is walked through, which can take a while: the loop has others to answer
            has_images = any(item.images for item in request.items)
            read = partial(call_of, request, timeout_seconds=NO_HURRY_SECONDS)
            call = await asyncio.to_thread(read) if has_images else read()
            shop.admit(call)
        except GatewayError as error:
            await _refuse(context, error)
        # says that the call was taken: whoever loses the connection from here on does not know how it ended
        await context.send_initial_metadata((("x-request-id", call.request_id),) if call.request_id else ())
        return call


def _unpacked(raw: bytes) -> pb.GenerateRequest:
    """Raises InvalidRequest: it is no such message, or one that would unpack to too much."""
    try:
        if has_too_many_fields(raw):
            raise InvalidRequest("the request has more fields than any that can be drawn")
        return pb.GenerateRequest.FromString(raw)
    except (ValueError, DecodeError):
        raise InvalidRequest("the request is no GenerateRequest of img_serving.v1") from None


async def _send(context: Context, event: pb.GenerateEvent | bytes) -> None:
    """Hand one event on. Who does not read for `READING_SECONDS` is given up: pictures are not held for ever."""
    try:
        async with asyncio.timeout(READING_SECONDS):
            await context.write(event)
    except TimeoutError:
        raise _NobodyReads from None


class _NobodyReads(Exception):
    """A caller does not take what it asked for."""


def handler_of(service: GenerationService) -> grpc.GenericRpcHandler:
    """The service for a server: as the generated code has it, but for events that are encoded already."""
    methods: dict[str, Any] = {
        "Generate": grpc.unary_stream_rpc_method_handler(service.Generate, None, event_bytes),
        "Capabilities": grpc.unary_unary_rpc_method_handler(
            service.Capabilities, pb.CapabilitiesRequest.FromString, pb.CapabilitiesResponse.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


class _News:
    """What a call has to tell, the latest of each kind: who reads slowly misses steps, and costs little memory.

    Of the previews of one picture the latest few are kept: a quick engine draws them all before any was read.
    """

    def __init__(self) -> None:
        self._bell = asyncio.Event()
        self._step: Progress | None = None
        self._previews: dict[int, deque[Progress]] = {}
        self._is_started = False

    def progress(self, progress: Progress) -> None:
        """A step was made, or a preview."""
        if progress.preview is not None:
            self._previews.setdefault(progress.preview.index, deque(maxlen=PREVIEWS_KEPT)).append(progress)
        else:
            self._step = progress
        self._bell.set()

    def started(self) -> None:
        """It waits no longer."""
        self._is_started = True

    def ring(self) -> None:
        """It is over."""
        self._bell.set()

    async def wait(self) -> bool:
        """Until there is something; False: it still waits for a slot, and has for `WAITING_SECONDS`."""
        if self._is_started:
            await self._bell.wait()
            return True
        try:
            async with asyncio.timeout(WAITING_SECONDS):
                await self._bell.wait()
        except TimeoutError:
            return self._is_started
        return True

    def take(self) -> list[Progress]:
        """Everything since the last time, in order."""
        self._bell.clear()
        news = [*chain.from_iterable(self._previews.values()), *([self._step] if self._step is not None else [])]
        self._previews.clear()
        self._step = None
        return sorted(news, key=lambda one: one.done)


async def _result(
    drawing: asyncio.Future[list[Artifact | ItemFailure]], context: Context
) -> list[Artifact | ItemFailure]:
    try:
        return await drawing
    except BackendRefusal as refusal:
        await _refuse(context, refusal.error)
    except AttemptError as error:
        await context.abort(grpc.StatusCode.INTERNAL, error.message)
    raise AssertionError  # `abort` raises


async def _refuse(context: Context, error: GatewayError) -> NoReturn:
    """End the RPC with what the error means."""
    trailers: Metadata = ()
    if error.param is not None:
        trailers += (("img-serving-param", error.param),)
    if error.code is not None:
        trailers += (("img-serving-code", error.code),)
    code = grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, NotFound):
        code = grpc.StatusCode.NOT_FOUND
    elif isinstance(error, QueueFull):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers += (("retry-after-ms", str(round(1000 * (error.retry_after_seconds or 1)))), *_NOT_STARTED)
    await context.abort(code, error.message, trailers)
    raise AssertionError  # `abort` raises


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets only those in who know the token. Health is for everybody: who watches over containers has none."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's own handler, or one that refuses."""
        details: Any = handler_call_details
        if details.method.startswith(_HEALTH):
            return await continuation(handler_call_details)
        given = next((value for name, value in details.invocation_metadata if name == "authorization"), "")
        if hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected):
            return await continuation(handler_call_details)
        # a handler of streams: it answers without waiting for a message, however large that is, or whether it ever comes
        return grpc.stream_stream_rpc_method_handler(_unknown_caller)


async def _unknown_caller(requests: Any, context: Context) -> None:  # noqa: ARG001 - gRPC's shape
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "metadata `authorization: Bearer …` is missing or wrong")
