"""When each endpoint would have a task done: what `least_work` compares, busy endpoints included."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate

from img_serving.policy.endpoint import EndpointState


class Forecast:
    """For each of some endpoints: when it has a free slot, and how long it takes.

    `frees` in seconds of the clock, `heads` seconds a call (fixed part, a model to load, and what else runs there), `slopes`
    seconds a megapixel-step. One that was not measured, or not for long, is taken to be as fast, per weight, as the fastest
    of the others: so everyone is tried soon, and one disappointment is enough to know better.
    """

    __slots__ = ("endpoints", "frees", "heads", "slopes")

    def __init__(
        self,
        endpoints: Sequence[EndpointState],
        models: Mapping[str, str | None],
        now: float,
        promised: Mapping[int, float],
    ) -> None:
        """`models` by backend: what the task needs there. `promised`: until when others have laid claim to an endpoint."""
        self.endpoints = endpoints
        self.frees = [one.expected_free if one.expected_free > now else one.free_at(now) for one in endpoints]
        if promised:
            for index, one in enumerate(endpoints):
                self.frees[index] = max(self.frees[index], promised.get(one.id, 0.0))
        slopes = [
            one.speed.per_unit if one.speed.per_unit is not None and one.speed.stale_at > now else 0.0
            for one in endpoints
        ]
        if 0.0 in slopes:
            known = [slope * one.weight for slope, one in zip(slopes, endpoints, strict=True) if slope]
            best = min(known, default=1.0)
            slopes = [slope or best / one.weight for slope, one in zip(slopes, endpoints, strict=True)]
        self.slopes = slopes
        self.heads = [one.speed.overhead for one in endpoints]
        for index, one in enumerate(endpoints):
            if one.in_flight and one.slots > 1:
                # what runs there already is shared out over its slots: the fuller of two is the slower
                self.heads[index] += one.outstanding_cost / one.slots * slopes[index]
            if one.capabilities.switches_models:
                model = models.get(one.backend)
                if model is not None and one.loaded_model is not None and one.loaded_model != model:
                    self.heads[index] += one.switch_seconds

    @classmethod
    def of(
        cls, endpoints: Sequence[EndpointState], frees: list[float], heads: list[float], slopes: list[float]
    ) -> Forecast:
        """A forecast of figures that are at hand."""
        one = cls.__new__(cls)
        one.endpoints, one.frees, one.heads, one.slopes = endpoints, frees, heads, slopes
        return one

    def ends(self, cost: float) -> list[float]:
        """When each would have a task of `cost` done."""
        return [free + head + cost * slope for free, head, slope in zip(self.frees, self.heads, self.slopes)]  # noqa: B905 - hot, and made together

    def soonest(self, cost: float) -> int:
        """The index of the one that would have a task of `cost` done first."""
        return self.first_of(self.ends(cost))

    def first_of(self, ends: list[float]) -> int:
        """The index of the soonest of these ends; among equals of the one whose turn is longest ago."""
        best = min(ends)
        index = ends.index(best)
        if best in ends[index + 1 :]:
            tied = [at for at, end in enumerate(ends) if end == best]
            index = min(tied, key=lambda at: self.endpoints[at].picked_at)
        return index

    def contenders(self, costs: Sequence[float], idle: Sequence[int]) -> tuple[list[int], list[tuple[float, float]]]:
        """The indices of those whom tasks of these costs could choose: of n tasks each finds one of the n soonest.

        Asked for the cheapest and the dearest task; who is soonest for one in between is so for one of these, nearly always.
        The best of those that are `idle` is among them in any case. Also, for each of the two: by when the n-th soonest is
        done, which is the latest any of the tasks would have to accept, and by when the best idle one is.
        """
        found: set[int] = set()
        margins: list[tuple[float, float]] = []
        for cost in {min(costs), max(costs)}:
            ends = self.ends(cost)
            last = sorted(ends)[min(len(costs), len(ends)) - 1]
            found.update([index for index, end in enumerate(ends) if end <= last])
            if idle:
                best = min(idle, key=ends.__getitem__)
                found.add(best)
                margins.append((last, ends[best]))
        return sorted(found), margins

    def narrowed(self, indices: Sequence[int]) -> Forecast:
        """The forecast of some of them."""
        return Forecast.of(
            [self.endpoints[index] for index in indices],
            [self.frees[index] for index in indices],
            [self.heads[index] for index in indices],
            [self.slopes[index] for index in indices],
        )

    def promise(self, index: int, cost: float) -> None:
        """A task of `cost` is going to run there: what comes after it begins later."""
        endpoint = self.endpoints[index]
        seconds = cost * self.slopes[index]
        if endpoint.max_batch_size > 1:
            seconds += self.heads[index] / endpoint.max_batch_size  # it will share its call
        else:
            seconds += self.heads[index]
        self.frees[index] += seconds / endpoint.slots

    def work_by(self, moment: float, indices: Sequence[int]) -> float:
        """Megapixel-steps that the endpoints at those indices would have done by then."""
        frees, slopes, endpoints = self.frees, self.slopes, self.endpoints
        return sum([(moment - frees[at]) * endpoints[at].slots / slopes[at] for at in indices if frees[at] < moment])

    def level_of(self, indices: Sequence[int]) -> Level:
        """What the endpoints at those indices get done together."""
        return Level([(self.frees[index], self.endpoints[index].slots / self.slopes[index]) for index in indices])


class Level:
    """How much work some endpoints have done by when, each from the moment at which it is free."""

    __slots__ = ("_begun", "_frees", "_rates")

    def __init__(self, stands: list[tuple[float, float]]) -> None:
        """(when it is free, megapixel-steps a second) of each."""
        stands.sort()
        self._frees = [free for free, _ in stands]
        self._rates = [0.0, *accumulate([rate for _, rate in stands])]
        self._begun = [0.0, *accumulate([free * rate for free, rate in stands])]

    def work_by(self, moment: float) -> float:
        """Megapixel-steps done by then."""
        count = bisect_left(self._frees, moment)
        return self._rates[count] * moment - self._begun[count]

    def through(self, work: float) -> float:
        """When they are through with so much."""
        frees, rates, begun = self._frees, self._rates, self._begun
        for count in range(1, len(frees) + 1):
            moment = (work + begun[count]) / rates[count]
            if count == len(frees) or moment <= frees[count]:
                return moment
        return float("inf")
