"""How long it will take: positions, waits and ends, from what waits, what runs, and the speeds that were learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from img_serving.domain.jobs import Batch, Job, Route
from img_serving.domain.tenants import Tenant
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.fair_queue import Account, Lane, Level
from img_serving.policy.lines import Line
from img_serving.policy.placement import Placement
from img_serving.policy.snapshots import BackendQueue, JobEstimate, SchedulerSnapshot, TenantQueue

PACE_SECONDS = 0.5
MAX_PACES = 1024

MOST_ETAS = 100
"""With more tenants than this waiting, a snapshot has no estimates of each."""

UNKNOWN_SECONDS = 1.0
"""A task is taken to need so long where nothing was measured, for those who must be told something."""


class Ahead(msgspec.Struct, frozen=True, gc=False):
    """What goes before somebody: so many tasks, and their work in megapixel-steps."""

    tasks: float = 0.0
    work: float = 0.0

    def __add__(self, other: Ahead) -> Ahead:
        return Ahead(self.tasks + other.tasks, self.work + other.work)


class Stand(msgspec.Struct, frozen=True, gc=False):
    """One endpoint in a pace: seconds until it has a free slot, seconds a megapixel-step and a call, its slots and batches."""

    free: float
    per_unit: float
    overhead: float
    slots: int
    batch: int

    def seconds(self, cost: float) -> float:
        """How long it takes for a task on its own."""
        return self.overhead + self.per_unit * cost

    def rate(self, cost: float) -> float:
        """Megapixel-steps a second on all its slots, at tasks of this cost, with full batches, as there are while many wait."""
        return self.slots / (self.per_unit + self.overhead / (cost * self.batch))


class Pace(msgspec.Struct, frozen=True):
    """What some endpoints do together; who is free soonest stands first. `slots` calls at a time."""

    stands: tuple[Stand, ...]
    slots: int
    slowest_unit: float
    """Seconds a megapixel-step, and a call, of the slowest: for bounds that cost nothing."""
    slowest_call: float

    def at_most(self, ahead: Ahead, own: Ahead) -> float:
        """More seconds than it can take until what is ahead and one's own is done, if all were as slow as the slowest."""
        tasks, work = ahead.tasks + own.tasks, ahead.work + own.work
        calls = tasks / self.slots + own.tasks + 1
        return self.stands[-1].free + (work / self.slots + own.work) * self.slowest_unit + calls * self.slowest_call

    def through(self, ahead: Ahead) -> float:
        """Seconds until all that is ahead has been started and the next task is: at once where there is none and a slot free.

        Each endpoint has started what it could draw since its slot came free, and half a task more on each slot, as they are
        not in step; but for the first: alone, it starts a task just when it has done the one before.
        """
        if not ahead.tasks or not ahead.work:
            return self.stands[0].free
        cost = ahead.work / ahead.tasks
        started = -cost / 2
        rate = now = 0.0
        for one in self.stands:
            if one.free > now:
                if started + rate * (one.free - now) >= ahead.work:
                    break
                started += rate * (one.free - now)
                now = one.free
            rate += one.rate(cost)
            started += one.slots * cost / 2
        return now + max(0.0, ahead.work - started) / rate

    def rate(self, cost: float) -> float:
        """Megapixel-steps a second of all of them, at tasks of this cost."""
        return sum([one.rate(cost) for one in self.stands])

    def mean_seconds(self, cost: float) -> float:
        """How long a task takes on the slot that it will probably have."""
        return cost * self.slots / self.rate(cost)

    def least_seconds(self, cost: float) -> float:
        """How long a task takes on the fastest endpoint."""
        return min([one.seconds(cost) for one in self.stands])


