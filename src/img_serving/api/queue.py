"""`/v1/queue`: what waits, for whom and for how long, and what each endpoint is doing about it."""

from __future__ import annotations

from itertools import islice
from typing import Literal, overload

import msgspec

from img_serving.api.backends import EndpointRecord, endpoint_record
from img_serving.api.exchange import Exchange, Reply
from img_serving.api.services import Services
from img_serving.domain.jobs import Job
from img_serving.policy.snapshots import JobEstimate

MAX_JOBS = 100
"""Jobs listed at most, the oldest ones; the counts are of all."""


class BackendQueueRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What waits for one backend. A picture counts for every backend that could draw it.

    `work` in megapixel-steps; `eta_seconds`: how long a new request would wait, null where no speed is known yet.
    """

    name: str
    depth: int
    running: int
    work: float
    oldest_seconds: float
    eta_seconds: float | None


class TenantQueueRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one tenant has waiting and running. `eta_seconds`: when the last of it should have started."""

    name: str
    priority: int
    weight: float
    max_running: int | None
    depth: int
    running: int
    work: float
    oldest_seconds: float
    eta_seconds: float | None


class QueuedEndpointRecord(EndpointRecord, frozen=True, kw_only=True):
    """One endpoint and how fast it is: seconds a call, and seconds a megapixel-step, as learned."""

    backend: str
    overhead_seconds: float | None
    seconds_per_unit: float | None
    work: float
    suspect: bool
    loaded_model: str | None
    exclusive_group: str | None


class QueuedJobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One job that is not over. `position`: pictures before its next one; null where no speed is known yet."""

    id: str
    tenant: str
    status: Literal["queued", "running"]
    n: int
    position: int
    age_seconds: float
    wait_seconds: float | None
    eta_seconds: float | None


class QueueReply(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `GET /v1/queue`. `depth` counts pictures that wait, `running` calls in flight, `jobs` the oldest ones."""

    object: Literal["queue"] = "queue"
    depth: int
    running: int
    work: float
    oldest_seconds: float
    draining: bool
    backends: list[BackendQueueRecord]
    tenants: list[TenantQueueRecord]
    endpoints: list[QueuedEndpointRecord]
    jobs: list[QueuedJobRecord]
    jobs_total: int


class Queue:
    """Handler of the queue route."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def look(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /v1/queue`."""
        dispatcher = self._services.dispatcher
        now = self._services.clock()
        scheduler = dispatcher.scheduler
        snapshot = scheduler.snapshot(now)
        oldest = list(islice(scheduler.jobs, MAX_JOBS))
        reply = QueueReply(
            depth=snapshot.queued,
            running=snapshot.running,
            work=_rounded(snapshot.work),
            oldest_seconds=_rounded(snapshot.oldest_seconds),
            draining=dispatcher.is_draining,
            backends=[
                BackendQueueRecord(
                    name=one.backend,
                    depth=one.depth,
                    running=one.running,
                    work=_rounded(one.work),
                    oldest_seconds=_rounded(one.oldest_seconds),
                    eta_seconds=_rounded(one.eta_seconds),
                )
                for one in snapshot.backends
            ],
            tenants=[
                TenantQueueRecord(
                    name=one.tenant,
                    priority=one.priority,
                    weight=one.weight,
                    max_running=one.max_running,
                    depth=one.depth,
                    running=one.running,
                    work=_rounded(one.work),
                    oldest_seconds=_rounded(one.oldest_seconds),
                    eta_seconds=_rounded(one.eta_seconds),
                )
                for one in snapshot.tenants
            ],
            endpoints=[
                QueuedEndpointRecord(
                    **msgspec.structs.asdict(endpoint_record(one)),
                    backend=one.backend,
                    overhead_seconds=one.overhead_seconds,
                    seconds_per_unit=one.seconds_per_unit,
                    work=_rounded(one.outstanding),
                    suspect=one.suspect,
                    loaded_model=one.loaded_model,
                    exclusive_group=one.group,
                )
                for one in snapshot.endpoints
            ],
            jobs=[_job(job, one, now) for job, one in zip(oldest, scheduler.estimates(oldest, now), strict=True)],
            jobs_total=len(scheduler.jobs),
        )
        return Reply(200, (msgspec.json.encode(reply),))


def _job(job: Job, estimate: JobEstimate, now: float) -> QueuedJobRecord:
    return QueuedJobRecord(
        id=job.id,
        tenant=job.tenant.name,
        status="queued" if job.started_at is None else "running",
        n=len(job.tasks),
        position=estimate.position,
        age_seconds=_rounded(now - job.submitted_at),
        wait_seconds=_rounded(estimate.wait_seconds),
        eta_seconds=_rounded(estimate.eta_seconds),
    )


@overload
def _rounded(value: float) -> float: ...
@overload
def _rounded(value: float | None) -> float | None: ...
def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
