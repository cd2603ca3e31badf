"""What the moving parts need from the outside, as Protocols: backends, artifact stores, state, the upstream transport."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
            StorageFailed: nothing can be stored there; what needs no storage works all the same.
        """
        ...

    def close(self) -> None:
        """Finish what is being written."""
        ...


@dataclass(frozen=True, slots=True)
class JobQuery:
    """Which of a tenant's jobs are asked for; None: all. `after` is the id of the last one that was seen."""

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

    async def save_job(self, job: StoredJob) -> None:
        """Replace a job that is there; one that was forgotten meanwhile stays forgotten."""
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

    async def unfinished_jobs(self) -> list[str]:
        """The ids of all jobs that are not over, oldest first."""
        ...

    async def load_job(self, job_id: str) -> StoredJob | None:
        """A job of whatever tenant."""
        ...

    async def forget_job(self, job_id: str) -> None:
        """Remove a job; unknown ones are fine."""
        ...

    async def forget_expired(self, now: float) -> int:
        """Remove the jobs whose `expires_at` has passed; returns how many there were."""
        ...


class State(StateStore, JobStore, Protocol):
    """Everything that survives a restart, in one place."""


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
