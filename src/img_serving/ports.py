"""What the moving parts need from the outside, as Protocols: backends, artifact stores, state, transports."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlsplit

import msgspec

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.images import Artifact, Call, ItemFailure, Operation, Progress
from img_serving.domain.jobs import JobStatus
from img_serving.domain.stored import StoredJob

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What a health check found: `detail` says why (safe to show). `models` is None where the server did not tell.

    `found` says in one line which program speaks there, and what that rests on, where the adapter knows ("" if not).
    `faults` say what of its configuration cannot work there, each in one line.
    """

    healthy: bool
    detail: str = ""
    models: tuple[str, ...] | None = None
    found: str = ""
    faults: tuple[str, ...] = ()


class Backend(Protocol):
    """An adapter: one upstream protocol, spoken to one endpoint.

    Foreign errors are mapped here, once, and nowhere else.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What it can do, as far as it is known now (a detecting adapter learns)."""
        ...

    @property
    def protocol(self) -> str:
        """The protocol spoken: for `http` what was detected, once it was."""
        ...

    async def generate(self, call: Call, on_progress: OnProgress) -> Sequence[Artifact | ItemFailure]:
        """Draw `call.items`: exactly one result each, in order.

        Cancelling the task cancels the work upstream as far as the protocol can, at once.

        Raises:
            AttemptError: the endpoint failed; `outcome` says how.
            BackendRefusal: the request is at fault.
        """
        ...

    async def check(self, timeout_seconds: float) -> HealthReport:
        """Ask for health without drawing. Never raises for what the endpoint does wrong."""
        ...

    async def close(self) -> None:
        """Give up connections. Calls in flight have ended before."""
        ...


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """What is known of a stored picture without reading it. `modified_at` in Unix seconds."""

    name: str
    media_type: str
    size_bytes: int
    modified_at: float