def pace_of(endpoints: Sequence[EndpointState], now: float) -> Pace | None:
    """The pace; None where no endpoint was measured. One that was not counts as the others do on average."""
    known = [one for one in endpoints if one.speed.per_unit is not None]
    if not known:
        return None
    slots = sum([one.slots for one in known])
    per_unit = sum([(one.speed.per_unit or 0.0) * one.slots for one in known]) / slots
    overhead = sum([one.speed.overhead * one.slots for one in known]) / slots
    stands = [
        Stand(
            free=max(0.0, one.free_at(now) - now),
            per_unit=per_unit if one.speed.per_unit is None else one.speed.per_unit,
            overhead=overhead if one.speed.per_unit is None else one.speed.overhead,
            slots=one.slots,
            batch=one.max_batch_size,
        )
        for one in endpoints
    ]
    stands.sort(key=_free)
    return Pace(
        tuple(stands),
        sum([one.slots for one in stands]),
        max([one.per_unit for one in stands]),
        max([one.overhead for one in stands]),
    )


def recent_pace(placement: Placement, route: Route, now: float) -> Pace | None:
    """The pace of a route, at most `PACE_SECONDS` old: it is asked for with every job that arrives."""
    until, known = placement.paces.get(route, (float("-inf"), None))
    pace: Pace | None = known
    if now >= until:
        if len(placement.paces) >= MAX_PACES:
            placement.paces.clear()
        pace = pace_of(placement.usable_of(route, now), now)
        placement.paces[route] = (now + PACE_SECONDS, pace)
    return pace


# what goes before whom


def _ahead_in_level(level: Level, account: Account, own: float) -> Ahead:
    """What other tenants of a level have before a task with `own` work of its tenant before it and with it.

    Others get as much as their weights say while it waits, no more than they have, and no more than their caps let run.
    """
    ahead = Ahead()
    for lane in level.lanes.values():
        if lane.account is not account:
            size, work = len(lane.tasks), lane.work
            most = min(work, own * lane.account.weight / account.weight)
            if lane.account.max_running is not None:
                most = min(most, work * max(0, lane.account.room) / size)
            ahead += Ahead(size * most / work, most)
    return ahead


def _ahead_in_line(line: Line, account: Account, own: float) -> Ahead:
    """What other tenants have in a line before it."""
    ahead = Ahead()
    for level in line.queue.levels:
        if level.priority > account.priority:
            held, held_work = level.held_back()
            ahead += Ahead(level.size - held, level.work - held_work)
        elif level.priority == account.priority:
            ahead += _ahead_in_level(level, account, own)
    return ahead


def _ahead_elsewhere(job: Job, account: Account, own: float, placement: Placement, now: float) -> Ahead:
    """What goes before it in other lines, its own tenant's included, as far as they go to the same endpoints."""
    mine = {one.id for one in placement.usable_of(job.route, now)}
    ahead = Ahead()
    for line in placement.lines:
        if line.route == job.route:
            continue
        theirs = placement.usable_of(line.route, now)
        common = sum(one.slots for one in theirs if one.id in mine)
        if not common:
            continue
        part = common / sum(one.slots for one in theirs)
        found = _ahead_in_line(line, account, own)
        for level in line.queue.levels:
            lane = level.lanes.get(account.name)
            for task in lane.tasks if lane is not None else ():
                if task.job.submitted_at > job.submitted_at:
                    break
                found += Ahead(1, task.job.cost)
        ahead += Ahead(found.tasks * part, found.work * part)
    return ahead


class _Standing(msgspec.Struct, frozen=True):
    """A job's `waiting` tasks, and what of its tenant's own lane is `before` them."""

    waiting: int
    before: Ahead


def estimate_of(job: Job, placement: Placement, now: float, *, arriving: bool = False) -> JobEstimate:
    """Where a job stands. `arriving`: it is not in line yet, and would stand last of its tenant's."""
    if arriving:
        return _estimate(job, placement, now, _Standing(len(job.tasks), _of_lane(_lane_of(job, placement), None)))
    waiting = [task for task in job.tasks if not task.started]
    if not waiting:
        return _estimate_of_running(job, now)
    if all(task.place is None for task in waiting):
        # a second try goes before all lines
        pace = pace_of(placement.usable_of(job.route, now), now)
        if pace is None:
            return JobEstimate(0, None, None)
        wait = pace.through(Ahead())
        return JobEstimate(0, wait, wait + pace.mean_seconds(job.cost))
    return _estimate(job, placement, now, _Standing(len(waiting), _of_lane(_lane_of(job, placement), job)))


