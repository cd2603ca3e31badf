"""The cases of the scheduling benchmark in virtual time: unequal endpoints, batches, and tenants."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from img_serving.domain.tenants import Tenant
from img_serving.simulation import (
    EARLY_RULES,
    Client,
    Kind,
    Noise,
    Report,
    Sender,
    SimulatedEndpoint,
    Terms,
    Workload,
    burst,
    load_of,
    poisson,
    routes_of,
    simulate,
    simulate_early,
)
from img_serving.simulation.report import Spread

Advance = Callable[[str], None]

SPEEDS = (2.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25)
"""Megapixel-steps a second of the eight unequal endpoints; the scheduler is told none of them."""

FLEET = tuple(SimulatedEndpoint(f"e{place}", speed=speed) for place, speed in enumerate(SPEEDS))

MIX = tuple(
    Kind(side, side, steps, weight=weight)
    for side, weight in ((512, 4), (768, 3), (1024, 2), (1536, 1))
    for steps in (10, 20, 30, 50)
)
"""Small pictures are asked for more often than large ones; the dearest costs 45 times the cheapest."""

LOADS = ("50 %", "70 %", "90 %", "burst")
TASKS = 3000
BURST = 400
OURS = ("least_work", "least_connections", "round_robin")
DISPATCHERS = (*OURS, *EARLY_RULES)
RATIO_TARGET = 1.05
FIGURES = ("p95", "p99", "makespan")


@dataclass(frozen=True)
class Check:
    """One figure that has a target."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def is_met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def target(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{self.unit}"


# ------------------------------------------------------------------------------------------------- unequal endpoints


@dataclass
class Unequal:
    """By load and dispatcher: the figures of each seed, and one run's report of the highest load for the plot."""

    seconds: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)

    def ratio(self, load: str, dispatcher: str, figure: str) -> float:
        """The mean over the seeds of the figure ÷ the reference's of the same seed."""
        mine, theirs = self.seconds[load][dispatcher], self.seconds[load]["reference"]
        return statistics.fmean(one[figure] / other[figure] for one, other in zip(mine, theirs, strict=True))

    def mean(self, load: str, dispatcher: str, figure: str) -> float:
        return statistics.fmean(one[figure] for one in self.seconds[load][dispatcher])

    def checks(self) -> list[Check]:
        return [
            Check(f"least_work, {load}: {figure} ÷ reference", self.ratio(load, "least_work", figure), RATIO_TARGET)
            for load in LOADS
            for figure in FIGURES
        ]


def unequal_endpoints(seeds: int, advance: Advance) -> Unequal:
    found = Unequal()
    unit = load_of(FLEET, MIX, routes(FLEET, MIX), shares(MIX)).utilisation
    for load in LOADS:
        of_load: dict[str, list[dict[str, float]]] = {name: [] for name in DISPATCHERS}
        for seed in range(seeds):
            advance(f"unequal endpoints, {load}, seed {seed}")
            rng = Random(1000 + seed)
            if load == "burst":
                workload = burst(MIX, BURST, rng=rng)
            else:
                workload = poisson(MIX, float(load[:-2]) / 100 / unit, count=TASKS, rng=rng)
            for name in DISPATCHERS:
                report = dispatch(FLEET, workload, name, seed)
                latency = Spread.of(report.latencies())
                of_load[name].append({"p95": latency.p95, "p99": latency.p99, "makespan": report.makespan})
                if load == "90 %" and seed == 0:
                    found.reports[name] = report
        found.seconds[load] = of_load
    return found


def dispatch(fleet: Sequence[SimulatedEndpoint], workload: Workload, name: str, seed: int) -> Report:
    if name in EARLY_RULES:
        return simulate_early(fleet, workload, name)
    return simulate(fleet, workload, Terms(strategy=name), rng=Random(seed))  # type: ignore[arg-type]


def routes(fleet: Sequence[SimulatedEndpoint], kinds: Sequence[Kind]) -> list[Any]:
    return routes_of(fleet, [kind.request() for kind in kinds], Terms().routing)


def shares(kinds: Sequence[Kind]) -> list[float]:
    total = sum(kind.weight for kind in kinds)
    return [kind.weight / total for kind in kinds]


# ----------------------------------------------------------------------------------------------------------- batching

BATCH, OVERHEAD, EACH = 8, 2.0, 1.0
"""A call of b pictures takes 2 + b seconds, at most 8 of them: full batches draw 2.4 times what single calls do."""

UNIT = Kind(1000, 1000, 5)  # 10 megapixel-steps
THROUGHPUT_TARGET, IDLE_TARGET = 0.95, 1.01


@dataclass(frozen=True)
class Batching:
    """One fleet of endpoints that draw batches."""

    endpoints: int
    throughput: float
    """At saturation, as a share of what full batches would draw."""
    idle_latency: float
    """Mean seconds at a hundredth of the load, as a multiple of those without batches."""
    calls: int
    images: int
    by_load: dict[str, dict[str, float]]
    """Mean latency with and without batches, in seconds, at some loads of what single calls can draw."""

    def checks(self) -> list[Check]:
        what = f"{self.endpoints} endpoint{'' if self.endpoints == 1 else 's'} with batches"
        return [
            Check(f"{what}: throughput ÷ full batches", self.throughput, THROUGHPUT_TARGET, at_least=True),
            Check(f"{what}: latency when idle ÷ without batches", self.idle_latency, IDLE_TARGET),
            Check(f"{what}: calls ÷ images at saturation", self.calls / self.images, 0.99),
        ]


