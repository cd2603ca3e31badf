"""What is told of a job: the record of `/v1/jobs`, of its events and of webhooks, made from what is stored and what is live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from img_serving.domain.errors import GatewayError
from img_serving.domain.images import Operation
from img_serving.domain.jobs import Job, JobStatus
from img_serving.domain.stored import StoredJob
from img_serving.gateway.delivery import Delivery
from img_serving.gateway.dispatcher import Dispatcher
from img_serving.gateway.live import LiveJob


class JobError(msgspec.Struct, frozen=True):
    """How a job failed: the error object of the API."""

    message: str
    type: str
    param: str | None
    code: str | None


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job as its owner sees it. Times are Unix seconds.

    `position` counts the pictures before its next one; in `eta_seconds` it should be done (null: nobody knows, or it is over).
    `waiting_for` says why no backend can take it for now. `progress` is 0 to 1 over all pictures. `result` is the body that
    the plain request would have got.
    """

    object: Literal["job"] = "job"
    id: str
    operation: Operation
    status: JobStatus
    model: str | None
    n: int
    position: int | None
    eta_seconds: float | None
    progress: float
    attempts: int
    backend: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    request_id: str
    idempotency_key: str | None
    webhook_url: str | None
    waiting_for: str | None
    result: msgspec.Raw | None
    error: JobError | None


class JobRecords:
    """Makes the records."""

    def __init__(self, dispatcher: Dispatcher, delivery: Delivery, clock: Callable[[], float]) -> None:
        """`clock` gives the scheduler's seconds."""
        self._dispatcher = dispatcher
        self._delivery = delivery
        self._clock = clock

    async def full(self, stored: StoredJob, live: LiveJob | None = None, *, inline: bool = True) -> JobRecord:
        """Everything, with the result; not `inline`: its pictures as URLs also where base64 was asked for.

        A result whose pictures are gone is left out, and the error says so.
        """
        if live is not None and not live.is_over:
            return self.brief(stored, live)
        if stored.result is None:
            return self.brief(stored)
        try:
            answer = await self._delivery.again(stored, None if live is None else live.artifacts, inline=inline)
        except GatewayError as error:
            return msgspec.structs.replace(
                self.brief(stored), error=JobError(error.message, error.kind, error.param, error.code)
            )
        return msgspec.structs.replace(self.brief(stored), result=msgspec.Raw(b"".join(answer.parts)))

    def brief(self, stored: StoredJob, live: LiveJob | None = None) -> JobRecord:
        """The same without a result."""
        if live is not None and not live.is_over:
            return self._running(stored, live.job, live.progress, live.waiting_for)
        error = stored.error
        return _record(
            stored,
            progress=1.0 if stored.status is JobStatus.SUCCEEDED else 0.0,
            error=None if error is None else JobError(error.message, error.kind, error.param, error.code),
        )

    def of_plain(self, job: Job, created_at: float) -> JobRecord:
        """A plain request that is still drawn: nobody else keeps it."""
        return self._running(
            StoredJob(
                id=job.id,
                tenant=job.tenant.name,
                request=job.request,
                created_at=created_at,
                deadline_at=created_at,
                response_format="url",
                base_url="",
                artifact_key=b"",
                request_id=job.request_id,
            ),
            job,
            job.steps_done / job.steps_total if job.steps_total else 0.0,
        )

    def _running(self, stored: StoredJob, job: Job, progress: float, waiting_for: str | None = None) -> JobRecord:
        # one without a route waits for a backend that can take it, whether it was tried already or not
        status = JobStatus.RUNNING if job.started_at is not None and job.route else JobStatus.QUEUED
        position: int | None = None
        eta: float | None = None
        if job.route and not job.is_over:
            estimate = self._dispatcher.scheduler.estimate(job, self._clock())
            position = estimate.position
            eta = None if estimate.eta_seconds is None else round(estimate.eta_seconds, 3)
        started = stored.started_at
        if started is None and job.started_at is not None:
            started = stored.created_at + job.queued_seconds
        running = msgspec.structs.replace(
            stored,
            status=status,
            started_at=started,
            backend=job.backend or stored.backend,
            attempts=stored.attempts + job.attempts,
        )
        return _record(running, position=position, eta_seconds=eta, progress=progress, waiting_for=waiting_for)


def _record(
    stored: StoredJob,
    *,
    position: int | None = None,
    eta_seconds: float | None = None,
    progress: float = 0.0,
    waiting_for: str | None = None,
    error: JobError | None = None,
) -> JobRecord:
    return JobRecord(
        id=stored.id,
        operation=stored.request.operation,
        status=stored.status,
        model=stored.request.model,
        n=stored.request.n,
        position=position,
        eta_seconds=eta_seconds,
        progress=round(progress, 4),
        attempts=stored.attempts,
        backend=stored.backend,
        created_at=round(stored.created_at, 3),
        started_at=_rounded(stored.started_at),
        finished_at=_rounded(stored.finished_at),
        expires_at=_rounded(stored.expires_at),
        request_id=stored.request_id,
        idempotency_key=stored.idempotency_key,
        webhook_url=stored.webhook_url,
        waiting_for=waiting_for,
        result=None,
        error=error,
    )


def _rounded(moment: float | None) -> float | None:
    return None if moment is None else round(moment, 3)
