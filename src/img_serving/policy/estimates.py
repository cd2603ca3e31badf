"""How long it will take: positions, waits and ends, from what waits, what runs, and the speeds that were learned."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from img_serving.domain.jobs import Batch, Job, Route
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.fair_queue import Level, Share
from img_serving.policy.lines import Line
from img_serving.policy.placement import Placement
from img_serving.policy.snapshots import BackendQueue, JobEstimate, SchedulerSnapshot, TenantQueue

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
    lines = placement.lines
    endpoints = placement.usable_of(job.route, now)
    pace = pace_of(endpoints, job.cost, now)
    waiting = len(job.tasks) if arriving else sum(not task.started for task in job.tasks)
    if not waiting:
        ends = [
            max(batch.expected_end, now) - now
            for task in job.tasks
            if (batch := task.batch) is not None and not job.is_over
        ]
        return JobEstimate(0, 0.0, max(ends, default=0.0) if pace is not None or not ends else None)
    share = lines.shares.of(job.tenant)
    line = lines.find(job.route)
    before_tasks = 0
    before = 0.0
    if line is not None:
        lane = next(
            (level.lanes.get(share.name) for level in line.queue.levels if level.priority == share.priority), None
        )
        for task in lane.tasks if lane is not None else ():
            if not arriving and task.job is job:
                break
            before_tasks += 1
            before += task.job.cost
    own = before + job.cost
    tasks, work = ahead_in_line(line, share, own) if line is not None else (0.0, 0.0)
    if len(lines) > (line is not None):
        more_tasks, more_work = ahead_elsewhere(job.route, share, own, placement, now)
        tasks += more_tasks
        work += more_work
    position = before_tasks + round(tasks)
    if pace is None:
        return JobEstimate(position, None, None)
    wait = max(pace.through(before + work), _wait_for_room(share, before, pace))
    rest = (waiting - 1) * job.cost / pace.rate
    return JobEstimate(position, wait, wait + rest + pace.one(job.cost))


def _wait_for_room(share: Share, before: float, pace: Pace) -> float:
    """How long the tenant's own cap makes it wait."""
    if share.max_running is None or (share.room > 0 and not before):
        return 0.0
    rate = pace.rate * min(1.0, share.max_running / pace.slots)
    return (pace.begun_seconds if share.room <= 0 else 0.0) + before / rate


def wait_by_cap(job: Job, share: Share, pace: Pace) -> float:
    """Seconds until the job is done if its tenant's own cap were all that holds it up; 0.0 without a cap."""
    if share.max_running is None:
        return 0.0
    rate = pace.rate * min(1.0, share.max_running / pace.slots)
    return _wait_for_room(share, share.work, pace) + (len(job.tasks) - 1) * job.cost / rate + pace.one(job.cost)


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


def snapshot_of(
    placement: Placement, jobs: Collection[Job], queued: int, running: Iterable[Batch], now: float
) -> SchedulerSnapshot:
    """A frozen picture of the scheduler."""
    waiting_since = [job.submitted_at for job in jobs if job.started_at is None]
    in_flight: dict[str, int] = {}
    drawn: dict[str, int] = {}
    count = 0
    for batch in running:
        count += 1
        in_flight[batch.backend] = in_flight.get(batch.backend, 0) + len(batch.tasks)
        for task in batch.tasks:
            name = task.job.tenant.name
            if not batch.is_hedge and not task.job.is_over:
                drawn[name] = drawn.get(name, 0) + 1
    return SchedulerSnapshot(
        queued=queued,
        running=count,
        work=placement.lines.work,
        oldest_seconds=now - min(waiting_since) if waiting_since else 0.0,
        endpoints=tuple(endpoint.snapshot(now) for endpoint in placement.fleet),
        backends=_by_backend(placement, in_flight, now),
        tenants=_by_tenant(placement, jobs, drawn, now),
    )


def _by_backend(placement: Placement, in_flight: dict[str, int], now: float) -> tuple[BackendQueue, ...]:
    names = dict.fromkeys(endpoint.backend for endpoint in placement.fleet)
    found: list[BackendQueue] = []
    for name in names:
        lines = [line for line in placement.lines if name in line.models]
        size = sum(line.queue.size for line in lines)
        work = sum(line.queue.work for line in lines)
        oldest = [task.job.submitted_at for line in lines if (task := line.queue.oldest()) is not None]
        endpoints = [one for one in placement.fleet if one.backend == name and one.is_usable(now)]
        pace = pace_of(endpoints, work / size if size else 1.0, now)
        # the others on the routes help
        helpers = [placement.usable_of(line.route, now) for line in lines]
        paces = [one for some in helpers if (one := pace_of(some, work / size, now)) is not None]
        best = max(paces, key=lambda one: one.rate, default=pace)
        found.append(
            BackendQueue(
                backend=name,
                waiting=size,
                running=in_flight.get(name, 0),
                work=work,
                oldest_seconds=now - min(oldest) if oldest else 0.0,
                eta_seconds=best.through(work) if best is not None else None,
            )
        )
    return tuple(found)


def _by_tenant(placement: Placement, jobs: Iterable[Job], drawn: dict[str, int], now: float) -> tuple[TenantQueue, ...]:
    last: dict[str, Job] = {}
    oldest: dict[str, float] = {}
    tenants: dict[str, Job] = {}
    waiting: dict[str, int] = {}
    for job in jobs:
        name = job.tenant.name
        tenants[name] = job
        count = sum(not task.started for task in job.tasks)
        if count:
            waiting[name] = waiting.get(name, 0) + count
            last[name] = job
            oldest.setdefault(name, job.submitted_at)
    found: list[TenantQueue] = []
    for name, job in tenants.items():
        share = placement.lines.shares.of(job.tenant)
        estimate = estimate_of(last[name], placement, now) if name in last else None
        found.append(
            TenantQueue(
                tenant=name,
                priority=share.priority,
                weight=share.weight,
                max_running=share.max_running,
                waiting=waiting.get(name, 0),
                running=drawn.get(name, 0),
                work=share.work,
                oldest_seconds=now - oldest[name] if name in oldest else 0.0,
                eta_seconds=0.0 if estimate is None else estimate.wait_seconds,
            )
        )
    return tuple(found)
