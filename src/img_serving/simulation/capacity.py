"""What a fleet can do at most, and how much of that a workload asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from img_serving.domain.jobs import Route
from img_serving.simulation.fleet import SimulatedEndpoint
from img_serving.simulation.workload import Kind

_MOST_GROUPS = 8
"""Up to so many different routes every union of them is looked at (2⁸); of more, each alone and all together."""


@dataclass(frozen=True, slots=True)
class Load:
    """How a stream of requests compares to the fleet: `utilisation` above 1 grows a queue without bound.

    `bottleneck` names the endpoints that are the tightest, which may be a part of the fleet that has a model.
    """

    utilisation: float
    bottleneck: tuple[str, ...]


def slot_seconds(endpoint: SimulatedEndpoint, kind: Kind) -> float:
    """The least seconds of a slot that one picture of this kind takes there, in as full a batch as there may be."""
    limit = endpoint.max_batch_size
    if endpoint.batch in {"seeds", "request"}:
        limit = min(limit, kind.images)  # only pictures of one request can travel together
    elif endpoint.batch == "single":
        limit = 1
    return endpoint.overhead_seconds / limit + kind.cost / endpoint.speed


def load_of(
    fleet: Sequence[SimulatedEndpoint], kinds: Sequence[Kind], routes: Sequence[Route], rates: Sequence[float]
) -> Load:
    """The load of so many requests a second of each kind, on the endpoints of the first tier of their routes.

    It is the largest over all groups of kinds of (work of the group / endpoints that may do it). Where kinds differ in
    which endpoint suits them, the true limit is a little below: a load close to 1 is too much already.
    """
    places = [_first_tier(fleet, route) for route in routes]
    groups = sorted({tuple(sorted(where)) for where in places})
    sizes = range(1, len(groups) + 1) if len(groups) <= _MOST_GROUPS else (1, len(groups))
    worst = Load(0.0, ())
    for size in sizes:
        for chosen in combinations(groups, size):
            where = sorted(set().union(*chosen))
            inside = [place for place, mine in enumerate(places) if mine.issubset(where) and rates[place] > 0]
            utilisation = _utilisation(fleet, kinds, rates, where, inside)
            if utilisation > worst.utilisation:
                worst = Load(utilisation, tuple(fleet[number].name for number in where))
    return worst


def _utilisation(
    fleet: Sequence[SimulatedEndpoint],
    kinds: Sequence[Kind],
    rates: Sequence[float],
    where: Sequence[int],
    inside: Sequence[int],
) -> float:
    images = sum(rates[place] * kinds[place].images for place in inside)
    if not images or not where:
        return 0.0
    capacity = 0.0
    for number in where:
        endpoint = fleet[number]
        mean = (
            sum(rates[place] * kinds[place].images * slot_seconds(endpoint, kinds[place]) for place in inside) / images
        )
        capacity += endpoint.slots / mean
    return images / capacity


def _first_tier(fleet: Sequence[SimulatedEndpoint], route: Route) -> set[int]:
    tier = min(target.tier for target in route)
    backends = {target.backend for target in route if target.tier == tier}
    return {number for number, endpoint in enumerate(fleet) if endpoint.group in backends}
