"""The scheduler under any order of events: all resolved once, nothing miscounted, nobody sent where it may not go."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from img_serving.domain.capabilities import BatchShape, Capabilities
from img_serving.domain.errors import (
    ContentRefused,
    DeadlineUnreachable,
    NoUsableBackend,
    Outcome,
    QueueFull,
    RateLimited,
)
from img_serving.domain.images import Artifact, ImageRequest, ItemFailure
from img_serving.domain.jobs import CANCELLED, Batch, Ended, Job, JobStatus, Route, Target, Task
from img_serving.domain.tenants import ANONYMOUS, Tenant
from img_serving.policy.balancing import STRATEGIES
from img_serving.policy.circuit_breaker import BreakerOptions, CircuitBreaker
from img_serving.policy.endpoint import EndpointState, ExclusiveGroup
from img_serving.policy.health import HealthOptions, HealthRecord
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.retry import RetryOptions
from img_serving.policy.scheduler import Scheduler

PICTURE = Artifact("image/png", 8, 8, None, data=b"")
BACKENDS = ("a", "b", "c")
ROUTES: tuple[Route, ...] = (
    (Target("a", "m"),),
    (Target("a", "another"),),
    (Target("b", "m"),),
    (Target("a", "m"), Target("b", None)),
    (Target("a", "m", 0), Target("b", "m", 1)),
    (Target("c", "m", 1), Target("a", "m", 0), Target("b", "m", 1)),
)
SHAPES: tuple[BatchShape, ...] = ("single", "request", "seeds", "items")
MAX_TASKS = 60
TENANTS = (
    ANONYMOUS,
    Tenant("heavy", weight=4.0),
    Tenant("important", priority=2),
    Tenant("bounded", max_running=2),
)
KINDS = (
    "ok",
    "item failures",
    "item refusals",
    "all items fail",
    "failed",
    "unknown",
    "not started",
    "busy",
    "refused",
    "cancelled",
)


def may_travel_together(shape: BatchShape, tasks: tuple[Task, ...]) -> bool:
    """Said again from the words in `Capabilities`, not from the code under test."""
    if len(tasks) == 1:
        return True
    first = tasks[0].job.request
    alike = all(
        (task.job.request.steps, task.job.request.width, task.job.request.height)
        == (first.steps, first.width, first.height)
        for task in tasks
    )
    if shape == "request":
        return len({id(task.job) for task in tasks}) == 1 and not first.seed_given
    if shape == "seeds":
        consecutive = [task.seed for task in tasks] == [tasks[0].seed + index for index in range(len(tasks))]
        return alike and consecutive and len({task.job.request.prompt for task in tasks}) == 1
    return alike and shape == "items"


class SchedulerMachine(RuleBasedStateMachine):
    """Does what a gateway does, in any order, and keeps its own books."""

    @initialize(
        strategy=st.sampled_from(sorted(STRATEGIES)),
        max_wait_seconds=st.sampled_from([None, None, 20.0]),
        max_attempts=st.integers(1, 4),
        floor=st.sampled_from([0.01, 10.0]),
        seed=st.integers(0, 99),
        shapes=st.lists(st.sampled_from(SHAPES), min_size=4, max_size=4),
        plain=st.booleans(),
        panic_mode=st.booleans(),
        overflow=st.sampled_from([None, 5.0]),
        hedge=st.sampled_from([None, 2.0]),
        ageing=st.sampled_from([0.0, 10.0]),
        affinity=st.sampled_from([0.0, 5.0]),
        max_work=st.sampled_from([None, None, 1000.0]),
    )
    def start(
        self,
        *,
        strategy,
        max_wait_seconds,
        max_attempts,
        floor,
        seed,
        shapes,
        plain,
        panic_mode,
        overflow,
        hedge,
        ageing,
        affinity,
        max_work,
    ):
        """`plain`: nobody ever waits on purpose (for company, for a model, for a faster endpoint, for another's GPU)."""
        self.now = 1000.0
        self.rng = Random(seed)
        self.plain = plain and strategy != "least_work"
        self.panic_mode = panic_mode or self.plain
        self.overflow = None if self.plain else overflow
        self.groups = {} if self.plain else {name: ExclusiveGroup(name) for name in ("gpu 0", "gpu 1")}
        retry = RetryOptions(max_attempts=max_attempts, floor_per_second=floor, hedge_after_factor=hedge)
        options = SchedulerOptions(
            strategy,
            max_tasks=MAX_TASKS,
            max_work=max_work,
            max_wait_seconds=max_wait_seconds,
            ageing_seconds=ageing,
            affinity_seconds=affinity,
            slow_start_seconds=0.0 if self.plain else 30.0,
            tier_overflow_seconds=self.overflow,
            panic_mode=self.panic_mode,
            retry=retry,
        )
        self.max_attempts = max_attempts
        self.max_work = max_work
        self.scheduler = Scheduler(options, self.rng, self.now)
        self.endpoints: dict[int, EndpointState] = {}
        self.open_jobs: dict[str, Job] = {}
        self.resolved: Counter[str] = Counter()
        self.submitted: list[Job] = []
        self.running: list[Batch] = []
        for backend, shape in zip("aabc", shapes, strict=True):
            self._add(backend, shape, size=3, slots=1)

    # what happens to endpoints

    @rule(
        backend=st.sampled_from(BACKENDS),
        shape=st.sampled_from(SHAPES),
        size=st.integers(1, 4),
        slots=st.integers(1, 3),
        weight=st.sampled_from([0.5, 1.0, 5.0]),
        retry_unknown=st.booleans(),
        switches=st.booleans(),
        linger=st.sampled_from([0.0, 1.0]),
        group=st.sampled_from([None, "gpu 0", "gpu 1"]),
        cheap=st.booleans(),
        pixels=st.sampled_from([None, 2 * 1024 * 1024]),
    )
    def add_endpoint(
        self, *, backend, shape, size, slots, weight, retry_unknown, switches, linger, group, cheap, pixels
    ):
        assume(len(self.endpoints) < 12)
        self._add(
            backend,
            shape,
            size=size,
            slots=slots,
            weight=weight,
            retry_unknown=retry_unknown,
            switches=switches,
            linger=linger,
            group=group,
            cheap=cheap,
            pixels=pixels,
        )

    def _add(
        self,
        backend,
        shape,
        *,
        size,
        slots,
        weight=1.0,
        retry_unknown=True,
        switches=False,
        linger=0.0,
        group=None,
        cheap=False,
        pixels=None,
    ):
        number = len(self.endpoints)
        self.endpoints[number] = EndpointState(
            id=number,
            backend=backend,
            url=f"http://{number}",
            slots=slots,
            weight=weight,
            capabilities=Capabilities(batch=shape, max_batch_size=size, switches_models=switches and not self.plain),
            max_batch_size=size,
            max_batch_pixels=pixels,
            linger_seconds=0.0 if self.plain else linger,
            group=self.groups.get(group),
            cheap=cheap,
            breaker=CircuitBreaker(BreakerOptions(failures=2), self.rng),
            health=HealthRecord(HealthOptions(fall=1)),
            retry_unknown=retry_unknown,
        )
        self.scheduler.add_endpoint(self.endpoints[number])

    @rule(backend=st.sampled_from(BACKENDS))
    def remove_backend(self, backend):
        self.note(self.scheduler.remove_backend(backend, self.now))
        for task in self.waiting():
            names = {target.backend for target in task.job.route}
            assert any(
                endpoint.backend in names
                and endpoint.enabled
                and not endpoint.removed
                and endpoint.id not in task.tried
                for endpoint in self.endpoints.values()
            )

    @precondition(lambda self: self.endpoints)
    @rule(data=st.data(), ok=st.booleans())
    def check_health(self, data, ok):
        endpoint = self.any_endpoint(data)
        if not endpoint.removed:
            self.scheduler.set_endpoint_state(endpoint.id, self.now, healthy=ok)

    @precondition(lambda self: self.endpoints)
    @rule(data=st.data(), enabled=st.booleans())
    def enable(self, data, enabled):
        endpoint = self.any_endpoint(data)
        if not endpoint.removed:
            self.scheduler.set_endpoint_state(endpoint.id, self.now, enabled=enabled)

    @precondition(lambda self: self.endpoints)
    @rule(data=st.data(), slots=st.integers(1, 4))
    def resize(self, data, slots):
        """An engine has said what it can."""
        endpoint = self.any_endpoint(data)
        if not endpoint.removed:
            endpoint.resize(slots)
            self.scheduler.endpoint_changed()

    # what happens to jobs

    @rule(
        n=st.integers(1, 5),
        route=st.sampled_from(ROUTES),
        prompt=st.sampled_from(["cat", "dog"]),
        steps=st.sampled_from([4, 20]),
        seed=st.integers(0, 3),
        seed_given=st.booleans(),
        patience=st.sampled_from([5.0, 60.0, 1000.0]),
        at_once=st.booleans(),
        tenant=st.sampled_from(TENANTS),
    )
    def submit(self, *, n, route, prompt, steps, seed, seed_given, patience, at_once, tenant):
        job = Job(
            id=f"job {len(self.submitted)}",
            request=ImageRequest(prompt, n=n, steps=steps, seed=seed, seed_given=seed_given),
            route=route,
            tenant=tenant,
            submitted_at=self.now,
            deadline=self.now + patience,
        )
        before = self.scheduler.queued
        served = any(
            endpoint.enabled and not endpoint.removed and endpoint.backend in {target.backend for target in route}
            for endpoint in self.endpoints.values()
        )
        usable = {number for number, endpoint in self.endpoints.items() if endpoint.is_usable(self.now)}
        if at_once and (batch := self.scheduler.start_at_once(job, self.now)) is not None:
            assert before == 0
            assert served
            assert batch.tasks == (job.tasks[0],)
            self.submitted.append(job)
            self.open_jobs[job.id] = job
            self.check_batch(batch, {id(job.tasks[0]): set()}, usable)
            assert self.scheduler.queued == 0
            return
        try:
            self.scheduler.submit(job)
        except NoUsableBackend:
            assert not served
        except QueueFull:
            assert before + n > MAX_TASKS or self.max_work is not None
        except DeadlineUnreachable:
            assert before or self.running
        except RateLimited:
            assert tenant.max_running is not None
        else:
            assert served
            assert before + n <= MAX_TASKS
            self.submitted.append(job)
            self.open_jobs[job.id] = job
            return
        assert self.scheduler.queued == before

    @precondition(lambda self: self.open_jobs)
    @rule(data=st.data())
    def cancel(self, data):
        job = self.open_jobs[data.draw(st.sampled_from(sorted(self.open_jobs)))]
        unwanted = self.scheduler.cancel(job, self.now)
        self.note([job])
        assert job.status is JobStatus.CANCELLED
        assert self.scheduler.cancel(job, self.now) == []
        for batch in unwanted:
            assert batch in self.running
            assert all(task.job.is_over for task in batch.tasks)

    @rule()
    def look_after(self):
        before = {id(task): set(task.tried) for job in self.open_jobs.values() for task in job.tasks}
        usable = {number for number, endpoint in self.endpoints.items() if endpoint.is_usable(self.now)}
        for batch in self.scheduler.look_after(self.now):
            (task,) = batch.tasks
            assert batch.is_hedge
            assert task.hedge is batch
            assert task.batch in self.running
            assert self.endpoints[batch.endpoint_id].cheap
            assert self.endpoints[task.batch.endpoint_id].cheap
            self.check_batch(batch, before, usable)

    @rule()
    def next_batches(self):
        before = {id(task): set(task.tried) for job in self.open_jobs.values() for task in job.tasks}
        usable = {number for number, endpoint in self.endpoints.items() if endpoint.is_usable(self.now)}
        seen: set[int] = set()
        for batch in self.scheduler.next_batches(self.now):
            for task in batch.tasks:
                assert id(task) not in seen
                seen.add(id(task))
            self.check_batch(batch, before, usable)
        if self.plain:
            assert self.scheduler.next_batches(self.now) == []
        self.nobody_waits_in_vain()

    def check_batch(self, batch: Batch, before: dict[int, set[int]], usable: set[int]) -> None:
        endpoint = self.endpoints[batch.endpoint_id]
        assert endpoint.enabled
        assert not endpoint.removed
        assert 1 <= len(batch.tasks) <= endpoint.max_batch_size
        assert endpoint.in_flight <= endpoint.slots
        if endpoint.max_batch_pixels is not None and len(batch.tasks) > 1:
            assert len(batch.tasks) * 1024 * 1024 <= endpoint.max_batch_pixels
        assert may_travel_together(endpoint.capabilities.batch, batch.tasks)
        target = next(one for one in batch.tasks[0].job.route if one.backend == endpoint.backend)
        assert (batch.backend, batch.model) == (endpoint.backend, target.model)
        for task in batch.tasks:
            assert not task.job.is_over
            assert task.artifact is None
            assert endpoint.id not in before[id(task)]
            assert task.attempts <= self.max_attempts + batch.is_hedge
            assert task.job.deadline > self.now
            self.nothing_better_was_left(task, endpoint, before[id(task)], usable)
        self.running.append(batch)

    def nothing_better_was_left(self, task: Task, chosen: EndpointState, tried: set[int], usable: set[int]) -> None:
        """A lower tier, or an endpoint that is not usable, is taken only where no usable endpoint stands before it."""
        tiers = {target.backend: target.tier for target in task.job.route}
        for number in usable - tried:
            endpoint = self.endpoints[number]
            if endpoint.backend in tiers and not endpoint.removed and endpoint.is_usable(self.now):
                assert chosen.id in usable
                if self.overflow is None:
                    assert tiers[chosen.backend] <= tiers[endpoint.backend]

    def nobody_waits_in_vain(self):
        """A task waits only while the first tier with a usable endpoint that it has not tried is full."""
        if not self.plain:
            return
        for task in self.waiting():
            if task.job.deadline <= self.now or task.job.tenant.max_running is not None:
                continue
            for tier in sorted({target.tier for target in task.job.route}):
                names = {target.backend for target in task.job.route if target.tier == tier}
                usable = [
                    endpoint
                    for endpoint in self.endpoints.values()
                    if endpoint.backend in names and endpoint.id not in task.tried and endpoint.is_usable(self.now)
                ]
                assert all(endpoint.in_flight >= endpoint.slots for endpoint in usable)
                if usable:
                    break

    @precondition(lambda self: self.running)
    @rule(data=st.data(), kind=st.sampled_from(KINDS))
    def finish_and_go_on(self, data, kind):
        """What the dispatcher does: an endpoint that became free is given work at once."""
        self.finish(data=data, kind=kind)
        self.next_batches()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), kind=st.sampled_from(KINDS))
    def finish(self, data, kind):
        batch = data.draw(st.sampled_from(self.running))
        self.running.remove(batch)
        size = len(batch.tasks)
        mixed = [data.draw(st.booleans()) for _ in range(size)] if kind.startswith("item ") else []
        failure = ItemFailure("no", refused=kind == "item refusals")
        ended = {
            "ok": Ended(results=(PICTURE,) * size),
            "item failures": Ended(results=tuple(PICTURE if good else failure for good in mixed)),
            "item refusals": Ended(results=tuple(PICTURE if good else failure for good in mixed)),
            "all items fail": Ended(results=(failure,) * size),
            "failed": Ended(outcome=Outcome.FAILED, message="failed"),
            "unknown": Ended(outcome=Outcome.UNKNOWN, message="cut"),
            "not started": Ended(outcome=Outcome.NOT_STARTED, message="refused"),
            "busy": Ended(outcome=Outcome.NOT_STARTED, message="busy", busy_seconds=3.0),
            "refused": Ended(refusal=ContentRefused("no")),
            "cancelled": CANCELLED,
        }[kind]
        self.note(self.scheduler.finish(batch, ended, self.now))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def progress(self, data):
        self.scheduler.heard_of(data.draw(st.sampled_from(self.running)), self.now)

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 10.0, 100.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        self.note(self.scheduler.expire(self.now))
        assert all(job.deadline > self.now for job in self.open_jobs.values())

    # the books

    def any_endpoint(self, data) -> EndpointState:
        return self.endpoints[data.draw(st.sampled_from(sorted(self.endpoints)))]

    def note(self, jobs: list[Job]) -> None:
        for job in jobs:
            assert self.open_jobs.pop(job.id) is job
            self.resolved[job.id] += 1
            assert job.is_over
            if job.status is JobStatus.SUCCEEDED:
                assert job.error is None
                assert all(task.artifact is not None for task in job.tasks)
            else:
                assert job.error is not None

    def waiting(self) -> list[Task]:
        return [task for job in self.open_jobs.values() for task in job.tasks if not task.started]

    @invariant()
    def the_scheduler_knows_the_open_jobs(self):
        assert {job.id for job in self.scheduler.jobs} == set(self.open_jobs)
        assert all(not job.is_over for job in self.open_jobs.values())

    @invariant()
    def queued_is_the_number_of_tasks_that_wait_and_each_stands_in_one_place(self):
        waiting = {id(task) for task in self.waiting()}
        standing = [id(task) for task in self.scheduler._again if not task.job.is_over and not task.started]
        for line in self.scheduler._lines:
            tasks = [task for level in line.queue.levels for lane in level.lanes.values() for task in lane.tasks]
            assert line.queue.size == len(tasks) > 0
            assert line.queue.work == pytest.approx(sum(task.job.cost for task in tasks))
            standing += map(id, tasks)
        assert self.scheduler.queued == len(waiting)
        assert len(standing) == len(waiting)
        assert set(standing) == waiting

    @invariant()
    def the_order_of_a_line_has_everybody_once_but_for_those_over_their_cap(self):
        for line in self.scheduler._lines:
            order = list(line.queue.order())
            assert len(set(map(id, order))) == len(order)
            for level in line.queue.levels:
                for lane in level.lanes.values():
                    expected = min(len(lane.tasks), max(0, lane.account.room))
                    assert [task for task in order if task.place is lane] == list(lane.tasks)[:expected]

    @invariant()
    def tenants_keep_to_their_caps_and_the_books_are_right(self):
        for share in self.scheduler._lines.accounts:
            waiting = [task for task in self.waiting() if task.job.tenant.name == share.name and task.place is not None]
            assert share.waiting == len(waiting)
            assert share.work == pytest.approx(sum(task.job.cost for task in waiting), abs=1e-6)
            if share.max_running is not None:
                tasks = {
                    id(task) for batch in self.running for task in batch.tasks if task.job.tenant.name == share.name
                }
                assert {id(task) for task in share.running} == tasks
                assert len(tasks) <= share.max_running

    @invariant()
    def a_gpu_is_used_by_one_endpoint_at_a_time(self):
        for name, group in self.groups.items():
            busy = [endpoint for endpoint in self.endpoints.values() if endpoint.group is group and endpoint.in_flight]
            assert len(busy) <= 1, name
            assert group.holder is (busy[0] if busy else None)

    @invariant()
    def every_running_task_knows_its_batches(self):
        for batch in self.running:
            for task in batch.tasks:
                assert batch in {task.batch, task.hedge}
                assert task.started

    @invariant()
    def slots_and_costs_are_those_of_the_running_batches(self):
        assert self.scheduler.running == len(self.running)
        for endpoint in self.endpoints.values():
            here = [batch for batch in self.running if batch.endpoint_id == endpoint.id]
            assert endpoint.in_flight == len(here)
            full = [batch.expected_end for batch in here] if len(here) >= endpoint.slots else []
            assert endpoint.expected_free == min(full, default=0.0)
            assert endpoint.outstanding_cost == pytest.approx(sum(batch.cost for batch in here), abs=1e-6)

    @invariant()
    def a_snapshot_can_always_be_taken(self):
        snapshot = self.scheduler.snapshot(self.now)
        assert (snapshot.queued, snapshot.running) == (self.scheduler.queued, self.scheduler.running)
        assert snapshot.oldest_seconds >= 0
        assert sum(tenant.depth for tenant in snapshot.tenants) == sum(
            len(line.queue) for line in self.scheduler._lines
        )
        assert self.scheduler.wait_estimate(self.now) >= 1.0
        for job in self.open_jobs.values():
            estimate = self.scheduler.estimate(job, self.now)
            assert 0 <= estimate.position <= self.scheduler.queued
            assert estimate.wait_seconds is None or estimate.wait_seconds >= 0

    def teardown(self):
        """Everything ends: what runs answers, what can start does, and the deadline takes the rest."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(1000):
            while self.running:
                batch = self.running.pop()
                ended = (
                    CANCELLED if batch in self.scheduler.unwanted() else Ended(results=(PICTURE,) * len(batch.tasks))
                )
                self.note(self.scheduler.finish(batch, ended, self.now))
            self.next_batches()
            if not self.running:
                break
        self.now += 1e6
        self.note(self.scheduler.expire(self.now))
        assert self.resolved == Counter(job.id for job in self.submitted)
        assert self.open_jobs == {}
        assert (self.scheduler.queued, self.scheduler.running) == (0, 0)
        assert self.scheduler.next_batches(self.now) == []
        assert not self.scheduler._again
        assert not list(self.scheduler._lines)
        assert not self.scheduler._jobs._by_patience
        assert all(endpoint.in_flight == 0 for endpoint in self.endpoints.values())
        assert not any(endpoint.removed for endpoint in self.scheduler._fleet)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
