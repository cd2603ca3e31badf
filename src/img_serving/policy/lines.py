"""The lines of waiting tasks, one a route, and the books of the tenants who stand in them."""

from __future__ import annotations

from collections.abc import Iterator

from img_serving.domain.jobs import Job, Route, Task
from img_serving.policy.fair_queue import FairQueue, Share, Shares


class Line:
    """The tasks that wait for one route. `models`: what a task needs, by backend."""

    __slots__ = ("models", "queue", "route")

    def __init__(self, route: Route) -> None:
        self.route = route
        self.queue = FairQueue()
        self.models = {target.backend: target.model for target in route}


class Lines:
    """All lines that somebody stands in. `work` in megapixel-steps is what they hold together."""

    __slots__ = ("_by_route", "shares", "work")

    def __init__(self) -> None:
        self._by_route: dict[Route, Line] = {}
        self.shares = Shares()
        self.work = 0.0

    def __iter__(self) -> Iterator[Line]:
        return iter(self._by_route.values())

    def __len__(self) -> int:
        return len(self._by_route)

    def find(self, route: Route) -> Line | None:
        """The line of a route, if anybody stands in it."""
        return self._by_route.get(route)

    def enter(self, job: Job, share: Share) -> None:
        """All tasks of a job stand in line."""
        line = self._by_route.get(job.route)
        if line is None:
            line = self._by_route[job.route] = Line(job.route)
        count = len(job.tasks)
        self.shares.arrive(share, count, job.cost * count)
        self.work += job.cost * count
        for task in job.tasks:
            line.queue.push(task, share)

    def serve(self, line: Line, task: Task) -> None:
        """It is the task's turn: it leaves the line, and its tenant has had that much more."""
        share: Share = task.place.share
        self._remove(line, task, share)
        self.shares.serve(share, task.job.cost)

    def leave(self, task: Task) -> None:
        """The task is not wanted any more."""
        self._remove(self._by_route[task.job.route], task, task.place.share)

    def waiting_since(self, moment: float) -> Iterator[Job]:
        """Jobs that have stood in line since `moment` or before, each as often as it has tasks there."""
        for line in self:
            for level in line.queue.levels:
                yield from level.arrived_until(moment)

    def _remove(self, line: Line, task: Task, share: Share) -> None:
        line.queue.remove(task)
        self.shares.leave(share, task.job.cost)
        if line.queue.size:
            self.work -= task.job.cost
            return
        del self._by_route[line.route]
        self.work = self.work - task.job.cost if self._by_route else 0.0
