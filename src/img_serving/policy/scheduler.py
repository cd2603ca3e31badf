"""The scheduler: queue, batching, balancing and slots as one state machine. Plain code: no I/O, no clock, no logging.

A task waits in one queue for its route, not in a queue per endpoint (late binding). Whoever holds the scheduler calls

    submit(job)                 the job's tasks stand in line
    next_batches(now)           what can start now; every batch returned is running until `finish` hears of it
    finish(batch, ended, now)   how a call went; returns the jobs that this resolved
    cancel(job, now)            returns the running batches that nobody wants any more
    expire(now)                 returns the jobs whose deadline or longest wait has passed

and does the I/O in between. Every submitted job is resolved exactly once: `job.finished_at` is set then, with `job.error`
or a picture in every task.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

from img_serving.domain.errors import (
    AllAttemptsFailed,
    Cancelled,
    DeadlineExceeded,
    GatewayError,
    InvalidRequest,
    NoUsableBackend,
    Outcome,
    QueueFull,
)
from img_serving.domain.images import Artifact, ItemFailure
from img_serving.domain.jobs import Batch, Ended, Job, JobStatus, Route, Target, Task
from img_serving.policy.balancing import STRATEGIES, Strategy
from img_serving.policy.batching import LOOK_AHEAD, fill
from img_serving.policy.cost import cost_of
from img_serving.policy.endpoint import EndpointSnapshot, EndpointState
from img_serving.policy.retry import RetryBudget, RetryOptions


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """`max_tasks` may wait; `max_wait_seconds` None means until the deadline."""

    strategy: Strategy = "round_robin"
    max_tasks: int = 1000
    max_wait_seconds: float | None = None
    retry: RetryOptions = field(default_factory=RetryOptions)


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """The scheduler at one moment."""

    queued: int
    running: int
    oldest_seconds: float
    endpoints: tuple[EndpointSnapshot, ...]


Tiers = tuple[tuple[Target, ...], ...]


class _Queue:
    """The tasks that wait for one route, first come first served, and the backends that may take them by tier."""

    __slots__ = ("dead", "tasks", "tiers")

    def __init__(self, tiers: Tiers) -> None:
        self.tasks: deque[Task] = deque()
        self.dead = 0
        self.tiers = tiers


@lru_cache(maxsize=1024)
def _tiers_of(route: Route) -> Tiers:
    """A route's targets by tier, the lowest first."""
    tiers: dict[int, list[Target]] = {}
    for target in route:
        tiers.setdefault(target.tier, []).append(target)
    return tuple(tuple(tiers[tier]) for tier in sorted(tiers))


