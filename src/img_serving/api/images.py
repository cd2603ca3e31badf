"""`/v1/images/generations`: the hot route."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import msgspec

from img_serving.api.bodies import check_json_type, decode_json, read_raw
from img_serving.api.edits import EditBody, body_of_form, pictures_of, to_edit
from img_serving.api.exchange import ClientDisconnected, Exchange, Reply
from img_serving.api.generation import (
    CHOICES,
    Bounds,
    ClosedGenerationBody,
    GenerationBody,
    refuse_unknown,
    response_format_of,
    to_request,
    unknown_fields,
    with_unknown,
)
from img_serving.api.multipart import read_form
from img_serving.api.services import Services
from img_serving.domain.errors import GatewayError, NotFound, QueueFull
from img_serving.domain.images import ImageRequest
from img_serving.domain.jobs import Job
from img_serving.gateway.delivery import ResponseFormat

HELD_UPLOADS = 16
"""Bodies of edits in memory at most, in units of the largest one: a queue of uploads must not fill the machine."""

EDIT_FIELDS = frozenset(EditBody.__struct_fields__)


TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,256})?")
"""W3C Trace Context, 3.2: what is passed on."""


class Images:
    """Handlers of the image routes."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._decoder = msgspec.json.Decoder(GenerationBody)
        self._closed_decoder = msgspec.json.Decoder(ClosedGenerationBody)
        config = services.config
        self._limit = config.server.max_body_bytes
        self._edit_decoder = msgspec.json.Decoder(EditBody)
        self._upload_limit = config.server.max_upload_bytes
        self._uploads = 0
        self._cancel = config.jobs.cancel_on_disconnect
        self._bounds = Bounds(
            max_n=config.limits.max_n,
            max_pixels=config.limits.max_pixels,
            max_steps=config.limits.max_steps,
            max_prompt_chars=config.limits.max_prompt_chars,
            default_format=config.response.default_format,
            allow_file=config.response.allow_file,
        )

    async def generate(self, exchange: Exchange) -> Reply:
        """`POST /v1/images/generations`."""
        raw = await read_raw(exchange, self._limit)
        unknown: list[str] = []
        try:
            body: GenerationBody = self._closed_decoder.decode(raw)
        except (ValueError, RecursionError):
            body = decode_json(raw, self._decoder, CHOICES)  # says what is wrong, if anything is
            unknown = unknown_fields(raw)
        request, response_format = to_request(body, self._bounds), response_format_of(body, self._bounds)
        if unknown:
            if body.strict:
                refuse_unknown(unknown)
            request = with_unknown(request, unknown)
        return await self._draw(exchange, request, response_format)

    async def edit(self, exchange: Exchange) -> Reply:
        """`POST /v1/images/edits`, as a form or as JSON."""
        held = 0

        def hold(count: int) -> None:
            nonlocal held
            if self._uploads + count > HELD_UPLOADS * self._upload_limit:
                raise QueueFull("too many uploads are being worked on", retry_after_seconds=5.0)
            self._uploads += count
            held += count

        try:
            request, response_format = await self._read_edit(exchange, hold)
            return await self._draw(exchange, request, response_format)
        finally:
            self._uploads -= held

    async def _read_edit(self, exchange: Exchange, hold: Callable[[int], None]) -> tuple[ImageRequest, ResponseFormat]:
        """Read and check what is edited. In a thread: a body of many megabytes must not hold everybody else up."""
        kind = exchange.header(b"content-type")
        is_form = (kind or b"").partition(b";")[0].strip().lower() == b"multipart/form-data"
        if not is_form:
            check_json_type(exchange)
        raw = exchange.body_at_hand(self._upload_limit)
        if raw is None:
            raw = await exchange.body(self._upload_limit, hold)
        else:
            hold(len(raw))

        def read(raw: bytes) -> tuple[ImageRequest, ResponseFormat]:
            if is_form:
                form = read_form(raw, kind or b"")
                body, pictures, mask = body_of_form(form)
                unknown = sorted(form.fields.keys() - EDIT_FIELDS)
            else:
                body = decode_json(raw, self._edit_decoder, CHOICES)
                pictures, mask = pictures_of(body)
                unknown = unknown_fields(raw, EDIT_FIELDS)
            if unknown and body.strict:
                refuse_unknown(unknown, EDIT_FIELDS)
            response_format = response_format_of(body, self._bounds)
            return with_unknown(to_edit(body, pictures, mask, self._bounds), unknown), response_format

        return await asyncio.to_thread(read, raw)

    async def _draw(self, exchange: Exchange, request: ImageRequest, response_format: ResponseFormat) -> Reply:
        """Run a request and answer it."""
        services = self._services
        traceparent = exchange.header(b"traceparent") or b""
        job = exchange.job = services.pipeline.admit(
            exchange.tenant,
            request,
            exchange.request_id,
            # one that is none would only break the call that it travels with
            traceparent.decode("ascii") if TRACEPARENT.fullmatch(traceparent) else None,
        )
        exchange.extra_headers.append((b"x-job-id", job.id.encode()))
        # Node's fetch and proxies close at once when their user leaves: the job is not worth its slot then.
        if self._cancel:
            exchange.connection.on_disconnect(_canceller(exchange))
        try:
            answer = await services.pipeline.run(job, response_format, lambda: services.origin.base_url(exchange))
        except asyncio.CancelledError:
            if exchange.disconnected:
                raise ClientDisconnected from None
            raise
        except GatewayError:
            exchange.extra_headers += _headers(job)
            raise
        finally:
            exchange.connection.on_disconnect(None)
        headers = _headers(job)
        if answer.ignored:
            headers.append((b"x-img-serving-ignored", ", ".join(answer.ignored).encode()))
        return Reply(200, answer.parts, headers=headers)

    async def not_yet(self, exchange: Exchange) -> Reply:
        """Variations: a route of the API that this version does not serve, said so."""
        raise NotFound(f"{exchange.path} is not supported by this version; it draws and edits", code="unsupported")


def _canceller(exchange: Exchange) -> Callable[[], None]:
    """What cancels the handler that is running now."""
    handler = asyncio.current_task()

    def cancel() -> None:
        if handler is not None and not exchange.reply_started:
            exchange.disconnected = True
            handler.cancel()

    return cancel


def _headers(job: Job) -> list[tuple[bytes, bytes]]:
    if job.backend is None:
        return []
    return [
        (b"x-backend", job.backend.encode()),
        (b"x-attempts", b"%d" % job.attempts),
        (b"x-queue-ms", b"%d" % (job.queued_seconds * 1000)),
    ]
