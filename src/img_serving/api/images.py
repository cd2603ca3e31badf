"""The image routes: `/v1/images/generations`, the hot route, with edits and variations beside it.

A plain request runs in its own handler. One that is streamed, that has an Idempotency-Key or that wants a job is a job apart,
which its handler only follows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import msgspec
from msgspec import structs

from img_serving.api.asked import (
    Asked,
    asked,
    idempotency_key_of,
    is_retry,
    retries_by_itself,
    traceparent_of,
    wants_async,
    without_previews,
)
from img_serving.api.bodies import check_json_type, decode_json, read_raw
from img_serving.api.edits import PicturesOperation
from img_serving.api.event_stream import Piece, finished_events, image_events, reply_of
from img_serving.api.exchange import ClientDisconnected, Exchange, Headers, Reply
from img_serving.api.fingerprints import fingerprint_of_json
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
from img_serving.api.inputs import is_form, read_pictures_request, url_fetcher
from img_serving.api.job_replies import accepted_reply
from img_serving.api.keep_alive import KeepAlive, pause_seconds
from img_serving.api.services import Services
from img_serving.domain.errors import Cancelled, GatewayError, InvalidRequest, QueueFull
from img_serving.domain.images import Operation
from img_serving.domain.jobs import Job
from img_serving.domain.stored import StoredError, StoredJob
from img_serving.gateway.delivery import Answer
from img_serving.gateway.jobs import Order, Taken
from img_serving.gateway.live import LiveJob
from img_serving.gateway.returns import Key, Shared
from img_serving.policy.webhooks import check_webhook_url

HELD_UPLOADS = 16
"""Bodies of edits in memory at most, in units of the largest one: a queue of uploads must not fill the machine."""

HEAD_SECONDS = 5.0
"""How long a stream's head waits for something to tell: until then a failure has its own status."""


