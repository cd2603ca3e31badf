"""The tasks that wait for one route, in the order in which they should be served: by priority, and fairly inside one.

Fairness is by virtual time (start-time fair queueing, Goyal et al., 1996): every tenant has a clock that each task served
moves on by its cost over the tenant's weight, and the tenant whose clock is furthest behind goes next. It bounds how far
two backlogged tenants can drift apart by one task each, as deficit round robin does, but nobody waits for a quantum of
somebody else's, and lines of several models on the same backends share one clock a tenant. A tenant that comes back starts
at the clock of who is being served: being away saves nothing up. Clocks belong to a pool of backends (`lines.Pool`): what
somebody had of engines that others do not use is no reason to make them wait.

Between priorities ages count: a priority rises by one for every `ageing_seconds` that its oldest task has waited.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count, islice

from img_serving.domain.jobs import Job, Task
from img_serving.domain.tenants import Tenant

_numbers = count()

MOST_PASSES = 8
"""So often the first task of a lane may be passed by others of it that fit into somebody's batch: they move its tenant's clock
on, and without a bound its turn would never come."""

DEAD_LANES = 64
"""So many lanes without tasks may stand in a heap before it is swept."""


class Account:
    """One tenant over all lines: its cap, what it has running, and what it has waiting."""

    __slots__ = ("max_running", "name", "parked", "priority", "running", "waiting", "weight", "work")

    def __init__(self, tenant: Tenant) -> None:
        self.name = tenant.name
        self.weight = tenant.weight
        self.priority = tenant.priority
        self.max_running = tenant.max_running
        self.running: dict[Task, None] = {}
        """Its tasks that are drawn; kept only for a tenant with a cap."""
        self.waiting = 0
        self.work = 0.0
        self.parked: dict[Lane, None] = {}
        """Lanes that stand aside while the tenant is at its cap."""

    @property
    def room(self) -> int:
        """How many more of its tasks may run."""
        return 1 << 30 if self.max_running is None else self.max_running - len(self.running)

    def started(self, task: Task) -> None:
        """A task of a tenant with a cap runs."""
        self.running[task] = None

    def ended(self, task: Task) -> None:
        """It does not any more: lanes that stood aside because of the cap come back."""
        self.running.pop(task, None)
        if self.parked and self.room > 0:
            parked, self.parked = self.parked, {}
            for lane in parked:
                lane.level.list_lane(lane)


class Clock:
    """How much a tenant has had in one pool: cost over weight, and when it last had a turn."""

    __slots__ = ("turn", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.turn = 0
        """Number of its last turn: who had none for longest goes first among equals."""


class Lane:
    """The tasks of one tenant in one line, first come first served."""

    __slots__ = ("account", "clock", "level", "listed", "number", "passed", "tasks", "work")

    def __init__(self, level: Level, account: Account, clock: Clock) -> None:
        self.level = level
        self.account = account
        self.clock = clock
        self.tasks: OrderedDict[Task, None] = OrderedDict()
        self.work = 0.0
        self.number = next(_numbers)
        self.listed = False
        self.passed = 0
        """How often others of the lane went before its first task, in somebody's company."""

    @property
    def head(self) -> Task:
        """Its first task; it has one."""
        return next(iter(self.tasks))