class ArtifactStore(Protocol):
    """Keeps finished pictures by unguessable name (`<id>.<ext>`)."""

    async def put(self, data: bytes | memoryview, extension: str, name: str | None = None) -> StoredArtifact:
        """Store atomically: a reader sees the whole picture or none.

        `name` is one that `is_name` knows, for who has to be able to store the same picture again: it replaces what is there.

        Raises:
            StorageFailed: the disk is full, read-only or gone.
        """
        ...

    async def find(self, name: str) -> StoredArtifact | None:
        """The picture's record; None if unknown, expired or not a name that this store gives."""
        ...

    def read(self, name: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes `start` (inclusive) to `stop` (exclusive) in chunks of at most 1 MiB."""
        ...

    async def delete(self, name: str) -> bool:
        """Remove a picture; whether it was there."""
        ...

    async def names(self) -> list[str]:
        """The names of all pictures, expired ones too."""
        ...

    async def sweep(self) -> int:
        """Remove what is expired or over the size limit; returns how many pictures went."""
        ...

    def path_of(self, name: str) -> str:
        """Where the picture is, for operators who allow `response_format: "file"`."""
        ...

    async def prepare(self) -> None:
        """Make ready to store.

        Raises:
            StorageFailed: nothing can be stored there.
        """
        ...

    def close(self) -> None:
        """Finish what is being written."""
        ...


@dataclass(frozen=True, slots=True)
class JobQuery:
    """Which of a tenant's jobs are asked for; None: all. `after` is the id of the last one that was seen.

    Queued and running are one to a store: it is not told of every start, so either finds all jobs that are not over.
    """

    status: JobStatus | None = None
    operation: Operation | None = None
    idempotency_key: str | None = None
    request_id: str | None = None
    limit: int = 20
    after: str | None = None


class StateStore(Protocol):
    """What survives a restart: backends added over the API, and the hash of the key made at the first start."""

    async def open(self) -> None:
        """Open or create the store, and bring an older one up to date."""
        ...

    async def backends(self) -> list[bytes]:
        """The stored backend records (JSON), oldest first."""
        ...

    async def put_backend(self, name: str, record: bytes) -> None:
        """Add or replace one, on disk before it returns."""
        ...

    async def delete_backend(self, name: str) -> None:
        """Remove one; unknown names are fine."""
        ...

    async def get_value(self, key: str) -> str | None:
        """A small named value."""
        ...

    async def put_value(self, key: str, value: str) -> None:
        """Set a small named value, on disk before it returns."""
        ...

    async def close(self) -> None:
        """Finish what is being written and let go of the file."""
        ...


class JobStore(Protocol):
    """Keeps the durable jobs. What a method has confirmed is on disk, also after a power cut."""

    async def add_job(self, job: StoredJob) -> StoredJob | None:
        """Take a new job; or return the one of the same tenant that has its idempotency key already, and take nothing.

        A key is free again once its job is `expires_at`.
        """
        ...

    async def save_job(self, job: StoredJob, webhook: StoredWebhook | None = None) -> None:
        """Replace a job that is there and not over: a note of how a call went may come later than the end of its job.

        In the same transaction its event is added to the outbox: what its client is to be told of its end.
        """
        ...

    async def find_job(self, tenant: str, job_id: str) -> StoredJob | None:
        """A tenant's job, unless it is past its `expires_at`."""
        ...

    async def find_key(self, tenant: str, idempotency_key: str) -> StoredJob | None:
        """The job that was made with this key and is not past its `expires_at`."""
        ...

    async def list_jobs(self, tenant: str, query: JobQuery) -> list[StoredJob]:
        """A tenant's jobs, newest first, at most `query.limit`."""
        ...

    async def unfinished_jobs(self, limit: int, after: str | None = None) -> list[StoredJob]:
        """Jobs of all tenants that are not over, oldest first, at most `limit`; those that came after the job `after`."""
        ...

    async def load_job(self, job_id: str) -> StoredJob | None:
        """A job of whatever tenant."""
        ...

    async def forget_expired(self, now: float) -> int:
        """Remove the jobs whose `expires_at` has passed; returns how many there were."""
        ...


WebhookState = Literal["pending", "delivered", "failed"]


class StoredWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """One event for one receiver, as the outbox keeps it. Times are Unix seconds.

    `payload` is the body as it is sent, byte for byte, at every try. `queued_at`: since when it is tried, which is
    `created_at` until somebody asks for another delivery; `attempts` counts from there. `next_at` None: it is not tried
    again, as it was delivered (`delivered_at`) or given up. `last_error` says how the last try failed ("" if none did).
    """

    event_id: str
    job_id: str
    tenant: str
    url: str
    type: str
    created_at: float
    payload: bytes
    queued_at: float
    next_at: float | None
    attempts: int = 0
    delivered_at: float | None = None
    last_error: str = ""

    @property
    def state(self) -> WebhookState:
        """What has become of it so far."""
        if self.next_at is not None:
            return "pending"
        return "failed" if self.delivered_at is None else "delivered"

    @property
    def host(self) -> str:
        """Whose receiver it goes to."""
        return (urlsplit(self.url).hostname or "").rstrip(".")


class WebhookStore(Protocol):
    """The outbox: events that wait for their receivers, and those of the last days. What a call confirmed is on disk.

    Whoever ends a job adds its event in the same transaction; an event that is there already is left as it is.
    """

    async def due_webhooks(
        self, now: float, limit: int, *, except_events: Collection[str] = (), except_hosts: Collection[str] = ()
    ) -> list[StoredWebhook]:
        """Events whose time has come: those never tried first, each kind longest due first."""
        ...

    async def next_webhook_at(self, after: float) -> float | None:
        """When the next event is due that is not due at `after` yet; None: there is none."""
        ...

    async def record_webhook(
        self, event_id: str, *, attempts: int, next_at: float | None, delivered_at: float | None, last_error: str
    ) -> None:
        """Note how a try ended; an event that is gone meanwhile is fine."""
        ...

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
        ...

    async def requeue_webhook(self, event_id: str, now: float) -> bool:
        """Have an event delivered (again), from the beginning of its schedule; False: there is no such event."""
        ...

    async def sweep_webhooks(self, before: float) -> int:
        """Forget events that are not tried any more and were queued before then; returns how many, a bounded number a call."""
        ...


class State(StateStore, JobStore, WebhookStore, Protocol):
    """Everything that survives a restart, in one place."""


class PostReply(msgspec.Struct, frozen=True):
    """What a receiver answered. `retry_after_seconds` is its own Retry-After, None where it said none."""

    status: int
    retry_after_seconds: float | None = None


class WebhookPoster(Protocol):
    """Sends one call to a URL that a client named: to public addresses only, unless the operator allows others."""

    async def __call__(
        self, url: str, headers: Sequence[tuple[str, str]], body: bytes, timeout_seconds: float
    ) -> PostReply:
        """POST `body`, and the answer whatever it is: redirects are not followed. `timeout_seconds` bounds all of it.

        Raises:
            ExchangeFailed: there is no answer, or the address may not be called.
        """
        ...


class UpstreamReply(msgspec.Struct, frozen=True):
    """A complete HTTP reply. Header names are lower case; of a repeated header the last value stands."""

    status: int
    headers: Mapping[str, str] = {}  # msgspec copies an empty default
    body: bytes | bytearray = b""


class Transport(Protocol):
    """HTTP to one origin, with connections kept alive. Cancelling a request closes its connection at once."""

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
        timeout_seconds: float,
        max_body_bytes: int,
        on_event_bytes: Callable[[bytes], None] | None = None,
    ) -> UpstreamReply:
        """One request to `path` (absolute, with query, percent-encoded) and its complete reply; redirects are not followed.

        `timeout_seconds` bounds the whole exchange. The body of a good `text/event-stream` is given to `on_event_bytes` as it
        comes, if there is one, and the reply's own is empty then. It must not raise.

        Raises:
            AttemptError: `NOT_STARTED` when no byte was sent (refused, DNS, TLS, connect time-out; also when a kept-alive
                connection was found closed and a new one could not be made); `UNKNOWN` when cut or timed out after
                sending, with nothing or only a part of the reply received; `FAILED` when the reply is not HTTP or is over
                `max_body_bytes`.
        """
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...
