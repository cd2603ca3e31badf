"""What a simulation found: one row a job as columns, figures of endpoints, and what follows from them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

LEVELS = (0.5, 0.95, 0.99)
"""The percentiles that are told of waits and latencies."""

_MOST_SAMPLES = 1024


class Status(IntEnum):
    """How a simulated job ended. `PENDING` at the end of a simulation: nothing could have come of it any more."""

    PENDING = 0
    SUCCEEDED = 1
    FAILED = 2
    EXPIRED = 3
    REFUSED = 4


def percentile(ordered: Sequence[float], level: float) -> float:
    """The value below which a share `level` of ascending values lies, interpolated; NaN where there is none."""
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * level
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def jain_index(shares: Iterable[float]) -> float:
    """Jain's index of fairness: 1 where all have the same, 1/n where one has everything; NaN where nobody has anything.

    Jain, Chiu, Hawe: A quantitative measure of fairness and discrimination, DEC-TR-301 (1984).
    """
    values = list(shares)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else math.nan


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles of some seconds."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of these, in any order."""
        ordered = sorted(values)
        if not ordered:
            return cls(0, math.nan, math.nan, math.nan, math.nan, math.nan)
        p50, p95, p99 = (percentile(ordered, level) for level in LEVELS)
        return cls(len(ordered), math.fsum(ordered) / len(ordered), p50, p95, p99, ordered[-1])

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {name: _json_number(getattr(self, name)) for name in ("count", "mean", "p50", "p95", "p99", "most")}


@dataclass(slots=True)
class EndpointFigures:
    """What one endpoint did."""

    name: str
    slots: int
    calls: int = 0
    images: int = 0
    failures: int = 0
    model_loads: int = 0
    busy_seconds: float = 0.0
    """Of all its slots together."""

    def utilisation(self, seconds: float) -> float:
        """The share of its slots' time that was spent in calls."""
        return self.busy_seconds / (self.slots * seconds) if seconds > 0 else 0.0


class Samples:
    """How many tasks waited over time, in at most 1,024 samples: the interval doubles when there would be more."""

    __slots__ = ("interval", "next_at", "running", "times", "waiting")

    def __init__(self, interval: float = 0.25) -> None:
        self.interval = interval
        self.next_at = 0.0
        self.times = array("d")
        self.waiting = array("l")
        self.running = array("l")

    def take(self, now: float, waiting: int, running: int) -> None:
        """Note the state at `now`, which is `next_at` or later."""
        self.times.append(now)
        self.waiting.append(waiting)
        self.running.append(running)
        if len(self.times) >= _MOST_SAMPLES:
            self.times, self.waiting, self.running = self.times[::2], self.waiting[::2], self.running[::2]
            self.interval *= 2
        self.next_at = now + self.interval


