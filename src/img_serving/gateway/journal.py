"""What is written down about the calls of durable jobs, so that a crash in the middle of one is known of afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping

from msgspec import structs

from img_serving.domain.errors import GatewayError, Outcome
from img_serving.domain.images import Call
from img_serving.domain.jobs import Batch, Ended, JobStatus
from img_serving.gateway.live import LiveJob
from img_serving.gateway.spool import InputSpool
from img_serving.gateway.tasks import TaskRegistry
from img_serving.ports import JobStore

log = logging.getLogger(__name__)


class CallJournal:
    """The dispatcher's journal (see `dispatcher.AttemptJournal`): counts the calls of a job that may have been paid for.

    A call is counted before it is made, and taken back when it is known to have failed. What is counted when the gateway
    dies is not drawn again.
    """

    def __init__(self, live: Mapping[str, LiveJob], store: JobStore, spool: InputSpool, tasks: TaskRegistry) -> None:
        """`live` are the jobs that are not over, by id."""
        self._live = live
        self._store = store
        self._spool = spool
        self._tasks = tasks

    async def starting(self, batch: Batch) -> None:
        """Write down that calls are made which cost money, before they are."""
        if batch.retry_unknown:
            return  # after a crash they are simply made again
        lives = list(self._durable_of(batch))
        for live in lives:
            now = live.current()
            live.stored = structs.replace(
                now, status=JobStatus.RUNNING, attempts=live.stored.attempts, at_risk=now.at_risk + 1
            )
        await asyncio.gather(*[self._store.save_job(live.stored) for live in lives])

    def ended(self, batch: Batch, ended: Ended) -> None:
        """A call that is known to have failed cost nothing: after a crash the job may be drawn."""
        harmless = ended.refusal is not None or ended.outcome in {Outcome.FAILED, Outcome.NOT_STARTED}
        if batch.retry_unknown or not harmless:
            return
        for live in self._durable_of(batch):
            if live.stored.at_risk:
                live.stored = structs.replace(live.stored, at_risk=live.stored.at_risk - 1)
                self._tasks.spawn(self._noted(live), "noting a call's end")

    async def filled(self, call: Call) -> Call:
        """The call with the bytes of its input pictures."""
        return await self._spool.filled(call)

    async def _noted(self, live: LiveJob) -> None:
        if not live.is_over and live.stored.id in self._live:
            try:
                await self._store.save_job(live.stored)
            except GatewayError as error:
                log.warning("the end of a call of job %s could not be written down: %s", live.stored.id, error.message)

    def _durable_of(self, batch: Batch) -> Iterable[LiveJob]:
        for job_id in dict.fromkeys(task.job.id for task in batch.tasks if task.job.durable):
            live = self._live.get(job_id)
            if live is not None:
                yield live