class Level:
    """The lanes of one priority in one line."""

    __slots__ = ("_arrivals", "_capped", "_heap", "lanes", "priority", "size", "work")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.lanes: dict[str, Lane] = {}
        self._capped: dict[Lane, None] = {}
        """The lanes of tenants with a cap."""
        self.size = 0
        self.work = 0.0
        self._heap: list[tuple[float, int, int, Lane]] = []
        self._arrivals: deque[Task] = deque()

    def push(self, task: Task, account: Account, clock: Clock) -> None:
        """Stand last in the tenant's lane."""
        lane = self.lanes.get(account.name)
        if lane is None:
            lane = self.lanes[account.name] = Lane(self, account, clock)
            if account.max_running is not None:
                self._capped[lane] = None
        cost = task.job.cost
        lane.tasks[task] = None
        lane.work += cost
        self.size += 1
        self.work += cost
        task.place = lane
        self._arrivals.append(task)
        self.list_lane(lane)

    def remove(self, task: Task) -> None:
        """Leave the line, from wherever in it."""
        cost = task.job.cost
        lane: Lane = task.place
        task.place = None
        del lane.tasks[task]
        lane.work -= cost
        self.size -= 1
        self.work -= cost
        if not lane.tasks:
            lane.work = 0.0
            lane.account.parked.pop(lane, None)
            self._capped.pop(lane, None)
            del self.lanes[lane.account.name]
            if len(self._heap) > DEAD_LANES + 2 * len(self.lanes):
                self._heap = [entry for entry in self._heap if entry[3].tasks]
                heapify(self._heap)
        if not self.size:
            self.work = 0.0
        if len(self._arrivals) > DEAD_LANES + 2 * self.size:
            self._arrivals = deque(one for one in self._arrivals if one.place is not None)

    def list_lane(self, lane: Lane) -> None:
        """Take part in the order, or stand aside while the tenant is at its cap."""
        if lane.listed or not lane.tasks:
            return
        if lane.account.room <= 0:
            lane.account.parked[lane] = None
            return
        lane.listed = True
        heappush(self._heap, (lane.clock.value, lane.clock.turn, lane.number, lane))

    def oldest(self) -> Task | None:
        """The task that has waited longest."""
        arrivals = self._arrivals
        while arrivals and arrivals[0].place is None:
            arrivals.popleft()
        return arrivals[0] if arrivals else None

    def oldest_that_may_run(self) -> Task | None:
        """The task that has waited longest of those whose tenant is not at its cap."""
        oldest = self.oldest()
        if oldest is None or oldest.place.account.room > 0:
            return oldest
        heads = [lane.head for lane in self.lanes.values() if lane.account.room > 0]
        return min(heads, key=_arrival, default=None)

    def arrived_until(self, moment: float) -> Iterator[Job]:
        """The jobs of the tasks that came at `moment` or before, oldest first."""
        for task in self._arrivals:
            if task.job.submitted_at > moment:
                return
            if task.place is not None:
                yield task.job

    def held_back(self) -> tuple[int, float]:
        """(tasks, work) that tenants' caps keep from starting now."""
        tasks = 0
        work = 0.0
        for lane in self._capped:
            room = max(0, lane.account.room)
            if room < len(lane.tasks):
                tasks += len(lane.tasks) - room
                work += lane.work - sum(task.job.cost for task in islice(lane.tasks, room))
        return tasks, work

    def head(self) -> Task | None:
        """The task whose turn it is; None where every tenant is at its cap."""
        heap = self._heap
        while heap:
            value, turn, _, lane = heap[0]
            clock = lane.clock
            if not lane.tasks:
                lane.listed = False
                heappop(heap)
            elif lane.account.room <= 0:
                lane.listed = False
                heappop(heap)
                self.list_lane(lane)
            elif value != clock.value or turn != clock.turn:
                heapreplace(heap, (clock.value, clock.turn, lane.number, lane))
            else:
                return lane.head
        return None

    def order(self) -> Iterator[Task]:
        """The tasks in the order in which they would be served, if nothing else came. The level must not change meanwhile."""
        head = self.head()
        if head is None:
            return
        yield head
        if len(self._heap) == 1:
            lane = self._heap[0][3]
            yield from islice(lane.tasks, 1, min(len(lane.tasks), lane.account.room))
            return
        # what would follow: the clocks run on in a copy
        heap: list[tuple[float, int, int, Lane]] = list(self._heap)
        first = heap[0][3]
        served = {first.number: islice(first.tasks, 1, min(len(first.tasks), first.account.room))}
        turn = 1 << 60
        heapreplace(heap, (first.clock.value + head.job.cost / first.account.weight, turn, first.number, first))
        while heap:
            value, _, number, lane = heap[0]
            tasks = served.get(number)
            if tasks is None:
                clock = lane.clock
                if clock.value > value:
                    heapreplace(heap, (clock.value, clock.turn, number, lane))
                    continue
                tasks = served[number] = islice(lane.tasks, max(0, lane.account.room))
            task = next(tasks, None)
            if task is None:
                heappop(heap)
                continue
            yield task
            turn += 1
            heapreplace(heap, (value + task.job.cost / lane.account.weight, turn, number, lane))


