"""How long it will take: positions, waits and ends, from what waits, what runs, and the speeds that were learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from img_serving.domain.jobs import Batch, Job, Route
from img_serving.domain.tenants import Tenant
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.fair_queue import Lane, Level, Share
from img_serving.policy.lines import Line
from img_serving.policy.placement import Placement
from img_serving.policy.snapshots import BackendQueue, JobEstimate, SchedulerSnapshot, TenantQueue

PACE_SECONDS = 0.5
MAX_PACES = 1024

UNKNOWN_SECONDS = 1.0
"""A task is taken to need so long where nothing was measured, for those who must be told something."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What some endpoints do together.

    `rate` megapixel-steps a second, `slots` calls at a time, `begun_seconds` until a slot is free on average, and whether
    one is `idle` now.
    """

    rate: float
    slots: int
    begun_seconds: float
    idle: bool

    def through(self, work: float) -> float:
        """Seconds until `work` has been started, behind what runs."""
        return self.begun_seconds + work / self.rate if work or not self.idle else 0.0

    def one(self, cost: float) -> float:
        """Seconds that one task of `cost` takes on an average slot."""
        return cost * self.slots / self.rate


def pace_of(endpoints: Sequence[EndpointState], cost: float, now: float) -> Pace | None:
    """The pace at tasks of `cost`; None where no endpoint was measured. One that was not counts as the average one does."""
    rate = begun = 0.0
    slots = measured = 0
    idle = False
    for one in endpoints:
        slots += one.slots
        idle = idle or one.in_flight < one.slots
        if one.speed.per_unit is None:
            continue
        # full batches, as there are while many wait
        unit = one.speed.per_unit + one.speed.overhead / (cost * one.max_batch_size)
        rate += one.slots / unit
        begun += max(0.0, one.expected_free - now) * one.slots / unit
        measured += one.slots
    if not measured:
        return None
    return Pace(rate * slots / measured, slots, begun / rate, idle)


def recent_pace(placement: Placement, job: Job, now: float) -> Pace | None:
    """The pace of a job's route, at most `PACE_SECONDS` old: it is asked for with every job that arrives."""
    until, known = placement.paces.get(job.route, (float("-inf"), None))
    pace: Pace | None = known
    if now >= until:
        if len(placement.paces) >= MAX_PACES:
            placement.paces.clear()
        pace = pace_of(placement.usable_of(job.route, now), job.cost, now)
        placement.paces[job.route] = (now + PACE_SECONDS, pace)
    return pace


def ahead_in_level(level: Level, share: Share, own: float) -> tuple[float, float]:
    """(tasks, work) of a level that go before a tenant's task which has `own` work of the tenant before it and with it.

    Others get as much as their weights say while it waits, and no more than they have.
    """
    tasks = work = 0.0
    for lane in level.lanes.values():
        if lane.share is share:
            continue
        part = min(lane.work, own * lane.share.weight / share.weight)
        work += part
        tasks += len(lane.tasks) * part / lane.work if lane.work else 0.0
    return tasks, work


def ahead_in_line(line: Line, share: Share, own: float) -> tuple[float, float]:
    """(tasks, work) of other tenants in a line that go before it."""
    tasks = work = 0.0
    for level in line.queue.levels:
        if level.priority > share.priority:
            tasks += level.size
            work += level.work
        elif level.priority == share.priority:
            more_tasks, more_work = ahead_in_level(level, share, own)
            tasks += more_tasks
            work += more_work
    return tasks, work


def ahead_elsewhere(route: Route, share: Share, own: float, placement: Placement, now: float) -> tuple[float, float]:
    """(tasks, work) in other lines that go before it, as far as they go to the same endpoints."""
    mine = {one.id for one in placement.usable_of(route, now)}
    tasks = work = 0.0
    for line in placement.lines:
        if line.route == route:
            continue
        theirs = placement.usable_of(line.route, now)
        common = sum(one.slots for one in theirs if one.id in mine)
        if not common:
            continue
        part = common / sum(one.slots for one in theirs)
        more_tasks, more_work = ahead_in_line(line, share, own)
        tasks += more_tasks * part
        work += more_work * part
    return tasks, work


def estimate_of(job: Job, placement: Placement, now: float, *, arriving: bool = False) -> JobEstimate:
    """Where a job stands. `arriving`: it is not in line yet, and would stand last of its tenant's."""
    waiting = len(job.tasks) if arriving else sum(not task.started for task in job.tasks)
    if not waiting:
        return _estimate_of_running(job, now)
    lane = _lane_of(job, placement)
    before, work = 0, 0.0
    for task in lane.tasks if lane is not None else ():
        if not arriving and task.job is job:
            break
        before += 1
        work += task.job.cost
    return _estimate(job, placement, now, _Standing(waiting, before, work))


def _lane_of(job: Job, placement: Placement) -> Lane | None:
    line = placement.lines.find(job.route)
    levels = line.queue.levels if line is not None else ()
    return next((level.lanes.get(job.tenant.name) for level in levels if level.priority == job.tenant.priority), None)


