"""What a decision costs: the only figures of the scheduling benchmark that depend on the machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from random import Random

from scheduling_cases import FLEET, MIX, SPEEDS, Check, routes, shares

from img_serving.domain.images import Artifact
from img_serving.domain.jobs import Batch, Ended, Job
from img_serving.domain.tenants import Tenant
from img_serving.policy.balancing import Strategy
from img_serving.simulation import SimulatedEndpoint, Terms, load_of, poisson, simulate
from img_serving.simulation.fleet import endpoint_state, new_scheduler

ENDPOINTS = (8, 100)
TENANTS = (1, 50)
QUEUES = (100, 1_000, 10_000, 100_000)
STRATEGIES: tuple[Strategy, ...] = ("least_work", "round_robin")
COST_TARGETS = {8: 50.0, 100: 250.0}
"""Microseconds of a decision by the number of endpoints."""
FLAT_TARGET = 1.5
"""The longest queue's cost ÷ the shortest one's."""
MILLION, MILLION_TARGET = 1_000_000, 180.0

_DONE = Ended(results=(Artifact("image/png", 1, 1, None, data=b""),))


@dataclass(frozen=True)
class Setting:
    """What is timed, whatever the length of the queue."""

    strategy: Strategy
    endpoints: int
    tenants: int

    def __str__(self) -> str:
        tenants = "1 tenant" if self.tenants == 1 else f"{self.tenants} tenants"
        return f"{self.strategy}, {self.endpoints} endpoints, {tenants}"


@dataclass(frozen=True)
class Cost:
    """Microseconds of a decision and of a submission, one figure a round, at one length of the queue."""

    queue: int
    decision: list[float]
    submit: list[float]

    @property
    def microseconds(self) -> float:
        return statistics.median(self.decision)

    @property
    def submit_microseconds(self) -> float:
        return statistics.median(self.submit)


@dataclass(frozen=True)
class Costs:
    """One setting at all lengths of the queue, the shortest first."""

    setting: Setting
    by_queue: list[Cost]

    @property
    def growth(self) -> float:
        """The longest queue's cost ÷ the shortest one's of the same round: the median of the rounds."""
        pairs = zip(self.by_queue[-1].decision, self.by_queue[0].decision, strict=True)
        return statistics.median(long / short for long, short in pairs)

    def checks(self) -> list[Check]:
        # a long queue may not cost more than a short one, so the dearest of all lengths speaks for them
        dearest = max(cost.microseconds for cost in self.by_queue)
        span = f"{self.by_queue[-1].queue:,} ÷ {self.by_queue[0].queue:,} waiting"
        return [
            Check(f"{self.setting}: a decision", dearest, COST_TARGETS[self.setting.endpoints], unit=" µs"),
            Check(f"{self.setting}: {span}", self.growth, FLAT_TARGET),
        ]


def calibration() -> float:
    """Milliseconds of a fixed loop: two machines, or two moments of one, compare by it. The least of five."""

    def loop() -> float:
        began = time.perf_counter()
        seen: dict[int, float] = {}
        for number in range(200_000):
            seen[number & 1023] = seen.get(number & 511, 0.0) + number * 0.5
        return (time.perf_counter() - began) * 1e3

    return min(loop() for _ in range(5))


def decision_costs(
    queues: Sequence[int], rounds: int, decisions: int, advance: Callable[[str], None]
) -> Iterator[Costs]:
    """Each round times every length of the queue in turn, so that a machine that changes its speed does so to all of them."""
    for strategy in STRATEGIES:
        for endpoints in ENDPOINTS:
            for tenants in TENANTS:
                setting = Setting(strategy, endpoints, tenants)
                advance(f"a decision, {setting}")
                lines = [_Line(setting, queue) for queue in queues]
                gc.collect()
                gc.freeze()  # what waits for minutes is not looked through again and again
                rows = [[line.mean_of(decisions) for line in lines] for _ in range(rounds)]
                gc.unfreeze()
                yield Costs(
                    setting,
                    [
                        Cost(queue, [row[place][0] for row in rows], [row[place][1] for row in rows])
                        for place, queue in enumerate(queues)
                    ],
                )


class _Line:
    """A scheduler that always has work: a call ends, the next one starts, and one more task comes in for it."""

    def __init__(self, setting: Setting, queue: int) -> None:
        self._rng = rng = Random(1)
        speeds = [SPEEDS[place % len(SPEEDS)] for place in range(setting.endpoints)]
        self._fleet = [SimulatedEndpoint(f"e{place}", speed=speed) for place, speed in enumerate(speeds)]
        terms = Terms(strategy=setting.strategy)
        self._scheduler = new_scheduler(terms, rng)
        for number, endpoint in enumerate(self._fleet):
            self._scheduler.add_endpoint(endpoint_state(number, endpoint, terms, rng))
        self._seconds = self._submit_seconds = 0.0
        self._tenants = [Tenant(f"tenant {place}") for place in range(setting.tenants)]
        self._requests = [kind.request() for kind in MIX]
        self._weights = [kind.weight for kind in MIX]
        self._routes = routes(self._fleet, MIX)
        self._numbers = count()
        self._running: list[tuple[float, int, Batch]] = []
        self._now = 0.0
        for _ in range(queue + setting.endpoints):
            self.submit(0.0)
        self.start(self._scheduler.next_batches(0.0), 0.0)
        for _ in range(max(300, 12 * setting.endpoints)):
            self.turn()  # until every endpoint's speed is known

    def mean_of(self, decisions: int) -> tuple[float, float]:
        """Mean microseconds of a decision and of a submission."""
        self._seconds = self._submit_seconds = 0.0
        for _ in range(decisions):
            self.turn()
        return self._seconds / decisions * 1e6, self._submit_seconds / decisions * 1e6

    def submit(self, now: float) -> None:
        place = self._rng.choices(range(len(MIX)), self._weights)[0]
        number = next(self._numbers)
        tenant = self._tenants[number % len(self._tenants)]
        job = Job(str(number), self._requests[place], self._routes[place], tenant, now, float("inf"))
        began = time.perf_counter()
        self._scheduler.submit(job)
        self._submit_seconds += time.perf_counter() - began

    def start(self, batches: Sequence[Batch], now: float) -> None:
        for batch in batches:
            seconds = self._fleet[batch.endpoint_id].seconds_of(batch.cost) * self._rng.uniform(0.8, 1.2)
            heappush(self._running, (now + seconds, next(self._numbers), batch))

    def turn(self) -> None:
        """One call ends: finish and next_batches are the decision."""
        scheduler = self._scheduler
        wake = scheduler.wakes_at(self._now)
        while wake is not None and self._now < wake < (self._running[0][0] if self._running else float("inf")):
            # an endpoint was left free for a moment, and the moment is over
            self._now = wake
            began = time.perf_counter()
            batches = scheduler.next_batches(wake)
            self._seconds += time.perf_counter() - began
            self.start(batches, wake)
            wake = scheduler.wakes_at(wake)
        self._now, _, batch = heappop(self._running)
        began = time.perf_counter()
        scheduler.finish(batch, _DONE, self._now)
        batches = scheduler.next_batches(self._now)
        self._seconds += time.perf_counter() - began
        self.start(batches, self._now)
        self.submit(self._now)


def a_million(advance: Callable[[str], None]) -> float:
    """Wall seconds for a million tasks at 90 % load on the eight unequal endpoints, arrivals included."""
    advance("a million tasks")
    began = time.perf_counter()
    rate = 0.9 / load_of(FLEET, MIX, routes(FLEET, MIX), shares(MIX)).utilisation
    report = simulate(FLEET, poisson(MIX, rate, count=MILLION, rng=Random(1)), Terms(), rng=Random(1))
    taken = time.perf_counter() - began
    if report.images != MILLION:
        raise RuntimeError(f"{report.images} of {MILLION} pictures were drawn")
    return taken
