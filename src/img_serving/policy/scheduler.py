"""The scheduler: queue, batching, balancing and slots as one state machine. Plain code: no I/O, no clock, no logging.

A task waits in one queue for its route, not in a queue per endpoint (late binding). Whoever holds the scheduler calls

    submit(job)                 the job's tasks stand in line, or are refused with the reason and an honest estimate
    next_batches(now)           what can start now; every batch returned is running until `finish` hears of it
    finish(batch, ended, now)   how a call went; returns the jobs that this resolved
    cancel(job, now)            returns the running batches that nobody wants any more
    expire(now)                 returns the jobs whose deadline or longest wait has passed
    set_endpoint_state(…)       what an operator or a health check says of an endpoint
    look_after(now)             now and then: finds wedged endpoints, and returns second calls for slow ones
    snapshot(now)               a frozen picture of it all

and does the I/O in between. Every submitted job is resolved exactly once: `job.finished_at` is set then, with `job.error`
or a picture in every task.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from heapq import heapify, heappop, heapreplace
from random import Random

from img_serving.domain.errors import (
    Cancelled,
    DeadlineExceeded,
    GatewayError,
    InvalidRequest,
    NoUsableBackend,
    Outcome,
    OutcomeUnknown,
)
from img_serving.domain.images import Artifact
from img_serving.domain.jobs import Batch, Ended, Job, JobStatus, Route, Task
from img_serving.policy.admission import check_admission
from img_serving.policy.cost import cost_of
from img_serving.policy.deadlines import OpenJobs
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.estimates import Book, estimate_of, snapshot_of, wait_seconds
from img_serving.policy.fleet import Fleet
from img_serving.policy.health import Health
from img_serving.policy.least_work import LeastWork
from img_serving.policy.lines import Line, Lines
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.placement import NEVER, Placement
from img_serving.policy.retry import Payment, RetryBudget
from img_serving.policy.snapshots import JobEstimate, SchedulerSnapshot
from img_serving.policy.verdicts import final_error, judge

AGAIN_WINDOW = 64
"""Second tries looked at in a pass."""

MOST_BUSY_CALLS = 20
"""So many calls may tell a task that they are busy before it is not sent there again."""

NO_ENDPOINT = "no endpoint of the route is left"
REMOVED = "the backend that should serve this was removed"


class Scheduler:
    """See the module's text. Its state: lines by route, tasks that stand for a second try, running batches, endpoints."""

    def __init__(self, options: SchedulerOptions, rng: Random, now: float) -> None:
        """`rng` decides for the random strategy; `now` starts the retry budget."""
        self.options = options
        self._budget = RetryBudget(options.retry, now)
        self._fleet = Fleet()
        self._lines = Lines(self._fleet.resources_of)
        kind = LeastWork if options.strategy == "least_work" else Placement
        self._placement = kind(options, self._fleet, self._lines, rng)
        self._again: deque[Task] = deque()
        self._running: dict[Batch, None] = {}
        self._suspects: dict[Batch, None] = {}
        """Running batches that a resolved job or a picture from elsewhere has left: nobody may want them any more."""
        self._jobs = OpenJobs()
        self._queued = 0
        self._turn = 0

    # endpoints

    def add_endpoint(self, endpoint: EndpointState) -> None:
        """From now on it may be given work."""
        self._fleet.add(endpoint)

    def remove_backend(self, backend: str, now: float) -> list[Job]:
        """No new work for its endpoints; what runs there ends as it ends. Returns the jobs that nobody else could serve."""
        self._fleet.remove_backend(backend)
        return self._resolve_hopeless(now)

    def set_endpoint_state(
        self,
        endpoint_id: int,
        now: float,
        *,
        enabled: bool | None = None,
        healthy: bool | None = None,
        detail: str = "",
    ) -> bool:
        """What an operator or a health check says of an endpoint; returns whether the verdict of the checks changed."""
        endpoint = self._fleet[endpoint_id]
        if enabled is not None:
            endpoint.enabled = enabled
        if healthy is None:
            return False
        was_down = endpoint.health.is_down
        changed = endpoint.health.record(healthy, detail)
        if was_down and endpoint.health.health is Health.UP:
            self._fleet.recovered(endpoint, now, self.options.slow_start_seconds)
            endpoint.breaker.try_soon(now)
        return changed

    def endpoint_changed(self) -> None:
        """An endpoint can do something else than before (slots, capabilities)."""
        self._fleet.changed()

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
    def jobs(self) -> Collection[Job]:
        """The jobs that are not resolved yet, in the order of their arrival."""
        return self._jobs.all

    def submit(self, job: Job) -> None:
        """The job's tasks stand in line, all or none. A durable job was checked when it was taken, and is not refused now.

        Raises:
            NoUsableBackend: the route has no endpoint at all (its backend was removed since it was planned).
            QueueFull: as much is waiting as may wait.
            DeadlineUnreachable: what stands before it takes longer than it may.
            RateLimited: the same, because of its tenant's own cap.
        """
        if job.durable:
            job.cost = cost_of(job.request)
            if not self._fleet.has_untried(job.route, ()):
                raise NoUsableBackend(NO_ENDPOINT, retry_after_seconds=1.0)
        else:
            self.check(job)
        self._lines.enter(job, self._lines.account(job.tenant))
        self._queued += len(job.tasks)
        self._jobs.add(job)

    def check(self, job: Job, others: int = 0) -> None:
        """Whether a job may stand in line; `others` are tasks that may and do not yet.

        Raises:
            GatewayError: as `submit` does.
        """
        job.cost = cost_of(job.request)
        if not self._fleet.has_untried(job.route, ()):
            raise NoUsableBackend(NO_ENDPOINT, retry_after_seconds=1.0)
        account = self._lines.account(job.tenant)
        check_admission(job, account, self._placement, self._queued + others, self.options)

    def start_at_once(self, job: Job, now: float) -> Batch | None:
        """`submit` and `next_batches` in one, for a single picture while nobody waits; None where that is not so.

        Then the job has not been submitted. Most requests of a gateway with free slots go this way, and it is half as long.
        """
        if self._queued or len(job.tasks) != 1:
            return None
        job.cost = cost_of(job.request)
        if job.tenant.max_running is not None and self._lines.account(job.tenant).room <= 0:
            return None
        endpoint = self._placement.pick_at_once(job.tasks[0], now)
        if endpoint is None:
            return None
        self._jobs.add(job)
        self._queued += 1
        return self._start(endpoint, [job.tasks[0]], now)

    def next_batches(self, now: float) -> list[Batch]:
        """Bind waiting tasks to free slots, for as long as there are both that go together."""
        batches: list[Batch] = []
        if not self._queued:
            self._again.clear()
            return batches
        placement = self._placement
        placement.begin(now)
        if self._again and not placement.is_full():
            # some at a time: with a thousand waiting for an endpoint to recover, every event must not ask for all of them
            for task in [self._again.popleft() for _ in range(min(AGAIN_WINDOW, len(self._again)))]:
                if task.job.is_over or task.started:
                    continue
                endpoint = placement.pick_again(task)
                if endpoint is None:
                    self._again.append(task)
                else:
                    batches.append(self._start(endpoint, [task], now))
        self._place_lines(batches, now)
        return batches

    def _place_lines(self, batches: list[Batch], now: float) -> None:
        """Give free slots to the lines, always the one whose turn it is; who cannot go now is not asked again in this pass."""
        placement = self._placement
        lines = placement.lines_with_a_chance()
        alone = len(lines) == 1
        heap: list[tuple[tuple[float, ...], int, Line]] = [
            (() if alone else placement.rank(line), number, line) for number, line in enumerate(lines)
        ]
        heapify(heap)
        while heap:
            rank, number, line = heap[0]
            if not alone and rank != (current := placement.rank(line)):
                # its tenants have had a turn meanwhile
                heapreplace(heap, (current, number, line))
                continue
            found = placement.place(line)
            if found is None:
                heappop(heap)
                continue
            endpoint, members = found
            for task in members:
                self._lines.serve(line, task)
            batches.append(self._start(endpoint, members, now))
            if not line.queue.size:
                heappop(heap)
            if not alone and placement.is_full():
                return

    def wakes_at(self, now: float) -> float | None:
        """When to call `next_batches` again although nothing happens until then; None: not before something does."""
        wake = self._placement.wake
        return None if not self._queued or wake == NEVER else max(wake, now)

    def finish(self, batch: Batch, ended: Ended, now: float) -> list[Job]:
        """A batch's call is over; returns the jobs that are resolved by it."""
        del self._running[batch]
        endpoint = self._fleet[batch.endpoint_id]
        endpoint.end(batch)
        self._fleet.forget_if_over(endpoint)
        for task in batch.tasks:
            self._leave(task, batch)
        if judge(endpoint, batch, ended, now):
            self._fleet.recovered(endpoint, now, self.options.slow_start_seconds)
        done: list[Job] = []
        if ended.results is not None:
            for task, result in zip(batch.tasks, ended.results, strict=True):
                if task.job.is_over or task.artifact is not None:
                    continue
                if isinstance(result, Artifact):
                    task.artifact = result
                    if batch.is_hedge:
                        task.job.backend = batch.backend
                    if task.batch is not None:
                        self._suspects[task.batch] = None  # the other call for the same picture has lost
                    if len(task.job.tasks) == 1 or all(other.artifact is not None for other in task.job.tasks):
                        done.append(self._resolve(task.job, JobStatus.SUCCEEDED, None, now))
                elif result.refused:
                    done.append(self._fail(task.job, InvalidRequest(result.message, param="prompt"), now))
                else:
                    done += self._after_failure(task, endpoint, Outcome.FAILED, result.message, now)
        elif ended.refusal is not None:
            done += self._after_refusal(batch, ended.refusal, now)
        elif ended.outcome is not None:
            # A batch that failed as a whole is taken apart: its members are tried again one by one. It was one call, so
            # it costs the budget one retry, and the last member is not refused for the first ones' sake.
            shared = len(batch.tasks) > 1
            payment = Payment(self._budget, now)
            for task in batch.tasks:
                task.alone = task.alone or shared
                if not task.job.is_over:
                    done += self._after_failure(
                        task, endpoint, ended.outcome, ended.message, now, shared=shared, payment=payment
                    )
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
        """Running batches that nobody waits for any more; each is told once."""
        if not self._suspects:
            return []
        suspects, self._suspects = self._suspects, {}
        return [batch for batch in suspects if batch in self._running and batch.is_unwanted]

    def expire(self, now: float) -> list[Job]:
        """Resolve the jobs whose deadline has passed, or that waited longer than they may."""
        late: list[tuple[Job, str]] = []
        for job in self._jobs.late(now):
            waited = "before it started" if job.started_at is None else "before it was done"
            late.append((job, f"the deadline of {job.deadline - job.submitted_at:g} s passed {waited}"))
        longest = self.options.max_wait_seconds
        if longest is not None:
            told = {job.id for job, _ in late}
            for job in self._lines.waiting_since(now - longest):
                if job.started_at is None and job.id not in told:
                    told.add(job.id)
                    late.append((job, f"waited {longest:g} s without a free slot"))
        return [
            self._resolve(job, JobStatus.EXPIRED, DeadlineExceeded(message, should_retry=False), now)
            for job, message in late
        ]

    def heard_of(self, batch: Batch, now: float) -> None:
        """The engine reports progress: the call is alive."""
        batch.heard_at = now

    def look_after(self, now: float) -> list[Batch]:
        """Find endpoints whose calls have gone silent, and start second calls where a cheap endpoint is slow.

        A suspect endpoint gets no new work while another can do it, until one of its calls is over or speaks.
        """
        for endpoint in self._fleet:
            endpoint.suspect = bool(endpoint.running) and endpoint.is_silent(now)
        factor = self.options.retry.hedge_after_factor
        if factor is None or self._queued:
            return []
        self._placement.begin(now)
        batches: list[Batch] = []
        for batch in list(self._running):
            expected = batch.expected_seconds
            if batch.is_hedge or expected is None or now - batch.started_at < factor * expected:
                continue
            if not self._fleet[batch.endpoint_id].cheap:
                continue
            for task in batch.tasks:
                if not task.job.is_over and task.artifact is None and task.hedge is None:
                    other = self._placement.pick_hedge(task)
                    if other is not None and self._budget.spend(now):
                        batches.append(self._start(other, [task], now, is_hedge=True))
        return batches

    # what can be looked at

    def snapshot(self, now: float, *, with_waits: bool = True) -> SchedulerSnapshot:
        """A frozen picture of it all; without the tenants' waits it costs less."""
        return snapshot_of(self._placement, self._queued, self._running, now, with_waits=with_waits)

    def estimate(self, job: Job, now: float) -> JobEstimate:
        """A job's position in line, and when it should start and be done."""
        return estimate_of(job, self._placement, now)

    def estimates(self, jobs: Iterable[Job], now: float) -> list[JobEstimate]:
        """The same for many jobs, at hardly more than the cost of one."""
        book = Book(self._placement, now)
        return [estimate_of(job, self._placement, now, book=book) for job in jobs]

    def wait_estimate(self, now: float, route: Route | None = None) -> float:
        """Seconds until what waits now has probably started (for one route, or the slowest); 1 s at least."""
        return wait_seconds(self._placement, route, now)

    # starting

    def _start(self, endpoint: EndpointState, members: list[Task], now: float, *, is_hedge: bool = False) -> Batch:
        model = _model_for(members[0], endpoint)
        cost = members[0].job.cost * len(members)
        self._turn += 1
        endpoint.picked_at = self._turn
        if not is_hedge:
            self._queued -= len(members)
        is_last_hope = not endpoint.is_usable(now)
        durable = watched = False
        for task in members:
            job = task.job
            durable = durable or job.durable
            watched = watched or job.watcher is not None
            if not task.tried:
                self._budget.earn()
                job.panicked = job.panicked or is_last_hope
            task.tried.add(endpoint.id)
            task.attempts += 1
            task.calls += 1
            task.started = True
            if job.started_at is None:
                job.started_at = now
                job.status = JobStatus.RUNNING
            job.attempts = max(job.attempts, task.calls)
            if not is_hedge:
                job.backend = endpoint.backend
            if job.tenant.max_running is not None and not is_hedge:
                self._lines.account(job.tenant).started(task)
        batch = Batch(endpoint.id, endpoint.backend, model, tuple(members), endpoint.breaker.start(now), cost, now, now)
        batch.is_hedge = is_hedge
        batch.retry_unknown = endpoint.retry_unknown
        batch.durable = durable
        batch.watched = watched
        self._placement.expect(batch, endpoint, now)
        for task in members:
            if is_hedge:
                task.hedge = batch
            else:
                task.batch = batch
        endpoint.start(batch)
        self._running[batch] = None
        return batch

    def _leave(self, task: Task, batch: Batch) -> None:
        """The task does not travel in that batch any more."""
        if task.hedge is batch:
            task.hedge = None
        elif task.batch is batch:
            task.batch, task.hedge = task.hedge, None
        if task.batch is None and task.job.tenant.max_running is not None:
            self._lines.account(task.job.tenant).ended(task)

    # what follows from how it ended

    def _after_failure(
        self,
        task: Task,
        endpoint: EndpointState,
        outcome: Outcome,
        message: str,
        now: float,
        *,
        shared: bool = False,
        payment: Payment | None = None,
    ) -> list[Job]:
        """Try the task elsewhere if it may be and there is an elsewhere; else its job has failed.

        A task that failed in company (`shared`) may be asked for alone where it was, if that is all there is: perhaps it was
        another's prompt that spoiled the batch. `payment` is that of its whole batch.
        """
        if task.artifact is not None:
            return []
        if outcome is Outcome.NOT_STARTED:
            task.attempts -= 1
        if task.batch is not None:
            return []  # a second call for it is still running
        allowed = self._budget.allows(outcome, task.attempts, retry_unknown=endpoint.retry_unknown)
        if allowed:
            route = task.job.route
            if (
                outcome is Outcome.NOT_STARTED
                and now < endpoint.busy_until < task.job.deadline
                and task.calls < MOST_BUSY_CALLS
                and endpoint.enabled
                and not endpoint.removed
            ):
                task.tried.discard(
                    endpoint.id
                )  # it said when it is free again, and that is in time: it may be waited for
            if shared and not task.job.panicked and not self._fleet.has_untried(route, task.tried):
                task.tried.discard(endpoint.id)
            if self._fleet.has_untried(route, task.tried) and (
                outcome is Outcome.NOT_STARTED or (payment or Payment(self._budget, now)).is_made()
            ):
                self._stand_again(task)
                return []
        error = final_error(task, list(self._fleet.of(task.job.route)), message, now)
        if outcome is Outcome.UNKNOWN and not endpoint.retry_unknown:
            # it may be there, and paid for: only a person can say whether to ask again
            error = OutcomeUnknown(f"{message}; it may have been drawn and paid for", should_retry=False)
        return [self._fail(task.job, error, now)]

    def _after_refusal(self, batch: Batch, error: GatewayError, now: float) -> list[Job]:
        jobs = {task.job.id: task.job for task in batch.tasks}
        if len(jobs) == 1:
            return [self._fail(job, error, now) for job in jobs.values() if not job.is_over]
        # One of several requests is at fault, and nobody knows which: each is asked alone, at the same endpoint if need be.
        return self._ask_again(batch, now)

    def _ask_again(self, batch: Batch, now: float) -> list[Job]:
        """Ask for each picture of a batch again, alone, as if the call had not been."""
        done: list[Job] = []
        for task in batch.tasks:
            if task.job.is_over or task.artifact is not None:
                continue
            task.alone = True
            task.attempts -= 1
            if task.batch is not None:
                continue
            task.tried.discard(batch.endpoint_id)
            if self._fleet.has_untried(task.job.route, task.tried):
                self._stand_again(task)
            else:
                done.append(self._fail(task.job, NoUsableBackend(REMOVED, retry_after_seconds=1.0), now))
        return done

    def _stand_again(self, task: Task) -> None:
        task.started = False
        self._again.append(task)
        self._queued += 1

    def _resolve_hopeless(self, now: float) -> list[Job]:
        """Resolve waiting jobs that no endpoint is left for (a backend was removed)."""
        hopeless = [
            job
            for job in self._jobs.all
            if any(not task.started and not self._fleet.has_untried(job.route, task.tried) for task in job.tasks)
        ]
        return [self._fail(job, NoUsableBackend(REMOVED, retry_after_seconds=1.0), now) for job in hopeless]

    def _fail(self, job: Job, error: GatewayError, now: float) -> Job:
        return self._resolve(job, JobStatus.FAILED, error, now)

    def _resolve(self, job: Job, status: JobStatus, error: GatewayError | None, now: float) -> Job:
        job.status = status
        job.error = error
        job.finished_at = now
        self._jobs.remove(job)
        if status is JobStatus.SUCCEEDED:
            return job  # all of it was started: there is nothing left to find
        for task in job.tasks:
            if task.batch is not None:
                self._suspects[task.batch] = None
                if task.hedge is not None:
                    self._suspects[task.hedge] = None
            elif not task.started:
                self._queued -= 1
                if task.place is not None:
                    self._lines.leave(task)
        return job


def _model_for(task: Task, endpoint: EndpointState) -> str | None:
    for target in task.job.route:
        if target.backend == endpoint.backend:
            return target.model
    raise LookupError(f"{endpoint.backend} is not on the route")


__all__ = ["Scheduler", "SchedulerOptions"]
