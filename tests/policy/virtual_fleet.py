"""A fleet in virtual time: endpoints of known speeds under the real scheduler, for tests of what it decides and when."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any

from img_serving.domain.capabilities import BatchShape, Capabilities
from img_serving.domain.errors import Outcome
from img_serving.domain.images import Artifact, ImageRequest
from img_serving.domain.jobs import CANCELLED, Batch, Ended, Job, Target
from img_serving.domain.tenants import ANONYMOUS, Tenant
from img_serving.policy.circuit_breaker import BreakerOptions, CircuitBreaker
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.health import HealthOptions, HealthRecord
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.scheduler import Scheduler

PICTURE = Artifact("image/png", 8, 8, None, data=b"")
FAILED = Ended(outcome=Outcome.FAILED, message="it broke")
BREAKER = BreakerOptions(failures=3, timeouts=3, open_seconds=10, jitter=0, min_calls=1000)

_numbers = count()


def endpoint(
    number: int,
    backend: str = "a",
    *,
    speed: float | None = None,
    shape: BatchShape = "single",
    size: int = 1,
    switches: bool = False,
    breaker: BreakerOptions = BREAKER,
    **more: Any,
) -> EndpointState:
    """`speed` in seconds a megapixel-step, as if one call had been measured."""
    one = EndpointState(
        id=number,
        backend=backend,
        url=f"http://{number}",
        slots=more.pop("slots", 1),
        weight=more.pop("weight", 1.0),
        capabilities=Capabilities(batch=shape, max_batch_size=size, switches_models=switches),
        max_batch_size=size,
        breaker=CircuitBreaker(breaker, Random(1)),
        health=HealthRecord(HealthOptions(fall=1)),
        **more,
    )
    if speed is not None:
        one.speed.learn(10.0, speed * 10.0, 0.0)
    return one


def job(
    *backends: str | tuple[str, int],
    now: float = 0.0,
    patience: float = 1e6,
    cost: int = 10,
    model: str = "m",
    tenant: Tenant = ANONYMOUS,
    **request: Any,
) -> Job:
    """A job for these backends (name, or name and tier; none: "a"), of `cost` megapixel-steps a picture."""
    named = [(one, 0) if isinstance(one, str) else one for one in backends or ("a",)]
    return Job(
        id=f"job {next(_numbers)}",
        request=ImageRequest(
            request.pop("prompt", "cat"), width=1000, height=1000, steps=cost, guidance_scale=1.0, **request
        ),
        route=tuple(Target(name, model, tier) for name, tier in named),
        tenant=tenant,
        submitted_at=now,
        deadline=now + patience,
    )


def scheduler(*endpoints: EndpointState, **options: Any) -> Scheduler:
    one = Scheduler(SchedulerOptions(**options), Random(1), now=0.0)
    for state in endpoints:
        one.add_endpoint(state)
    return one


def drawn(batch: Batch) -> Ended:
    return Ended(results=(PICTURE,) * len(batch.tasks))


def places(batches: list[Batch]) -> list[int]:
    return [batch.endpoint_id for batch in batches]


def only(batches: list[Batch]) -> Batch:
    assert len(batches) == 1
    return batches[0]


class VirtualFleet:
    """Does what a dispatcher does, but its clock jumps to whatever comes next: the end of a call, or when it asked to be woken.

    A call takes `seconds(batch)`, or as long as its endpoint is known to need. It ends as `ends(batch)` says: well, if unset.
    """

    def __init__(
        self,
        *endpoints: EndpointState,
        seconds: Callable[[Batch], float] | None = None,
        ends: Callable[[Batch], Ended] = drawn,
        **options: Any,
    ) -> None:
        self.now = 0.0
        self.scheduler = scheduler(*endpoints, **options)
        self.endpoints = {one.id: one for one in endpoints}
        self.seconds = seconds or self._seconds
        self.ends = ends
        self.started: list[Batch] = []
        self.after_each: Callable[[Batch], None] = lambda batch: None
        """Called when a call has ended, before anything else starts: for clients that come back."""
        self._calls: list[tuple[float, int, Batch]] = []
        self._number = count()

    def _seconds(self, batch: Batch) -> float:
        one = self.endpoints[batch.endpoint_id]
        expected = one.speed.seconds(batch.cost)
        assert expected is not None
        return expected + (one.switch_seconds if batch.loads_model else 0.0)

    def submit(self, *jobs: Job) -> None:
        for each in jobs:
            self.scheduler.submit(each)
        self.pump()

    def pump(self) -> list[Batch]:
        batches = self.scheduler.next_batches(self.now)
        self.follow(batches)
        return batches

    def follow(self, batches: list[Batch]) -> None:
        for batch in batches:
            self.started.append(batch)
            heappush(self._calls, (self.now + self.seconds(batch), next(self._number), batch))

    def run(self, until: float, *, tick: float | None = None) -> None:
        """Let time pass. With a `tick` (seconds) it also looks after deadlines and silent endpoints so often."""
        while True:
            wakes_at = self.scheduler.wakes_at(self.now)
            moments = [self._calls[0][0]] if self._calls else []
            moments += [wakes_at] if wakes_at is not None and wakes_at > self.now else []
            moments += [self.now + tick] if tick is not None else []
            if not moments or min(moments) > until:
                break
            self.now = min(moments)
            while self._calls and self._calls[0][0] <= self.now:
                self._end(heappop(self._calls)[2], None)
            if tick is not None:
                self.scheduler.expire(self.now)
                self.stop(self.scheduler.unwanted())
                self.follow(self.scheduler.look_after(self.now))
            self.pump()
        self.now = until

    def stop(self, batches: list[Batch]) -> None:
        """Calls that nobody wants any more are closed at once."""
        for batch in batches:
            self._calls = sorted(call for call in self._calls if call[2] is not batch)
            self._end(batch, CANCELLED)

    def _end(self, batch: Batch, ended: Ended | None) -> None:
        self.scheduler.finish(batch, ended or self.ends(batch), self.now)
        self.after_each(batch)
        self.stop(self.scheduler.unwanted())

    def order(self) -> list[Job]:
        """The jobs in the order in which their first picture was begun."""
        return list(dict.fromkeys(task.job for batch in self.started for task in batch.tasks))
