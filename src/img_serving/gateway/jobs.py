"""Jobs that outlive a connection: taken, followed, cancelled, written down, and brought back after a restart.

A durable job is on disk before anybody is told that it was taken, and its end is on disk before anybody is told of that. In
between a task of its own waits for it (`_run`), whether somebody follows it or not. A job that is only streamed runs the
same way and is in memory alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from msgspec import structs

from img_serving.domain.errors import (
    AllAttemptsFailed,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    Draining,
    GatewayError,
    NotFound,
    NoUsableBackend,
    OutcomeUnknown,
)
from img_serving.domain.images import Artifact, ImageRequest
from img_serving.domain.jobs import Job, JobStatus
from img_serving.domain.stored import ResponseFormat, StoredJob
from img_serving.domain.tenants import Tenant
from img_serving.gateway.delivery import Delivery, drawn_of
from img_serving.gateway.dispatcher import Dispatcher
from img_serving.gateway.ends import JobEnds
from img_serving.gateway.identifiers import new_id, random_bytes
from img_serving.gateway.journal import CallJournal
from img_serving.gateway.live import LiveJob
from img_serving.gateway.pipeline import Pipeline
from img_serving.gateway.spool import InputSpool
from img_serving.gateway.tasks import TaskRegistry
from img_serving.policy.options import JobOptions
from img_serving.ports import ArtifactStore, JobQuery, JobStore, StoredWebhook
from img_serving.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
"""Between two tries of a job that nobody waits for, while no endpoint can take it."""

PATIENCE_SECONDS = 120.0
"""For so long after a restart, or after its backend was removed, a job waits for somebody who can serve it."""

RECOVERED_AT_ONCE = 500
"""Jobs read from the store in one go after a restart."""

CONTENT_KEY_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A request that is to outlive its connection, and how it is to be answered.

    `fingerprint` tells whether two requests are the same. `is_async`: nobody waits on a connection for it to end.
    """

    tenant: Tenant
    request: ImageRequest
    response_format: ResponseFormat
    base_url: str
    fingerprint: bytes
    request_id: str
    traceparent: str | None = None
    idempotency_key: str | None = None
    webhook_url: str | None = None
    is_async: bool = False


@dataclass(frozen=True, slots=True)
class Taken:
    """A job that was taken now, or (`replayed`) earlier for the same key. `live` is None where it is over already."""

    stored: StoredJob
    live: LiveJob | None
    replayed: bool = False


