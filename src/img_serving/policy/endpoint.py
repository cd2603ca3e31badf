"""What the scheduler knows of one endpoint: slots, health, breaker and learned speed."""

from __future__ import annotations

from dataclasses import dataclass

from img_serving.domain.capabilities import Capabilities
from img_serving.policy.circuit_breaker import CircuitBreaker
from img_serving.policy.health import Health, HealthRecord

SPEED_MEMORY = 0.3
"""Share of a new measurement in the moving averages: about the last six calls count."""


@dataclass(frozen=True, slots=True)
class EndpointSnapshot:
    """One endpoint at one moment: for `repr`, health, metrics, the API and tests."""

    backend: str
    url: str
    slots: int
    in_flight: int
    health: str
    health_detail: str
    breaker: str
    usable: bool
    weight: float
    seconds_per_unit: float | None
    latency_seconds: float | None
    calls: int
    failures: int
    last_error: str | None


class EndpointState:
    """One address of a backend, as the policies see it. Only the scheduler and the prober write to it."""

    __slots__ = (
        "backend",
        "breaker",
        "busy_until",
        "calls",
        "capabilities",
        "enabled",
        "failures",
        "health",
        "id",
        "in_flight",
        "last_error",
        "latency_seconds",
        "max_batch_size",
        "outstanding_cost",
        "picked_at",
        "removed",
        "retry_unknown",
        "seconds_per_unit",
        "slots",
        "smooth_weight",
        "url",
        "weight",
    )

    def __init__(
        self,
        *,
        id: int,  # noqa: A002 - the field's own word
        backend: str,
        url: str,
        slots: int,
        weight: float,
        capabilities: Capabilities,
        max_batch_size: int,
        breaker: CircuitBreaker,
        health: HealthRecord,
        enabled: bool = True,
        retry_unknown: bool = True,
    ) -> None:
        """`slots` calls may be in flight at once; `weight` is this endpoint's share."""
        self.id = id
        self.backend = backend
        self.url = url
        self.slots = slots
        self.weight = weight
        self.capabilities = capabilities
        self.max_batch_size = max_batch_size
        self.breaker = breaker
        self.health = health
        self.enabled = enabled
        self.retry_unknown = retry_unknown
        self.removed = False
        self.in_flight = 0
        self.outstanding_cost = 0.0
        self.busy_until = 0.0
        self.seconds_per_unit: float | None = None
        self.latency_seconds: float | None = None
        self.smooth_weight = 0.0
        self.picked_at = 0
        self.calls = 0
        self.failures = 0
        self.last_error: str | None = None

    def is_usable(self, now: float) -> bool:
        """Whether it may be used at all: a full endpoint is usable, just not ready."""
        return (
            self.enabled
            and not self.removed
            and self.health.health is not Health.DOWN
            and self.busy_until <= now
            and self.breaker.admits(now)
        )

    def is_only_busy(self, now: float) -> bool:
        """Whether all that keeps it from being used is that it said to come back later."""
        return (
            self.busy_until > now
            and self.enabled
            and not self.removed
            and self.health.health is not Health.DOWN
            and self.breaker.admits(now)
        )

    def learn(self, cost: float, seconds: float) -> None:
        """A call of `cost` megapixel-steps took `seconds`."""
        speed = seconds / cost
        if self.seconds_per_unit is None or self.latency_seconds is None:
            self.seconds_per_unit = speed
            self.latency_seconds = seconds
            return
        self.seconds_per_unit += SPEED_MEMORY * (speed - self.seconds_per_unit)
        self.latency_seconds += SPEED_MEMORY * (seconds - self.latency_seconds)

    def snapshot(self, now: float) -> EndpointSnapshot:
        """A frozen picture of it."""
        return EndpointSnapshot(
            backend=self.backend,
            url=self.url,
            slots=self.slots,
            in_flight=self.in_flight,
            health=self.health.health.value,
            health_detail=self.health.detail,
            breaker=self.breaker.state(now).value,
            usable=self.is_usable(now),
            weight=self.weight,
            seconds_per_unit=self.seconds_per_unit,
            latency_seconds=self.latency_seconds,
            calls=self.calls,
            failures=self.failures,
            last_error=self.last_error,
        )

    def __repr__(self) -> str:
        speed = "?" if self.seconds_per_unit is None else f"{self.seconds_per_unit:.3g}"
        return (
            f"<Endpoint {self.backend} {self.url}: {self.in_flight}/{self.slots} slots, "
            f"{self.health.health}, {self.breaker!r}, {speed} s/MP-step>"
        )
