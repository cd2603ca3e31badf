"""State that lives as long as the process: for tests and for drawing without a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import msgspec

from img_serving.domain.stored import OVER, StoredJob
from img_serving.ports import JobQuery, StoredWebhook, WebhookState
from img_serving.state.sqlite import StateError


class MemoryState:
    """The contract of a state store without the disk."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        """Starts empty. `clock` gives Unix seconds: what is past its time is not found any more."""
        self._clock = clock
        self._jobs: dict[str, StoredJob] = {}
        self._keys: dict[tuple[str, str], str] = {}
        self._backends: dict[str, bytes] = {}
        self._values: dict[str, str] = {}
        self._webhooks: dict[str, StoredWebhook] = {}
        self._closed = False

    async def open(self) -> None:
        """Nothing to open."""
        self._check()

    async def backends(self) -> list[bytes]:
        """The stored backend records (JSON), oldest first."""
        self._check()
        return list(self._backends.values())

    async def put_backend(self, name: str, record: bytes) -> None:
        """Add or replace one; it keeps its place."""
        self._check()
        self._backends[name] = bytes(record)

    async def delete_backend(self, name: str) -> None:
        """Remove one; unknown names are fine."""
        self._check()
        self._backends.pop(name, None)

    async def get_value(self, key: str) -> str | None:
        """A small named value."""
        self._check()
        return self._values.get(key)

    async def put_value(self, key: str, value: str) -> None:
        """Set a small named value."""
        self._check()
        self._values[key] = value

    async def add_job(self, job: StoredJob) -> StoredJob | None:
        """Take a new job; or return the one that has its idempotency key already."""
        self._check()
        if job.idempotency_key is not None:
            holder = await self.find_key(job.tenant, job.idempotency_key)
            if holder is not None:
                return holder
            self._keys[job.tenant, job.idempotency_key] = job.id
        self._jobs[job.id] = job
        return None

    async def save_job(self, job: StoredJob, webhook: StoredWebhook | None = None) -> None:
        """Replace a job that is there and not over, and add its event to the outbox."""
        self._check()
        known = self._jobs.get(job.id)
        if known is not None and not known.is_over:
            self._jobs[job.id] = job
            if known.idempotency_key is not None and job.idempotency_key is None:
                del self._keys[known.tenant, known.idempotency_key]
            if webhook is not None:
                await self.add_webhook(webhook)

    async def find_job(self, tenant: str, job_id: str) -> StoredJob | None:
        """A tenant's job, unless it is past its `expires_at`."""
        self._check()
        found = self._jobs.get(job_id)
        return found if found is not None and found.tenant == tenant and self._is_kept(found) else None

    async def find_key(self, tenant: str, idempotency_key: str) -> StoredJob | None:
        """The job that was made with this key."""
        self._check()
        job_id = self._keys.get((tenant, idempotency_key))
        return None if job_id is None else await self.find_job(tenant, job_id)

    async def list_jobs(self, tenant: str, query: JobQuery) -> list[StoredJob]:
        """A tenant's jobs, newest first."""
        self._check()
        newest_first = list(reversed(self._jobs.values()))
        if query.after is not None:
            places = [place for place, job in enumerate(newest_first) if (job.id, job.tenant) == (query.after, tenant)]
            newest_first = newest_first[places[0] + 1 :] if places else []
        found = [
            job
            for job in newest_first
            if job.tenant == tenant
            and self._is_kept(job)
            and (query.status in {None, job.status} or not (job.is_over or query.status in OVER))
            and query.operation in {None, job.request.operation}
            and query.idempotency_key in {None, job.idempotency_key}
            and query.request_id in {None, job.request_id}
        ]
        return found[: query.limit]

    async def unfinished_jobs(self, limit: int, after: str | None = None) -> list[StoredJob]:
        """Jobs that are not over, oldest first."""
        self._check()
        ids = list(self._jobs)
        rest = ids[ids.index(after) + 1 :] if after in self._jobs else ids
        return [self._jobs[job_id] for job_id in rest if not self._jobs[job_id].is_over][:limit]

    async def load_job(self, job_id: str) -> StoredJob | None:
        """A job of whatever tenant."""
        self._check()
        return self._jobs.get(job_id)

    async def forget_expired(self, now: float) -> int:
        """Remove the jobs whose `expires_at` has passed."""
        self._check()
        gone = [job for job in self._jobs.values() if job.expires_at is not None and job.expires_at <= now]
        for job in gone:
            del self._jobs[job.id]
            # its key may be another job's by now
            if job.idempotency_key is not None and self._keys.get((job.tenant, job.idempotency_key)) == job.id:
                del self._keys[job.tenant, job.idempotency_key]
        return len(gone)

    def _is_kept(self, job: StoredJob) -> bool:
        return job.expires_at is None or job.expires_at > self._clock()

    async def add_webhook(self, webhook: StoredWebhook) -> None:
        """Add an event to the outbox; one whose id is there already is left as it is."""
        self._check()
        self._webhooks.setdefault(webhook.event_id, webhook)

    async def due_webhooks(
        self, now: float, limit: int, *, except_events: Collection[str] = (), except_hosts: Collection[str] = ()
    ) -> list[StoredWebhook]:
        """Events whose time has come: those never tried first, each kind longest due first."""
        self._check()
        due = [
            (one.attempts > 0, one.next_at, place, one)
            for place, one in enumerate(self._webhooks.values())
            if one.next_at is not None and one.next_at <= now
            if one.event_id not in except_events and one.host not in except_hosts
        ]
        return [one for *_, one in sorted(due)[:limit]]

    async def next_webhook_at(self, after: float) -> float | None:
        """When the next event is due that is not due at `after` yet; None: there is none."""
        self._check()
        moments = (one.next_at for one in self._webhooks.values())
        return min((moment for moment in moments if moment is not None and moment > after), default=None)

    async def record_webhook(
        self, event_id: str, *, attempts: int, next_at: float | None, delivered_at: float | None, last_error: str
    ) -> None:
        """Note how a try ended; an event that is gone meanwhile is fine."""
        self._check()
        if event_id in self._webhooks:
            self._webhooks[event_id] = msgspec.structs.replace(
                self._webhooks[event_id],
                attempts=attempts,
                next_at=next_at,
                delivered_at=delivered_at,
                last_error=last_error,
            )

    async def find_webhooks(
        self,
        *,
        event_id: str | None = None,
        job_id: str | None = None,
        state: WebhookState | None = None,
        limit: int,
        after: str | None = None,
    ) -> list[StoredWebhook]:
        """Events, newest first, that have all of what is given; those older than the event `after`."""
        self._check()
        newest_first = list(reversed(self._webhooks.values()))
        if after is not None:
            ids = [one.event_id for one in newest_first]
            newest_first = newest_first[ids.index(after) + 1 :] if after in ids else []
        return [
            one
            for one in newest_first
            if event_id in {None, one.event_id} and job_id in {None, one.job_id} and state in {None, one.state}
        ][:limit]

    async def requeue_webhook(self, event_id: str, now: float) -> bool:
        """Have an event delivered (again), from the beginning of its schedule; False: there is no such event."""
        self._check()
        if event_id not in self._webhooks:
            return False
        self._webhooks[event_id] = msgspec.structs.replace(
            self._webhooks[event_id], queued_at=now, next_at=now, attempts=0, delivered_at=None, last_error=""
        )
        return True

    async def sweep_webhooks(self, before: float) -> int:
        """Forget events that are not tried any more and were queued before then; returns how many."""
        self._check()
        old = [one.event_id for one in self._webhooks.values() if one.next_at is None and one.queued_at < before]
        for event_id in old:
            del self._webhooks[event_id]
        return len(old)

    async def close(self) -> None:
        """No more calls. Closing twice is fine."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise StateError("the state is closed: the gateway is stopping")

    def __repr__(self) -> str:
        return f"<MemoryState {len(self._backends)} backends, {len(self._values)} values>"
