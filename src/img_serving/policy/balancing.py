"""Which of the endpoints that have a free slot and may be used gets the next batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Literal

from img_serving.policy.endpoint import EndpointState
from img_serving.policy.forecast import Forecast

Strategy = Literal["round_robin", "weighted_round_robin", "random", "least_connections", "least_work", "peak_ewma"]
Choose = Callable[[Sequence[EndpointState], float, float, Random], EndpointState]
"""(candidates, cost of the task in megapixel-steps, now, rng) -> the one chosen. Candidates are never empty."""


def _turn(endpoint: EndpointState) -> int:
    return endpoint.picked_at


def round_robin(candidates: Sequence[EndpointState], cost: float, now: float, rng: Random) -> EndpointState:  # noqa: ARG001
    """The one whose last turn is longest ago: right also while the candidates change from call to call."""
    return min(candidates, key=_turn)


def weighted_round_robin(candidates: Sequence[EndpointState], cost: float, now: float, rng: Random) -> EndpointState:  # noqa: ARG001
    """Smooth weighted round robin, as nginx does it: shares by weight, interleaved instead of in runs."""
    total = 0.0
    best = candidates[0]
    for endpoint in candidates:
        weight = endpoint.weight_at(now)
        endpoint.smooth_weight += weight
        total += weight
        if endpoint.smooth_weight > best.smooth_weight:
            best = endpoint
    best.smooth_weight -= total
    return best


def random(candidates: Sequence[EndpointState], cost: float, now: float, rng: Random) -> EndpointState:  # noqa: ARG001
    """By chance, in proportion to weight."""
    return rng.choices(candidates, [endpoint.weight_at(now) for endpoint in candidates])[0]


def least_connections(candidates: Sequence[EndpointState], cost: float, now: float, rng: Random) -> EndpointState:  # noqa: ARG001
    """The fewest calls in flight per weight; among equals the one whose turn is longest ago."""
    return min(candidates, key=lambda endpoint: (endpoint.in_flight / endpoint.weight_at(now), endpoint.picked_at))


def least_work(candidates: Sequence[EndpointState], cost: float, now: float, rng: Random) -> EndpointState:  # noqa: ARG001
    """The one that would be done soonest. The scheduler also asks whether a busy one would be sooner still: `Forecast`."""
    forecast = Forecast(candidates, {}, now, {})
    return forecast.endpoints[forecast.soonest(cost)]


def peak_ewma(candidates: Sequence[EndpointState], cost: float, now: float, rng: Random) -> EndpointState:  # noqa: ARG001
    """The lowest latency, whose peaks fade slowly, x calls in flight; one not measured yet goes first, to be measured."""

    def load(endpoint: EndpointState) -> tuple[float, int]:
        latency = endpoint.latency_seconds if endpoint.latency_seconds is not None else 0.0
        return latency * (endpoint.in_flight + 1) / endpoint.weight_at(now), endpoint.picked_at

    return min(candidates, key=load)


STRATEGIES: dict[Strategy, Choose] = {
    "round_robin": round_robin,
    "weighted_round_robin": weighted_round_robin,
    "random": random,
    "least_connections": least_connections,
    "least_work": least_work,
    "peak_ewma": peak_ewma,
}
