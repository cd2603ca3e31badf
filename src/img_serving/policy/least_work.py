"""`least_work`: every task to the endpoint that would have it done first, busy ones included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from random import Random

from img_serving.domain.jobs import Task
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.fleet import Fleet
from img_serving.policy.forecast import Forecast, Level
from img_serving.policy.lines import Line, Lines, Pool
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.placement import LATE_SECONDS, Found, Placement
from img_serving.policy.tier import Tier

WINDOW = 16
"""Waiting tasks that `least_work` plans ahead for: whom a free endpoint suits is nearly always among the first few."""

COURTESY = 1.5
"""A free endpoint is taken although it would be this many times as late as a busy one: whoever takes a slow one frees the fast
one for all behind. In the benchmark's mixes 1.5 is better for the slowest twentieth and hundredth than 1 (everybody for
himself), by 3 to 8 %, and for the mean; from 2 on big pictures suffer on slow endpoints."""

DEPTH = 256
"""So far behind in a line a task is looked for that suits a free endpoint, if so much waits that there must be one."""

PROMISING = 4
"""Lines of a pool that are planned for although none of its endpoints is free, so that other lines know what is taken."""

LATE_SHARE = 0.1
"""Who waits for a busy endpoint looks again when that is late by this share of its call."""


@dataclass(slots=True, eq=False)
class Plan:
    """The first tasks of a line, and which of some endpoints they go to, as far as that has been thought through."""

    line: Line
    usable: list[EndpointState]
    window: list[Task]
    """The first tasks, as far as they were looked at; `order` gives the next ones."""
    order: Iterator[Task]
    end: int
    """So many of them are to be planned for."""
    everybody: Forecast
    forecast: Forecast
    """Of those of `everybody` who matter for the window; `idle` are indices in it."""
    idle: list[int]
    free: set[int]
    size: int = WINDOW
    """So many tasks stand before those for whom `_place_beyond` cares."""
    position: int = 0
    """Of the next task to think of: those before it wait for a busy endpoint, and are `promised` work there."""
    promised: float = 0.0

    def started(self, index: int) -> None:
        """The task at the position goes to that endpoint at once, and fills it."""
        task = self.window.pop(self.position)
        self.end -= 1
        self.size -= 1
        self.forecast.promise(index, task.job.cost)
        self.idle.remove(index)
        self.free.discard(id(self.forecast.endpoints[index]))


class LeastWork(Placement):
    """Plans the first tasks of a line, each to where it would be done first, and starts those whose endpoint is free.

    The others wait for a faster endpoint, and are promised it: whoever comes after them in this pass counts with that.
    """

    by_work = True

    def __init__(self, options: SchedulerOptions, fleet: Fleet, lines: Lines, rng: Random) -> None:
        super().__init__(options, fleet, lines, rng)
        self._promised: dict[int, float] = {}
        """Until when endpoints are laid claim to by lines that were looked at in this pass."""
        self._plan: Plan | None = None
        """What was thought through for the line that was asked last, which has got an endpoint for one of its tasks."""

    def begin(self, now: float) -> None:
        """Nothing is promised yet."""
        super().begin(now)
        self._promised = {}
        self._plan = None

    def lines_with_a_chance(self) -> list[Line]:
        """The lines of pools with a free slot, and some of those that contend with them for a faster endpoint."""
        found = super().lines_with_a_chance()
        if found and len(self.lines.active) > 1:
            open_pools: dict[Pool, None] = dict.fromkeys(line.pool for line in found)
            for pool in self.lines.active:
                if pool not in open_pools:
                    found += islice(pool.lines.values(), PROMISING)
        return found

    def _best_at_once(self, tier: Tier, ready: list[EndpointState], task: Task) -> EndpointState | None:
        self._promised = {}
        usable = tier.usable(self._now)
        endpoint = usable[self._forecast_of(tier, {}).soonest(task.job.cost)]
        return endpoint if endpoint in ready else None

    def _place_among(self, line: Line, usable: list[EndpointState], ready: list[EndpointState]) -> Found | None:
        several = len(self.lines.active) > 1
        if len(usable) == 1 and not several:
            return super()._place_among(line, usable, ready)
        # with nobody ready this only promises: others must not count on what this line is waiting for
        return self._place_by_work(line, usable, ready) if ready or several else None

    def _place_by_work(self, line: Line, usable: list[EndpointState], ready: list[EndpointState]) -> Found | None:
        """The first task, in the order of the line, that would be done soonest by an endpoint that is free now.

        Every task before it is better off waiting for a busy one, and is promised it. So a fast endpoint's next moment is
        given to whom it is due, and a slow one takes what it would finish sooner than anybody else could.
        """
        plan, self._plan = self._plan, None
        resumed = plan is not None and plan.line is line and plan.usable is usable
        if plan is None or not resumed:
            plan = self._begin_plan(line, usable, ready)
        else:
            plan.order = islice(self._order(line), len(plan.window), None)
        forecast, idle, free, window = plan.forecast, plan.idle, plan.free, plan.window
        while plan.position < plan.end:
            if plan.position == len(window):
                following = next(plan.order, None)
                if following is None:
                    break
                window.append(following)
            task = window[plan.position]
            index = self._better_off_at(task, forecast, idle, is_first=not plan.position)
            endpoint = forecast.endpoints[index]
            if index in idle:
                members = None if self._is_deferred(endpoint, line) else self._with_company(line, task, endpoint, ready)
                if members is not None:
                    if endpoint.slots == 1 and len(members) == 1 and len(free) > 1 and plan.end == plan.size:
                        self._plan = plan
                        plan.started(index)
                    return endpoint, members
                idle.remove(index)
                free.discard(id(endpoint))
            elif self._is_held_by_another(endpoint):
                self._ask_for_the_gpu(endpoint)
            forecast.promise(index, task.job.cost)
            plan.promised += task.job.cost
            plan.position += 1
        if free and len(window) >= plan.size:
            everybody = plan.everybody
            if resumed and forecast is not everybody:
                everybody = self._forecast(line, usable)
            # those who were planned for are among what is promised, if everybody has heard of it
            ahead = sum([task.job.cost for task in window[: plan.size]])
            if forecast is everybody:
                ahead -= plan.promised
            found = self._place_beyond(line, everybody, free, chain(window[plan.size :], plan.order), ahead)
            if found is not None:
                return found
        if window:
            self._keep_promises(forecast)
        return None

    def _begin_plan(self, line: Line, usable: list[EndpointState], ready: list[EndpointState]) -> Plan:
        """For the first tasks of a line, of which nothing is decided yet."""
        order = self._order(line)
        window: list[Task] = []
        everybody = forecast = self._forecast(line, usable)
        free = set(map(id, ready))
        idle = self._idle_of(forecast, free)
        end = WINDOW
        if len(usable) > 2 * WINDOW:
            window = list(islice(order, WINDOW + 1))
        if window:
            indices, margins = forecast.contenders([task.job.cost for task in window[:WINDOW]], idle)
            forecast = forecast.narrowed(indices)
            known_idle = set(idle)
            idle = [at for at, index in enumerate(indices) if index in known_idle]
            alone = len(self.lines.active) == 1 and not self.fleet.groups
            if alone and all(self._with_courtesy(best) > last for last, best in margins):
                end = 1  # none of them could choose an idle one, and nobody asks what they wait for
        return Plan(line, usable, window, order, end, everybody, forecast, idle, free)

    def _idle_of(self, forecast: Forecast, free: set[int]) -> list[int]:
        """The indices of the free endpoints that nobody else has been promised."""
        now = self._now
        endpoints = forecast.endpoints
        return [at for at, when in enumerate(forecast.frees) if when <= now and id(endpoints[at]) in free]

    def _better_off_at(self, task: Task, forecast: Forecast, idle: list[int], *, is_first: bool) -> int:
        """The endpoint for a task: the soonest, or an idle one that takes not much longer.

        Who takes a slow endpoint although a fast one would be a little sooner makes room there for everybody behind (see
        `COURTESY`). And the first of a line passes an idle endpoint by for no longer than that would have taken from the
        first: so much cannot be lost by any forecast, however often the other goes to somebody else or comes late.
        """
        ends = forecast.ends(task.job.cost)
        index = forecast.first_of(ends)
        if not idle or index in idle:
            return index
        best = min(idle, key=ends.__getitem__)
        if self._with_courtesy(ends[best]) <= ends[index]:
            return best
        if is_first:
            if task.waits_until is None:
                task.waits_until = ends[best]
            elif self._now >= task.waits_until:
                return best
            self.wake = min(self.wake, task.waits_until)
        return index

    def _with_courtesy(self, end: float) -> float:
        """What a busy endpoint must undercut to be worth waiting for, where an idle one would be done by `end`."""
        return self._now + (end - self._now) / COURTESY

    def _forecast(self, line: Line, usable: list[EndpointState]) -> Forecast:
        """What the usable endpoints would have done when, for this line's tasks."""
        tier = self.fleet.tiers(line.route)[0]
        if usable is tier.usable(self._now):
            return self._forecast_of(tier, line.models)
        return Forecast(usable, line.models, self._now, self._promised)

    def _forecast_of(self, tier: Tier, models: dict[str, str | None]) -> Forecast:
        """The same for a tier: from what it keeps at hand, unless something is special."""
        fleet = self.fleet
        if fleet.switches_models or fleet.groups or self._promised or self._now < fleet.ramping_until:
            return Forecast(tier.usable(self._now), models, self._now, self._promised)
        return tier.forecast(self._now)

    def _place_beyond(
        self, line: Line, forecast: Forecast, free: set[int], behind: Iterator[Task], ahead: float
    ) -> Found | None:
        """With more waiting than was planned for, a task further behind may be better off with a free endpoint.

        It is if that would have it done before the busy ones are through with all that stands before it: what was planned for,
        of which `ahead` is not among their promises, and then the line `behind` that, as work that they share evenly.
        """
        now = self._now
        idle = [at for at in self._idle_of(forecast, free) if not self._is_deferred(forecast.endpoints[at], line)]
        busy = [at for at, one in enumerate(forecast.endpoints) if id(one) not in free]
        if not busy or not idle:
            return None
        index = min(idle, key=forecast.slopes.__getitem__)
        head, slope = forecast.heads[index], forecast.slopes[index]
        rest = line.queue.may_run()[1]
        if forecast.work_by(now + head / COURTESY, busy) > rest:
            return None  # all that waits is not enough, even for the smallest picture
        level: Level | None = None
        for depth, task in enumerate(islice(behind, DEPTH - WINDOW), WINDOW + 1):
            cost = task.job.cost
            moment = now + (head + cost * slope) / COURTESY
            others = forecast.work_by(moment, busy) if level is None else level.work_by(moment)
            if others > rest + cost:
                return None  # nor is it for this one; the next ones are hardly different
            if others <= ahead + cost or depth == DEPTH:
                endpoint = forecast.endpoints[index]
                members = self._with_company(line, task, endpoint, [endpoint])
                return None if members is None else (endpoint, members)
            ahead += cost
            level = level or forecast.level_of(busy)
        return None

    def _keep_promises(self, forecast: Forecast) -> None:
        """Other lines must not count on what this one's tasks wait for; and whoever waits looks again if it comes late."""
        now = self._now
        if len(self.lines.active) > 1:
            for endpoint, free in zip(forecast.endpoints, forecast.frees, strict=True):
                if free > now:
                    self._promised[endpoint.id] = free
        busy = [one for one in forecast.endpoints if one.expected_free]
        if busy:
            first = min(busy, key=_expected_free)
            due = first.expected_free
            late = max(LATE_SECONDS, now - due, LATE_SHARE * (due - min([one.started_at for one in first.running])))
            self.wake = min(self.wake, max(due, now) + late)


def _expected_free(endpoint: EndpointState) -> float:
    return endpoint.expected_free
