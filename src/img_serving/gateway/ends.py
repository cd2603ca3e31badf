"""How jobs end: what is stored of it, and in the same moment who is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from msgspec import structs

from img_serving.domain.errors import Cancelled, DeadlineExceeded, GatewayError
from img_serving.domain.images import Artifact
from img_serving.domain.jobs import Job, JobStatus
from img_serving.domain.stored import StoredError, StoredJob
from img_serving.gateway.delivery import Delivery
from img_serving.ports import JobStore, StoredWebhook

log = logging.getLogger(__name__)

KEY_SECONDS = 24 * 3600.0
"""How long an idempotency key is remembered, counted from its first use."""

WRITE_TRIES = 5


class JobEnds:
    """Makes the last record of a job, and writes it down."""

    def __init__(
        self,
        *,
        store: JobStore,
        delivery: Delivery,
        unix_clock: Callable[[], float],
        is_draining: Callable[[], bool],
        event_of: Callable[[StoredJob], Awaitable[StoredWebhook | None]],
        on_event: Callable[[], None],
        result_ttl_seconds: float,
    ) -> None:
        """`event_of` is what the client of a job that has ended is to be told; `on_event` hears that there is such an event."""
        self._store = store
        self._delivery = delivery
        self._unix_clock = unix_clock
        self._is_draining = is_draining
        self._event_of = event_of
        self._on_event = on_event
        self._result_ttl_seconds = result_ttl_seconds

    async def kept(self, stored: StoredJob, job: Job, artifacts: list[Artifact], ignored: tuple[str, ...]) -> StoredJob:
        """The job as succeeded, its pictures stored."""
        result = await self._delivery.keep(stored, artifacts, ignored)
        return self.over(
            structs.replace(stored, status=JobStatus.SUCCEEDED, result=result, backend=job.backend, at_risk=0)
        )

    def failed(self, stored: StoredJob, error: GatewayError) -> StoredJob:
        """The job as failed, cancelled or expired, as the error says."""
        status = JobStatus.FAILED
        if isinstance(error, Cancelled):
            status = JobStatus.CANCELLED
        elif isinstance(error, DeadlineExceeded):
            status = JobStatus.EXPIRED
        return self.over(structs.replace(stored, status=status, error=StoredError.of(error), at_risk=0))

    def over(self, stored: StoredJob) -> StoredJob:
        """The job as over, and when it may be forgotten."""
        now = self._unix_clock()
        expires = now + self._result_ttl_seconds
        if stored.idempotency_key is not None:
            expires = max(expires, stored.created_at + KEY_SECONDS)
        # a clock that was set back meanwhile does not end a job before it began
        ended = max(now, stored.started_at or stored.created_at)
        return structs.replace(stored, finished_at=ended, expires_at=expires)

    async def written(self, stored: StoredJob) -> None:
        """Write a job's end down; a disk that is full for a moment is tried again."""
        for again in range(WRITE_TRIES):
            try:
                await self.write_once(stored)
            except GatewayError as error:
                if again == WRITE_TRIES - 1 or self._is_draining():
                    raise
                log.warning("job %s could not be written down, trying again: %s", stored.id, error.message)
                await asyncio.sleep(0.2 * 2**again)
            else:
                return

    async def write_once(self, stored: StoredJob) -> None:
        """Write it down, with what its client is to be told, in one transaction.

        Raises:
            GatewayError: it could not be.
        """
        event = await self._event_of(stored)
        await self._store.save_job(stored, event)
        if event is not None:
            self._on_event()