Urgency = Mapping[int, float]
"""Priorities with what their oldest task's wait adds; see `urgencies`."""

Rank = tuple[float, int, float, int, float]
"""By urgency (the lower priority first among equals: it has waited for that), then the tenant's clock, then who had no turn for
longest; one tenant's own tasks by their arrival."""


class FairQueue:
    """The tasks that wait for one route."""

    __slots__ = ("_levels", "size", "work")

    def __init__(self) -> None:
        self._levels: list[Level] = []
        self.size = 0
        self.work = 0.0

    def __len__(self) -> int:
        return self.size

    @property
    def levels(self) -> tuple[Level, ...]:
        """The priorities that have tasks, the highest first."""
        return tuple(level for level in self._levels if level.size)

    def push(self, task: Task, account: Account, clock: Clock) -> None:
        """Stand last in the tenant's lane of its priority."""
        for level in self._levels:
            if level.priority == account.priority:
                break
        else:
            level = Level(account.priority)
            self._levels.append(level)
            self._levels.sort(key=lambda one: -one.priority)
        level.push(task, account, clock)
        self.size += 1
        self.work += task.job.cost

    def remove(self, task: Task) -> None:
        """Leave the line, from wherever in it."""
        task.place.level.remove(task)
        self.size -= 1
        self.work = self.work - task.job.cost if self.size else 0.0

    def may_run(self) -> tuple[int, float]:
        """(tasks, work) that no tenant's cap keeps from starting now."""
        tasks, work = self.size, self.work
        for level in self.levels:
            held, held_work = level.held_back()
            tasks -= held
            work -= held_work
        return tasks, max(0.0, work)

    def head(self, urgency: Urgency | None = None) -> Task | None:
        """Whose turn it is; None where nobody waits or all who do are at their caps."""
        for level in self._ranked(urgency):
            task = level.head()
            if task is not None:
                return task
        return None

    def rank(self, urgency: Urgency | None = None) -> Rank:
        """Where this line's next task stands among those of other lines of its pool: the lowest goes first."""
        task = self.head(urgency)
        if task is None:
            return float("inf"), 0, 0.0, 0, 0.0
        lane: Lane = task.place
        priority = lane.account.priority
        level = priority if urgency is None else urgency.get(priority, priority)
        return -level, priority, lane.clock.value, lane.clock.turn, task.job.submitted_at

    def order(self, urgency: Urgency | None = None) -> Iterator[Task]:
        """The tasks in the order in which they would be served now. The queue must not change meanwhile."""
        levels = self._levels
        if len(levels) == 1:
            return levels[0].order()
        return (task for level in self._ranked(urgency) for task in level.order())

    def oldest(self) -> Task | None:
        """The task that has waited longest."""
        tasks = [task for level in self._levels if (task := level.oldest()) is not None]
        return min(tasks, key=_arrival, default=None)

    def _ranked(self, urgency: Urgency | None) -> list[Level]:
        levels = self._levels
        if len(levels) < 2 or urgency is None:
            return levels
        return sorted(levels, key=lambda level: (-urgency.get(level.priority, level.priority), level.priority))


def urgencies(queues: Iterable[FairQueue], now: float, ageing_seconds: float) -> Urgency | None:
    """What each waiting priority counts now: one more for every whole `ageing_seconds` that its oldest task has waited.

    Only tasks that could run count: one that nobody serves, or that its tenant's cap holds back, is not waiting for others.
    It is one figure for all lines, so that between equals the clocks decide and never the age. None where there is nothing
    to compare (one priority), or no ageing (0).
    """
    oldest: dict[int, float] = {}
    for queue in queues:
        for level in queue.levels:
            task = level.oldest_that_may_run()
            arrived = float("inf") if task is None else task.job.submitted_at
            oldest[level.priority] = min(arrived, oldest.get(level.priority, arrived))
    if len(oldest) < 2 or not ageing_seconds:
        return None
    return {
        priority: priority + (max(0.0, now - arrived) // ageing_seconds if arrived < now else 0.0)
        for priority, arrived in oldest.items()
    }


def _arrival(task: Task) -> float:
    return task.job.submitted_at
