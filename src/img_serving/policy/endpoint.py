"""What the scheduler knows of one endpoint: slots, health, breaker, learned speed, the model it holds, and what runs there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.jobs import Batch
from img_serving.policy.circuit_breaker import CircuitBreaker
from img_serving.policy.health import Health, HealthRecord
from img_serving.policy.speed import Speed

if TYPE_CHECKING:
    from img_serving.policy.tier import Tier

LATENCY_MEMORY_SECONDS = 60.0
"""How long a peak of latency is remembered (to 1/e of it)."""

SWITCH_SECONDS = 10.0
"""How long an engine is taken to need for loading another model, until it was seen."""

SWITCH_MEMORY = 0.5
"""Share of a new measurement in what is known of loading models."""

RAMP_FLOOR = 0.1
"""Share of its weight that an endpoint begins with after it has recovered."""

SILENCE_FACTOR = 4.0
SILENCE_SECONDS = 5.0
"""A call that has been silent for so many times its expected duration, and for so long, makes its endpoint suspect."""


class ExclusiveGroup:
    """Endpoints that share one GPU: only one of them has calls in flight at a time.

    Who is kept from it asks for it (`ask`). From the next pass on the holder starts nothing more, runs dry and hands over; who
    goes first then is the scheduler's usual order.
    """

    __slots__ = ("_asked", "_wanted", "holder", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.holder: EndpointState | None = None
        self._wanted = False
        self._asked = False

    def begin(self) -> None:
        """A new pass: what was asked for in the last one counts now, if it was not had meanwhile."""
        self._wanted, self._asked = self._asked and self.holder is not None, False

    def ask(self) -> None:
        """Somebody waits whom only the holder keeps from starting."""
        self._asked = True

    def admits(self, endpoint: EndpointState) -> bool:
        """Whether the endpoint may start a call as far as the others go."""
        return self.holder is None or (self.holder is endpoint and not self._wanted)


@dataclass(frozen=True, slots=True)
class EndpointSnapshot:
    """One endpoint at one moment: for `repr`, health, metrics, the API and tests.

    `speed` in seconds: `overhead_seconds` a call and `seconds_per_unit` a megapixel-step; None until measured.
    `outstanding` in megapixel-steps.
    """

    backend: str
    url: str
    slots: int
    in_flight: int
    health: str
    health_detail: str
    breaker: str
    suspect: bool
    usable: bool
    weight: float
    seconds_per_unit: float | None
    overhead_seconds: float | None
    latency_seconds: float | None
    outstanding: float
    calls: int
    failures: int
    last_error: str | None
    loaded_model: str | None
    group: str | None


class EndpointState:
    """One address of a backend, as the policies see it. Only the scheduler writes to it."""

    __slots__ = (
        "_busy_until",
        "_enabled",
        "_peak_at",
        "_removed",
        "_suspect",
        "backend",
        "breaker",
        "calls",
        "capabilities",
        "cheap",
        "expected_free",
        "failures",
        "group",
        "health",
        "id",
        "in_flight",
        "last_error",
        "latency_seconds",
        "linger_seconds",
        "loaded_model",
        "max_batch_pixels",
        "max_batch_size",
        "models",
        "outstanding_cost",
        "picked_at",
        "ramp_ends",
        "ramp_seconds",
        "retry_unknown",
        "running",
        "slots",
        "smooth_weight",
        "speed",
        "switch_seconds",
        "tiers",
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
        max_batch_pixels: int | None = None,
        linger_seconds: float = 0.0,
        group: ExclusiveGroup | None = None,
        cheap: bool = False,
    ) -> None:
        """`slots` calls may be in flight at once; `weight` is this endpoint's share.

        A batch holds at most `max_batch_size` pictures and `max_batch_pixels` in all; one that is not full may wait for
        company until its oldest picture is `linger_seconds` old. `cheap`: a second call for the same picture costs nothing.
        """
        self.id = id
        self.backend = backend
        self.url = url
        self.slots = slots
        self.weight = weight
        self.capabilities = capabilities
        self.max_batch_size = max_batch_size
        self.max_batch_pixels = max_batch_pixels
        self.linger_seconds = linger_seconds
        self.breaker = breaker
        self.health = health
        self.tiers: list[Tier] = []
        """Who keeps what is known of it at hand, and must hear of every change."""
        breaker.on_change = health.on_change = self._changed
        self._enabled = enabled
        self.retry_unknown = retry_unknown
        self.group = group
        self.cheap = cheap
        self._removed = False
        self._suspect = False
        self.in_flight = 0
        self.running: dict[Batch, None] = {}
        self.outstanding_cost = 0.0
        self.expected_free = 0.0
        """When its next slot should be free; 0.0 while one is."""
        self._busy_until = 0.0
        self.speed = Speed()
        self.latency_seconds: float | None = None
        self._peak_at = 0.0
        self.models: frozenset[str] | None = None
        """What its server says that it has; None: it does not say, so it may have any."""
        self.loaded_model: str | None = None
        self.switch_seconds = SWITCH_SECONDS
        self.ramp_ends = 0.0
        self.ramp_seconds = 0.0
        self.smooth_weight = 0.0
        self.picked_at = 0
        self.calls = 0
        self.failures = 0
        self.last_error: str | None = None

    # may it be used

    @property
    def enabled(self) -> bool:
        """Whether the operator lets it have work."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        self._changed()

    @property
    def removed(self) -> bool:
        """Whether its backend was removed."""
        return self._removed

    @removed.setter
    def removed(self, value: bool) -> None:
        self._removed = value
        self._changed()

    @property
    def suspect(self) -> bool:
        """Whether it looks wedged: its calls are silent for far too long."""
        return self._suspect

    @suspect.setter
    def suspect(self, value: bool) -> None:
        if value is not self._suspect:
            self._suspect = value
            self._changed()

    @property
    def busy_until(self) -> float:
        """Until when it asked to be left alone."""
        return self._busy_until

    @busy_until.setter
    def busy_until(self, value: float) -> None:
        self._busy_until = value
        self._changed()

    def is_usable(self, now: float) -> bool:
        """Whether it may be used at all: a full endpoint is usable, just not ready."""
        return (
            self._enabled
            and not self._removed
            and not self._suspect
            and self.health.health is not Health.DOWN
            and self._busy_until <= now
            and self.breaker.admits(now)
        )

    def usable_until(self, now: float) -> float:
        """Until when `is_usable` will say the same, if nothing happens."""
        steady = self.breaker.steady_until(now)
        return min(steady, self._busy_until) if self._busy_until > now else steady

    def _changed(self) -> None:
        for tier in self.tiers:
            tier.changed()

    def is_only_busy(self, now: float) -> bool:
        """Whether all that keeps it from being used is that it said to come back later."""
        return (
            self.busy_until > now
            and self.enabled
            and not self.removed
            and not self.suspect
            and self.health.health is not Health.DOWN
            and self.breaker.admits(now)
        )

    def has_room(self, now: float) -> bool:
        """Whether a call may start: a slot is free, as far as it may use them all yet, and its group lets it."""
        slots = self.slots
        if self.ramp_ends > now:
            slots = max(1, math.ceil(slots * self._ramp(now)))
        return self.in_flight < slots and (self.group is None or self.group.admits(self))

    def has_slot(self) -> bool:
        """Whether a slot is free, however lately it has recovered."""
        return self.in_flight < self.slots and (self.group is None or self.group.admits(self))

    def weight_at(self, now: float) -> float:
        """Its share: less than its weight for a while after it has recovered."""
        return self.weight * self._ramp(now) if self.ramp_ends > now else self.weight

    def recovered(self, now: float, slow_start_seconds: float) -> None:
        """It is back: it begins with a part of its slots and its weight, and has all of them after `slow_start_seconds`."""
        self.ramp_seconds = slow_start_seconds
        self.ramp_ends = now + slow_start_seconds

    def _ramp(self, now: float) -> float:
        return max(RAMP_FLOOR, 1.0 - (self.ramp_ends - now) / self.ramp_seconds)

    # what runs

    def start(self, batch: Batch) -> None:
        """A call begins."""
        self.in_flight += 1
        self.outstanding_cost += batch.cost
        self.calls += 1
        self.running[batch] = None
        for tier in self.tiers:
            tier.moved.add(self)
        if self.group is not None:
            self.group.holder = self
        self._note_when_free()

    def end(self, batch: Batch) -> None:
        """A call is over, however it went."""
        self.in_flight -= 1
        del self.running[batch]
        for tier in self.tiers:
            tier.moved.add(self)
        self.outstanding_cost = self.outstanding_cost - batch.cost if self.running else 0.0
        if self.group is not None and not self.running:
            self.group.holder = None
        self._note_when_free()

    def resize(self, slots: int) -> None:
        """So many calls may be in flight from now on; what runs above that ends as it ends."""
        self.slots = slots
        self._note_when_free()

    def _note_when_free(self) -> None:
        full = self.running and self.in_flight >= self.slots
        self.expected_free = min([one.expected_end for one in self.running]) if full else 0.0

    def free_at(self, now: float) -> float:
        """When it should have a free slot: now, or when the first of its calls should end.

        A call that is overdue is taken to need as long again as it is late: who waits for it does so ever less gladly.
        """
        soonest = self.expected_free
        if not soonest:
            holder = self.group.holder if self.group is not None else None
            if holder is None or holder is self:
                if self.ramp_ends <= now or not self.running or self.has_room(now):
                    return now
                # it has slots that it may not use yet
                return max(now, min([one.expected_end for one in self.running]))
            soonest = max([one.expected_end for one in holder.running])
        return soonest if soonest >= now else now + (now - soonest)

    def is_silent(self, now: float) -> bool:
        """Whether one of its calls has gone without a sign of life for so long that it looks wedged."""
        return any(
            batch.expected_seconds is not None
            and now - batch.heard_at > SILENCE_SECONDS + SILENCE_FACTOR * batch.expected_seconds
            for batch in self.running
        )

    # what is learned

    def learn(self, batch: Batch, seconds: float, now: float) -> None:
        """A call of `batch.cost` megapixel-steps took `seconds` and drew."""
        if batch.loads_model:
            expected = self.speed.seconds(batch.cost)
            if expected is not None:
                self.switch_seconds += SWITCH_MEMORY * (max(0.0, seconds - expected) - self.switch_seconds)
            return
        self.speed.learn(batch.cost, seconds, now)
        # peaks count at once and fade with time, so that an endpoint which has just stalled is not picked for its past
        known = self.latency_seconds
        if known is None or seconds >= known:
            self.latency_seconds = seconds
        else:
            kept = math.exp(-(now - self._peak_at) / LATENCY_MEMORY_SECONDS)
            self.latency_seconds = known * kept + seconds * (1.0 - kept)
        self._peak_at = now

    def snapshot(self, now: float) -> EndpointSnapshot:
        """A frozen picture of it."""
        measured = self.speed.per_unit is not None
        return EndpointSnapshot(
            backend=self.backend,
            url=self.url,
            slots=self.slots,
            in_flight=self.in_flight,
            health=self.health.health.value,
            health_detail=self.health.detail,
            breaker=self.breaker.state(now).value,
            suspect=self.suspect,
            usable=self.is_usable(now),
            weight=self.weight,
            seconds_per_unit=self.speed.per_unit,
            overhead_seconds=self.speed.overhead if measured else None,
            latency_seconds=self.latency_seconds,
            outstanding=self.outstanding_cost,
            calls=self.calls,
            failures=self.failures,
            last_error=self.last_error,
            loaded_model=self.loaded_model,
            group=self.group.name if self.group is not None else None,
        )

    def __repr__(self) -> str:
        return (
            f"<Endpoint {self.backend} {self.url}: {self.in_flight}/{self.slots} slots, "
            f"{self.health.health}, {self.breaker!r}, {self.speed!r}>"
        )
