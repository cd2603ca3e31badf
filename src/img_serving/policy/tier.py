"""The endpoints of some backends that serve a route together, with what is known of them kept at hand.

Deciding for one task must not ask a hundred endpoints for what has not changed. Who is usable is kept until an endpoint's
state changes or a moment comes at which it will; free times and speeds are renewed for the endpoints that have moved.
"""

from __future__ import annotations

from collections.abc import Sequence

from img_serving.policy.endpoint import EndpointState
from img_serving.policy.forecast import Forecast


class Tier:
    """Endpoints in file order. They tell it (`EndpointState.tiers`) when they change or move."""

    __slots__ = ("_frees", "_heads", "_renew_at", "_slopes", "_usable", "endpoints", "moved", "steady_until")

    def __init__(self, endpoints: Sequence[EndpointState]) -> None:
        self.endpoints = tuple(endpoints)
        self._usable: list[EndpointState] = []
        self.steady_until = float("-inf")
        """Until when the same are usable, if nothing happens."""
        self.moved: set[EndpointState] = set()
        """Endpoints on which a call began or ended since the last forecast."""
        self._renew_at = float("-inf")
        """From when on everything is to be asked again, because a speed has grown stale."""
        self._frees: list[float] = []
        self._heads: list[float] = []
        self._slopes: list[float] = []
        for one in endpoints:
            one.tiers.append(self)

    def changed(self) -> None:
        """An endpoint may have become usable, or may not be any more."""
        self.steady_until = float("-inf")

    def usable(self, now: float) -> list[EndpointState]:
        """Those that may be used, full ones included. Not to be changed."""
        if now >= self.steady_until:
            before = self._usable
            self._usable = [one for one in self.endpoints if one.is_usable(now)]
            self.steady_until = min([one.usable_until(now) for one in self.endpoints], default=float("inf"))
            if before != self._usable:
                self._renew_at = float("-inf")
        return self._usable

    def forecast(self, now: float) -> Forecast:
        """What its usable endpoints would have done when; for tasks that need no model to be loaded first."""
        usable = self.usable(now)
        if now >= self._renew_at or any(one.speed.per_unit is None for one in self.moved):
            fresh = Forecast(usable, {}, now, {})
            self._slopes, self._heads = fresh.slopes, fresh.heads.copy()
            self._frees = [one.expected_free for one in usable]
            # while somebody has yet to be measured, every measurement changes what is thought of it
            known = all(one.speed.per_unit is not None and one.speed.stale_at > now for one in usable)
            self._renew_at = min([one.speed.stale_at for one in usable]) if known else float("-inf")
            self.moved.clear()
            return fresh
        for one in self.moved:
            if one in usable:
                index = usable.index(one)
                self._frees[index] = one.expected_free
                self._heads[index] = one.speed.overhead + (
                    one.outstanding_cost / one.slots * self._slopes[index] if one.slots > 1 else 0.0
                )
                if one.speed.per_unit is not None and one.speed.stale_at > now:
                    self._slopes[index] = one.speed.per_unit
        self.moved.clear()
        # one that is overdue is taken to need as long again as it is late (see `EndpointState.free_at`)
        frees = [free if free > now else (now + now - free if free else now) for free in self._frees]
        return Forecast.of(usable, frees, self._heads, self._slopes)
