"""The tasks that wait for one route, in the order in which they should be served: by priority, and fairly inside one.

Fairness is by virtual time (start-time fair queueing, Goyal et al., 1996): every tenant has a clock that each task served
moves on by its cost over the tenant's weight, and the tenant whose clock is furthest behind goes next. It bounds how far
two backlogged tenants can drift apart by one task each, as deficit round robin does, but a tenant's clock is one number that
means the same in every queue (a tenant's tasks stand in as many queues as it asks for routes), and nobody waits for a quantum
of somebody else's. A tenant that comes back starts at the clock of who is being served: being away saves nothing up.

Between priorities ages count: a priority rises by one for every `ageing_seconds` that its oldest task has waited.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from heapq import heappop, heappush, heapreplace
from itertools import count, islice

from img_serving.domain.jobs import Job, Task
from img_serving.domain.tenants import Tenant

_numbers = count()


class Share:
    """What one tenant has had, over all queues: its clock, its running tasks, and what it has waiting."""

    __slots__ = ("clock", "max_running", "name", "parked", "priority", "running", "turn", "waiting", "weight", "work")

    def __init__(self, tenant: Tenant) -> None:
        self.name = tenant.name
        self.weight = tenant.weight
        self.priority = tenant.priority
        self.max_running = tenant.max_running
        self.clock = 0.0
        self.turn = 0
        """Number of its last turn: who had none for longest goes first among equals."""
        self.running: dict[Task, None] = {}
        """Its tasks that are drawn; kept only for a tenant with a cap."""
        self.waiting = 0
        self.work = 0.0
        self.parked: list[Lane] = []
        """Lanes that left their level's heap while the tenant was at its cap."""

    @property
    def room(self) -> int:
        """How many more of its tasks may run."""
        return 1 << 30 if self.max_running is None else self.max_running - len(self.running)


class Shares:
    """The tenants' shares, and the clock of each priority: that of whoever was served last."""

    def __init__(self) -> None:
        self._by_name: dict[str, Share] = {}
        self._clocks: dict[int, float] = {}
        self._turns = 0
        self.waiting: dict[int, int] = {}
        """Tasks that wait, by priority; those that nobody waits in are left out."""

    def of(self, tenant: Tenant) -> Share:
        """The tenant's share, made at the first question; weight, priority and cap are those of the newest."""
        share = self._by_name.get(tenant.name)
        if share is None:
            share = self._by_name[tenant.name] = Share(tenant)
        elif share.weight != tenant.weight or share.max_running != tenant.max_running:
            share.weight, share.max_running = tenant.weight, tenant.max_running
        return share

    def __iter__(self) -> Iterator[Share]:
        return iter(self._by_name.values())

    def arrive(self, share: Share, tasks: int, work: float) -> None:
        """`tasks` more of the tenant's wait. Its clock begins where its priority's stands, if it was away."""
        if not share.waiting:
            share.clock = max(share.clock, self._clocks.get(share.priority, 0.0))
        share.waiting += tasks
        share.work += work
        self.waiting[share.priority] = self.waiting.get(share.priority, 0) + tasks

    def leave(self, share: Share, cost: float) -> None:
        """A waiting task of the tenant does not wait any more."""
        share.waiting -= 1
        share.work = share.work - cost if share.waiting else 0.0
        left = self.waiting[share.priority] - 1
        if left:
            self.waiting[share.priority] = left
        else:
            del self.waiting[share.priority]

    def serve(self, share: Share, cost: float) -> None:
        """A waiting task of the tenant starts: its clock moves on."""
        self._clocks[share.priority] = max(self._clocks.get(share.priority, 0.0), share.clock)
        share.clock += cost / share.weight
        self._turns += 1
        share.turn = self._turns

    def started(self, share: Share, task: Task) -> None:
        """A task of a tenant with a cap runs."""
        share.running[task] = None

    def ended(self, share: Share, task: Task) -> None:
        """It does not any more: lanes that stood aside because of the cap come back."""
        share.running.pop(task, None)
        if share.parked and share.room > 0:
            parked, share.parked = share.parked, []
            for lane in parked:
                lane.level.list_lane(lane)


class Lane:
    """The tasks of one tenant in one queue, first come first served."""

    __slots__ = ("level", "listed", "number", "share", "tasks", "work")

    def __init__(self, level: Level, share: Share) -> None:
        self.level = level
        self.share = share
        self.tasks: OrderedDict[Task, None] = OrderedDict()
        self.work = 0.0
        self.number = next(_numbers)
        self.listed = False