def _estimate_of_running(job: Job, now: float) -> JobEstimate:
    batches = [task.batch for task in job.tasks if task.batch is not None and not job.is_over]
    if any(batch.expected_seconds is None for batch in batches):
        return JobEstimate(0, 0.0, None)
    return JobEstimate(0, 0.0, max([0.0, *(batch.expected_end - now for batch in batches)]))


@dataclass(frozen=True, slots=True)
class _Standing:
    """A job's `waiting` tasks, and the tasks and work of its tenant's lane that are `before` them."""

    waiting: int
    before: int
    work: float


def _estimate(job: Job, placement: Placement, now: float, standing: _Standing) -> JobEstimate:
    share = placement.lines.shares.of(job.tenant)
    own = standing.work + job.cost
    line = placement.lines.find(job.route)
    tasks, work = ahead_in_line(line, share, own) if line is not None else (0.0, 0.0)
    if len(placement.lines) > (line is not None):
        more_tasks, more_work = ahead_elsewhere(job.route, share, own, placement, now)
        tasks += more_tasks
        work += more_work
    position = standing.before + round(tasks)
    pace = pace_of(placement.usable_of(job.route, now), job.cost, now)
    if pace is None:
        return JobEstimate(position, None, None)
    wait = max(pace.through(standing.work + work), _wait_for_room(share, standing.work, pace, now))
    rest = (standing.waiting - 1) * job.cost / pace.rate
    return JobEstimate(position, wait, wait + rest + pace.one(job.cost))


def _wait_for_room(share: Share, before: float, pace: Pace, now: float) -> float:
    """How long the tenant's own cap makes it wait, with so much of its own work before it."""
    if share.max_running is None or (share.room > 0 and not before):
        return 0.0
    ends = [task.batch.expected_end - now for task in share.running if task.batch is not None]
    rate = pace.rate * min(1.0, share.max_running / pace.slots)
    return (max(0.0, min(ends, default=0.0)) if share.room <= 0 else 0.0) + before / rate


def wait_by_cap(job: Job, share: Share, pace: Pace, now: float) -> float:
    """Seconds until the job is done if its tenant's own cap were all that holds it up; 0.0 without a cap."""
    if share.max_running is None:
        return 0.0
    rate = pace.rate * min(1.0, share.max_running / pace.slots)
    return _wait_for_room(share, share.work, pace, now) + (len(job.tasks) - 1) * job.cost / rate + pace.one(job.cost)


def wait_seconds(placement: Placement, route: Route | None, now: float) -> float:
    """Seconds until what waits now has probably started, for one route or the slowest of all; 1 s at least."""
    waits = [UNKNOWN_SECONDS]
    for line in placement.lines:
        if route is not None and line.route != route:
            continue
        endpoints = placement.usable_of(line.route, now)
        pace = pace_of(endpoints, line.queue.work / line.queue.size, now)
        if pace is not None:
            waits.append(pace.through(line.queue.work))
        else:
            waits.append(UNKNOWN_SECONDS * line.queue.size / max(1, sum(one.slots for one in endpoints)))
    return max(waits)


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
        depth = sum(line.queue.size for line in lines)
        work = sum(line.queue.work for line in lines)
        oldest = [task.job.submitted_at for line in lines if (task := line.queue.oldest()) is not None]
        # the other backends on a line's route help with it
        fleets = [placement.usable_of(line.route, now) for line in lines]
        fleets.append([one for one in placement.fleet if one.backend == name and one.is_usable(now)])
        paces = [pace for one in fleets if (pace := pace_of(one, work / depth if depth else 1.0, now)) is not None]
        found.append(
            BackendQueue(
                backend=name,
                depth=depth,
                running=in_flight.get(name, 0),
                work=work,
                oldest_seconds=now - min(oldest) if oldest else 0.0,
                eta_seconds=max(paces, key=lambda pace: pace.rate).through(work) if paces else None,
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
                lanes.setdefault(lane.share.name, []).append(lane)
                tenants[lane.share.name] = next(iter(lane.tasks)).job.tenant
    found: list[TenantQueue] = []
    for name, theirs in lanes.items():
        share = placement.lines.shares.of(tenants[name])
        arrived = [next(iter(lane.tasks)).job.submitted_at for lane in theirs]
        waits = [_wait_of_the_last(lane, placement, now) for lane in theirs]
        known = [wait for wait in waits if wait is not None]
        found.append(
            TenantQueue(
                tenant=name,
                priority=share.priority,
                weight=share.weight,
                max_running=share.max_running,
                depth=share.waiting,
                running=drawn.get(name, 0),
                work=share.work,
                oldest_seconds=now - min(arrived) if arrived else 0.0,
                eta_seconds=max(known, default=0.0) if len(known) == len(waits) else None,
            )
        )
    return tuple(found)


def _wait_of_the_last(lane: Lane, placement: Placement, now: float) -> float | None:
    job = next(reversed(lane.tasks)).job
    return _estimate(job, placement, now, _Standing(1, len(lane.tasks) - 1, lane.work - job.cost)).wait_seconds
