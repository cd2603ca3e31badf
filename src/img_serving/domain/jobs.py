"""One request's life in the gateway: the job, its tasks (one a picture), and the batches that travel to endpoints."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

import msgspec

from img_serving.domain.errors import GatewayError, Outcome
from img_serving.domain.images import Artifact, ImageRequest, ItemFailure, Preview
from img_serving.domain.tenants import Tenant


class JobStatus(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Target(msgspec.Struct, frozen=True, gc=False):
    """One backend that could serve a request. `model` is its name there; None: whatever the engine has loaded.

    `only` are the endpoints of it that can, by their numbers, where others of it cannot.
    """

    backend: str
    model: str | None
    tier: int = 0
    only: tuple[int, ...] | None = None


Route = tuple[Target, ...]
"""The backends that could serve a request, in file order; the queue is chosen by it."""


class JobWatcher(Protocol):
    """Hears of a job while it is drawn. Its methods only take note: they neither wait nor raise."""

    def started(self, width: int, height: int) -> None:
        """A call was made, for pictures of this size (pixels)."""
        ...

    def progressed(self, index: int, share: float, preview: Preview | None) -> None:
        """Its call is done to `share` (0 to 1), and picture `index` looks like `preview` by now, where the engine shows it."""
        ...

    def drawn(self, index: int, artifact: Artifact) -> None:
        """Picture `index` is there. It may be told twice."""
        ...


class Task(msgspec.Struct, eq=False):
    """One image of a job: the unit that is queued, batched and retried. Only the scheduler writes to it."""

    job: Job
    index: int
    seed: int
    attempts: int = 0
    """Attempts that may have drawn; one that never started costs nothing."""
    calls: int = 0
    """Calls that it travelled in, also those that never started."""
    tried: set[int] = msgspec.field(default_factory=set)
    """Identifiers of the endpoints that had it."""
    alone: bool = False
    """Set after a batch failed as a whole: it is tried without company, so that one bad member fails alone."""
    started: bool = False
    batch: Batch | None = None
    """The running batch that it travels in."""
    hedge: Batch | None = None
    """A second running batch that draws the same picture, in case the first is slow."""
    waits_until: float | None = None
    """Until when it may pass a free endpoint by for a faster one that is busy; set when it first does."""
    place: Any = None
    """Where it stands in line (`policy.fair_queue.Lane`); None: it does not."""
    artifact: Artifact | None = None

    def __repr__(self) -> str:
        return f"<Task {self.index} of {self.job.id}>"


class Job(msgspec.Struct, eq=False):
    """One request's life. Times are seconds of the loop's clock. Only the scheduler writes to it."""

    id: str
    request: ImageRequest
    route: Route
    tenant: Tenant
    submitted_at: float
    deadline: float
    request_id: str = ""
    traceparent: str | None = None
    cost: float = 0.0
    """Megapixel-steps of one of its pictures; set when it is submitted."""
    status: JobStatus = JobStatus.QUEUED
    tasks: list[Task] = msgspec.field(default_factory=list)
    started_at: float | None = None
    finished_at: float | None = None
    backend: str | None = None
    attempts: int = 0
    """The most calls that any one of its pictures took, also those that never started."""
    panicked: bool = False
    """Whether it went to an endpoint that is ejected or broken because nothing better was left."""
    steps_done: int = 0
    steps_total: int = 0
    error: GatewayError | None = None
    watcher: JobWatcher | None = None
    durable: bool = False
    """It is in the job store: what happens to it is written down there, and it goes on after a restart."""

    def __post_init__(self) -> None:
        request = self.request
        if request.n == 1:
            self.tasks = [Task(self, 0, request.seed)]
        else:
            self.tasks = [Task(self, index, request.seed_of(index)) for index in range(request.n)]

    def __repr__(self) -> str:
        return f"<Job {self.id}: {self.status}, {len(self.tasks)} pictures>"

    @property
    def is_over(self) -> bool:
        """Whether it is resolved."""
        return self.finished_at is not None

    @property
    def queued_seconds(self) -> float:
        """How long it waited for its first slot (seconds)."""
        return (self.started_at if self.started_at is not None else self.submitted_at) - self.submitted_at


class Batch(msgspec.Struct, eq=False):
    """Compatible tasks that travel to one endpoint in one call."""

    endpoint_id: int
    backend: str
    model: str | None
    tasks: tuple[Task, ...]
    era: int
    cost: float
    started_at: float
    heard_at: float = 0.0
    """When its engine last showed a sign of life: its start, or the last progress."""
    expected_end: float = 0.0
    expected_seconds: float | None = None
    """How long it should take, where the endpoint's speed is known."""
    loads_model: bool = False
    """Whether the endpoint had another model loaded: its seconds say nothing about drawing."""
    is_hedge: bool = False
    retry_unknown: bool = True
    """Whether it may be made again where nobody knows how it ended: false where somebody pays for each."""
    durable: bool = False
    """Whether a picture of it belongs to a durable job."""
    watched: bool = False
    """Whether a job of it has a watcher."""

    @property
    def is_unwanted(self) -> bool:
        """Whether nobody waits for any of its pictures any more."""
        return all(task.job.finished_at is not None or task.artifact is not None for task in self.tasks)

    def __repr__(self) -> str:
        return f"<Batch of {len(self.tasks)} for {self.backend}>"


class Ended(msgspec.Struct, frozen=True):
    """How a batch's attempt ended: pictures, one of the failing outcomes, a refusal, or a cancellation."""

    results: tuple[Artifact | ItemFailure, ...] | None = None
    outcome: Outcome | None = None
    refusal: GatewayError | None = None
    message: str = ""
    busy_seconds: float | None = None
    timed_out: bool = False
    """The endpoint said nothing for as long as an attempt may take: it may be wedged."""
    is_blameless: bool = False
    """It failed, and yet the endpoint is well."""

    @property
    def is_cancelled(self) -> bool:
        """Neither pictures nor a failure: everybody who wanted it had left."""
        return self.results is None and self.outcome is None and self.refusal is None


CANCELLED = Ended()