class Level:
    """The lanes of one priority in one queue."""

    __slots__ = ("_arrivals", "_heap", "lanes", "priority", "size", "work")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.lanes: dict[str, Lane] = {}
        self.size = 0
        self.work = 0.0
        self._heap: list[tuple[float, int, int, Lane]] = []
        self._arrivals: deque[Task] = deque()

    def push(self, task: Task, share: Share, cost: float) -> None:
        """Stand last in the tenant's lane."""
        lane = self.lanes.get(share.name)
        if lane is None:
            lane = self.lanes[share.name] = Lane(self, share)
        lane.tasks[task] = None
        lane.work += cost
        self.size += 1
        self.work += cost
        task.place = lane
        self._arrivals.append(task)
        self.list_lane(lane)

    def remove(self, task: Task, cost: float) -> None:
        """Leave the line."""
        lane: Lane = task.place
        task.place = None
        del lane.tasks[task]
        lane.work -= cost
        self.size -= 1
        self.work -= cost
        if not lane.tasks:
            lane.work = 0.0
            del self.lanes[lane.share.name]
        if not self.size:
            self.work = 0.0
        if len(self._arrivals) > 64 + 2 * self.size:
            self._arrivals = deque(one for one in self._arrivals if self._stands(one))

    def list_lane(self, lane: Lane) -> None:
        """Take part in the order, or stand aside while the tenant is at its cap."""
        if lane.listed or not lane.tasks:
            return
        share = lane.share
        if share.room <= 0:
            if lane not in share.parked:
                share.parked.append(lane)
            return
        lane.listed = True
        heappush(self._heap, (share.clock, share.turn, lane.number, lane))

    def oldest(self) -> Task | None:
        """The task that has waited longest."""
        arrivals = self._arrivals
        while arrivals and not self._stands(arrivals[0]):
            arrivals.popleft()
        return arrivals[0] if arrivals else None

    def arrived_until(self, moment: float) -> Iterator[Job]:
        """The jobs of the tasks that came at `moment` or before, oldest first."""
        for task in self._arrivals:
            if task.job.submitted_at > moment:
                return
            if self._stands(task):
                yield task.job

    def head(self) -> Task | None:
        """The task whose turn it is; None where every tenant is at its cap."""
        heap = self._heap
        while heap:
            clock, turn, _, lane = heap[0]
            share = lane.share
            if not lane.tasks:
                lane.listed = False
                heappop(heap)
            elif share.room <= 0:
                lane.listed = False
                heappop(heap)
                self.list_lane(lane)
            elif clock != share.clock or turn != share.turn:
                heapreplace(heap, (share.clock, share.turn, lane.number, lane))
            else:
                return next(iter(lane.tasks))
        return None

    def order(self) -> Iterator[Task]:
        """The tasks in the order in which they would be served, if nothing else came. The level must not change meanwhile."""
        head = self.head()
        if head is None:
            return
        yield head
        if len(self._heap) == 1:
            lane = self._heap[0][3]
            yield from islice(lane.tasks, 1, min(len(lane.tasks), lane.share.room))
            return
        # what would follow: the clocks run on in a copy
        heap: list[tuple[float, int, int, Lane]] = list(self._heap)
        served: dict[int, tuple[int, float, Iterator[Task]]] = {}
        turn = 1 << 60
        first = heap[0][3]
        tasks = iter(first.tasks)
        next(tasks)
        served[first.number] = (1, first.share.clock + head.job.cost / first.share.weight, tasks)
        heapreplace(heap, (served[first.number][1], turn, first.number, first))
        while heap:
            key, _, number, lane = heap[0]
            share = lane.share
            given, clock, tasks = served.get(number) or (0, share.clock, iter(lane.tasks))
            if clock > key:
                heapreplace(heap, (clock, share.turn, number, lane))
                served[number] = (given, clock, tasks)
                continue
            task = next(tasks, None) if given < share.room else None
            if task is None:
                heappop(heap)
                continue
            yield task
            turn += 1
            clock += task.job.cost / share.weight
            served[number] = (given + 1, clock, tasks)
            heapreplace(heap, (clock, turn, number, lane))

    @staticmethod
    def _stands(task: Task) -> bool:
        return task.place is not None


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

    def push(self, task: Task, share: Share) -> None:
        """Stand last in the tenant's lane of its priority."""
        for level in self._levels:
            if level.priority == share.priority:
                break
        else:
            level = Level(share.priority)
            self._levels.append(level)
            self._levels.sort(key=lambda one: -one.priority)
        cost = task.job.cost
        level.push(task, share, cost)
        self.size += 1
        self.work += cost

    def remove(self, task: Task) -> None:
        """Leave the line, from wherever in it."""
        cost = task.job.cost
        task.place.level.remove(task, cost)
        self.size -= 1
        self.work = self.work - cost if self.size else 0.0

    def head(self, urgency: Urgency | None = None) -> Task | None:
        """Whose turn it is; None where nobody waits or all who do are at their caps."""
        for level in self._ranked(urgency):
            task = level.head()
            if task is not None:
                return task
        return None

    def rank(self, urgency: Urgency | None = None) -> Rank:
        """Where this queue's next task stands among those of other queues: the lowest goes first."""
        task = self.head(urgency)
        if task is None:
            return float("inf"), 0, 0.0, 0, 0.0
        share: Share = task.place.share
        priority = share.priority
        level = priority if urgency is None else urgency.get(priority, priority)
        return -level, priority, share.clock, share.turn, task.job.submitted_at

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

    It is one figure for all queues, so that between equals the clocks decide and never the age. None where there is nothing
    to compare (one priority), or no ageing (0).
    """
    oldest: dict[int, float] = {}
    for queue in queues:
        for level in queue.levels:
            task = level.oldest()
            if task is not None:
                arrived = task.job.submitted_at
                oldest[level.priority] = min(arrived, oldest.get(level.priority, arrived))
    if len(oldest) < 2 or not ageing_seconds:
        return None
    return {priority: priority + (now - arrived) // ageing_seconds for priority, arrived in oldest.items()}


def _arrival(task: Task) -> float:
    return task.job.submitted_at
