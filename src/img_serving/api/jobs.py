"""`/v1/jobs`: make a job, look at it, list one's own, follow one, cancel one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from img_serving.api.asked import idempotency_key_of
from img_serving.api.bodies import check_json_type, decode_json
from img_serving.api.event_stream import COMMENT, Piece, frame, news_pieces, reply_of
from img_serving.api.exchange import ClientDisconnected, Exchange, Reply
from img_serving.api.images import Images
from img_serving.api.keep_alive import pause_seconds
from img_serving.api.queries import choice_of, limit_of
from img_serving.api.services import Services
from img_serving.domain.errors import InvalidRequest, NotFound
from img_serving.domain.images import Operation
from img_serving.domain.jobs import Job, JobStatus
from img_serving.domain.stored import StoredJob
from img_serving.gateway.job_records import JobRecord
from img_serving.gateway.live import LiveJob
from img_serving.ports import JobQuery

OPERATIONS: tuple[Operation, ...] = ("generation", "edit", "variation")
PROGRESS_SECONDS = 0.5
"""Between two reports of progress at least."""

MICROSECONDS = 1_000_000
END_SECONDS = 1.0
"""What is added to the time of the last event, so that its id is the greatest."""


class JobBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/jobs`: `body` is what the operation's own route reads as JSON."""

    operation: Literal["generation", "edit", "variation"]
    body: msgspec.Raw
    webhook_url: Annotated[
        Annotated[str, Meta(max_length=2048)] | None, Meta(description="Called when the job ends.")
    ] = None


