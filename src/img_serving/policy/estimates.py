"""How long it will take: positions, waits and ends, from what waits, what runs, and the speeds that were learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from img_serving.domain.jobs import Batch, Job, Route
from img_serving.domain.tenants import Tenant
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.fair_queue import Account, Lane
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

    def times(self, share: float) -> Ahead:
        """A share of it."""
        return self if share == 1.0 else Ahead(self.tasks * share, self.work * share)


NOTHING = Ahead()


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


class _PoolBook(msgspec.Struct):
    """What stands in the lines of one pool, by priority and tenant, and the endpoints that it waits for."""

    usable: list[EndpointState]
    slots: int
    by_priority: dict[int, dict[Account, Ahead]]
    lanes: dict[Account, list[Lane]]


class Book:
    """Who waits for what at one moment, added up once: asking for many jobs must not mean walking all lines each time."""

    def __init__(self, placement: Placement, now: float) -> None:
        self.placement = placement
        self.now = now
        self._paces: dict[int, Pace | None] = {}
        self._pools: list[_PoolBook] = []
        for pool in placement.lines.active:
            usable = placement.usable_of(next(iter(pool.lines)), now)
            found: dict[int, dict[Account, Ahead]] = {}
            lanes: dict[Account, list[Lane]] = {}
            for line in pool.lines.values():
                for level in line.queue.levels:
                    accounts = found.setdefault(level.priority, {})
                    for lane in level.lanes.values():
                        more = Ahead(len(lane.tasks), lane.work)
                        accounts[lane.account] = accounts.get(lane.account, NOTHING) + more
                        lanes.setdefault(lane.account, []).append(lane)
            self._pools.append(_PoolBook(usable, sum(one.slots for one in usable), found, lanes))

    def pace(self, usable: list[EndpointState]) -> Pace | None:
        """The pace of some endpoints, worked out once for each list."""
        if id(usable) not in self._paces:
            self._paces[id(usable)] = pace_of(usable, self.now)
        return self._paces[id(usable)]

    def ahead_of(self, job: Job, standing: _Standing) -> Ahead:
        """What goes before a job: of its tenant's, and of others', as far as they go to the same endpoints."""
        account = self.placement.lines.account(job.tenant)
        usable = self.placement.usable_of(job.route, self.now)
        mine = {one.id for one in usable}
        shared: list[tuple[float, _PoolBook]] = []
        own = standing.before
        for pool in self._pools:
            part = 1.0
            if pool.usable is not usable:
                part = sum(one.slots for one in pool.usable if one.id in mine) / pool.slots if pool.slots else 0.0
            if not part:
                continue
            shared.append((part, pool))
            for lane in pool.lanes.get(account, ()):
                if lane is not standing.lane:
                    own += Ahead(len(lane.tasks), lane.work).times(part * _share_before(lane, job))
        others = NOTHING
        for part, pool in shared:
            for priority, accounts in pool.by_priority.items():
                if priority >= account.priority:
                    for other, theirs in accounts.items():
                        if other is not account:
                            before = _before(other, theirs, account, own.work + job.cost, priority)
                            others += before.times(part)
        return own + others


def _before(other: Account, theirs: Ahead, account: Account, own: float, priority: int) -> Ahead:
    """What another tenant has before a task with `own` work of its own tenant before it and with it.

    Of the same priority as much as the weights say, of a higher one all; never more than there is, or than its cap lets run.
    """
    share = 1.0
    if priority == account.priority and theirs.work:
        share = min(1.0, own * other.weight / account.weight / theirs.work)
    if other.max_running is not None and theirs.tasks:
        share = min(share, max(0, other.room) / theirs.tasks)
    return theirs.times(share)


def _share_before(lane: Lane, job: Job) -> float:
    """How much of a lane came before a job, about: by its first and its last task, as if the others had come evenly."""
    first, last = lane.head.job.submitted_at, next(reversed(lane.tasks)).job.submitted_at
    if job.submitted_at >= last:
        return 1.0
    return max(0.0, (job.submitted_at - first) / (last - first)) if last > first else 0.0


class _Standing(msgspec.Struct, frozen=True):
    """A job's `waiting` tasks, its tenant's `lane`, and what of that is `before` them."""

    waiting: int
    lane: Lane | None
    before: Ahead


def estimate_of(
    job: Job, placement: Placement, now: float, *, arriving: bool = False, book: Book | None = None
) -> JobEstimate:
    """Where a job stands. `arriving`: it is not in line yet, and would stand last of its tenant's.

    `book`: that of this very moment, where many are asked for.
    """
    if not arriving and all(task.started for task in job.tasks):
        return _estimate_of_running(job, now)
    book = book if book is not None else Book(placement, now)
    lane = _lane_of(job, placement)
    if arriving:
        return _estimate(job, book, _Standing(len(job.tasks), lane, _of_lane(lane, None)))
    waiting = [task for task in job.tasks if not task.started]
    if all(task.place is None for task in waiting):
        # a second try goes before all lines
        pace = book.pace(placement.usable_of(job.route, now))
        if pace is None:
            return JobEstimate(0, None, None)
        wait = pace.through(NOTHING)
        return JobEstimate(0, wait, wait + pace.mean_seconds(job.cost))
    return _estimate(job, book, _Standing(len(waiting), lane, _of_lane(lane, job)))


def _lane_of(job: Job, placement: Placement) -> Lane | None:
    line = placement.lines.find(job.route)
    levels = line.queue.levels if line is not None else ()
    return next((level.lanes.get(job.tenant.name) for level in levels if level.priority == job.tenant.priority), None)


def _of_lane(lane: Lane | None, until: Job | None) -> Ahead:
    """What stands in a lane before a job (None: all of it)."""
    if lane is None:
        return NOTHING
    own = 0 if until is None else sum(task in lane.tasks for task in until.tasks)
    if not own:
        return Ahead(len(lane.tasks), lane.work)
    # from both ends at once: who has just been taken stands last, and is told so, however long the line is
    work, work_from_there = 0.0, 0.0
    for passed, (first, last) in enumerate(zip(lane.tasks, reversed(lane.tasks), strict=True)):
        if first.job is until:
            return Ahead(passed, work)
        work += first.job.cost
        work_from_there += last.job.cost
        own -= last.job is until
        if not own:
            return Ahead(len(lane.tasks) - passed - 1, max(0.0, lane.work - work_from_there))
    return Ahead(len(lane.tasks), lane.work)


def _estimate_of_running(job: Job, now: float) -> JobEstimate:
    batches = [task.batch for task in job.tasks if task.batch is not None and not job.is_over]
    if any(batch.expected_seconds is None for batch in batches):
        return JobEstimate(0, 0.0, None)
    return JobEstimate(0, 0.0, max([0.0, *(batch.expected_end - now for batch in batches)]))


def _estimate(job: Job, book: Book, standing: _Standing) -> JobEstimate:
    placement, now = book.placement, book.now
    ahead = book.ahead_of(job, standing)
    position = round(ahead.tasks)
    pace = book.pace(placement.usable_of(job.route, now))
    if pace is None:
        return JobEstimate(position, None, None)
    account = placement.lines.account(job.tenant)
    wait = max(pace.through(ahead), wait_for_room(account, standing.before, pace, now))
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


def snapshot_of(
    placement: Placement, queued: int, running: Iterable[Batch], now: float, *, with_waits: bool
) -> SchedulerSnapshot:
    """A frozen picture of the scheduler. It costs time by tenants, lines, endpoints and calls, not by the tasks that wait.

    `with_waits`: also how long each tenant's last task will wait.
    """
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
        tenants=_by_tenant(Book(placement, now), tenants, drawn, with_waits=with_waits),
    )


def _by_backend(placement: Placement, in_flight: dict[str, int], now: float) -> tuple[BackendQueue, ...]:
    waiting: dict[str, Ahead] = {}
    oldest: dict[str, float] = {}
    fleets: dict[str, dict[int, list[EndpointState]]] = {}
    for line in placement.lines:
        more = Ahead(line.queue.size, line.queue.work)
        head = line.queue.oldest()
        usable = placement.usable_of(line.route, now)
        for name in line.models:
            waiting[name] = waiting.get(name, NOTHING) + more
            # the other backends on a line's route help with it; lines of one pool have one list
            fleets.setdefault(name, {})[id(usable)] = usable
            if head is not None:
                oldest[name] = min(head.job.submitted_at, oldest.get(name, now))
    found: list[BackendQueue] = []
    for name in dict.fromkeys(endpoint.backend for endpoint in placement.fleet):
        ahead = waiting.get(name, NOTHING)
        its_own = [one for one in placement.fleet if one.backend == name and one.is_usable(now)]
        paces = [pace_of(one, now) for one in [*fleets.get(name, {}).values(), its_own]] if its_own else []
        found.append(
            BackendQueue(
                backend=name,
                depth=int(ahead.tasks),
                running=in_flight.get(name, 0),
                work=ahead.work,
                oldest_seconds=now - oldest.get(name, now),
                # nobody waits for a backend that cannot be used
                eta_seconds=min([pace.through(ahead) for pace in paces if pace is not None], default=None),
            )
        )
    return tuple(found)


def _by_tenant(
    book: Book, tenants: dict[str, Tenant], drawn: dict[str, int], *, with_waits: bool
) -> tuple[TenantQueue, ...]:
    """Those who have something waiting or running."""
    placement, now = book.placement, book.now
    oldest: dict[str, float] = {}
    longest: dict[str, Lane] = {}
    for line in placement.lines:
        for level in line.queue.levels:
            for lane in level.lanes.values():
                name, job = lane.account.name, lane.head.job
                tenants[name] = job.tenant
                oldest[name] = min(job.submitted_at, oldest.get(name, now))
                if name not in longest or lane.work > longest[name].work:
                    longest[name] = lane
    found: list[TenantQueue] = []
    for name, tenant in tenants.items():
        account = placement.lines.account(tenant)
        wait: float | None = 0.0
        if name in longest:
            wait = _wait_of_the_last(longest[name], book) if with_waits and len(longest) <= MOST_ETAS else None
        found.append(
            TenantQueue(
                tenant=name,
                priority=account.priority,
                weight=account.weight,
                max_running=account.max_running,
                depth=account.waiting,
                running=drawn.get(name, 0),
                work=account.work,
                oldest_seconds=now - oldest.get(name, now),
                eta_seconds=wait,
            )
        )
    return tuple(found)


def _wait_of_the_last(lane: Lane, book: Book) -> float | None:
    job = next(reversed(lane.tasks)).job
    before = Ahead(len(lane.tasks) - 1, lane.work - job.cost)
    return _estimate(job, book, _Standing(1, lane, before)).wait_seconds


def _free(one: Stand) -> float:
    return one.free