def batching(count: int, seeds: int, advance: Advance) -> Batching:
    batched = [
        SimulatedEndpoint(f"e{place}", speed=10 / EACH, overhead_seconds=OVERHEAD, max_batch_size=BATCH)
        for place in range(count)
    ]
    single = [replace(endpoint, max_batch_size=1) for endpoint in batched]
    best = count * BATCH / (OVERHEAD + EACH * BATCH)
    rates: list[float] = []
    calls = images = 0
    for seed in range(seeds):
        advance(f"batches, saturated, {count} endpoints")
        # without noise: a hundred calls would have a luck of their own
        load = burst((UNIT,), 800 * count, noise=Noise("none"), rng=Random(seed))
        report = simulate(batched, load, Terms(), rng=Random(seed))
        rates.append(report.throughput)
        calls, images = calls + report.calls, images + report.images

    def latency(fleet: Sequence[SimulatedEndpoint], load: float) -> float:
        rate = load * count / (OVERHEAD + EACH)
        each = []
        for seed in range(seeds):
            workload = poisson((UNIT,), rate, count=1000, rng=Random(100 + seed))
            each.append(Spread.of(simulate(fleet, workload, Terms(), rng=Random(seed)).latencies()).mean)
        return statistics.fmean(each)

    by_load = {}
    for load in (0.01, 0.5, 0.9, 1.5, 2.0):
        advance(f"batches, {load:.0%} load, {count} endpoints")
        by_load[f"{load:.0%}"] = {"batches": latency(batched, load), "single": latency(single, load)}
    idle = by_load["1%"]
    return Batching(count, statistics.fmean(rates) / best, idle["batches"] / idle["single"], calls, images, by_load)


# ------------------------------------------------------------------------------------------------------------ tenants

FLOOD = 1000
JAIN_TARGET = 0.98
LONGEST_NOISE = 1.2


@dataclass(frozen=True)
class Flood:
    """One tenant floods, another sends one at a time; seconds."""

    endpoints: int
    alone_p95: float
    beside_p95: float
    residual: float
    """The longest that a call of the flood's can still have before it when the other's picture comes."""

    def checks(self) -> list[Check]:
        what = f"beside a flood, {self.endpoints} endpoint{'' if self.endpoints == 1 else 's'}"
        return [Check(f"{what}: p95 wait", self.beside_p95, 1.2 * self.alone_p95 + self.residual, unit=" s")]


def flood(count: int, seeds: int, advance: Advance) -> Flood:
    fleet = [SimulatedEndpoint(f"e{place}", speed=10) for place in range(count)]
    senders = (Sender(Tenant("flood")), Sender(Tenant("one"), share=0))
    asks = Client(1, count=60, start=5.0, think_seconds=1.0)
    alone: list[float] = []
    beside: list[float] = []
    for seed in range(seeds):
        advance(f"a flood, {count} endpoints")
        load = burst((UNIT,), FLOOD, senders=senders, rng=Random(seed))
        together = simulate(fleet, replace(load, clients=(asks,)), Terms(), rng=Random(seed))
        by_itself = Workload((UNIT,), senders, clients=(asks,), noise_of_clients=Noise(), client_seed=load.client_seed)
        alone.append(Spread.of(simulate(fleet, by_itself, Terms(), rng=Random(seed)).waits(1)).p95)
        beside.append(Spread.of(together.waits(1)).p95)
    residual = fleet[0].seconds_of(UNIT.cost) * LONGEST_NOISE
    return Flood(count, statistics.fmean(alone), statistics.fmean(beside), residual)


@dataclass(frozen=True)
class Fairness:
    """What backlogged tenants are served."""

    what: str
    index: float
    served: dict[str, float]

    def checks(self) -> list[Check]:
        return [Check(f"{self.what}: Jain's index", self.index, JAIN_TARGET, at_least=True)]


def fairness(weights: Sequence[float], what: str, seeds: int, advance: Advance) -> Fairness:
    """Tenants whose pictures differ in size, all with the same work waiting per weight, on the unequal endpoints."""
    sizes = ((512, 10), (512, 30), (768, 30), (1024, 30), (1536, 30))
    kinds = [Kind(side, side, steps) for side, steps in sizes[: len(weights)]]
    senders = [
        Sender(Tenant(f"{side}² × {steps}, weight {weight:g}", weight=weight), share=weight / kind.cost, kinds=(place,))
        for place, ((side, steps), weight, kind) in enumerate(zip(sizes, weights, kinds, strict=False))
    ]
    indexes: list[float] = []
    served = [0.0] * len(senders)
    for seed in range(seeds):
        advance(f"fairness, {what}")
        report = simulate(FLEET, burst(kinds, 4000, senders=senders, rng=Random(seed)), Terms(), rng=Random(seed))
        indexes.append(report.fairness())
        served = [old + new for old, new in zip(served, report.served_while_all_wait, strict=True)]
    total = sum(served)
    return Fairness(
        what,
        statistics.fmean(indexes),
        {sender.tenant.name: cost / total for sender, cost in zip(senders, served, strict=True)},
    )