class JobList(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `GET /v1/jobs`, newest first. The next page begins `?after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[JobRecord]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Jobs:
    """Handlers of the job routes."""

    def __init__(self, services: Services, images: Images) -> None:
        self._services = services
        self._images = images
        self._decoder = msgspec.json.Decoder(JobBody)
        self._heartbeat = pause_seconds(services.config.server.keepalive_after_seconds)

    async def create(self, exchange: Exchange) -> Reply:
        """`POST /v1/jobs`."""
        check_json_type(exchange)
        with self._images.uploads() as hold:
            raw = await self._images.read_upload(exchange, hold)
            body = self._body_of(raw)
            wanted = await self._images.read_json(body.operation, bytes(body.body), body.webhook_url, hold)
            return await self._images.accept(exchange, wanted, idempotency_key_of(exchange))

    def _body_of(self, raw: bytes) -> JobBody:
        try:
            return decode_json(raw, self._decoder, {"operation": OPERATIONS})
        except InvalidRequest as error:
            if "unknown field" in error.message:
                hint = 'what to draw goes into "body": {"operation": "generation", "body": {"prompt": …}}'
                raise InvalidRequest(f"{error.message}; {hint}", code=error.code, param=error.param) from None
            raise

    async def list(self, exchange: Exchange) -> Reply:
        """`GET /v1/jobs`: one's own, newest first."""
        query = _query_of(exchange)
        stored = await self._stored(exchange, query)
        records = [] if query.after is not None else list(self._in_memory(exchange, query))
        if stored:
            del records[query.limit - 1 :]  # the next page begins after the last one of this, which the store must know
        records += stored
        page = records[: query.limit]
        reply = JobList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(records) > len(page),
        )
        return Reply(200, (msgspec.json.encode(reply),))

    async def _stored(self, exchange: Exchange, query: JobQuery) -> Sequence[JobRecord]:
        """Those that the store has, as the query asks for them: one more than fits on a page, if there are so many.

        What the store takes for queued may run by now, or be over: it is asked on until the page is full.
        """
        services = self._services
        found = []
        after = query.after
        while True:
            stored = await services.jobs.listed(exchange.tenant, replace(query, limit=query.limit + 1, after=after))
            # who names one job wants its result; in a list pictures come as URLs, whatever was asked for
            is_one = len(stored) == 1 and (query.idempotency_key is not None or query.request_id is not None)
            records = [await self._record(one, inline=is_one) for one in stored]
            found += [one for one in records if query.status in {None, one.status}]
            if len(found) > query.limit or len(stored) <= query.limit:
                return found
            after = stored[-1].id

    async def _record(self, stored: StoredJob, *, inline: bool) -> JobRecord:
        live = self._services.jobs.live(stored.id)
        return await self._services.records.full(stored if live is None else live.stored, live, inline=inline)

    async def get(self, exchange: Exchange) -> Reply:
        """`GET /v1/jobs/{id}`."""
        job_id = exchange.variables["id"]
        if "/" in job_id:
            raise NotFound(f"there is nothing at {exchange.path[:200]}", code="unknown_path")
        services = self._services
        try:
            stored, live = await services.jobs.find(exchange.tenant, job_id)
        except NotFound:
            plain = self._plain(exchange, job_id)
            if plain is None:
                raise
            return Reply(200, (msgspec.json.encode(self._of_plain(plain)),))
        return Reply(200, (msgspec.json.encode(await services.records.full(stored, live)),))

    async def cancel(self, exchange: Exchange) -> Reply:
        """`DELETE /v1/jobs/{id}`: ends it; one that is over stays as it is."""
        services = self._services
        job_id = exchange.variables["id"]
        try:
            stored = await services.jobs.cancel(exchange.tenant, job_id)
        except NotFound:
            plain = self._plain(exchange, job_id)
            if plain is None:
                raise
            services.dispatcher.cancel(plain)
            record = msgspec.structs.replace(self._of_plain(plain), status=JobStatus.CANCELLED)
            return Reply(200, (msgspec.json.encode(record),))
        return Reply(200, (msgspec.json.encode(await services.records.full(stored)),))

    # plain requests

    def _plain(self, exchange: Exchange, job_id: str) -> Job | None:
        """A plain request of this tenant that is still drawn."""
        for job in self._services.dispatcher.scheduler.jobs:
            if job.id == job_id and job.tenant.name == exchange.tenant.name:
                return job
        return None

    def _of_plain(self, job: Job) -> JobRecord:
        services = self._services
        return services.records.of_plain(job, services.unix_clock() - (services.clock() - job.submitted_at))

    def _in_memory(self, exchange: Exchange, query: JobQuery) -> Iterator[JobRecord]:
        """Those of a tenant's jobs that no store has, as the query asks for them."""
        services = self._services
        found = [services.records.brief(one.stored, one) for one in services.jobs.in_memory(exchange.tenant)]
        open_jobs = [one for one in services.dispatcher.scheduler.jobs if one.tenant.name == exchange.tenant.name]
        found += [self._of_plain(job) for job in reversed(open_jobs) if services.jobs.live(job.id) is None]
        for record in found:
            if (
                query.idempotency_key is None
                and query.operation in {None, record.operation}
                and query.status in {None, record.status}
                and query.request_id in {None, record.request_id}
            ):
                yield record

    # events

    async def follow(self, exchange: Exchange) -> Reply:
        """`GET /v1/jobs/{id}/events`."""
        stored, live = await self._services.jobs.find(exchange.tenant, exchange.variables["id"])
        seen = _last_event_id(exchange)
        if live is None:
            if seen == _end_id(stored):
                return Reply(204, media_type=None)  # what makes an EventSource stop asking
            return reply_of(self._told_at_once(stored))
        exchange.job = live.job
        self._services.jobs.join(live)
        exchange.on_end = lambda: self._services.jobs.leave(live)
        handler = asyncio.current_task()

        def gone() -> None:
            exchange.disconnected = True
            if handler is not None:
                handler.cancel()

        exchange.connection.on_disconnect(gone)
        return reply_of(self._told(exchange, live, seen))

    async def _told_at_once(self, stored: StoredJob) -> AsyncIterator[bytes]:
        record = await self._services.records.full(stored)
        yield frame(f"job.{stored.status}", msgspec.json.encode(record), _end_id(stored))

    async def _told(self, exchange: Exchange, live: LiveJob, seen: int | None) -> AsyncIterator[Piece]:
        """What happens to a job, from where this client stopped listening.

        Ids are microseconds of the wall clock, kept growing: those of one process are understood by the next.
        """
        records = self._services.records
        unix = self._services.unix_clock
        read = 0 if seen is None else live.news_after(seen)
        told: tuple[object, ...] = ()
        last_id = seen or 0
        loop = asyncio.get_running_loop()
        silent_until = loop.time() + self._heartbeat
        try:
            if seen is None and not live.is_over:
                # where it stands comes first, also for who was too late for how it began
                record = records.brief(live.stored, live)
                told = _state(record)
                last_id = int(live.stored.created_at * MICROSECONDS)
                yield frame(f"job.{record.status}", msgspec.json.encode(record), last_id)
            while True:
                version = live.version
                while read < len(live.news):
                    read += 1
                    last_id = max(last_id + 1, live.news_ids[read - 1])
                    for piece in news_pieces(live.job.request, live.news[read - 1], last_id):
                        yield piece
                    silent_until = loop.time() + self._heartbeat
                if live.is_over:
                    break
                record = records.brief(live.stored, live)
                state = _state(record)
                if state != told:
                    kind = "progress" if told and told[0] == record.status else str(record.status)
                    told = state
                    last_id = max(last_id + 1, int(unix() * MICROSECONDS))
                    yield frame(f"job.{kind}", msgspec.json.encode(record), last_id)
                    silent_until = loop.time() + self._heartbeat
                    await _pause(live)
                    continue
                try:
                    async with asyncio.timeout_at(silent_until):
                        await live.changed(version)
                except TimeoutError:
                    yield COMMENT
                    silent_until = loop.time() + self._heartbeat
            stored = live.stored
            if stored.is_over:
                record = await records.full(stored, live)
                yield frame(f"job.{stored.status}", msgspec.json.encode(record), _end_id(stored))
        except asyncio.CancelledError:
            if exchange.disconnected:
                raise ClientDisconnected from None
            raise


def _state(record: JobRecord) -> tuple[object, ...]:
    """What a listener is told of when it changes."""
    return record.status, record.progress, record.attempts, record.backend, record.waiting_for


async def _pause(live: LiveJob) -> None:
    """Let progress add up for a moment; news and the end are told at once."""
    news = len(live.news)
    try:
        async with asyncio.timeout(PROGRESS_SECONDS):
            while len(live.news) == news and not live.is_over:
                await live.changed(live.version)
    except TimeoutError:
        return


def _end_id(stored: StoredJob) -> int:
    """The id of a job's last event: the same whoever tells it, and greater than all before it."""
    return int(((stored.finished_at or 0.0) + END_SECONDS) * MICROSECONDS)


def _last_event_id(exchange: Exchange) -> int | None:
    """Where the client stopped listening; what is no id of ours is as if it had not been sent."""
    given = exchange.header(b"last-event-id")
    return int(given) if given is not None and given.isdigit() and len(given) < 20 else None


def _query_of(exchange: Exchange) -> JobQuery:
    """The filters of a list.

    Raises:
        InvalidRequest: one is impossible; unknown ones are ignored.
    """
    given = exchange.query
    return JobQuery(
        status=choice_of(given, "status", tuple(JobStatus)),
        operation=choice_of(given, "operation", OPERATIONS),
        idempotency_key=given.get("idempotency_key") or None,
        request_id=given.get("request_id") or None,
        limit=limit_of(given),
        after=given.get("after") or None,
    )