def _lane_of(job: Job, placement: Placement) -> Lane | None:
    line = placement.lines.find(job.route)
    levels = line.queue.levels if line is not None else ()
    return next((level.lanes.get(job.tenant.name) for level in levels if level.priority == job.tenant.priority), None)


def _of_lane(lane: Lane | None, until: Job | None) -> Ahead:
    """What stands in a lane before a job (None: all of it)."""
    if lane is None:
        return Ahead()
    if until is None:
        return Ahead(len(lane.tasks), lane.work)
    tasks, work = 0, 0.0
    for task in lane.tasks:
        if task.job is until:
            break
        tasks += 1
        work += task.job.cost
    return Ahead(tasks, work)


def _estimate_of_running(job: Job, now: float) -> JobEstimate:
    batches = [task.batch for task in job.tasks if task.batch is not None and not job.is_over]
    if any(batch.expected_seconds is None for batch in batches):
        return JobEstimate(0, 0.0, None)
    return JobEstimate(0, 0.0, max([0.0, *(batch.expected_end - now for batch in batches)]))


def _estimate(job: Job, placement: Placement, now: float, standing: _Standing) -> JobEstimate:
    account = placement.lines.account(job.tenant)
    own = standing.before.work + job.cost
    line = placement.lines.find(job.route)
    others = Ahead() if line is None else _ahead_in_line(line, account, own)
    if len(placement.lines) > (line is not None):
        others += _ahead_elsewhere(job, account, own, placement, now)
    position = round(standing.before.tasks + others.tasks)
    pace = pace_of(placement.usable_of(job.route, now), now)
    if pace is None:
        return JobEstimate(position, None, None)
    wait = max(pace.through(standing.before + others), wait_for_room(account, standing.before, pace, now))
    rest = (standing.waiting - 1) * job.cost / pace.rate(job.cost)
    last = pace.least_seconds(job.cost) if placement.by_work else pace.mean_seconds(job.cost)
    return JobEstimate(position, wait, wait + rest + last)


def wait_for_room(account: Account, before: Ahead, pace: Pace, now: float) -> float:
    """How long the tenant's own cap makes it wait, with so much of its own before it; 0.0 without a cap."""
    if account.max_running is None or (account.room > 0 and not before.tasks):
        return 0.0
    wait = 0.0
    if account.room <= 0:
        ends = [task.batch.expected_end - now for task in account.running if task.batch is not None]
        wait = max(0.0, min(ends, default=0.0))
    if before.tasks:
        rate = pace.rate(before.work / before.tasks) * min(1.0, account.max_running / pace.slots)
        wait += before.work / rate
    return wait


def wait_seconds(placement: Placement, route: Route | None, now: float) -> float:
    """Seconds until what waits now has probably started, for one route or the slowest of all; 1 s at least."""
    waits = [UNKNOWN_SECONDS]
    for line in placement.lines:
        if route is not None and line.route != route:
            continue
        endpoints = placement.usable_of(line.route, now)
        pace = pace_of(endpoints, now)
        if pace is not None:
            waits.append(pace.through(Ahead(line.queue.size, line.queue.work)))
        else:
            waits.append(UNKNOWN_SECONDS * line.queue.size / max(1, sum(one.slots for one in endpoints)))
    return max(waits)


# the whole picture


