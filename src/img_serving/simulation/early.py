"""Dispatchers to compare with: they bind a task to an endpoint as it arrives, where it then waits in line."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Literal, get_args

from img_serving.simulation.fleet import SimulatedEndpoint
from img_serving.simulation.report import EndpointFigures, Report, Status
from img_serving.simulation.workload import Workload

EarlyRule = Literal["reference", "early_round_robin", "early_least_connections"]
"""`reference`: where it would be done soonest, with every endpoint's exact speed known and only the noise unknown.
The others are what a reverse proxy does."""

EARLY_RULES: tuple[EarlyRule, ...] = get_args(EarlyRule)


class _Line:
    """One slot with its own line, first come first served."""

    __slots__ = ("endpoint", "entries", "free_at", "number", "owed")

    def __init__(self, number: int, endpoint: SimulatedEndpoint) -> None:
        self.number = number
        self.endpoint = endpoint
        self.free_at = 0.0
        """When it is really done with all that is bound to it."""
        self.entries: deque[tuple[float, float, float]] = deque()
        """Start, mean seconds and end of what runs or waits."""
        self.owed = 0.0
        """Mean seconds of all that is in `entries`."""

    def forget_until(self, now: float) -> None:
        entries = self.entries
        while entries and entries[0][2] <= now:
            self.owed -= entries.popleft()[1]

    def expected_free_at(self, now: float) -> float:
        """As far as anybody can know: what runs takes its mean (or ends any moment), what waits takes its mean."""
        if not self.entries:
            return now
        start, mean, _ = self.entries[0]
        return max(now, start + mean) + self.owed - mean


def simulate_early(fleet: Sequence[SimulatedEndpoint], workload: Workload, rule: EarlyRule) -> Report:
    """Run a workload through a fleet that way: no batches, no faults, no clients, and every endpoint serves everything.

    A task meets the same noise as in `simulate`. An endpoint with several slots has one line; under `reference` each slot is
    its own.

    Raises:
        ValueError: the workload has clients, who would wait for each other's answers.
    """
    if workload.clients:
        raise ValueError(f"{rule} knows no clients who wait for their answers")
    report = Report(
        strategy=rule,
        tenants=tuple(sender.tenant.name for sender in workload.senders),
        weights=tuple(sender.tenant.weight for sender in workload.senders),
        endpoints=[EndpointFigures(endpoint.name, endpoint.slots) for endpoint in fleet],
        served_while_all_wait=[0.0] * len(workload.senders),
    )
    costs = [kind.cost for kind in workload.kinds]
    serve = _to_the_soonest(fleet) if rule == "reference" else _by_count(fleet, in_turn=rule == "early_round_robin")
    picture = 0
    for now, kind, sender in zip(workload.at, workload.kind, workload.sender, strict=True):
        began, ended = float("inf"), 0.0
        for _ in range(workload.kinds[kind].images):
            number, start, end = serve(costs[kind], workload.noise[picture], now)
            picture += 1
            figures = report.endpoints[number]
            figures.calls += 1
            figures.images += 1
            figures.busy_seconds += end - start
            began, ended = min(began, start), max(ended, end)
        report.tenant.append(sender)
        report.status.append(Status.SUCCEEDED)
        report.submitted.append(now)
        report.started.append(began)
        report.finished.append(ended)
        report.last_second = max(report.last_second, ended)
    report.images = picture
    return report


Serve = Callable[[float, float, float], tuple[int, float, float]]
"""(cost, noise, now) -> the endpoint's place, when the task starts there, and when it ends."""


def _to_the_soonest(fleet: Sequence[SimulatedEndpoint]) -> Serve:
    lines = [_Line(number, endpoint) for number, endpoint in enumerate(fleet) for _ in range(endpoint.slots)]

    def serve(cost: float, noise: float, now: float) -> tuple[int, float, float]:
        best, done_at, its_mean = lines[0], float("inf"), 0.0
        for line in lines:
            line.forget_until(now)
            mean = line.endpoint.seconds_of(cost)
            expected = line.expected_free_at(now) + mean
            if expected < done_at:
                best, done_at, its_mean = line, expected, mean
        start = max(now, best.free_at)
        end = start + its_mean * noise
        best.entries.append((start, its_mean, end))
        best.owed += its_mean
        best.free_at = end
        return best.number, start, end

    return serve


def _by_count(fleet: Sequence[SimulatedEndpoint], *, in_turn: bool) -> Serve:
    ends: list[list[float]] = [[] for _ in fleet]
    """By endpoint, as a heap: when each task bound to it ends; so many are outstanding."""
    free_at: list[list[float]] = [[0.0] * endpoint.slots for endpoint in fleet]
    turn = 0

    def serve(cost: float, noise: float, now: float) -> tuple[int, float, float]:
        nonlocal turn
        count = len(fleet)
        chosen = turn % count
        if not in_turn:
            for heap in ends:
                while heap and heap[0] <= now:
                    heappop(heap)
            # among equals the one whose turn it is
            chosen = min(((turn + step) % count for step in range(count)), key=lambda number: len(ends[number]))
        turn = chosen + 1
        start = max(now, heappop(free_at[chosen]))
        end = start + fleet[chosen].seconds_of(cost) * noise
        heappush(free_at[chosen], end)
        heappush(ends[chosen], end)
        return chosen, start, end

    return serve
