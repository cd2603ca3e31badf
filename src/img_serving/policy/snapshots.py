"""What the scheduler looks like at one moment: frozen records for the API, metrics, `repr` and tests."""

from __future__ import annotations

from dataclasses import dataclass

from img_serving.policy.endpoint import EndpointSnapshot


@dataclass(frozen=True, slots=True)
class BackendQueue:
    """What waits for one backend (a task counts for every backend that could have it).

    `depth` and `running` count tasks, `work` is in megapixel-steps, `oldest_seconds` the longest wait so far, `eta_seconds`
    how long a new request would wait; None where no speed is known yet.
    """

    backend: str
    depth: int
    running: int
    work: float
    oldest_seconds: float
    eta_seconds: float | None


@dataclass(frozen=True, slots=True)
class TenantQueue:
    """What one tenant has waiting and running, in the same units. `eta_seconds`: when the last of it should have started."""

    tenant: str
    priority: int
    weight: float
    max_running: int | None
    depth: int
    running: int
    work: float
    oldest_seconds: float
    eta_seconds: float | None


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """The scheduler at one moment. `queued` and `running` count tasks and batches, `work` megapixel-steps that wait."""

    queued: int
    running: int
    work: float
    oldest_seconds: float
    endpoints: tuple[EndpointSnapshot, ...]
    backends: tuple[BackendQueue, ...]
    tenants: tuple[TenantQueue, ...]


@dataclass(frozen=True, slots=True)
class JobEstimate:
    """Where a job stands: `position` tasks before its first waiting one, seconds until that starts and until all is done.

    None where no speed is known yet. A job that does not wait is at position 0.
    """

    position: int
    wait_seconds: float | None
    eta_seconds: float | None