def snapshot_of(placement: Placement, queued: int, running: Iterable[Batch], now: float) -> SchedulerSnapshot:
    """A frozen picture of the scheduler. It costs time by tenants, endpoints and calls, not by what waits."""
    in_flight: dict[str, int] = {}
    drawn: dict[str, int] = {}
    tenants: dict[str, Tenant] = {}
    count = 0
    for batch in running:
        count += 1
        in_flight[batch.backend] = in_flight.get(batch.backend, 0) + len(batch.tasks)
        for task in batch.tasks:
            tenant = task.job.tenant
            tenants[tenant.name] = tenant
            if not batch.is_hedge and not task.job.is_over:
                drawn[tenant.name] = drawn.get(tenant.name, 0) + 1
    oldest = [head.job.submitted_at for line in placement.lines if (head := line.queue.oldest()) is not None]
    return SchedulerSnapshot(
        queued=queued,
        running=count,
        work=placement.lines.work,
        oldest_seconds=now - min(oldest) if oldest else 0.0,
        endpoints=tuple(endpoint.snapshot(now) for endpoint in placement.fleet),
        backends=_by_backend(placement, in_flight, now),
        tenants=_by_tenant(placement, tenants, drawn, now),
    )


def _by_backend(placement: Placement, in_flight: dict[str, int], now: float) -> tuple[BackendQueue, ...]:
    found: list[BackendQueue] = []
    for name in dict.fromkeys(endpoint.backend for endpoint in placement.fleet):
        lines = [line for line in placement.lines if name in line.models]
        waiting = Ahead(sum(line.queue.size for line in lines), sum(line.queue.work for line in lines))
        oldest = [head.job.submitted_at for line in lines if (head := line.queue.oldest()) is not None]
        # the other backends on a line's route help with it
        fleets = [placement.usable_of(line.route, now) for line in lines]
        fleets.append([one for one in placement.fleet if one.backend == name and one.is_usable(now)])
        distinct = {id(one): one for one in fleets}  # lines of one pool have one list
        paces = [pace for one in distinct.values() if (pace := pace_of(one, now)) is not None]
        found.append(
            BackendQueue(
                backend=name,
                depth=int(waiting.tasks),
                running=in_flight.get(name, 0),
                work=waiting.work,
                oldest_seconds=now - min(oldest) if oldest else 0.0,
                eta_seconds=min([pace.through(waiting) for pace in paces], default=None),
            )
        )
    return tuple(found)


def _by_tenant(
    placement: Placement, tenants: dict[str, Tenant], drawn: dict[str, int], now: float
) -> tuple[TenantQueue, ...]:
    """Those who have something waiting or running."""
    lanes: dict[str, list[Lane]] = {name: [] for name in tenants}
    for line in placement.lines:
        for level in line.queue.levels:
            for lane in level.lanes.values():
                lanes.setdefault(lane.account.name, []).append(lane)
                tenants[lane.account.name] = next(iter(lane.tasks)).job.tenant
    found: list[TenantQueue] = []
    for name, theirs in lanes.items():
        account = placement.lines.account(tenants[name])
        arrived = [next(iter(lane.tasks)).job.submitted_at for lane in theirs]
        # what goes before whom is a question of everybody to everybody
        waits = [_wait_of_the_last(lane, placement, now) if len(lanes) <= MOST_ETAS else None for lane in theirs]
        known = [wait for wait in waits if wait is not None]
        found.append(
            TenantQueue(
                tenant=name,
                priority=account.priority,
                weight=account.weight,
                max_running=account.max_running,
                depth=account.waiting,
                running=drawn.get(name, 0),
                work=account.work,
                oldest_seconds=now - min(arrived) if arrived else 0.0,
                eta_seconds=max(known, default=0.0) if len(known) == len(waits) else None,
            )
        )
    return tuple(found)


def _wait_of_the_last(lane: Lane, placement: Placement, now: float) -> float | None:
    job = next(reversed(lane.tasks)).job
    before = Ahead(len(lane.tasks) - 1, lane.work - job.cost)
    return _estimate(job, placement, now, _Standing(1, before)).wait_seconds


def _free(one: Stand) -> float:
    return one.free
