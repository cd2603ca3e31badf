"""The lines of waiting tasks, one a route; the pools of backends that they stand for; and the tenants who stand in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from img_serving.domain.jobs import Job, Route, Task
from img_serving.domain.tenants import Tenant
from img_serving.policy.fair_queue import Account, Clock, FairQueue, Lane

BEHIND_TASKS = 8
"""A pool may be so many tasks further behind another than would be fair: what it could not use then is not saved up."""

MAX_POOLS = 1024
"""Pools whose clocks are remembered at most; past it those in which nobody waits are forgotten."""


class Pool:
    """The lines that stand for the same backends, whatever the models: the unit of fairness between tenants.

    Pools that have a backend or a GPU in common contend for it. Between them their own clocks decide: each task served moves
    its pool's on by its cost over the weights of all tenants that wait there, so that a pool of three tenants gets three
    shares. A tenant that waits in several contending pools is split between them: asking in many ways brings no more.
    """

    __slots__ = ("_clocks", "_turns", "backends", "clock", "clocks", "lines", "resources", "waiting")

    def __init__(self, backends: frozenset[str]) -> None:
        self.backends = backends
        self.resources = backends
        """The backends and the GPUs that they share with others."""
        self.lines: dict[Route, Line] = {}
        self.clock = 0.0
        self.clocks: dict[str, Clock] = {}
        """How much each tenant has had here."""
        self.waiting: dict[Account, int] = {}
        """The tenants that have tasks waiting here, and how many."""
        self._clocks: dict[int, float] = {}
        """The clock of each priority: that of the tenant that was served last, as it was before."""
        self._turns = 0

    def arrive(self, account: Account, tasks: int) -> Clock:
        """`tasks` more of the tenant's wait here. Its clock begins where its priority's stands, if it was away."""
        clock = self.clocks.get(account.name)
        if clock is None:
            clock = self.clocks[account.name] = Clock()
        waiting = self.waiting.get(account, 0)
        if not waiting:
            clock.value = max(clock.value, self._clocks.get(account.priority, 0.0))
        self.waiting[account] = waiting + tasks
        return clock

    def leave(self, account: Account) -> None:
        """A waiting task of the tenant does not wait any more."""
        left = self.waiting[account] - 1
        if left:
            self.waiting[account] = left
        else:
            del self.waiting[account]

    def serve(self, lane: Lane, cost: float, contenders: list[Pool]) -> None:
        """A waiting task starts: the clock of its tenant moves on, and the pool's where others want the same."""
        clock, account = lane.clock, lane.account
        self._clocks[account.priority] = max(self._clocks.get(account.priority, 0.0), clock.value)
        self._turns += 1
        clock.turn = self._turns
        if not contenders:
            clock.value += cost / account.weight
            return
        clock.value += cost / self._weight_here(account, contenders)
        step = cost / sum([self._weight_here(one, contenders) for one in self.waiting])
        self.clock += step
        for other in contenders:
            other.clock = max(other.clock, self.clock - BEHIND_TASKS * step)

    @staticmethod
    def _weight_here(account: Account, contenders: list[Pool]) -> float:
        return account.weight / (1 + sum([account in other.waiting for other in contenders]))


class Line:
    """The tasks that wait for one route. `models`: what a task needs, by backend."""

    __slots__ = ("models", "passed_over_since", "pool", "queue", "route")

    def __init__(self, route: Route, pool: Pool) -> None:
        self.route = route
        self.pool = pool
        self.queue = FairQueue()
        self.models = {target.backend: target.model for target in route}
        self.passed_over_since: float | None = None
        """Since when its next task is passed over for the sake of models that are loaded; None: it is not."""