class Images:
    """Handlers of the image routes."""

    def __init__(self, services: Services, keep_alive: KeepAlive) -> None:
        self._services = services
        self._keep_alive = keep_alive
        self._decoder = msgspec.json.Decoder(GenerationBody)
        self._closed_decoder = msgspec.json.Decoder(ClosedGenerationBody)
        config = services.config
        self._limit = config.server.max_body_bytes
        self._fetch = url_fetcher(allowed=config.limits.fetch_image_urls)
        self._upload_limit = config.server.max_upload_bytes
        self._uploads = 0
        self._cancels = config.jobs.cancel_on_disconnect
        self._grace = config.jobs.disconnect_grace_seconds
        self._coalesces = config.queue.coalesce
        self._heartbeat = pause_seconds(config.server.keepalive_after_seconds)
        self._bounds = Bounds(
            max_n=config.limits.max_n,
            max_pixels=config.limits.max_pixels,
            max_steps=config.limits.max_steps,
            max_prompt_chars=config.limits.max_prompt_chars,
            default_format=config.response.default_format,
            allow_file=config.response.allow_file,
            max_upload_bytes=config.server.max_upload_bytes,
        )

    async def generate(self, exchange: Exchange) -> Reply:
        """`POST /v1/images/generations`."""
        return await self._answer(exchange, self.read_generation(await read_raw(exchange, self._limit)))

    async def edit(self, exchange: Exchange) -> Reply:
        """`POST /v1/images/edits`, as a form or as JSON."""
        return await self._change("edit", exchange)

    async def vary(self, exchange: Exchange) -> Reply:
        """`POST /v1/images/variations`, as a form or as JSON."""
        return await self._change("variation", exchange)

    async def _change(self, operation: PicturesOperation, exchange: Exchange) -> Reply:
        kind = exchange.header(b"content-type")
        if not is_form(kind):
            check_json_type(exchange)
        with self.uploads() as hold:
            raw = await self.read_upload(exchange, hold)
            wanted = await self._read_pictures(operation, raw, kind, hold)
            del raw
            return await self._answer(exchange, wanted)

    # reading

    def read_generation(self, raw: bytes) -> Asked:
        """What a JSON body asks for.

        Raises:
            InvalidRequest: it is wrong; `param` names the field.
        """
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
        return asked(
            request,
            response_format,
            body,
            lambda: fingerprint_of_json("generation", raw),
            cancels=self._cancels,
        )

    @contextmanager
    def uploads(self) -> Iterator[Callable[[int], None]]:
        """What is called with the size of each piece of an upload; it counts for as long as the context is open.

        Raises:
            QueueFull: (by what is called) too much is being worked on.
        """
        held = 0

        def hold(count: int) -> None:
            nonlocal held
            if self._uploads + count > HELD_UPLOADS * self._upload_limit:
                raise QueueFull("too many uploads are being worked on", retry_after_seconds=5.0)
            self._uploads += count
            held += count

        try:
            yield hold
        finally:
            self._uploads -= held

    async def read_upload(self, exchange: Exchange, hold: Callable[[int], None]) -> bytes:
        """The body of a route that takes pictures."""
        raw = exchange.body_at_hand(self._upload_limit)
        if raw is None:
            return await exchange.body(self._upload_limit, hold)
        hold(len(raw))
        return raw

    async def read_json(
        self, operation: Operation, raw: bytes, webhook_url: str | None, hold: Callable[[int], None]
    ) -> Asked:
        """What the body of a job asks for, which is JSON. Raises as the operation's own route does."""
        if operation == "generation":
            wanted = self.read_generation(raw)
        else:
            wanted = await self._read_pictures(operation, raw, b"application/json", hold)
        return wanted if webhook_url is None else structs.replace(wanted, webhook_url=webhook_url)

    async def _read_pictures(
        self, operation: PicturesOperation, raw: bytes, kind: bytes | None, hold: Callable[[int], None]
    ) -> Asked:
        read = await read_pictures_request(operation, raw, kind, self._bounds, self._fetch, hold=hold)
        return asked(read.request, read.response_format, read.body, lambda: read.fingerprint, cancels=self._cancels)

    # answering

    async def _answer(self, exchange: Exchange, wanted: Asked) -> Reply:
        """The one place that decides what kind of job it is."""
        key = idempotency_key_of(exchange)
        if wants_async(exchange):
            return await self.accept(exchange, wanted, key)
        if wanted.webhook_url is not None:
            raise InvalidRequest(
                "webhook_url goes with a job: send `Prefer: respond-async`, or POST /v1/jobs", param="webhook_url"
            )
        if wanted.stream:
            return await self._stream(exchange, wanted, key)
        if key is not None:
            return await self._wait(exchange, wanted, key)
        return await self.draw(exchange, wanted)

    def _order(self, exchange: Exchange, wanted: Asked, key: str | None, *, is_async: bool = False) -> Order:
        return Order(
            tenant=exchange.tenant,
            request=wanted.request if is_async or wanted.stream else without_previews(wanted.request),
            response_format=wanted.response_format,
            base_url=self._services.origin.base_url(exchange),
            fingerprint=wanted.fingerprint(),
            request_id=exchange.request_id,
            traceparent=traceparent_of(exchange),
            idempotency_key=key,
            webhook_url=self._webhook_url(exchange, wanted) if is_async else None,
            is_async=is_async,
        )

    def _webhook_url(self, exchange: Exchange, wanted: Asked) -> str | None:
        """Who is told of the end of a job: the receiver that it names, or its key's own."""
        webhooks = self._services.config.webhooks
        url = wanted.webhook_url
        if url is None:
            return exchange.tenant.webhook_url if webhooks.enabled else None
        if not webhooks.enabled:
            raise InvalidRequest("webhooks are off here; the operator can allow them", param="webhook_url")
        check_webhook_url(url, allow_private=webhooks.allow_private_addresses)
        return url

    async def accept(self, exchange: Exchange, wanted: Asked, key: str | None) -> Reply:
        """Take a job and say so: 202, once it is on disk."""
        taken = await self._services.jobs.take(self._order(exchange, wanted, key, is_async=True))
        return await accepted_reply(self._services, exchange, taken)

    # a job that runs in its own handler

    async def draw(self, exchange: Exchange, wanted: Asked) -> Reply:
        """Run a request and answer it: what most requests are."""
        services = self._services
        returns = services.returns
        request = without_previews(wanted.request)
        shared: Shared | None = None
        coalesces = self._coalesces and request.seed_given
        if returns or coalesces:
            key = exchange.tenant.name, wanted.fingerprint()
            if is_retry(exchange) and (failure := returns.failure(key)) is not None:
                raise failure
            if (found := returns.find(key)) is not None:
                return await self._join(exchange, found)
        job = exchange.job = services.pipeline.admit(
            exchange.tenant, request, exchange.request_id, traceparent_of(exchange)
        )
        exchange.extra_headers.append((b"x-job-id", job.id.encode()))
        departure = _Departure(self, exchange, wanted)
        if coalesces:
            shared = departure.shared = returns.share(key, departure.cancel)
        exchange.connection.on_disconnect(departure.left)
        self._keep_alive.watch(exchange)
        try:
            ignored = await services.pipeline.draw(job)
            shared = departure.shared
            if shared is not None:
                shared.is_drawn = True
            if exchange.disconnected and (shared is None or shared.is_kept or not shared.followers):
                answer = await self._keep(exchange, wanted, job, ignored)
            else:
                answer = await services.delivery.answer(
                    job, wanted.response_format, lambda: services.origin.base_url(exchange), ignored
                )
        except asyncio.CancelledError:
            if departure.shared is not None:
                departure.shared.fail(Cancelled("the request was cancelled"))
            if exchange.disconnected:
                raise ClientDisconnected from None
            raise
        except GatewayError as error:
            exchange.extra_headers += _headers(job)
            self._failed(exchange, wanted, departure.shared, error)
            raise
        finally:
            exchange.connection.on_disconnect(None)
            self._keep_alive.forget(exchange)
            if departure.shared is not None:
                returns.over(departure.shared)
        if departure.shared is not None:
            departure.shared.resolve(answer, job)
        if exchange.disconnected:
            raise ClientDisconnected
        return Reply(200, answer.parts, headers=_headers(job, answer.ignored))

    def _failed(self, exchange: Exchange, wanted: Asked, shared: Shared | None, error: GatewayError) -> None:
        """Tell who has joined; and where this client cannot be told any more, its retry."""
        if shared is not None:
            shared.fail(error)
        if exchange.trickle is not None and exchange.trickle.is_out:
            told = StoredError.of(error).again()
            self._services.returns.remember((exchange.tenant.name, wanted.fingerprint()), told)

    async def _keep(self, exchange: Exchange, wanted: Asked, job: Job, ignored: tuple[str, ...]) -> Answer:
        """The client has left and its job was not cancelled: the result waits to be fetched."""
        services = self._services
        stored = await services.jobs.keep(self._order(exchange, wanted, None), job, ignored)
        return await services.delivery.again(stored)

    async def _join(self, exchange: Exchange, shared: Shared) -> Reply:
        """Wait for the same request of an earlier connection."""
        returns = self._services.returns
        returns.join(shared)
        grace = self._grace if retries_by_itself(exchange) else 0.0
        gone = _gone(exchange)
        exchange.connection.on_disconnect(gone)
        exchange.on_end = lambda: returns.leave(shared, grace if exchange.disconnected else 0.0)
        self._keep_alive.watch(exchange)
        try:
            answer, job = await shared.answer()
        except asyncio.CancelledError:
            if exchange.disconnected:
                raise ClientDisconnected from None
            raise
        finally:
            exchange.connection.on_disconnect(None)
            self._keep_alive.forget(exchange)
        exchange.job = job
        exchange.extra_headers.append((b"x-job-id", job.id.encode()))
        return Reply(200, answer.parts, headers=_headers(job, answer.ignored))

    # a durable job that its client waits for

    async def _wait(self, exchange: Exchange, wanted: Asked, key: str) -> Reply:
        """Wait for a job that goes on without this client, or tell again what came of it."""
        taken = await self._services.jobs.take(self._order(exchange, wanted, key))
        self._introduce(exchange, taken)
        stored, live = taken.stored, taken.live
        if live is not None:
            exchange.job = live.job
            exchange.connection.on_disconnect(_gone(exchange))
            self._keep_alive.watch(exchange)
            try:
                stored = await live.outcome()
            except asyncio.CancelledError:
                if exchange.disconnected:
                    raise ClientDisconnected from None
                raise
            except GatewayError:
                exchange.extra_headers += _headers(live.job)
                raise
            finally:
                exchange.connection.on_disconnect(None)
                self._keep_alive.forget(exchange)
        if stored.error is not None:
            raise stored.error.again()
        answer = await self._services.delivery.again(stored, None if live is None else live.artifacts)
        return Reply(200, answer.parts, headers=_headers_of(stored))

    @staticmethod
    def _introduce(exchange: Exchange, taken: Taken) -> None:
        exchange.extra_headers.append((b"x-job-id", taken.stored.id.encode()))
        if taken.replayed:
            exchange.extra_headers.append((b"idempotent-replayed", b"true"))

    # a stream

    async def _stream(self, exchange: Exchange, wanted: Asked, key: str | None) -> Reply:
        """Follow a job and tell what happens, as it happens."""
        jobs = self._services.jobs
        order = self._order(exchange, wanted, key)
        if key is not None:
            taken = await jobs.take(order)
            self._introduce(exchange, taken)
            if taken.live is None:
                return await self._tell_again(taken.stored)
            live = taken.live
        else:
            live = jobs.returning(order) or jobs.start(order, kept=not wanted.cancel_on_disconnect)
            exchange.extra_headers.append((b"x-job-id", live.stored.id.encode()))
        exchange.job = live.job
        jobs.join(live)
        grace = self._grace if retries_by_itself(exchange) else 0.0
        exchange.on_end = lambda: jobs.leave(live, grace if exchange.disconnected else 0.0)
        exchange.connection.on_disconnect(_gone(exchange))
        try:
            await _until_there_is_something(live, min(HEAD_SECONDS, self._heartbeat))
        except asyncio.CancelledError:
            if exchange.disconnected:
                raise ClientDisconnected from None
            raise
        if live.error is not None and not live.news:
            exchange.extra_headers += _headers(live.job)
            raise live.error
        return reply_of(_until_left(exchange, image_events(live, self._heartbeat)), _headers(live.job))

    async def _tell_again(self, stored: StoredJob) -> Reply:
        if stored.error is not None:
            raise stored.error.again()
        artifacts = await self._services.delivery.artifacts_of(stored)
        return reply_of(finished_events(stored.request, artifacts), _headers_of(stored))


