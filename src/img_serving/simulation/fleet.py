"""What stands in for the real endpoints: how long a call takes there, and how each is shown to the scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from img_serving.domain.capabilities import BatchShape, Capabilities
from img_serving.domain.images import ImageRequest
from img_serving.domain.jobs import Route
from img_serving.domain.tenants import Tenant
from img_serving.policy.balancing import Strategy
from img_serving.policy.circuit_breaker import BreakerOptions, CircuitBreaker
from img_serving.policy.endpoint import EndpointState, ExclusiveGroup
from img_serving.policy.health import HealthOptions, HealthRecord
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.retry import RetryOptions
from img_serving.policy.routing import Candidate, RoutingOptions, plan
from img_serving.policy.scheduler import Scheduler

ANY_MODEL = "any"
"""What requests ask for where neither they nor the endpoints name a model."""

_UNBOUNDED = 2**62


@dataclass(frozen=True, slots=True)
class SimulatedEndpoint:
    """One endpoint that exists only here.

    A call of b pictures takes `overhead_seconds` + their cost / `speed` (megapixel-steps a second, for each slot): a + c·b
    for equal pictures. A call for another one of its `models` than the last call's takes `load_seconds` more. An attempt
    that takes longer than `timeout_seconds` is cut (None: never). `backend` is its group, by default its own name.
    """

    name: str
    speed: float = 10.0
    slots: int = 1
    backend: str = ""
    overhead_seconds: float = 0.0
    max_batch_size: int = 1
    batch: BatchShape = "items"
    weight: float = 1.0
    tier: int = 0
    models: tuple[str, ...] = ()
    load_seconds: float = 0.0
    timeout_seconds: float | None = None
    max_batch_pixels: int | None = None
    max_wait_ms: float = 0.0
    exclusive_group: str | None = None
    cheap: bool = False
    retry_unknown: bool = True

    @property
    def group(self) -> str:
        """The backend that it belongs to."""
        return self.backend or self.name

    def seconds_of(self, cost: float) -> float:
        """The mean seconds of a call whose pictures cost this much together, in megapixel-steps."""
        return self.overhead_seconds + cost / self.speed


@dataclass(frozen=True, slots=True)
class Terms:
    """What an operator configures for all endpoints together; None means without bound.

    `base` is what else the scheduler is told.
    """

    base: SchedulerOptions = field(default_factory=SchedulerOptions)
    strategy: Strategy = "least_work"
    max_tasks: int | None = None
    max_wait_seconds: float | None = None
    deadline_seconds: float | None = None
    retry: RetryOptions = field(default_factory=RetryOptions)
    breaker: BreakerOptions = field(default_factory=BreakerOptions)
    health: HealthOptions = field(default_factory=HealthOptions)
    routing: RoutingOptions = field(default_factory=RoutingOptions)

    @property
    def patience(self) -> float:
        """Seconds from a job's arrival to its deadline."""
        return math.inf if self.deadline_seconds is None else self.deadline_seconds


def endpoint_state(
    number: int,
    endpoint: SimulatedEndpoint,
    terms: Terms,
    rng: Random,
    groups: dict[str, ExclusiveGroup] | None = None,
) -> EndpointState:
    """The endpoint as the policies see it: they know its slots and limits, never its speed.

    `groups` holds the exclusive groups that were met before.
    """
    name = endpoint.exclusive_group
    group = None if name is None or groups is None else groups.setdefault(name, ExclusiveGroup(name))
    return EndpointState(
        id=number,
        backend=endpoint.group,
        url=endpoint.name,
        slots=endpoint.slots,
        weight=endpoint.weight,
        capabilities=Capabilities(
            batch=endpoint.batch if endpoint.max_batch_size > 1 else "single",
            max_batch_size=endpoint.max_batch_size,
            max_concurrency=endpoint.slots,
            switches_models=endpoint.load_seconds > 0,
        ),
        max_batch_size=endpoint.max_batch_size,
        max_batch_pixels=endpoint.max_batch_pixels,
        group=group,
        cheap=endpoint.cheap,
        breaker=CircuitBreaker(terms.breaker, rng),
        health=HealthRecord(terms.health),
        retry_unknown=endpoint.retry_unknown,
        linger_seconds=endpoint.max_wait_ms / 1000,
    )


def new_scheduler(terms: Terms, rng: Random) -> Scheduler:
    """The gateway's own scheduler, with no endpoint yet, at second 0."""
    options = replace(
        terms.base,
        strategy=terms.strategy,
        max_tasks=_UNBOUNDED if terms.max_tasks is None else terms.max_tasks,
        max_wait_seconds=terms.max_wait_seconds,
        retry=terms.retry,
    )
    return Scheduler(options, rng, 0.0)


def routes_of(
    fleet: Sequence[SimulatedEndpoint], requests: Sequence[ImageRequest], routing: RoutingOptions
) -> list[Route]:
    """The route of each request, planned as the gateway plans it.

    Raises:
        GatewayError: no endpoint could ever serve one of them.
    """
    groups: dict[str, SimulatedEndpoint] = {}
    for endpoint in fleet:
        groups.setdefault(endpoint.group, endpoint)
    candidates = [Candidate(name, one.models, Capabilities(), tier=one.tier) for name, one in groups.items()]
    nameless = routing.default_backend is None and not any(one.models for one in groups.values())
    somebody = Tenant("anybody")
    return [
        plan(
            _naming(ANY_MODEL, request) if nameless and request.model is None else request,
            somebody,
            candidates,
            routing,
        )
        for request in requests
    ]


def _naming(model: str, request: ImageRequest) -> ImageRequest:
    return ImageRequest(prompt=request.prompt, model=model, width=request.width, height=request.height, n=request.n)
