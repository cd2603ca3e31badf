"""The adapter to one worker: calls in, a stream of events out, cancellation by leaving the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from msgspec import structs

from img_serving.backends.grpc.assembly import Assembly
from img_serving.backends.grpc.options import read_grpc_options
from img_serving.backends.http import patience, prompts_of
from img_serving.backends.rpc import Line, error_of
from img_serving.domain.capabilities import PARAMETERS, Capabilities
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Artifact, Call, ItemFailure, MediaType, Preview, Progress
from img_serving.media.sniff import sniff
from img_serving.ports import HealthReport, OnProgress
from img_serving.wire.generation import CAPABILITIES, CHUNK_BYTES, GENERATE, SERVICE, capabilities_of, message_of
from img_serving.wire.pictures import Carried, read_event
from img_serving.wire.v1 import generation_pb2 as pb

MAX_MODELS: Final = 500
MAX_CAPABILITIES_BYTES: Final = 4 * 1024 * 1024
SIGN_OF_LIFE_SECONDS: Final = 0.5
MAX_NAME_CHARS: Final = 256

UNKNOWN: Final = Capabilities(
    operations=frozenset({"generation", "edit", "variation"}),
    batch="items",
    honours=PARAMETERS - {"user", "moderation"},
    max_images=16,
    masks=True,
    max_concurrency=1,
    progress=True,
    previews=True,
    cancels=True,
)
"""Of a worker that has not told: whatever is asked for is tried, one picture a call and one call at a time."""


class GrpcBackend:
    """Draws with a worker that speaks `img_serving.v1`."""

    def __init__(
        self,
        url: str,
        *,
        options: Mapping[str, Any] | None = None,
        models: Sequence[str] = (),
        ca_file: str | None = None,
        tls_verify: bool = True,
        api_key: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
        proxy: str | None = None,
    ) -> None:
        """`models` are the configured ones: with them, no other is served. The rest is as `Line` has it.

        Raises:
            ValueError: an option is wrong, or the address is none that gRPC can have.
        """
        self._options = read_grpc_options(options or {})
        name = self._options.server_name
        self._line = Line(
            url,
            ca_file=ca_file,
            tls_verify=tls_verify,
            api_key=api_key,
            headers=headers,
            proxy=proxy,
            keepalive_seconds=self._options.keepalive_seconds,
            options=() if name is None else (("grpc.ssl_target_name_override", name),),
        )
        self._models = tuple(models)
        self._capabilities = UNKNOWN

    def __repr__(self) -> str:
        return f"<GrpcBackend {self._line.target}>"

    @property
    def protocol(self) -> str:
        """Always `grpc`."""
        return "grpc"

    @property
    def capabilities(self) -> Capabilities:
        """What the worker said at the last good check; before, `UNKNOWN`."""
        return self._capabilities

    async def generate(self, call: Call, on_progress: OnProgress) -> Sequence[Artifact | ItemFailure]:
        """Draw a batch. Cancelling cancels the RPC: the worker stops at its next step.

        Raises:
            AttemptError: `NOT_STARTED` where no connection came about or the worker has no room; `UNKNOWN` where it was cut, or
                nothing was heard for `call.timeout_seconds`; else `FAILED`.
            BackendRefusal: the request is at fault.
        """
        able = self._capabilities.of(call.model)
        width, height = able.sizes.fit(call.width, call.height)  # rounded here, so that it can be said
        fitting = structs.replace(_spelt(call, able), width=width, height=height)
        message = message_of(fitting, able.honoured(call.request.operation))
        telling = _Telling(on_progress)
        assembly = Assembly(call.items)
        async with (
            self._line.held(min(call.timeout_seconds, self._options.connect_timeout_ms / 1000)) as channel,
            patience(call.timeout_seconds) as heard,
        ):
            # no deserializer: pictures are read where they are
            generate: Any = channel.unary_stream(GENERATE, pb.GenerateRequest.SerializeToString, None)
            stream = generate(message, metadata=self._line.metadata_of(call))
            del message  # gRPC has its own copy of the input images
            try:
                async for raw in stream:
                    heard()
                    if self._take(read_event(raw), assembly, call, telling):
                        return assembly.finished()
            except ValueError as error:
                raise AttemptError(Outcome.FAILED, f"the worker does not speak {SERVICE}: {error}") from None
            except grpc.aio.AioRpcError as error:
                raise self._meaning(error, call) from None
            finally:
                stream.cancel()
        raise AttemptError(Outcome.FAILED, "the worker ended its answer without saying that it was done")

    async def check(self, timeout_seconds: float) -> HealthReport:
        """Ask for health, then for what the worker can do. A worker that still loads is not healthy yet."""
        try:
            async with patience(timeout_seconds), self._line.held(timeout_seconds) as channel:
                told = await self._told(channel)
                healthy, detail = await self._health(channel)
        except AttemptError as error:
            return HealthReport(healthy=False, detail=error.message)
        except grpc.aio.AioRpcError as error:
            return HealthReport(healthy=False, detail=_said(self._meaning(error)))
        if told is None:
            return HealthReport(healthy=healthy, detail=detail, found="a worker of another version")
        if told.HasField("loading"):
            loading = told.loading
            detail = self._line.redactor.clean(
                f"loading failed: {loading.failed}"
                if loading.failed
                else f"loading: {loading.share:.0%}, {loading.doing}"
            )
            return HealthReport(healthy=False, detail=detail)
        models = self._learn(told)
        found = self._line.redactor.clean(f"{told.name or 'a worker'} {told.version}".strip())
        return HealthReport(healthy=healthy, detail=detail, models=models, found=found)

    async def close(self) -> None:
        """Close the connection."""
        await self._line.close()

    def _take(self, event: pb.GenerateEvent | Carried, assembly: Assembly, call: Call, telling: _Telling) -> bool:
        """Act on one event; True: it was the last."""
        if isinstance(event, Carried):
            if isinstance(event.head, pb.Picture):
                assembly.picture(event.head, event.data)
            else:
                assembly.chunk(event.head.index, event.data)
            telling.alive()
            return False
        kind = event.WhichOneof("event")
        if kind == "progress":
            telling.progress(event.progress.done, event.progress.total)
            return False
        if kind == "preview" and call.previews:
            telling.preview(_preview_of(event.preview, len(call.items)))
        elif kind == "picture":
            assembly.picture(event.picture, event.picture.data)
        elif kind == "chunk":
            assembly.chunk(event.chunk.index, event.chunk.data)
        elif kind == "error":
            assembly.error(event.error, self._line.redactor.clean(event.error.message, prompts_of(call)))
        telling.alive()
        return kind == "done"

    async def _told(self, channel: grpc.aio.Channel) -> pb.CapabilitiesResponse | None:
        """What the worker says of itself; None: it has no such method."""
        # no deserializer: what is too large to be an answer is not unpacked
        ask: Any = channel.unary_unary(CAPABILITIES, pb.CapabilitiesRequest.SerializeToString, None)
        try:
            raw = await ask(pb.CapabilitiesRequest(), metadata=self._line.metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return None
            raise
        if len(raw) > MAX_CAPABILITIES_BYTES:
            raise AttemptError(Outcome.FAILED, f"what the worker can do is told in {len(raw)} bytes: too many")
        try:
            return pb.CapabilitiesResponse.FromString(raw)
        except DecodeError:
            raise AttemptError(Outcome.FAILED, f"the worker does not speak {SERVICE}") from None

    async def _health(self, channel: grpc.aio.Channel) -> tuple[bool, str]:
        """The standard health service's word, where there is one."""
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for name in (SERVICE, ""):
            try:
                reply = await stub.Check(health_pb2.HealthCheckRequest(service=name), metadata=self._line.metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    continue  # it knows itself only as a whole
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    break
                raise
            if reply is None:  # gRPC's way to say that it could not be read
                return False, "its health service does not speak grpc.health.v1"
            names = dict(health_pb2.HealthCheckResponse.ServingStatus.items())
            status = next((word for word, value in names.items() if value == reply.status), str(reply.status))
            return status == "SERVING", f"health: {status}"
        return True, "it answers, and has no health service"

    def _learn(self, told: pb.CapabilitiesResponse) -> tuple[str, ...]:
        """Take in what it can do; its models."""
        any_model = told.any_model and not self._models
        able = {
            one.id: capabilities_of(one, slots=told.slots, any_model=any_model)
            for one in told.models[:MAX_MODELS]
            if one.id and len(one.id) <= MAX_NAME_CHARS and one.id.isprintable()
        }
        if not able:
            return ()
        first, *others = able.values()
        learned = first if all(one == first for one in others) else replace(first, variants=able)
        if learned != self._capabilities:
            self._capabilities = learned
        return tuple(able)

    def _meaning(self, error: grpc.aio.AioRpcError, call: Call | None = None) -> AttemptError | BackendRefusal:
        return error_of(error, self._line.redactor, () if call is None else prompts_of(call))


class _Telling:
    """What the gateway is told of a call: progress that never runs back, and now and then a sign of life between steps.

    Every event of a worker's is one; but only what the gateway hears renews its own time-out.
    """

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._clock = asyncio.get_running_loop().time
        self._latest = Progress(0, 1)
        self._told_at = self._clock()

    def progress(self, done: int, total: int) -> None:
        """So many steps are done."""
        total = max(1, total, self._latest.done)
        self._tell(Progress(max(self._latest.done, min(done, total)), total))

    def preview(self, preview: Preview | None) -> None:
        """It looks like this by now; None: nothing that can be shown."""
        if preview is not None:
            self._on_progress(structs.replace(self._latest, preview=preview))
            self._told_at = self._clock()

    def alive(self) -> None:
        """Something came that is no progress."""
        if self._clock() - self._told_at >= SIGN_OF_LIFE_SECONDS:
            self._tell(self._latest)

    def _tell(self, progress: Progress) -> None:
        self._latest, self._told_at = progress, self._clock()
        self._on_progress(progress)


def _spelt(call: Call, able: Capabilities) -> Call:
    """With the worker's own names of samplers and schedulers."""
    request = call.request
    sampler = able.samplers.find(request.sampler) if able.samplers is not None and request.sampler else None
    scheduler = able.schedulers.find(request.scheduler) if able.schedulers is not None and request.scheduler else None
    if sampler in {None, request.sampler} and scheduler in {None, request.scheduler}:
        return call
    own = structs.replace(request, sampler=sampler or request.sampler, scheduler=scheduler or request.scheduler)
    return structs.replace(call, request=own)


def _preview_of(preview: pb.Preview, items: int) -> Preview | None:
    """An unfinished picture, if it is one."""
    media_type: MediaType | None = sniff(preview.data)
    if media_type is None or len(preview.data) > CHUNK_BYTES or preview.index >= items:
        return None
    # also false for NaN, which no comparison is true of
    known = preview.HasField("share") and 0.0 <= preview.share <= 1.0
    return Preview(preview.data, media_type, preview.index, preview.share if known else None)


def _said(error: AttemptError | BackendRefusal) -> str:
    return error.message if isinstance(error, AttemptError) else error.error.message