class _Departure:
    """What happens to a plain request's job when its client leaves."""

    __slots__ = ("_exchange", "_handler", "_images", "_wanted", "shared")

    def __init__(self, images: Images, exchange: Exchange, wanted: Asked) -> None:
        self._images = images
        self._exchange = exchange
        self._wanted = wanted
        self._handler = asyncio.current_task()
        self.shared: Shared | None = None

    def left(self) -> None:
        """The client has left: who retries by itself may come back for a moment, for others the job is not worth its slot."""
        exchange, images = self._exchange, self._images
        exchange.disconnected = True
        returns = images._services.returns
        grace = images._grace if retries_by_itself(exchange) else 0.0
        is_kept = not self._wanted.cancel_on_disconnect
        if self.shared is None and (is_kept or grace > 0):
            key: Key = exchange.tenant.name, self._wanted.fingerprint()
            self.shared = returns.share(key, self.cancel, is_kept=is_kept)
        if self.shared is None:
            self.cancel()
        else:
            returns.leave(self.shared, grace)

    def cancel(self) -> None:
        """Nobody waits for the job: its handler ends, and with it the job."""
        if self._handler is not None:
            self._handler.cancel()


def _gone(exchange: Exchange) -> Callable[[], None]:
    """What ends a handler that only waits for something that goes on without it."""
    handler = asyncio.current_task()

    def gone() -> None:
        exchange.disconnected = True
        if handler is not None:
            handler.cancel()

    return gone


