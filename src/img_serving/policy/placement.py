"""Where waiting tasks go: which of them, to which endpoint, with what company. Decides, and changes nothing but its notes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from random import Random
from typing import Any

from img_serving.domain.jobs import Batch, Route, Task
from img_serving.policy.balancing import STRATEGIES
from img_serving.policy.batching import able_for, company_limit, fill
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.fair_queue import MOST_PASSES, Lane, Urgency, urgencies
from img_serving.policy.fleet import Fleet
from img_serving.policy.forecast import Forecast
from img_serving.policy.lines import Line, Lines
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.tier import Tier

LATE_SECONDS = 0.1
"""Who waits for somebody to come or go without being told looks again after so long."""

NEVER = float("inf")
Found = tuple[EndpointState, list[Task]]


class Placement:
    """One pass after the other: `begin(now)`, then `place` for the lines, in the order of their `rank`.

    `wake` is when a pass may find more although nothing happens until then. Strategies that choose among the free endpoints
    are used here as they are; `least_work.LeastWork` also looks at the busy ones.
    """

    by_work = False
    """Whether busy endpoints are compared too."""

    def __init__(self, options: SchedulerOptions, fleet: Fleet, lines: Lines, rng: Random) -> None:
        self.fleet = fleet
        self.lines = lines
        self.wake = NEVER
        self._options = options
        self._choose = STRATEGIES[options.strategy]
        self._rng = rng
        self._now = 0.0
        self._urgency: Urgency | None = None
        self._wanted: dict[str, set[str | None]] | None = None
        self.paces: dict[Route, tuple[float, Any]] = {}
        """What `estimates` keeps for a moment: (until when, pace) by route."""

    # a pass

    def begin(self, now: float) -> None:
        """Nothing is promised yet, and nobody has claimed anything."""
        self._now = now
        self.wake = NEVER
        self._wanted = None
        self._urgency = None
        if len(self.lines.priorities) > 1:
            served = (line.queue for line in self.lines if self._usable(self.fleet.tiers(line.route), (), None))
            self._urgency = urgencies(served, now, self._options.ageing_seconds)
        for group in self.fleet.groups:
            group.begin()

    def lines_with_a_chance(self) -> list[Line]:
        """The lines to look at: those of pools with a free slot."""
        found: list[Line] = []
        for pool in self.lines.active:
            # the lines of a pool differ in their models, which not every endpoint need have
            tiers = tuple(dict.fromkeys(tier for route in pool.lines for tier in self.fleet.tiers(route)))
            if any(one.in_flight < one.slots for tier in tiers for one in tier.endpoints):
                found += pool.lines.values()
            else:
                self._note_when_steady(tiers)
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
        return self._place_among(line, usable, ready)

    def _place_among(self, line: Line, usable: list[EndpointState], ready: list[EndpointState]) -> Found | None:
        """Who of the line goes to which of the usable endpoints, of which those that are ready may start a call."""
        if not ready:
            return None
        task = next(self._order(line), None)
        if task is None:
            return None
        if self.fleet.switches_models:
            ready = self._near_the_model(ready, usable, line)
        while ready:
            endpoint = self._choose_of(ready, task.job.cost)
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
        tiers = self.fleet.tiers(task.job.route)
        for tier in tiers:
            usable = tier.usable(now)
            if not usable:
                continue
            ready = self._ready(usable, now)
            if not ready or self.fleet.switches_models:
                return None
            endpoint = self._best_at_once(tier, ready, task)
            if endpoint is None:
                return None
            return None if endpoint.linger_seconds and endpoint.max_batch_size > 1 else endpoint
        return self._choose_one(self._last_hopes(tiers, (), task.job.deadline), task)

    def _best_at_once(self, tier: Tier, ready: list[EndpointState], task: Task) -> EndpointState | None:  # noqa: ARG002
        """Of the endpoints that are ready the one for a lone task; None if a busy one of the tier is worth waiting for."""
        return self._choose_of(ready, task.job.cost)

    def _choose_of(self, ready: list[EndpointState], cost: float) -> EndpointState:
        return ready[0] if len(ready) == 1 else self._choose(ready, cost, self._now, self._rng)

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
        return self._choose_of(candidates, task.job.cost) if candidates else None

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

    def _with_company(
        self, line: Line, task: Task, endpoint: EndpointState, ready: list[EndpointState]
    ) -> list[Task] | None:
        """The task and those who travel with it; None where it should linger for more company."""
        most = company_limit(endpoint, task)
        if most == 1:
            return [task]
        waiting, _ = line.queue.may_run()
        limit = min(most, waiting)
        shape = able_for(endpoint, task).batch
        lingers = endpoint.linger_seconds > 0 and shape not in {"single", "request"}
        if limit > 1:
            # A batch leaves work for the other free slots; where calls linger for company, only for other endpoints.
            free = len(ready) if lingers else sum([one.slots - one.in_flight for one in ready])
            limit = min(limit, -(-waiting // max(1, free)))
        members = [task]
        if limit > 1:
            others = (one for one in self._order(line) if one is not task and _may_go_along(one))
            members = fill(shape, task, others, limit)
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