class Jobs:
    """Every job that does not belong to one connection alone. `journal` is for the dispatcher."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        dispatcher: Dispatcher,
        delivery: Delivery,
        store: JobStore,
        spool: ArtifactStore,
        tasks: TaskRegistry,
        metrics: Metrics,
        unix_clock: Callable[[], float],
        tenant_of: Callable[[str], Tenant],
        event_of: Callable[[StoredJob], Awaitable[StoredWebhook | None]],
        on_event: Callable[[], None],
        options: JobOptions,
    ) -> None:
        """Take the parts.

        `spool` keeps the input pictures of jobs that wait; `tenant_of` finds who owns a job after a restart; `event_of` is what
        the client of a job that has ended is to be told, and `on_event` hears that there is such an event.
        """
        self._ends = JobEnds(
            store=store,
            delivery=delivery,
            unix_clock=unix_clock,
            is_draining=lambda: dispatcher.is_draining,
            event_of=event_of,
            on_event=on_event,
            result_ttl_seconds=options.result_ttl_seconds,
        )
        self._pipeline = pipeline
        self._dispatcher = dispatcher
        self._delivery = delivery
        self._store = store
        self._spool = InputSpool(spool)
        self._tasks = tasks
        self._metrics = metrics
        self._unix_clock = unix_clock
        self._tenant_of = tenant_of
        self._options = options
        self._live: dict[str, LiveJob] = {}
        self.journal = CallJournal(self._live, store, self._spool, tasks)
        self._accepting = 0
        self._resting = 0
        self._idle: asyncio.Future[None] | None = None
        self._recovered_at: float | None = None

    def __repr__(self) -> str:
        return f"<Jobs {len(self._live)} live>"

    # taking

    async def take(self, order: Order) -> Taken:
        """Take a durable job: it is on disk when this returns. With an idempotency key that is known, its job.

        Raises:
            Conflict: the key was used for another request.
            GatewayError: it is refused: nobody can serve it, or there is no room; nothing is kept then.
        """
        if order.idempotency_key is not None:
            holder = await self._store.find_key(order.tenant.name, order.idempotency_key)
            if holder is not None:
                return await self._again(order, holder)
        # not to be left half done by a client that leaves
        taken = await asyncio.shield(self._tasks.spawn(self._take_or_refuse(order), "taking a job"))
        if isinstance(taken, GatewayError):
            raise taken
        return taken

    async def _take_or_refuse(self, order: Order) -> Taken | GatewayError:
        try:
            return await self._take_new(order)
        except GatewayError as error:
            return error  # told to the client; a task that raises is a fault of ours

    async def _take_new(self, order: Order) -> Taken:
        patience = self._options.max_age_seconds if order.is_async else self._pipeline.timeout_seconds
        stored = self._new(order, patience)
        job = self._pipeline.admit(
            order.tenant,
            order.request,
            order.request_id,
            order.traceparent,
            job_id=stored.id,
            patience_seconds=patience,
        )
        job.durable = True
        # what waits for another try stands in no line, and yet may not grow without bound
        self._dispatcher.check(job, self._accepting + self._resting)
        live = self._live[stored.id] = self._follow(job, stored, durable=True, kept=True)
        live.to_submit = len(job.tasks)
        self._accepting += live.to_submit
        try:
            request = job.request = await self._spool.put(order.request)
            stored = live.stored = structs.replace(stored, request=request)
            holder = await self._store.add_job(stored)
        except BaseException as error:
            self._drop(live)
            live.failed(stored, error if isinstance(error, GatewayError) else _stopping())
            if isinstance(error, GatewayError):
                await self._spool.forget(stored)  # where it was stopped instead, it may have been written
            raise
        if holder is not None:
            # another request with the same key was a moment earlier
            self._drop(live)
            live.failed(stored, NotFound("there is no such job", code="job_not_found"))
            await self._spool.forget(stored)
            return await self._again(order, holder)
        self._metrics.durable_jobs.add("taken")
        self._tasks.spawn(self._run(live), "job")
        return Taken(stored, live)

    def _drop(self, live: LiveJob) -> None:
        del self._live[live.stored.id]
        self._submitted(live)
        if not self._live and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _submitted(self, live: LiveJob) -> None:
        """Its tasks stand in line now, or never will: they are no longer among those that are let in and do not yet."""
        self._accepting -= live.to_submit
        live.to_submit = 0

    async def _again(self, order: Order, holder: StoredJob) -> Taken:
        """What a known idempotency key stands for."""
        if holder.fingerprint != order.fingerprint:
            raise Conflict(
                "this Idempotency-Key was used for another request; use a new key for each request",
                code="idempotency_key_reused",
                param="Idempotency-Key",
                should_retry=False,
            )
        live = self._live.get(holder.id)
        if live is None and not holder.is_over:
            # it ended between the look into the store and now
            holder = await self._store.load_job(holder.id) or holder
            if not holder.is_over:
                raise _stopping()
        self._metrics.durable_jobs.add("replayed")
        return Taken(holder, live, replayed=True)

    def start(self, order: Order, *, kept: bool) -> LiveJob:
        """Run a job in memory, apart from its connection; not `kept`: until its last follower leaves.

        Raises:
            GatewayError: it is refused.
        """
        job = self._pipeline.admit(order.tenant, order.request, order.request_id, order.traceparent)
        self._dispatcher.check(job, self._accepting)
        stored = structs.replace(self._new(order, self._pipeline.timeout_seconds, job.id), request=_bare(order.request))
        live = self._live[job.id] = self._follow(job, stored, durable=False, kept=kept)
        self._tasks.spawn(self._run(live), "job")
        return live

    async def keep(self, order: Order, job: Job, ignored: tuple[str, ...]) -> StoredJob:
        """Keep the result of a job whose client has left and that was not cancelled: it can be fetched as a job.

        Raises:
            GatewayError: it could not be kept.
        """
        stored = self._new(order, job.deadline - job.submitted_at, job.id)
        artifacts = [await self._delivery.as_delivered(one, order.request) for one in drawn_of(job)]
        stored = structs.replace(stored, request=_bare(order.request))
        done = await self._ends.kept(stored, job, artifacts, ignored)
        await self._store.add_job(done)
        return done

    def _new(self, order: Order, patience_seconds: float, job_id: str | None = None) -> StoredJob:
        now = self._unix_clock()
        return StoredJob(
            id=job_id or new_id("job_"),
            tenant=order.tenant.name,
            request=order.request,
            created_at=now,
            deadline_at=now + patience_seconds,
            response_format=order.response_format,
            base_url=order.base_url,
            artifact_key=random_bytes(CONTENT_KEY_BYTES),
            fingerprint=order.fingerprint,
            is_async=order.is_async,
            request_id=order.request_id,
            traceparent=order.traceparent,
            idempotency_key=order.idempotency_key,
            webhook_url=order.webhook_url,
        )

    def _follow(self, job: Job, stored: StoredJob, *, durable: bool, kept: bool) -> LiveJob:
        return LiveJob(
            job, stored, durable=durable, kept=kept, on_drawn=self._convert_soon, unix_clock=self._unix_clock
        )

    # following

    def live(self, job_id: str) -> LiveJob | None:
        """The job, if it is not over."""
        return self._live.get(job_id)

    def returning(self, order: Order) -> LiveJob | None:
        """The job of the same request whose client has left a moment ago."""
        for live in self._live.values():
            if live.leaving is not None and (live.stored.tenant, live.stored.fingerprint) == (
                order.tenant.name,
                order.fingerprint,
            ):
                return live
        return None

    def join(self, live: LiveJob) -> None:
        """A client follows the job from now on."""
        live.followers += 1
        if live.leaving is not None:
            live.leaving.cancel()
            live.leaving = None

    def leave(self, live: LiveJob, grace_seconds: float = 0.0) -> None:
        """A client follows it no more. Who was the last takes a job along that is not kept, after `grace_seconds`."""
        live.followers -= 1
        if live.followers or live.kept or live.is_over:
            return
        if grace_seconds > 0:
            live.leaving = asyncio.get_running_loop().call_later(grace_seconds, self._stop, live)
        else:
            self._stop(live)

    def live_counts(self) -> dict[str, int]:
        """How many jobs are not over, by where they are kept."""
        durable = sum(live.durable for live in self._live.values())
        return {"disk": durable, "memory": len(self._live) - durable}

    async def find(self, tenant: Tenant, job_id: str) -> tuple[StoredJob, LiveJob | None]:
        """A tenant's job, and itself where it is not over.

        Raises:
            NotFound: there is none, or it is somebody else's.
        """
        live = self._live.get(job_id)
        if live is not None and live.stored.tenant == tenant.name:
            return live.stored, live
        stored = await self._store.find_job(tenant.name, job_id)
        if stored is None:
            raise NotFound("there is no such job, or its time is over", code="job_not_found")
        return stored, self._live.get(job_id)

    def in_memory(self, tenant: Tenant) -> list[LiveJob]:
        """A tenant's live jobs that no store has, newest first."""
        found = [one for one in self._live.values() if not one.durable and one.stored.tenant == tenant.name]
        return found[::-1]

    async def listed(self, tenant: Tenant, query: JobQuery) -> list[StoredJob]:
        """A tenant's stored jobs, newest first."""
        return await self._store.list_jobs(tenant.name, query)

    async def cancel(self, tenant: Tenant, job_id: str) -> StoredJob:
        """End a job; one that is over already stays as it is.

        Raises:
            NotFound: there is none, or it is somebody else's.
        """
        stored, live = await self.find(tenant, job_id)
        if live is None:
            return stored
        self._stop(live)
        while not live.is_over:
            await live.changed(live.version)
        return live.stored

    def _stop(self, live: LiveJob) -> None:
        live.leaving = None
        live.cancelled = True
        live.woken.set()
        if live.is_submitted:
            self._dispatcher.cancel(live.job)

    # running

    async def _run(self, live: LiveJob) -> None:
        """Wait for a job, whatever happens to it, and end it exactly once."""
        try:
            await self._run_to_its_end(live)
        except Draining as error:
            # nothing is written: it goes on after the restart
            live.failed(live.stored, error)
        except GatewayError as error:
            await self._fail(live, error)
        except asyncio.CancelledError:
            live.failed(live.stored, _stopping())
            raise
        except Exception:
            log.exception("the job %s broke", live.stored.id)
            self._metrics.internal_errors.add("job")
            await self._fail(live, AllAttemptsFailed("an internal error in the gateway; its log has it"))
        finally:
            self._drop(live)
            if not live.is_over:
                live.failed(
                    live.stored, _stopping()
                )  # stopped while its end was written down: nobody must wait for ever
            if live.leaving is not None:
                live.leaving.cancel()
            live.job.watcher = None
            for task in live.job.tasks:
                task.artifact = None  # jobs and tasks hold each other: not with their pictures

    async def _run_to_its_end(self, live: LiveJob) -> None:
        ignored = await self._drawn(live)
        artifacts: list[Artifact] = []
        for index in range(len(live.job.tasks)):
            converted = await live.conversions[index]
            if isinstance(converted, GatewayError):
                raise converted
            artifacts.append(converted)
        if live.job.request.strict:
            for index, artifact in enumerate(artifacts):
                live.finished(index, artifact)
        self._delivery.count(live.job, artifacts)
        if live.durable or (live.kept and not live.followers):
            done = await self._ends.kept(live.current(), live.job, artifacts, ignored)
            await (self._ends.written(done) if live.durable else self._store.add_job(done))
            await self._spool.forget(live.stored)
        else:
            done = structs.replace(
                live.current(),
                status=JobStatus.SUCCEEDED,
                finished_at=self._unix_clock(),
                backend=live.job.backend,
            )
        live.succeeded(done, artifacts)

    async def _drawn(self, live: LiveJob) -> tuple[str, ...]:
        """Have it drawn; while nobody can, a job that nobody waits for is tried again and again until its deadline."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            if live.cancelled:
                raise Cancelled("the job was cancelled")
            if self._dispatcher.is_draining:
                raise _stopping()
            try:
                if not live.job.route:
                    live.tried_again(self._revived(live.stored))
                live.is_submitted = True
                live.waits(None)
                self._submitted(live)
                try:
                    return await self._pipeline.draw(live.job)
                finally:
                    live.is_submitted = False
            except (NoUsableBackend, NotFound, AllAttemptsFailed) as error:
                if not self._may_try_again(live, error):
                    raise
                wait = min(LONGEST_PAUSE_SECONDS, max(pause, error.retry_after_seconds or 0.0))
                why = error.message
            log.info("job %s waits %.0f s for a backend that can take it", live.stored.id, wait)
            live.stored = structs.replace(live.stored, attempts=live.stored.attempts + live.job.attempts)
            live.job.route = ()
            live.job.attempts = 0
            live.waits(why)
            await self._rest(live, min(wait, max(0.0, live.stored.deadline_at - self._unix_clock())))
            pause = min(LONGEST_PAUSE_SECONDS, pause * 2)
            if live.stored.deadline_at <= self._unix_clock():
                raise DeadlineExceeded(
                    "the deadline of the job passed before a backend could take it", should_retry=False
                )

    async def _rest(self, live: LiveJob, seconds: float) -> None:
        """Wait for its next try; less long where it is cancelled, or the gateway stops."""
        count = len(live.job.tasks)
        self._resting += count
        try:
            async with asyncio.timeout(seconds):
                await live.woken.wait()
            if not (live.cancelled or self._dispatcher.is_draining):
                live.woken.clear()
        except TimeoutError:
            return
        finally:
            self._resting -= count

    def try_again(self) -> None:
        """The backends have changed: what waits for one that can take it asks now."""
        for live in self._live.values():
            if live.waiting_for is not None:
                live.woken.set()

    def _may_try_again(self, live: LiveJob, error: GatewayError) -> bool:
        if not live.durable:
            return False
        recovered = self._recovered_at
        just_began = recovered is not None and self._unix_clock() - recovered < PATIENCE_SECONDS
        was_there_before = recovered is not None and live.stored.created_at < recovered
        if not isinstance(error, NotFound):
            live.missing_since = None
        else:
            # its backend has not said yet what it has, or is being replaced by another of its name
            now = self._unix_clock()
            live.missing_since = now if live.missing_since is None else live.missing_since
            return now - live.missing_since < PATIENCE_SECONDS
        if isinstance(error, AllAttemptsFailed) and any(task.attempts for task in live.job.tasks):
            return False  # somebody tried to draw it
        return live.stored.is_async or (just_began and was_there_before)

    def _convert_soon(self, live: LiveJob, index: int, artifact: Artifact) -> None:
        """Bring a picture into the form that it is delivered in, while the others are still drawn."""
        live.conversions[index] = self._tasks.spawn(self._converted(live, index, artifact), "picture")

    async def _converted(self, live: LiveJob, index: int, artifact: Artifact) -> Artifact | GatewayError:
        try:
            converted = await self._delivery.as_delivered(artifact, live.job.request)
        except GatewayError as error:
            return error
        if not live.job.request.strict:  # whether a strict request was honoured is known when all of it is there
            live.finished(index, converted)
        return converted

    # ends

    async def _fail(self, live: LiveJob, error: GatewayError) -> None:
        done = self._ends.failed(live.current(), error)
        if done.idempotency_key is not None and _is_free_of_cost(live.job, error):
            done = structs.replace(done, idempotency_key=None)  # the same request may be sent again
        if live.durable:
            try:
                await self._ends.written(done)
            except GatewayError as fault:
                log.error("the end of job %s could not be written down yet: %s", done.id, fault.message)  # noqa: TRY400
                live.failed(done, error)
                await self._written_at_last(live, done)
            await self._spool.forget(done)
        if not live.is_over:
            live.failed(done, error)

    async def _written_at_last(self, live: LiveJob, done: StoredJob) -> None:
        """Try on until its end is on disk: to the store it is not over, and nobody else would tell it. Not when stopping."""
        pause = FIRST_PAUSE_SECONDS
        while not self._dispatcher.is_draining:
            live.woken.clear()
            await self._rest(live, pause)
            pause = min(LONGEST_PAUSE_SECONDS, pause * 2)
            with suppress(GatewayError):
                await self._ends.write_once(done)
                return

    # restart

    async def recover(self) -> int:
        """Bring back what was not over when the gateway stopped or died; returns how many go on."""
        self._recovered_at = self._unix_clock()
        wanted: set[str] = set()
        page = await self._store.unfinished_jobs(RECOVERED_AT_ONCE)
        while page:
            for stored in page:
                if stored.at_risk:
                    await self._end_at_risk(stored)
                else:
                    wanted.update(stored.spooled)
                    self._bring_back(stored)
            page = await self._store.unfinished_jobs(RECOVERED_AT_ONCE, page[-1].id)
        await self._spool.sweep(wanted)
        return len(self._live)

    async def drain(self, seconds: float) -> None:
        """Once nothing is drawn any more: keep for at most `seconds` what was drawn. What waits goes on after the restart."""
        for live in self._live.values():
            live.woken.set()
        if not self._live:
            return
        self._idle = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds):
                await self._idle
        except TimeoutError:
            log.warning("drain time is over; %d jobs could not be brought to their end", len(self._live))
        finally:
            self._idle = None

    def _bring_back(self, stored: StoredJob) -> None:
        stored = structs.replace(stored, status=JobStatus.QUEUED)
        # its route is looked for when it runs: backends may not have said yet what they have
        job = self._pipeline.placeholder(self._tenant_of(stored.tenant), stored)
        live = self._live[stored.id] = self._follow(job, stored, durable=True, kept=True)
        self._metrics.durable_jobs.add("recovered")
        self._tasks.spawn(self._run(live), "job")

    async def _end_at_risk(self, stored: StoredJob) -> None:
        """End a job that may not be drawn again: with its pictures, where the gateway died after they were stored."""
        try:
            result = await self._delivery.found(stored)
        except (GatewayError, ValueError) as error:
            log.warning("what was stored of job %s cannot be read: %s", stored.id, error)
            result = None
        if result is not None:
            done = self._ends.over(structs.replace(stored, status=JobStatus.SUCCEEDED, result=result, at_risk=0))
        else:
            unknown = OutcomeUnknown(
                f"the gateway stopped while {stored.backend or 'a backend'} was drawing this, and it may have been "
                "paid for: it is not drawn again (retry_unknown)",
                should_retry=False,
            )
            done = self._ends.failed(stored, unknown)
            self._metrics.durable_jobs.add("unknown")
            log.warning("job %s ended without our knowing how", stored.id)
        await self._ends.written(done)
        self._metrics.jobs.add(done.status)

    def _revived(self, stored: StoredJob) -> Job:
        job = self._pipeline.admit(
            self._tenant_of(stored.tenant),
            stored.request,
            stored.request_id,
            stored.traceparent,
            job_id=stored.id,
            patience_seconds=stored.deadline_at - stored.created_at,
            age_seconds=max(0.0, self._unix_clock() - stored.created_at),
        )
        job.durable = True
        return job

    async def sweep(self) -> int:
        """Forget the jobs whose time is over; returns how many there were."""
        return await self._store.forget_expired(self._unix_clock())


def _stopping() -> Draining:
    return Draining("the gateway is stopping", retry_after_seconds=5.0)


def _is_free_of_cost(job: Job, error: GatewayError) -> bool:
    """Whether nothing was drawn, and the client would be told the same only because it asked too early."""
    if error.retry_after_seconds is not None:
        return True
    return isinstance(error, NotFound | AllAttemptsFailed) and not any(task.attempts for task in job.tasks)


def _bare(request: ImageRequest) -> ImageRequest:
    """The request without its input pictures, for a record that nothing is drawn from."""
    return structs.replace(request, images=(), mask=None) if request.images else request