async def _until_there_is_something(live: LiveJob, seconds: float) -> None:
    """Until there is news of a picture, or its end, or the head has waited for long enough."""
    try:
        async with asyncio.timeout(seconds):
            while not (live.news or live.is_over):
                await live.changed(live.version)
    except TimeoutError:
        return


async def _until_left(exchange: Exchange, frames: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """The frames, while the client is there."""
    try:
        async for one in frames:
            yield one
    except asyncio.CancelledError:
        if exchange.disconnected:
            raise ClientDisconnected from None
        raise


def _headers(job: Job, ignored: tuple[str, ...] = ()) -> Headers:
    headers: Headers = []
    if job.backend is not None:
        headers = [
            (b"x-backend", job.backend.encode()),
            (b"x-attempts", b"%d" % job.attempts),
            (b"x-queue-ms", b"%d" % (job.queued_seconds * 1000)),
        ]
    if ignored:
        headers.append((b"x-img-serving-ignored", ", ".join(ignored).encode()))
    return headers


def _headers_of(stored: StoredJob) -> Headers:
    """The same, of a job as it is kept."""
    headers: Headers = []
    if stored.backend is not None:
        waited = (stored.started_at or stored.created_at) - stored.created_at
        headers = [
            (b"x-backend", stored.backend.encode()),
            (b"x-attempts", b"%d" % stored.attempts),
            (b"x-queue-ms", b"%d" % (waited * 1000)),
        ]
    if stored.result is not None and stored.result.ignored:
        headers.append((b"x-img-serving-ignored", ", ".join(stored.result.ignored).encode()))
    return headers
