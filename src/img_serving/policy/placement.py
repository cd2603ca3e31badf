"""Where waiting tasks go: which of them, to which endpoint, with what company. Decides, and changes nothing but its notes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from random import Random
from typing import Any

from img_serving.domain.jobs import Batch, Route, Task
from img_serving.policy.balancing import STRATEGIES
from img_serving.policy.batching import company_limit, fill
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.fair_queue import MOST_PASSES, Lane, Urgency, urgencies
from img_serving.policy.fleet import Fleet
from img_serving.policy.forecast import Forecast
from img_serving.policy.lines import Line, Lines, Pool
from img_serving.policy.options import SchedulerOptions
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

LATE_SECONDS = 0.1
LATE_SHARE = 0.1
"""Who waits for a busy endpoint looks again when that is late by so many seconds, or by this share of its call."""

NEVER = float("inf")
Found = tuple[EndpointState, list[Task]]


class Placement:
    """One pass after the other: `begin(now)`, then `place` for the lines, in the order of their `rank`.

    `wake` is when a pass may find more although nothing happens until then.
    """

    def __init__(self, options: SchedulerOptions, fleet: Fleet, lines: Lines, rng: Random) -> None:
        self.fleet = fleet
        self.lines = lines
        self.wake = NEVER
        self._options = options
        self._choose = STRATEGIES[options.strategy]
        self.by_work = options.strategy == "least_work"
        """Whether busy endpoints are compared too."""
        self._rng = rng
        self._now = 0.0
        self._urgency: Urgency | None = None
        self._promised: dict[int, float] = {}
        self._wanted: dict[str, set[str | None]] | None = None
        self.paces: dict[Route, tuple[float, Any]] = {}
        """What `estimates` keeps for a moment: (until when, pace) by route."""

    # a pass

    def begin(self, now: float) -> None:
        """Nothing is promised yet, and nobody has claimed anything."""
        self._now = now
        self.wake = NEVER
        self._promised = {}
        self._wanted = None
        self._urgency = None
        if len(self.lines.priorities) > 1:
            served = (line.queue for line in self.lines if self._usable(self.fleet.tiers(line.route), (), None))
            self._urgency = urgencies(served, now, self._options.ageing_seconds)
        for group in self.fleet.groups:
            group.begin()

    def lines_with_a_chance(self) -> list[Line]:
        """The lines to look at: those of pools with a free slot, and what contends with them for a faster endpoint."""
        found: list[Line] = []
        shut: list[Pool] = []
        for pool in self.lines.active:
            tiers = self.fleet.tiers(next(iter(pool.lines)))
            if any(one.in_flight < one.slots for tier in tiers for one in tier.endpoints):
                found += pool.lines.values()
            else:
                shut.append(pool)
                self._note_when_steady(tiers)
        if found and shut and self.by_work:
            for pool in shut:
                found += islice(pool.lines.values(), PROMISING)
        return found

    def rank(self, line: Line) -> tuple[float, ...]:
        """Where the line stands among the others: the lowest goes first."""
        urgency, priority, *rest = line.queue.rank(self._urgency)
        return urgency, priority, line.pool.clock, *rest

    def is_full(self) -> bool:
        """Whether every slot is taken."""
        return all(endpoint.in_flight >= endpoint.slots for endpoint in self.fleet)

    def place(self, line: Line) -> Found | None:
        """Who of the line goes where now, with what company; None: nobody can, or whoever can had better wait."""
        now = self._now
        usable = self._usable(self.fleet.tiers(line.route), (), line)
        if not usable:
            return self._place_on_a_last_hope(line)
        ready = self._ready(usable, now)
        if not ready:
            self._wait_for_room(usable)
        if self.by_work and (len(usable) > 1 or len(self.lines.active) > 1):
            # with nobody ready this only promises: others must not count on what this line is waiting for
            return self._place_by_work(line, usable, ready) if ready or len(self.lines.active) > 1 else None
        if not ready:
            return None
        task = next(self._order(line), None)
        if task is None:
            return None
        if self.fleet.switches_models:
            ready = self._near_the_model(ready, usable, line)
        while ready:
            endpoint = ready[0] if len(ready) == 1 else self._choose(ready, task.job.cost, now, self._rng)
            members = self._with_company(line, task, endpoint, ready)
            if members is not None:
                return endpoint, members
            ready = [other for other in ready if other is not endpoint]
        return None

    # single tasks

    def pick_at_once(self, task: Task, now: float) -> EndpointState | None:
        """The endpoint for a lone task while nobody waits, or None if it had better stand in line."""
        if task.job.deadline <= now:
            return None
        self._now = now
        self._promised = {}
        tiers = self.fleet.tiers(task.job.route)
        for tier in tiers:
            usable = tier.usable(now)
            if not usable:
                continue
            ready = self._ready(usable, now)
            if not ready or self.fleet.switches_models:
                return None
            if self.by_work:
                endpoint = usable[self._forecast_of(tier, {}).soonest(task.job.cost)]
                if endpoint not in ready:
                    return None
            else:
                endpoint = ready[0] if len(ready) == 1 else self._choose(ready, task.job.cost, now, self._rng)
            return None if endpoint.linger_seconds and endpoint.max_batch_size > 1 else endpoint
        return self._choose_one(self._last_hopes(tiers, (), task.job.deadline), task)

    def pick_again(self, task: Task) -> EndpointState | None:
        """The endpoint for a second try, which does not stand in line again: one that it has not tried."""
        tenant = task.job.tenant
        if task.job.deadline <= self._now or (tenant.max_running is not None and self.lines.account(tenant).room <= 0):
            return None
        tiers = self.fleet.tiers(task.job.route)
        usable = self._usable(tiers, task.tried, None)
        if not usable:
            return self._choose_one(self._last_hopes(tiers, task.tried, task.job.deadline), task)
        ready = self._ready(usable, self._now)
        if not ready:
            self._wait_for_room(usable)
        return self._choose_one(ready, task)

    def pick_hedge(self, task: Task) -> EndpointState | None:
        """A free and cheap endpoint that has not had the task, for a second call beside the one that is slow."""
        now = self._now
        usable = self._usable(self.fleet.tiers(task.job.route), task.tried, None)
        return self._choose_one([one for one in usable if one.cheap and one.has_room(now)], task)

    def expect(self, batch: Batch, endpoint: EndpointState, now: float) -> None:
        """Note how long a call that begins now should take, and which model the engine will hold."""
        seconds = endpoint.speed.seconds(batch.cost)
        if endpoint.capabilities.switches_models and batch.model is not None:
            batch.loads_model = endpoint.loaded_model != batch.model
            endpoint.loaded_model = batch.model
            if batch.loads_model and seconds is not None:
                seconds += endpoint.switch_seconds
        batch.expected_seconds = seconds
        if seconds is None:
            seconds = self._guess(batch.tasks[0].job.route) * batch.cost / endpoint.weight
        batch.expected_end = now + seconds

    def _choose_one(self, candidates: list[EndpointState], task: Task) -> EndpointState | None:
        if not candidates:
            return None
        return self._choose(candidates, task.job.cost, self._now, self._rng)

    def _guess(self, route: Route) -> float:
        """Seconds a megapixel-step of an endpoint that was not measured, times its weight: those of the fastest other."""
        return min(
            (one.speed.per_unit * one.weight for one in self.fleet.of(route) if one.speed.per_unit is not None),
            default=1.0,
        )

    # who may be used

    def usable_of(self, route: Route, now: float) -> list[EndpointState]:
        """The usable endpoints of the first tier that has any."""
        self._now = now
        return self._usable(self.fleet.tiers(route), (), None)

    def _usable(self, tiers: Sequence[Tier], tried: Collection[int], line: Line | None) -> list[EndpointState]:
        """The usable endpoints, full ones included, of the first tier that has any; of more where a tier overflows."""
        now = self._now
        may_overflow = line is not None and self._options.tier_overflow_seconds is not None
        found: list[EndpointState] = []
        self._note_when_steady(tiers)
        for tier in tiers:
            usable = tier.usable(now)
            if usable and not (found or tried or may_overflow):
                return usable
            found += [one for one in usable if one.id not in tried]
            if found and not (line is not None and may_overflow and self._overflows(line, found)):
                break
        return found

    def _note_when_steady(self, tiers: Sequence[Tier]) -> None:
        """Look again when an endpoint may be used that may not now: it was busy, or its breaker is open."""
        for tier in tiers:
            tier.usable(self._now)
            self.wake = min(self.wake, tier.steady_until)

    @staticmethod
    def _ready(usable: list[EndpointState], now: float) -> list[EndpointState]:
        """Those of the usable endpoints that may start a call now.

        One that comes back is spared while others serve; where all have just come back there is nobody to spare them.
        """
        ready = [one for one in usable if one.in_flight < one.slots and one.has_room(now)]
        if not ready and all(one.ramp_ends > now for one in usable):
            return [one for one in usable if one.has_slot()]
        return ready

    def _overflows(self, line: Line, endpoints: list[EndpointState]) -> bool:
        """Whether what waits for these endpoints would take them longer than they have before the next tier helps."""
        limit = self._options.tier_overflow_seconds
        if limit is None or self._ready(endpoints, self._now):
            return False
        level = Forecast(endpoints, {}, self._now, {}).level_of(range(len(endpoints)))
        return level.through(line.queue.work) > self._now + limit

    def _last_hopes(self, tiers: Sequence[Tier], tried: Collection[int], deadline: float) -> list[EndpointState]:
        """Where no endpoint is usable: those that are ejected or broken, for one chance each.

        None of them while one that said when it is free again is worth waiting for, nor where the operator wants no panic:
        then everybody waits until one recovers.
        """
        now = self._now
        hopes: list[EndpointState] = []
        worth_waiting = not self._options.panic_mode
        for tier in tiers:
            for one in tier.endpoints:
                if one.id in tried or not one.enabled or one.removed:
                    continue
                if one.is_only_busy(now) and one.busy_until < deadline:
                    worth_waiting = True
                elif one.has_room(now):
                    hopes.append(one)
        return [] if worth_waiting else hopes

    def _wait_for_room(self, usable: list[EndpointState]) -> None:
        """Nobody has room: look again when one that is coming back gets its next slot.

        Where another endpoint of its group holds the GPU, it is to hand it over.
        """
        for one in usable:
            if one.ramp_ends > self._now and one.in_flight < one.slots:
                self.wake = min(self.wake, self._now + max(LATE_SECONDS, one.ramp_seconds / one.slots))
        for one in usable:
            if self._is_held_by_another(one):
                self._ask_for_the_gpu(one)
                return

    @staticmethod
    def _is_held_by_another(one: EndpointState) -> bool:
        """Whether all that keeps the endpoint from a call is that another of its group has the GPU."""
        group = one.group
        return group is not None and group.holder is not None and group.holder is not one and one.in_flight < one.slots

    def _ask_for_the_gpu(self, one: EndpointState) -> None:
        """Whoever holds it is to hand it over; that is seen to in the next pass."""
        if one.group is not None:
            one.group.ask()
            self.wake = min(self.wake, self._now + LATE_SECONDS)

    # who goes

    def _order(self, line: Line) -> Iterator[Task]:
        now = self._now
        return (task for task in line.queue.order(self._urgency) if task.job.deadline > now)

    def _place_on_a_last_hope(self, line: Line) -> Found | None:
        task = next(self._order(line), None)
        if task is None:
            return None
        self.wake = min(self.wake, task.job.deadline)  # those behind it may be able to wait for longer
        hopes = self._last_hopes(self.fleet.tiers(line.route), (), task.job.deadline)
        endpoint = self._choose_one(hopes, task)
        if endpoint is None:
            return None
        members = self._with_company(line, task, endpoint, hopes)
        return None if members is None else (endpoint, members)

    def _place_by_work(self, line: Line, usable: list[EndpointState], ready: list[EndpointState]) -> Found | None:
        """The first task, in the order of the line, that would be done soonest by an endpoint that is free now.

        Every task before it is better off waiting for a busy one, and is promised it. So a fast endpoint's next moment is
        given to whom it is due, and a slow one takes what it would finish sooner than anybody else could.
        """
        window = list(islice(self._order(line), WINDOW))
        if not window:
            return None
        everybody = forecast = self._forecast(line, usable)
        free = set(map(id, ready))
        if len(usable) > 2 * WINDOW:
            costs = [task.job.cost for task in window]
            forecast = forecast.narrowed(forecast.contenders(costs, self._idle_of(forecast, free)))
        idle = self._idle_of(forecast, free)
        promised = 0.0
        for task in window:
            index = self._better_off_at(task, forecast, idle, is_first=task is window[0])
            endpoint = forecast.endpoints[index]
            if index in idle:
                members = None if self._is_deferred(endpoint, line) else self._with_company(line, task, endpoint, ready)
                if members is not None:
                    return endpoint, members
                idle.remove(index)
                free.discard(id(endpoint))
            elif self._is_held_by_another(endpoint):
                self._ask_for_the_gpu(endpoint)
            forecast.promise(index, task.job.cost)
            promised += task.job.cost
        if free and line.queue.size > len(window):
            # those who were planned for are among what is promised, if everybody has heard of it
            ahead = sum([task.job.cost for task in window]) - (promised if forecast is everybody else 0.0)
            found = self._place_beyond(line, everybody, free, ahead)
            if found is not None:
                return found
        self._keep_promises(forecast)
        return None

    def _idle_of(self, forecast: Forecast, free: set[int]) -> list[int]:
        """The indices of the free endpoints that nobody else has been promised."""
        now = self._now
        return [at for at, one in enumerate(forecast.endpoints) if forecast.frees[at] <= now and id(one) in free]

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
        now = self._now
        best = min(idle, key=ends.__getitem__)
        if now + (ends[best] - now) / COURTESY <= ends[index]:
            return best
        if is_first:
            if task.waits_until is None:
                task.waits_until = ends[best]
            elif now >= task.waits_until:
                return best
            self.wake = min(self.wake, task.waits_until)
        return index

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

    def _place_beyond(self, line: Line, forecast: Forecast, free: set[int], ahead: float) -> Found | None:
        """With more waiting than was planned for, a task further behind may be better off with a free endpoint.

        It is if that would have it done before the busy ones are through with all that stands before it: what was planned for,
        of which `ahead` is not among their promises, and then the line in its order, as work that they share evenly.
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
        level = forecast.level_of(busy)
        for depth, task in enumerate(islice(self._order(line), WINDOW, DEPTH), WINDOW + 1):
            cost = task.job.cost
            others = level.work_by(now + (head + cost * slope) / COURTESY)
            if others > rest + cost:
                return None  # nor is it for this one; the next ones are hardly different
            if others <= ahead + cost or depth == DEPTH:
                endpoint = forecast.endpoints[index]
                members = self._with_company(line, task, endpoint, [endpoint])
                return None if members is None else (endpoint, members)
            ahead += cost
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

    def _with_company(
        self, line: Line, task: Task, endpoint: EndpointState, ready: list[EndpointState]
    ) -> list[Task] | None:
        """The task and those who travel with it; None where it should linger for more company."""
        most = company_limit(endpoint, task)
        if most == 1:
            return [task]
        waiting, _ = line.queue.may_run()
        limit = min(most, waiting)
        lingers = endpoint.linger_seconds > 0 and endpoint.capabilities.batch not in {"single", "request"}
        if limit > 1:
            # A batch leaves work for the other free slots; where calls linger for company, only for other endpoints.
            free = len(ready) if lingers else sum([one.slots - one.in_flight for one in ready])
            limit = min(limit, -(-waiting // max(1, free)))
        members = [task]
        if limit > 1:
            others = (one for one in self._order(line) if one is not task and _may_go_along(one))
            members = fill(endpoint.capabilities.batch, task, others, limit)
        if lingers and len(members) < most:
            until = task.job.submitted_at + endpoint.linger_seconds
            if self._now < until:
                self.wake = min(self.wake, until)
                return None
        return members

    # models

    def _near_the_model(
        self, ready: list[EndpointState], usable: list[EndpointState], line: Line
    ) -> list[EndpointState]:
        """Of the free endpoints those that have the line's model loaded; where there are none, those that may load it.

        For a bounded time a line waits for a busy endpoint that has its model, if that is free sooner than another could
        load it, and is passed over for others whose model is loaded.
        """
        at_hand = [one for one in ready if not self._must_switch(one, line)]
        if at_hand:
            return at_hand
        soonest = min(one.switch_seconds for one in ready)
        if any(
            not self._must_switch(one, line) and one.free_at(self._now) - self._now < soonest for one in usable
        ) and self._may_be_passed_over(line):
            return []
        return [one for one in ready if not self._is_deferred(one, line)]

    def _may_be_passed_over(self, line: Line) -> bool:
        """Whether the line can wait a while yet for the sake of models; its patience begins when it is first asked for."""
        if not self._options.affinity_seconds:
            return False
        if line.passed_over_since is None:
            line.passed_over_since = self._now
        until = line.passed_over_since + self._options.affinity_seconds
        if self._now >= until:
            return False
        self.wake = min(self.wake, until)
        return True

    @staticmethod
    def _must_switch(endpoint: EndpointState, line: Line) -> bool:
        if not endpoint.capabilities.switches_models:
            return False
        model = line.models.get(endpoint.backend)
        return model is not None and endpoint.loaded_model != model

    def _is_deferred(self, endpoint: EndpointState, line: Line) -> bool:
        """Whether the endpoint has a model loaded that others wait for, and the line can wait a while yet."""
        return (
            self.fleet.switches_models
            and endpoint.loaded_model is not None
            and self._must_switch(endpoint, line)
            and endpoint.loaded_model in self._models_wanted(endpoint.backend)
            and self._may_be_passed_over(line)
        )

    def _models_wanted(self, backend: str) -> set[str | None]:
        if self._wanted is None:
            self._wanted = {}
            for line in self.lines:
                for name, model in line.models.items():
                    self._wanted.setdefault(name, set()).add(model)
        return self._wanted.get(backend, set())


def _may_go_along(task: Task) -> bool:
    """Whether a task may travel in another's company: the first of its lane always, the others not past it for ever."""
    lane: Lane = task.place
    return lane.passed < MOST_PASSES or task is lane.head


def _expected_free(endpoint: EndpointState) -> float:
    return endpoint.expected_free