class Lines:
    """All lines that somebody stands in. `work` in megapixel-steps is what they hold together."""

    __slots__ = ("_accounts", "_by_route", "_pools", "_resources_of", "active", "priorities", "work")

    def __init__(self, resources_of: Callable[[frozenset[str]], frozenset[str]]) -> None:
        """`resources_of` the backends: what work for them takes from others."""
        self._resources_of = resources_of
        self._accounts: dict[str, Account] = {}
        self._by_route: dict[Route, Line] = {}
        self._pools: dict[frozenset[str], Pool] = {}
        self.active: dict[Pool, None] = {}
        """The pools that have lines."""
        self.priorities: dict[int, int] = {}
        """Tasks that wait, by priority; those in which nobody waits are left out."""
        self.work = 0.0

    def __iter__(self) -> Iterator[Line]:
        return iter(self._by_route.values())

    def __len__(self) -> int:
        return len(self._by_route)

    @property
    def accounts(self) -> Iterator[Account]:
        """Every tenant that was seen."""
        return iter(self._accounts.values())

    def account(self, tenant: Tenant) -> Account:
        """The tenant's account, made at the first question; the cap is that of the newest."""
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = Account(tenant)
        elif account.max_running != tenant.max_running:
            account.max_running = tenant.max_running
        return account

    def find(self, route: Route) -> Line | None:
        """The line of a route, if anybody stands in it."""
        return self._by_route.get(route)

    def contenders(self, pool: Pool) -> list[Pool]:
        """The other pools with lines that want something that this one wants."""
        return [other for other in self.active if other is not pool and not pool.resources.isdisjoint(other.resources)]

    def enter(self, job: Job, account: Account) -> None:
        """All tasks of a job stand in line."""
        line = self._by_route.get(job.route) or self._open(job.route)
        count = len(job.tasks)
        clock = line.pool.arrive(account, count)
        account.waiting += count
        account.work += job.cost * count
        self.work += job.cost * count
        self.priorities[account.priority] = self.priorities.get(account.priority, 0) + count
        for task in job.tasks:
            line.queue.push(task, account, clock)

    def serve(self, line: Line, task: Task) -> None:
        """It is the task's turn: it leaves the line, and its tenant has had that much more."""
        lane: Lane = task.place
        pool = line.pool
        pool.serve(lane, task.job.cost, self.contenders(pool) if len(self.active) > 1 else [])
        line.passed_over_since = None
        lane.passed = 0 if task is lane.head else lane.passed + 1
        self._remove(line, task, lane)

    def leave(self, task: Task) -> None:
        """The task is not wanted any more."""
        self._remove(self._by_route[task.job.route], task, task.place)

    def waiting_since(self, moment: float) -> Iterator[Job]:
        """Jobs that have stood in line since `moment` or before, each as often as it has tasks there."""
        for line in self:
            for level in line.queue.levels:
                yield from level.arrived_until(moment)

    def _open(self, route: Route) -> Line:
        backends = frozenset(target.backend for target in route)
        pool = self._pools.get(backends)
        if pool is None:
            if len(self._pools) >= MAX_POOLS:
                self._pools = {one.backends: one for one in self.active}
            pool = self._pools[backends] = Pool(backends)
        if not pool.lines:
            pool.resources = self._resources_of(backends)
            others = [other.clock for other in self.contenders(pool)]
            if others:
                # neither what it had while nobody else wanted it counts, nor what it did not want
                pool.clock = min(max(pool.clock, min(others)), max(others))
            self.active[pool] = None
        line = self._by_route[route] = pool.lines[route] = Line(route, pool)
        return line

    def _remove(self, line: Line, task: Task, lane: Lane) -> None:
        account, cost = lane.account, task.job.cost
        line.queue.remove(task)
        account.waiting -= 1
        account.work = account.work - cost if account.waiting else 0.0
        left = self.priorities[account.priority] - 1
        if left:
            self.priorities[account.priority] = left
        else:
            del self.priorities[account.priority]
        pool = line.pool
        if not line.queue.size:
            del self._by_route[line.route]
            del pool.lines[line.route]
            if not pool.lines:
                del self.active[pool]
        pool.leave(account)
        self.work = self.work - cost if self._by_route else 0.0
