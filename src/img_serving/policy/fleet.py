"""The endpoints there are: by number, by backend, and by the tiers of a route."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from img_serving.domain.jobs import Route, Target
from img_serving.policy.endpoint import EndpointState, ExclusiveGroup
from img_serving.policy.tier import Tier

MAX_ROUTES = 1024
"""Routes whose tiers are remembered at most; past it all are forgotten."""


class Fleet:
    """All endpoints, those of removed backends included until their last call is over."""

    __slots__ = ("_by_backend", "_by_endpoints", "_by_id", "_tiers", "groups", "ramping_until", "switches_models")

    def __init__(self) -> None:
        self._by_id: dict[int, EndpointState] = {}
        self._by_backend: dict[str, list[EndpointState]] = {}
        self._tiers: dict[Route, tuple[Tier, ...]] = {}
        self._by_endpoints: dict[tuple[int, ...], Tier] = {}
        self.switches_models = False
        """Whether any endpoint holds one model at a time."""
        self.ramping_until = 0.0
        """When the last of those that have recovered has all of its share again."""
        self.groups: tuple[ExclusiveGroup, ...] = ()
        """Those that share a GPU."""

    def add(self, endpoint: EndpointState) -> None:
        """From now on it may be given work."""
        self._by_id[endpoint.id] = endpoint
        self._by_backend.setdefault(endpoint.backend, []).append(endpoint)
        self.changed()

    def remove_backend(self, backend: str) -> None:
        """Its endpoints get no work any more, and are forgotten when their last call is over."""
        for endpoint in self._by_backend.pop(backend, []):
            endpoint.removed = True
            self.forget_if_over(endpoint)
        self.changed()

    def forget_if_over(self, endpoint: EndpointState) -> None:
        """Forget a removed endpoint on which nothing runs."""
        if endpoint.removed and not endpoint.in_flight:
            del self._by_id[endpoint.id]

    def changed(self) -> None:
        """Endpoints came or went, or can do something else than before."""
        self._tiers.clear()
        self._by_endpoints.clear()
        for one in self._by_id.values():
            one.tiers.clear()
        here = [one for endpoints in self._by_backend.values() for one in endpoints]
        self.switches_models = any(one.capabilities.switches_models for one in here)
        self.groups = tuple(dict.fromkeys(one.group for one in here if one.group is not None))

    def recovered(self, endpoint: EndpointState, now: float, slow_start_seconds: float) -> None:
        """An endpoint is back, and begins with a part of its share."""
        endpoint.recovered(now, slow_start_seconds)
        self.ramping_until = max(self.ramping_until, now + slow_start_seconds)

    def __getitem__(self, endpoint_id: int) -> EndpointState:
        return self._by_id[endpoint_id]

    def __iter__(self) -> Iterator[EndpointState]:
        return iter(self._by_id.values())

    def of(self, route: Route) -> Iterable[EndpointState]:
        """The endpoints of every backend on the route."""
        return (endpoint for tier in self.tiers(route) for endpoint in tier.endpoints)

    def tiers(self, route: Route) -> tuple[Tier, ...]:
        """The endpoints of a route by tier, the lowest first; remembered until something changes."""
        tiers = self._tiers.get(route)
        if tiers is None:
            if len(self._tiers) >= MAX_ROUTES:
                self._tiers.clear()
            targets: dict[int, list[Target]] = {}
            for target in route:
                targets.setdefault(target.tier, []).append(target)
            tiers = self._tiers[route] = tuple(self._tier_of(targets[tier]) for tier in sorted(targets))
        return tiers

    def _tier_of(self, targets: list[Target]) -> Tier:
        """One for the same endpoints, however many routes (models) lead to them."""
        endpoints = [one for target in targets for one in self._having(target)]
        key = tuple(one.id for one in endpoints)
        tier = self._by_endpoints.get(key)
        if tier is None:
            tier = self._by_endpoints[key] = Tier(endpoints)
        return tier

    def _having(self, target: Target) -> list[EndpointState]:
        """The endpoints of a backend but for those that lack the model, where another one says that it has it.

        Where none says so the name is the operator's own, and any of them may know it.
        """
        here = self._by_backend.get(target.backend, [])
        if target.only is not None:
            here = [one for one in here if one.id in target.only]
        if target.model is None or not any(one.models is not None and target.model in one.models for one in here):
            return here
        return [one for one in here if one.models is None or target.model in one.models]

    def resources_of(self, backends: frozenset[str]) -> frozenset[str]:
        """What work for these backends takes from others: the backends, and the GPUs that they share."""
        groups = (one.group for backend in backends for one in self._by_backend.get(backend, ()))
        return backends | {f"group {group.name}" for group in groups if group is not None}

    def has_untried(self, route: Route, tried: Collection[int]) -> bool:
        """Whether an enabled endpoint is left that is not among those tried."""
        return any(endpoint.enabled and endpoint.id not in tried for endpoint in self.of(route))