@dataclass(slots=True)
class Report:
    """One simulation. Columns have one entry a job, in the order of submission; times are seconds from the start."""

    strategy: str
    tenants: tuple[str, ...]
    weights: tuple[float, ...]
    endpoints: list[EndpointFigures]
    tenant: array[int] = field(default_factory=lambda: array("H"))
    status: bytearray = field(default_factory=bytearray)
    submitted: array[float] = field(default_factory=lambda: array("d"))
    started: array[float] = field(default_factory=lambda: array("d"))
    """NaN where it never got a slot."""
    finished: array[float] = field(default_factory=lambda: array("d"))
    refusals: dict[str, int] = field(default_factory=dict)
    """Jobs that were refused at submission, by the error's code."""
    served_while_all_wait: list[float] = field(default_factory=list)
    """By tenant: megapixel-steps begun while every tenant had tasks waiting."""
    images_while_all_wait: int = 0
    """How many pictures that were: of few, no index says how fair it is."""
    samples: Samples = field(default_factory=Samples)
    images: int = 0
    """Pictures drawn."""
    last_second: float = 0.0

    @property
    def jobs(self) -> int:
        """All that were submitted, refused ones included."""
        return len(self.status)

    @property
    def calls(self) -> int:
        """Attempts made at all endpoints."""
        return sum(endpoint.calls for endpoint in self.endpoints)

    @property
    def failures(self) -> int:
        """Attempts that failed."""
        return sum(endpoint.failures for endpoint in self.endpoints)

    @property
    def makespan(self) -> float:
        """Seconds from the first submission to the last end."""
        return max(0.0, self.last_second - (self.submitted[0] if self.submitted else 0.0))

    @property
    def throughput(self) -> float:
        """Pictures a second over the makespan."""
        return self.images / self.makespan if self.makespan else 0.0

    @property
    def mean_batch(self) -> float:
        """Pictures a call, over all calls."""
        asked = sum(endpoint.images for endpoint in self.endpoints)
        return asked / self.calls if self.calls else 0.0

    @property
    def utilisation(self) -> float:
        """The share of all slots' time that was spent in calls."""
        slots = sum(endpoint.slots for endpoint in self.endpoints)
        return sum(one.busy_seconds for one in self.endpoints) / (slots * self.makespan) if self.makespan else 0.0

    def count(self, status: Status) -> int:
        """How many jobs ended so."""
        return self.status.count(status)

    def waits(self, tenant: int | None = None) -> Iterator[float]:
        """Seconds to the first slot, of every job that got one."""
        return (
            began - asked
            for who, asked, began in zip(self.tenant, self.submitted, self.started, strict=True)
            if began == began and (tenant is None or who == tenant)  # noqa: PLR0124 - NaN: it never began
        )

    def latencies(self, tenant: int | None = None) -> Iterator[float]:
        """Seconds to the last picture, of every job that succeeded."""
        done = Status.SUCCEEDED
        return (
            ended - asked
            for who, status, asked, ended in zip(self.tenant, self.status, self.submitted, self.finished, strict=True)
            if status == done and (tenant is None or who == tenant)
        )

    def fairness(self) -> float:
        """Jain's index of what the tenants were served per weight while all of them waited; NaN: that never was."""
        if len(self.tenants) < 2:
            return math.nan
        return jain_index(cost / weight for cost, weight in zip(self.served_while_all_wait, self.weights, strict=True))

    def plain(self) -> dict[str, Any]:
        """The figures for JSON: no row of a job, numbers rounded to a microsecond, null for what there is none of."""
        return {
            "strategy": self.strategy,
            "jobs": self.jobs,
            **{status.name.lower(): self.count(status) for status in Status if status is not Status.PENDING},
            "refusals": dict(self.refusals),
            "unresolved": self.count(Status.PENDING),
            "images": self.images,
            "calls": self.calls,
            "failed_calls": self.failures,
            "mean_batch": _json_number(self.mean_batch),
            "makespan_seconds": _json_number(self.makespan),
            "images_per_second": _json_number(self.throughput),
            "utilisation": _json_number(self.utilisation),
            "wait_seconds": Spread.of(self.waits()).plain(),
            "latency_seconds": Spread.of(self.latencies()).plain(),
            "fairness": _json_number(self.fairness()),
            "tenants": [
                {
                    "name": name,
                    "weight": self.weights[place],
                    "jobs": self.tenant.count(place),
                    "wait_seconds": Spread.of(self.waits(place)).plain(),
                    "latency_seconds": Spread.of(self.latencies(place)).plain(),
                }
                for place, name in enumerate(self.tenants)
            ],
            "endpoints": [
                {
                    "name": one.name,
                    "slots": one.slots,
                    "calls": one.calls,
                    "images": one.images,
                    "failed_calls": one.failures,
                    "model_loads": one.model_loads,
                    "utilisation": _json_number(one.utilisation(self.makespan)),
                }
                for one in self.endpoints
            ],
        }


def _json_number(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return round(value, 6) if math.isfinite(value) else None