class Scheduler:
    """See the module's text. Its state: queues by route, tasks that stand for a second try, running batches, endpoints."""

    def __init__(self, options: SchedulerOptions, rng: Random, now: float) -> None:
        """`rng` decides for the random strategy; `now` starts the retry budget."""
        self._options = options
        self._choose = STRATEGIES[options.strategy]
        self._rng = rng
        self._budget = RetryBudget(options.retry, now)
        self._queues: dict[Route, _Queue] = {}
        self._again: deque[Task] = deque()
        self._running: set[Batch] = set()
        self._suspects: set[Batch] = set()
        """Running batches of a job that was resolved without them: nobody may want them any more."""
        self._jobs: dict[str, Job] = {}
        self._endpoints: dict[int, EndpointState] = {}
        self._of_backend: dict[str, list[EndpointState]] = {}
        self._queued = 0
        self._turn = 0

    # endpoints

    def add_endpoint(self, endpoint: EndpointState) -> None:
        """From now on it may be given work."""
        self._endpoints[endpoint.id] = endpoint
        self._of_backend.setdefault(endpoint.backend, []).append(endpoint)

    def remove_backend(self, backend: str, now: float) -> list[Job]:
        """No new work for its endpoints; what runs there ends as it ends. Returns the jobs that nobody else could serve."""
        for endpoint in self._of_backend.pop(backend, []):
            endpoint.removed = True
            if not endpoint.in_flight:
                del self._endpoints[endpoint.id]
        return self._resolve_hopeless(now)

    def is_idle(self, backend: str) -> bool:
        """Whether no batch of that backend (also one removed) is running."""
        return not any(batch.backend == backend for batch in self._running)

    # the life of a job

    @property
    def queued(self) -> int:
        """Tasks that wait for their first or next attempt."""
        return self._queued

    @property
    def running(self) -> int:
        """Batches in flight."""
        return len(self._running)

    @property
    def jobs(self) -> Iterable[Job]:
        """The jobs that are not resolved yet."""
        return self._jobs.values()

    def submit(self, job: Job) -> None:
        """The job's tasks stand in line, all or none.

        Raises:
            NoUsableBackend: the route has no endpoint at all (its backend was removed since it was planned).
            QueueFull: as much is waiting as may wait.
        """
        if not self._has_untried(job.tasks[0]):
            raise NoUsableBackend("no endpoint of the route is left", retry_after_seconds=1.0)
        count = len(job.tasks)
        if self._queued + count > self._options.max_tasks:
            raise QueueFull(
                f"the queue holds {self._queued} of at most {self._options.max_tasks} tasks; {count} more do not fit",
                retry_after_seconds=self.wait_estimate(),
            )
        queue = self._queues.get(job.route)
        if queue is None:
            queue = self._queues[job.route] = _Queue(_tiers_of(job.route))
        self._jobs[job.id] = job
        queue.tasks.extend(job.tasks)
        self._queued += count

    def start_at_once(self, job: Job, now: float) -> Batch | None:
        """`submit` and `next_batches` in one, for a single picture while nobody waits; None where that is not so.

        Then the job has not been submitted. Most requests of a gateway with free slots go this way, and it is half as long.
        """
        if self._queued or len(job.tasks) != 1:
            return None
        task = job.tasks[0]
        endpoint = self._pick(_tiers_of(job.route), task, now)
        if endpoint is None:
            return None
        self._jobs[job.id] = job
        self._queued += 1
        return self._start(endpoint, self._model_for(task, endpoint), [task], now)

    def wait_estimate(self) -> float:
        """Seconds until what waits now has probably started: tasks x mean latency / slots (1 s where nothing is known)."""
        live = [endpoint for endpoint in self._endpoints.values() if not endpoint.removed and endpoint.enabled]
        slots = sum(endpoint.slots for endpoint in live)
        known = [endpoint.latency_seconds for endpoint in live if endpoint.latency_seconds is not None]
        mean = sum(known) / len(known) if known else 1.0
        return max(1.0, mean * max(1, self._queued) / max(1, slots))

    def next_batches(self, now: float) -> list[Batch]:
        """Bind waiting tasks to free slots, for as long as there are both."""
        batches: list[Batch] = []
        if not self._queued:
            # nobody waits, so whoever still stands somewhere is over
            self._again.clear()
            self._queues.clear()
            return batches
        if self._again:
            for task in [self._again.popleft() for _ in range(len(self._again))]:
                self._start_again(task, batches, now)
        for route, queue in list(self._queues.items()):
            self._drain(queue, batches, now)
            if not queue.tasks:
                del self._queues[route]
        return batches

    def finish(self, batch: Batch, ended: Ended, now: float) -> list[Job]:
        """A batch's call is over; returns the jobs that are resolved by it."""
        self._running.remove(batch)
        for task in batch.tasks:
            task.batch = None
        endpoint = self._endpoints[batch.endpoint_id]
        endpoint.in_flight -= 1
        endpoint.outstanding_cost -= batch.cost
        if endpoint.removed and not endpoint.in_flight:
            del self._endpoints[endpoint.id]
        self._note(endpoint, batch, ended, now)
        done: list[Job] = []
        if ended.results is not None:
            for task, result in zip(batch.tasks, ended.results, strict=True):
                if task.job.is_over:
                    continue
                if isinstance(result, Artifact):
                    task.artifact = result
                    if len(task.job.tasks) == 1 or all(other.artifact is not None for other in task.job.tasks):
                        done.append(self._resolve(task.job, JobStatus.SUCCEEDED, None, now))
                elif result.refused:
                    done.append(self._fail(task.job, InvalidRequest(result.message, param="prompt"), now))
                else:
                    done += self._after_failure(task, endpoint, Outcome.FAILED, result.message, now)
        elif ended.refusal is not None:
            done += self._after_refusal(batch, ended.refusal, now)
        elif ended.outcome is not None:
            # A batch that failed as a whole is taken apart: its members are tried again one by one.
            for task in batch.tasks:
                task.alone = len(batch.tasks) > 1
                if not task.job.is_over:
                    done += self._after_failure(task, endpoint, ended.outcome, ended.message, now)
        else:
            # Cancelled: whoever still wants a picture of it (there should be nobody) is asked for again.
            done += self._ask_again(batch, now)
        return done

    def cancel(self, job: Job, now: float, error: GatewayError | None = None) -> list[Batch]:
        """Resolve a job as cancelled (or with `error`); returns the running batches that nobody wants any more."""
        if job.is_over:
            return []
        self._resolve(job, JobStatus.FAILED if error else JobStatus.CANCELLED, error or Cancelled("cancelled"), now)
        return self.unwanted()

    def unwanted(self) -> list[Batch]:
        """Running batches all of whose jobs are over; each is told once."""
        if not self._suspects:
            return []
        suspects, self._suspects = self._suspects, set()
        return [batch for batch in suspects if batch in self._running and all(task.job.is_over for task in batch.tasks)]

    def expire(self, now: float) -> list[Job]:
        """Resolve the jobs whose deadline has passed, or that waited longer than they may."""
        longest = self._options.max_wait_seconds
        late: list[tuple[Job, str]] = []
        for job in self._jobs.values():
            if now >= job.deadline:
                waited = "before it started" if job.started_at is None else "before it was done"
                late.append((job, f"the deadline of {job.deadline - job.submitted_at:g} s passed {waited}"))
            elif longest is not None and job.started_at is None and now - job.submitted_at >= longest:
                late.append((job, f"waited {longest:g} s without a free slot"))
        return [
            self._resolve(job, JobStatus.EXPIRED, DeadlineExceeded(message, should_retry=False), now)
            for job, message in late
        ]

    def snapshot(self, now: float) -> SchedulerSnapshot:
        """A frozen picture of it all."""
        waiting = [job.submitted_at for job in self._jobs.values() if job.started_at is None]
        return SchedulerSnapshot(
            queued=self._queued,
            running=len(self._running),
            oldest_seconds=now - min(waiting) if waiting else 0.0,
            endpoints=tuple(endpoint.snapshot(now) for endpoint in self._endpoints.values()),
        )

    # how a batch is made

    def _drain(self, queue: _Queue, batches: list[Batch], now: float) -> None:
        while queue.tasks:
            head = queue.tasks[0]
            if head.job.is_over:
                queue.tasks.popleft()
                queue.dead -= 1
                continue
            endpoint = self._pick(queue.tiers, head, now)
            if endpoint is None:
                return
            queue.tasks.popleft()
            waiting = len(queue.tasks) + 1 - queue.dead
            limit = min(endpoint.max_batch_size, waiting)
            if limit > 1:
                limit = min(limit, -(-waiting // max(1, self._free_slots(queue, endpoint, now))))
            members = [head] if limit <= 1 else self._take_company(queue, head, endpoint, limit)
            batches.append(self._start(endpoint, self._model_for(head, endpoint), members, now))

    @staticmethod
    def _take_company(queue: _Queue, head: Task, endpoint: EndpointState, limit: int) -> list[Task]:
        """Take those who may travel with `head` out of the front of the queue; the others keep their places."""
        front = [queue.tasks.popleft() for _ in range(min(LOOK_AHEAD, len(queue.tasks)))]
        live = [task for task in front if not task.job.is_over]
        queue.dead -= len(front) - len(live)
        members = fill(endpoint.capabilities.batch, head, live, limit)
        taken = set(map(id, members))
        queue.tasks.extendleft(task for task in reversed(live) if id(task) not in taken)
        return members

    def _free_slots(self, queue: _Queue, chosen: EndpointState, now: float) -> int:
        """Free slots that this queue's tasks could use beside the chosen one, itself included: a batch leaves work for them.

        Slots of lower tiers and of endpoints that may not be used will not take any, so they count for nothing.
        """
        tier = next(tier for tier in queue.tiers if any(target.backend == chosen.backend for target in tier))
        return sum(
            max(0, endpoint.slots - endpoint.in_flight)
            for target in tier
            for endpoint in self._of_backend.get(target.backend, ())
            if endpoint.is_usable(now)
        )

    def _start_again(self, task: Task, batches: list[Batch], now: float) -> None:
        """A second try does not stand in line again: it goes first, to an endpoint that it has not tried."""
        if task.job.is_over:
            return
        endpoint = self._pick(_tiers_of(task.job.route), task, now)
        if endpoint is None:
            self._again.append(task)
            return
        batches.append(self._start(endpoint, self._model_for(task, endpoint), [task], now))

    @staticmethod
    def _model_for(task: Task, endpoint: EndpointState) -> str | None:
        for target in task.job.route:
            if target.backend == endpoint.backend:
                return target.model
        raise LookupError(f"{endpoint.backend} is not on the route")

    def _pick(self, tiers: Tiers, task: Task, now: float) -> EndpointState | None:
        """The endpoint for a task, or None if it has to wait.

        The first tier with a usable endpoint serves, its full endpoints included: those are worth waiting for. Where no
        endpoint of the route is usable, one that said when it is free again is waited for, if that is in time; failing that,
        those that are ejected or broken get one chance each.
        """
        tried = task.tried
        last_hopes: list[EndpointState] = []
        worth_waiting = False
        for tier in tiers:
            usable = False
            ready: list[EndpointState] = []
            for target in tier:
                for endpoint in self._of_backend.get(target.backend, ()):
                    if endpoint.id in tried or not endpoint.enabled:
                        continue
                    if endpoint.is_usable(now):
                        usable = True
                        if endpoint.in_flight < endpoint.slots:
                            ready.append(endpoint)
                    elif endpoint.is_only_busy(now) and endpoint.busy_until < task.job.deadline:
                        worth_waiting = True
                    elif endpoint.in_flight < endpoint.slots:
                        last_hopes.append(endpoint)
            if ready:
                return ready[0] if len(ready) == 1 else self._choose(ready, cost_of(task.job.request), self._rng)
            if usable:
                return None
        if last_hopes and not worth_waiting:
            return self._choose(last_hopes, cost_of(task.job.request), self._rng)
        return None

    def _start(self, endpoint: EndpointState, model: str | None, members: list[Task], now: float) -> Batch:
        cost = cost_of(members[0].job.request) * len(members)
        self._turn += 1
        endpoint.picked_at = self._turn
        endpoint.in_flight += 1
        endpoint.outstanding_cost += cost
        endpoint.calls += 1
        self._queued -= len(members)
        is_last_hope = not endpoint.is_usable(now)
        for task in members:
            if not task.tried:
                self._budget.earn()
                task.job.panicked = task.job.panicked or is_last_hope
            task.tried.add(endpoint.id)
            task.attempts += 1
            task.started = True
            job = task.job
            if job.started_at is None:
                job.started_at = now
                job.status = JobStatus.RUNNING
            job.attempts = max(job.attempts, len(task.tried))
            job.backend = endpoint.backend
        batch = Batch(endpoint.id, endpoint.backend, model, tuple(members), endpoint.breaker.start(now), cost, now)
        for task in members:
            task.batch = batch
        self._running.add(batch)
        return batch

    # what follows from how it ended

    def _note(self, endpoint: EndpointState, batch: Batch, ended: Ended, now: float) -> None:
        """Breaker, speed and last error of the endpoint. Cancellations, refusals and "busy" count for nothing."""
        results = ended.results
        if results and (isinstance(results[0], Artifact) or any(isinstance(result, Artifact) for result in results)):
            endpoint.learn(batch.cost, max(now - batch.started_at, 1e-6))
            endpoint.breaker.end(batch.era, ok=True, now=now)
        elif ended.results is not None:
            # Not one picture: its speed says nothing, and it has failed unless it refused.
            failures = [result.message for result in ended.results if isinstance(result, ItemFailure)]
            refused = any(isinstance(result, ItemFailure) and result.refused for result in ended.results)
            if not refused:
                endpoint.failures += 1
                endpoint.last_error = failures[-1]
            endpoint.breaker.end(batch.era, ok=None if refused else False, now=now)
        elif ended.outcome is None or ended.busy_seconds is not None:
            endpoint.breaker.end(batch.era, ok=None, now=now)
            if ended.busy_seconds is not None:
                endpoint.busy_until = now + ended.busy_seconds
                endpoint.last_error = ended.message
        else:
            endpoint.failures += 1
            endpoint.last_error = ended.message
            endpoint.breaker.end(batch.era, ok=False, now=now)

    def _after_failure(
        self, task: Task, endpoint: EndpointState, outcome: Outcome, message: str, now: float
    ) -> list[Job]:
        """Try the task elsewhere if it may be and there is an elsewhere; else its job has failed."""
        if outcome is Outcome.NOT_STARTED:
            task.attempts -= 1
        allowed = self._budget.allows(outcome, task.attempts, retry_unknown=endpoint.retry_unknown)
        if allowed and self._has_untried(task) and (outcome is Outcome.NOT_STARTED or self._budget.spend(now)):
            self._stand_again(task)
            return []
        return [self._fail(task.job, self._final_error(task, message, now), now)]

    def _final_error(self, task: Task, message: str, now: float) -> GatewayError:
        if not task.attempts:
            # Nothing was drawn or paid: where an endpoint said when it is free again, the caller may come back then.
            busy = [
                endpoint.busy_until - now
                for target in task.job.route
                for endpoint in self._of_backend.get(target.backend, ())
                if endpoint.enabled and endpoint.busy_until > now
            ]
            if busy:
                return NoUsableBackend(message, retry_after_seconds=max(1.0, min(busy)))
        if task.job.panicked:
            wait = min(
                (
                    endpoint.breaker.opens_in(now)
                    for target in task.job.route
                    for endpoint in self._of_backend.get(target.backend, ())
                ),
                default=1.0,
            )
            return NoUsableBackend(
                f"no endpoint of the route is usable; the last one tried said: {message}",
                retry_after_seconds=max(1.0, wait),
            )
        return AllAttemptsFailed(message, should_retry=False)

    def _after_refusal(self, batch: Batch, error: GatewayError, now: float) -> list[Job]:
        jobs = {task.job.id: task.job for task in batch.tasks if not task.job.is_over}
        if len(jobs) == 1:
            return [self._fail(job, error, now) for job in jobs.values()]
        # One of several requests is at fault, and nobody knows which: each is asked alone, at the same endpoint if need be.
        return self._ask_again(batch, now)

    def _ask_again(self, batch: Batch, now: float) -> list[Job]:
        """Ask for each picture of a batch again, alone, as if the call had not been."""
        done: list[Job] = []
        for task in batch.tasks:
            if task.job.is_over:
                continue
            task.alone = True
            task.attempts -= 1
            task.tried.discard(batch.endpoint_id)
            if self._has_untried(task):
                self._stand_again(task)
            else:
                error = NoUsableBackend("the backend that should serve this was removed", retry_after_seconds=1.0)
                done.append(self._fail(task.job, error, now))
        return done

    def _has_untried(self, task: Task) -> bool:
        return any(
            endpoint.id not in task.tried and endpoint.enabled
            for target in task.job.route
            for endpoint in self._of_backend.get(target.backend, ())
        )

    def _stand_again(self, task: Task) -> None:
        task.started = False
        self._again.append(task)
        self._queued += 1

    def _resolve_hopeless(self, now: float) -> list[Job]:
        """Resolve waiting jobs that no endpoint is left for (a backend was removed)."""
        hopeless = [
            job
            for job in self._jobs.values()
            if any(not task.started and not self._has_untried(task) for task in job.tasks)
        ]
        error = "the backend that should serve this was removed"
        return [self._fail(job, NoUsableBackend(error, retry_after_seconds=1.0), now) for job in hopeless]

    def _fail(self, job: Job, error: GatewayError, now: float) -> Job:
        return self._resolve(job, JobStatus.FAILED, error, now)

    def _resolve(self, job: Job, status: JobStatus, error: GatewayError | None, now: float) -> Job:
        job.status = status
        job.error = error
        job.finished_at = now
        del self._jobs[job.id]
        if status is JobStatus.SUCCEEDED:
            return job  # all of it was started: there is nothing left to find
        self._suspects.update(task.batch for task in job.tasks if task.batch is not None)
        # Its waiting tasks leave the count now, and the queue when they come up or when the dead are the majority.
        self._queued -= sum(1 for task in job.tasks if not task.started)
        queue = self._queues.get(job.route)
        if queue is not None:
            queue.dead += sum(1 for task in job.tasks if not task.started and not task.tried and not task.alone)
            if queue.dead > 64 and queue.dead * 2 > len(queue.tasks):
                queue.tasks = deque(task for task in queue.tasks if not task.job.is_over)
                queue.dead = 0
        return job
