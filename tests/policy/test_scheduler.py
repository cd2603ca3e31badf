"""The scheduler, fact by fact; `test_scheduler_properties` holds what is true in any order of events."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.domain.capabilities import BatchShape, Capabilities
from img_serving.domain.errors import (
    AllAttemptsFailed,
    ContentRefused,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    NoUsableBackend,
    Outcome,
    QueueFull,
)
from img_serving.domain.images import Artifact, ImageRequest, ItemFailure
from img_serving.domain.jobs import CANCELLED, Batch, Ended, Job, JobStatus, Target, Task
from img_serving.domain.tenants import ANONYMOUS
from img_serving.policy.circuit_breaker import BreakerOptions, BreakerState, CircuitBreaker
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.health import HealthOptions, HealthRecord
from img_serving.policy.options import SchedulerOptions
from img_serving.policy.retry import RetryOptions
from img_serving.policy.scheduler import Scheduler

steady = settings(deadline=None, derandomize=True)

PICTURE = Artifact("image/png", 8, 8, None, data=b"")
FAILED = Ended(outcome=Outcome.FAILED, message="it broke")
UNKNOWN = Ended(outcome=Outcome.UNKNOWN, message="it was cut")
NOT_STARTED = Ended(outcome=Outcome.NOT_STARTED, message="it refused")
BREAKER = BreakerOptions(failures=3, open_seconds=10, jitter=0)


def busy(seconds: float) -> Ended:
    return Ended(outcome=Outcome.NOT_STARTED, message="too many requests", busy_seconds=seconds)


def scheduler(**options: Any) -> Scheduler:
    return Scheduler(SchedulerOptions(**options), Random(1), now=0.0)


def endpoint(
    number: int,
    backend: str = "a",
    *,
    slots: int = 1,
    shape: BatchShape = "single",
    size: int = 1,
    retry_unknown: bool = True,
) -> EndpointState:
    return EndpointState(
        id=number,
        backend=backend,
        url=f"http://{number}",
        slots=slots,
        weight=1.0,
        capabilities=Capabilities(batch=shape, max_batch_size=size),
        max_batch_size=size,
        breaker=CircuitBreaker(BREAKER, Random(1)),
        health=HealthRecord(HealthOptions()),
        retry_unknown=retry_unknown,
    )


def with_endpoints(*endpoints: EndpointState, **options: Any) -> Scheduler:
    one = scheduler(**options)
    for state in endpoints:
        one.add_endpoint(state)
    return one


counter = iter(range(10**9))


def job(*backends: str | tuple[str, int], now: float = 0.0, patience: float = 1000.0, **request: Any) -> Job:
    """A job for these backends (name, or name and tier); no backend means "a"."""
    named = [(one, 0) if isinstance(one, str) else one for one in backends or ("a",)]
    return Job(
        id=f"job {next(counter)}",
        request=ImageRequest(request.pop("prompt", "cat"), **request),
        route=tuple(Target(name, f"model of {name}", tier) for name, tier in named),
        tenant=ANONYMOUS,
        submitted_at=now,
        deadline=now + patience,
    )


def submitted(one: Scheduler, *jobs: Job) -> tuple[Job, ...]:
    for each in jobs:
        one.submit(each)
    return jobs


def drawn(batch: Batch) -> Ended:
    return Ended(results=(PICTURE,) * len(batch.tasks))


def places(batches: Iterable[Batch]) -> list[int]:
    return [batch.endpoint_id for batch in batches]


def break_open(state: EndpointState, now: float = 0.0) -> None:
    for _ in range(BREAKER.failures):
        state.breaker.end(state.breaker.start(now), False, now)
    assert not state.breaker.admits(now)


def only(batches: list[Batch]) -> Batch:
    assert len(batches) == 1
    return batches[0]


# a job's life


def test_a_lone_job_on_an_idle_endpoint_starts_at_once():
    one = with_endpoints(endpoint(0))
    (asked,) = submitted(one, job())
    batch = only(one.next_batches(2.0))
    assert (batch.backend, batch.model, batch.endpoint_id) == ("a", "model of a", 0)
    assert (asked.status, asked.queued_seconds, asked.backend) == (JobStatus.RUNNING, 2.0, "a")
    assert one.finish(batch, drawn(batch), 5.0) == [asked]
    assert (asked.status, asked.finished_at, asked.error, asked.attempts) == (JobStatus.SUCCEEDED, 5.0, None, 1)


def test_a_job_of_several_pictures_is_done_when_the_last_one_is():
    one = with_endpoints(endpoint(0, slots=2))
    (asked,) = submitted(one, job(n=2))
    first, second = one.next_batches(0)
    assert one.finish(second, drawn(second), 1) == []
    assert one.finish(first, drawn(first), 2) == [asked]


def test_a_full_queue_takes_all_of_a_job_or_nothing():
    one = with_endpoints(endpoint(0), max_tasks=5)
    submitted(one, job(n=3))
    with pytest.raises(QueueFull, match="3 of at most 5") as caught:
        one.submit(job(n=3))
    assert caught.value.retry_after_seconds is not None
    assert one.queued == 3
    submitted(one, job(n=2))


def test_a_job_that_no_endpoint_is_left_for_is_refused_instead_of_waiting_for_its_deadline():
    one = with_endpoints(endpoint(0))
    one.remove_backend("a", 0)
    with pytest.raises(NoUsableBackend):
        one.submit(job())
    assert (one.queued, list(one.jobs)) == (0, [])


def test_a_deadline_that_passes_resolves_the_job_waiting_or_running():
    one = with_endpoints(endpoint(0))
    running, waiting, patient = submitted(one, job(patience=5), job(patience=5), job(patience=50))
    batch = only(one.next_batches(0))
    assert one.expire(4.9) == []
    assert one.expire(5) == [running, waiting]
    assert {each.status for each in (running, waiting)} == {JobStatus.EXPIRED}
    assert isinstance(running.error, DeadlineExceeded)
    assert "before it was done" in running.error.message
    assert "before it started" in str(waiting.error)
    assert one.unwanted() == [batch]
    one.finish(batch, CANCELLED, 5)
    assert only(one.next_batches(5)).tasks[0].job is patient


def test_the_longest_wait_counts_only_until_the_first_slot():
    one = with_endpoints(endpoint(0), max_wait_seconds=10)
    running, waiting = submitted(one, job(), job())
    one.next_batches(0)
    assert one.expire(10) == [waiting]
    assert not running.is_over


def test_a_cancelled_job_that_waits_vanishes_from_the_queue():
    one = with_endpoints(endpoint(0))
    _, second, third = submitted(one, job(), job(), job())
    batch = only(one.next_batches(0))
    assert one.cancel(second, 1) == []
    assert (second.status, one.queued) == (JobStatus.CANCELLED, 1)
    one.finish(batch, drawn(batch), 2)
    assert only(one.next_batches(2)).tasks[0].job is third


def test_a_batch_that_somebody_else_still_wants_is_not_given_up():
    one = with_endpoints(endpoint(0, shape="items", size=2))
    first, second = submitted(one, job(), job())
    batch = only(one.next_batches(0))
    assert one.cancel(first, 1) == []
    assert one.cancel(second, 1) == [batch]


def test_a_job_may_be_ended_with_an_error_of_the_callers():
    one = with_endpoints(endpoint(0))
    (asked,) = submitted(one, job())
    one.cancel(asked, 0, Draining("stopping"))
    assert (asked.status, type(asked.error)) == (JobStatus.FAILED, Draining)


def test_the_pictures_of_a_cancelled_job_that_arrive_late_resolve_nothing():
    one = with_endpoints(endpoint(0))
    (asked,) = submitted(one, job())
    batch = only(one.next_batches(0))
    one.cancel(asked, 1)
    assert one.finish(batch, drawn(batch), 2) == []
    assert asked.status is JobStatus.CANCELLED


def test_a_call_cancelled_although_somebody_wants_it_is_made_again():
    one = with_endpoints(endpoint(0))
    (asked,) = submitted(one, job())
    assert one.finish(only(one.next_batches(0)), CANCELLED, 1) == []
    again = only(one.next_batches(1))
    assert one.finish(again, drawn(again), 2) == [asked]


def test_a_call_cancelled_on_a_removed_backend_ends_its_job():
    one = with_endpoints(endpoint(0))
    (asked,) = submitted(one, job())
    batch = only(one.next_batches(0))
    one.remove_backend("a", 1)
    assert one.finish(batch, CANCELLED, 2) == [asked]
    assert isinstance(asked.error, NoUsableBackend)


# order


@steady
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=15), slots=st.integers(1, 3), size=st.integers(1, 4))
def test_tasks_of_one_route_start_in_the_order_they_came(sizes, slots, size):
    one = with_endpoints(endpoint(0, slots=slots, shape="items", size=size), endpoint(1, slots=slots))
    expected = [task for each in submitted(one, *(job(n=n) for n in sizes)) for task in each.tasks]
    started: list[Task] = []
    while batches := one.next_batches(0):
        for batch in batches:
            started += batch.tasks
            one.finish(batch, drawn(batch), 0)
    assert started == expected


def test_a_second_try_does_not_stand_in_line_again():
    one = with_endpoints(endpoint(0), endpoint(1))
    first, _, _ = submitted(one, job(), job(), job())
    batch, other = one.next_batches(0)
    one.finish(batch, FAILED, 1)
    assert one.next_batches(1) != []  # the third takes the free endpoint: the first has tried it
    one.finish(other, drawn(other), 2)
    assert only(one.next_batches(2)).tasks == (first.tasks[0],)


def test_routes_do_not_block_each_other():
    one = with_endpoints(endpoint(0, "a"), endpoint(1, "b"))
    submitted(one, job("a"), job("a"))
    assert places(one.next_batches(0)) == [0]
    submitted(one, job("b"))
    assert places(one.next_batches(0)) == [1]


def test_clients_that_come_and_go_behind_a_blocked_head_leave_nothing_behind():
    one = with_endpoints(endpoint(0))
    head, running = job(), job()
    submitted(one, running)
    one.next_batches(0)
    submitted(one, head)
    for _ in range(5000):
        (passing,) = submitted(one, job(n=2))
        one.cancel(passing, 0)
        one.next_batches(0)
    assert one.queued == 1
    assert [line.queue.size for line in one._lines] == [1]
    assert sum(len(level._arrivals) for line in one._lines for level in line.queue.levels) <= 200


def test_routes_of_clients_that_left_are_forgotten():
    one = with_endpoints(endpoint(0))
    for index in range(100):
        asked = job()
        asked.route = (Target("a", f"a model that the client made up: {index}"),)
        one.submit(asked)
        one.cancel(asked, 0)
        one.next_batches(0)
    assert list(one._lines) == []


# batches


def test_batches_form_by_themselves_while_the_slots_are_busy():
    one = with_endpoints(endpoint(0, shape="items", size=4))
    submitted(one, job())
    first = only(one.next_batches(0))
    assert len(first.tasks) == 1
    submitted(one, *(job(prompt=f"picture {index}") for index in range(6)))
    assert one.next_batches(0) == []
    one.finish(first, drawn(first), 1)
    assert len(only(one.next_batches(1)).tasks) == 4


def test_work_is_spread_over_idle_endpoints_before_it_is_batched():
    one = with_endpoints(*(endpoint(number, shape="items", size=8) for number in range(4)))
    submitted(one, job(n=4))
    assert [len(batch.tasks) for batch in one.next_batches(0)] == [1, 1, 1, 1]
    one = with_endpoints(*(endpoint(number, shape="items", size=8) for number in range(4)))
    submitted(one, job(n=10))
    assert sorted(len(batch.tasks) for batch in one.next_batches(0)) == [2, 2, 3, 3]


@pytest.mark.parametrize("why", ["down", "broken", "disabled", "lower tier"])
def test_slots_that_will_not_take_work_do_not_make_batches_smaller(why):
    able = endpoint(0, "a", shape="items", size=8)
    unable = endpoint(1, "b", slots=32, shape="items", size=8)
    one = with_endpoints(able, unable)
    if why == "down":
        unable.health.record(ok=False, detail="")
    elif why == "broken":
        break_open(unable)
    elif why == "disabled":
        unable.enabled = False
    submitted(one, job("a", ("b", 1 if why == "lower tier" else 0), n=8))
    assert [len(batch.tasks) for batch in one.next_batches(0)] == [8]


def test_company_is_taken_past_the_dead_and_past_those_that_do_not_fit():
    one = with_endpoints(endpoint(0, shape="items", size=3))
    blocker, head, gone, unlike, friend = jobs = [job(), job(), job(), job(steps=3), job()]
    submitted(one, blocker)
    batch = only(one.next_batches(0))
    submitted(one, *jobs[1:])
    one.cancel(gone, 0)
    one.finish(batch, drawn(batch), 0)
    assert [task.job for task in only(one.next_batches(0)).tasks] == [head, friend]
    (line,) = one._lines
    assert ([task.job for task in line.queue.order()], one.queued) == ([unlike], 1)


def test_a_batch_refused_as_a_whole_is_tried_one_by_one_and_only_the_poisonous_one_fails():
    one = with_endpoints(endpoint(0, shape="items", size=3))
    good, poison, fine = submitted(one, job(), job(prompt="poison"), job())
    batch = only(one.next_batches(0))
    assert len(batch.tasks) == 3
    error = ContentRefused("not that")
    assert one.finish(batch, Ended(refusal=error), 1) == []
    assert one.queued == 3
    done: list[Job] = []
    while batches := one.next_batches(1):
        for each in batches:
            assert len(each.tasks) == 1
            refused = each.tasks[0].job is poison
            done += one.finish(each, Ended(refusal=error) if refused else drawn(each), 1)
    assert set(map(id, done)) == set(map(id, (good, poison, fine)))
    assert (poison.status, poison.error) == (JobStatus.FAILED, error)
    assert (good.status, fine.status) == (JobStatus.SUCCEEDED, JobStatus.SUCCEEDED)


def test_a_refusal_is_not_tried_elsewhere_and_not_counted_by_the_breaker():
    state = endpoint(0)
    one = with_endpoints(state, endpoint(1))
    for _ in range(10):
        (asked,) = submitted(one, job())
        batch = only(one.next_batches(0))
        assert one.finish(batch, Ended(refusal=ContentRefused("no")), 0) == [asked]
        assert isinstance(asked.error, ContentRefused)
    assert state.breaker.state(0) is BreakerState.CLOSED
    assert state.failures == 0


def test_a_batch_refused_while_its_backend_is_removed_ends_its_jobs():
    one = with_endpoints(endpoint(0, shape="items", size=2))
    jobs = submitted(one, job(), job())
    batch = only(one.next_batches(0))
    one.remove_backend("a", 0)
    assert one.finish(batch, Ended(refusal=ContentRefused("no")), 1) == list(jobs)
    assert one.queued == 0


def test_a_batch_that_failed_is_taken_apart_and_its_members_are_tried_elsewhere_alone():
    one = with_endpoints(endpoint(0, "a", shape="items", size=4), endpoint(1, "b", slots=4, shape="items", size=4))
    for state in one._fleet._by_backend["b"]:
        state.enabled = False
    submitted(one, job("a", "b"), job("a", "b"))
    batch = only(one.next_batches(0))
    one._fleet._by_backend["b"][0].enabled = True
    one.finish(batch, FAILED, 0)
    assert [(each.endpoint_id, len(each.tasks)) for each in one.next_batches(0)] == [(1, 1), (1, 1)]


def test_only_the_failed_pictures_of_a_batch_are_tried_again():
    one = with_endpoints(endpoint(0, "a", shape="items", size=2), endpoint(1, "b"))
    one._fleet._by_backend["b"][0].enabled = False
    (asked,) = submitted(one, job("a", "b", n=2))
    batch = only(one.next_batches(0))
    one._fleet._by_backend["b"][0].enabled = True
    assert one.finish(batch, Ended(results=(PICTURE, ItemFailure("smudged"))), 1) == []
    again = only(one.next_batches(1))
    assert (again.endpoint_id, again.tasks) == (1, (asked.tasks[1],))
    assert one.finish(again, drawn(again), 2) == [asked]
    assert asked.attempts == 2


def test_a_picture_refused_on_its_own_fails_its_job_only():
    one = with_endpoints(endpoint(0, shape="items", size=2))
    bad, good = submitted(one, job(), job())
    batch = only(one.next_batches(0))
    assert one.finish(batch, Ended(results=(ItemFailure("no", refused=True), PICTURE)), 1) == [bad, good]
    assert isinstance(bad.error, InvalidRequest)
    assert good.status is JobStatus.SUCCEEDED


def test_an_endpoint_whose_pictures_all_fail_is_broken_and_its_speed_is_not_learned():
    state = endpoint(0, shape="items", size=2)
    one = with_endpoints(state)
    for _ in range(BREAKER.failures):
        submitted(one, job(n=2))
        batch = only(one.next_batches(0))
        one.finish(batch, Ended(results=(ItemFailure("out of memory"),) * 2), 0.001)
    assert not state.breaker.admits(0.001)
    assert (state.speed.per_unit, state.last_error) == (None, "out of memory")


def test_an_endpoint_that_refuses_all_pictures_is_not_broken():
    state = endpoint(0)
    one = with_endpoints(state)
    for _ in range(10):
        submitted(one, job())
        one.finish(only(one.next_batches(0)), Ended(results=(ItemFailure("no", refused=True),)), 0.001)
    assert state.breaker.admits(0.001)
    assert (state.speed.per_unit, state.failures) == (None, 0)


# failover


def tried_until_the_end(one: Scheduler, ended: Ended, now: float = 0.0) -> list[int]:
    """The endpoints that a job is tried on, every one answering `ended`."""
    seen: list[int] = []
    while batches := one.next_batches(now):
        batch = only(batches)
        seen.append(batch.endpoint_id)
        one.finish(batch, ended, now)
    return seen


def test_failover_goes_to_endpoints_not_tried_yet():
    one = with_endpoints(*(endpoint(number) for number in range(3)))
    (asked,) = submitted(one, job())
    assert sorted(tried_until_the_end(one, FAILED)) == [0, 1, 2]
    assert isinstance(asked.error, AllAttemptsFailed)
    assert (asked.error.message, asked.error.should_retry, asked.error.status) == ("it broke", False, 502)
    assert asked.attempts == 3


def test_attempts_are_limited():
    one = with_endpoints(*(endpoint(number) for number in range(5)), retry=RetryOptions(max_attempts=2))
    submitted(one, job())
    assert len(tried_until_the_end(one, FAILED)) == 2


def test_an_attempt_that_never_started_costs_none():
    one = with_endpoints(*(endpoint(number) for number in range(5)), retry=RetryOptions(max_attempts=1))
    (asked,) = submitted(one, job())
    assert len(tried_until_the_end(one, NOT_STARTED)) == 5
    assert isinstance(asked.error, AllAttemptsFailed)
    assert (asked.tasks[0].attempts, asked.attempts) == (0, 5)


@pytest.mark.parametrize(("retry_unknown", "tries"), [(True, 2), (False, 1)])
def test_an_unknown_outcome_is_tried_again_only_where_a_duplicate_costs_no_money(retry_unknown, tries):
    one = with_endpoints(*(endpoint(number, retry_unknown=retry_unknown) for number in range(2)))
    (asked,) = submitted(one, job())
    assert len(tried_until_the_end(one, UNKNOWN)) == tries
    assert isinstance(asked.error, AllAttemptsFailed)
    assert asked.error.code == ("backend_failed" if retry_unknown else "outcome_unknown")


def test_retries_are_a_share_of_the_traffic():
    endpoints = [endpoint(number, slots=1000) for number in range(2)]
    retry = RetryOptions(max_attempts=2, budget_ratio=0.2, floor_per_second=1e-6)
    one = with_endpoints(*endpoints, retry=retry)
    for state in endpoints:
        state.breaker = CircuitBreaker(BreakerOptions(failures=10**9), Random(1))
    tries = 0
    for _ in range(500):
        submitted(one, job())
        tries += len(tried_until_the_end(one, FAILED))
    assert 590 <= tries <= 605


def test_a_task_goes_to_the_next_tier_when_the_first_has_failed_it():
    one = with_endpoints(endpoint(0, "a"), endpoint(1, "b"))
    submitted(one, job(("b", 1), ("a", 0)))
    assert tried_until_the_end(one, FAILED) == [0, 1]


def test_a_full_tier_is_waited_for_and_an_unusable_one_is_not():
    first = endpoint(0, "a")
    one = with_endpoints(first, endpoint(1, "b", slots=5))
    submitted(one, job("a"))
    batch = only(one.next_batches(0))
    submitted(one, job(("a", 0), ("b", 1)))
    assert one.next_batches(0) == []
    first.health.record(ok=False, detail="gone")
    assert places(one.next_batches(0)) == [1]
    one.finish(batch, drawn(batch), 0)


def test_with_every_endpoint_down_each_is_tried_once_and_the_caller_is_told_when_to_come_back():
    endpoints = [endpoint(number) for number in range(3)]
    one = with_endpoints(*endpoints)
    for state in endpoints:
        break_open(state)
    (asked,) = submitted(one, job())
    assert sorted(tried_until_the_end(one, NOT_STARTED, now=4)) == [0, 1, 2]
    assert isinstance(asked.error, NoUsableBackend)
    assert (asked.error.retry_after_seconds, asked.error.should_retry, asked.error.status) == (6, None, 503)


def test_every_job_of_a_batch_that_went_to_a_last_hope_is_told_so():
    state = endpoint(0, shape="items", size=2)
    one = with_endpoints(state)
    state.health.record(ok=False, detail="down")
    jobs = submitted(one, job(), job())
    batch = only(one.next_batches(0))
    assert one.finish(batch, FAILED, 0) == list(jobs)
    assert [type(each.error) for each in jobs] == [NoUsableBackend, NoUsableBackend]


def test_a_usable_endpoint_that_fails_and_a_last_hope_that_fails_too_is_a_failure_of_all():
    good, bad = endpoint(0), endpoint(1)
    bad.health.record(ok=False, detail="down")
    one = with_endpoints(good, bad)
    (asked,) = submitted(one, job())
    assert tried_until_the_end(one, FAILED) == [0, 1]
    assert isinstance(asked.error, AllAttemptsFailed)


def test_a_disabled_endpoint_is_no_candidate_not_even_a_last_hope():
    off, on = endpoint(0), endpoint(1)
    off.enabled = False
    one = with_endpoints(off, on)
    submitted(one, job())
    assert tried_until_the_end(one, FAILED) == [1]


def test_removing_a_backend_ends_what_only_it_could_serve_and_lets_what_runs_finish():
    one = with_endpoints(endpoint(0, "a"), endpoint(1, "b"))
    running, stranded, elsewhere = submitted(one, job("a"), job("a"), job("a", "b"))
    first = next(batch for batch in one.next_batches(0) if batch.endpoint_id == 0)
    assert one.remove_backend("a", 1) == [stranded]
    assert one.running == 2
    assert not elsewhere.is_over
    assert one.finish(first, drawn(first), 2) == [running]
    assert one.running == 1
    assert [snapshot.backend for snapshot in one.snapshot(2).endpoints] == ["b"]


# breakers and busy endpoints


def test_half_open_lets_exactly_one_through_while_others_can_serve():
    broken, good = endpoint(0, slots=10), endpoint(1, slots=3)
    one = with_endpoints(broken, good)
    break_open(broken)
    submitted(one, *(job() for _ in range(8)))
    assert places(one.next_batches(5)) == [1, 1, 1]
    assert places(one.next_batches(10)) == [0]
    assert one.next_batches(20) == []


def test_a_trial_that_is_cancelled_does_not_jam_the_breaker():
    broken, good = endpoint(0), endpoint(1)
    one = with_endpoints(broken, good)
    break_open(broken)
    (asked,) = submitted(one, job())
    trial = only(one.next_batches(10))
    assert trial.endpoint_id == 0
    assert one.cancel(asked, 11) == [trial]
    one.finish(trial, CANCELLED, 11)
    submitted(one, job(), job())
    assert sorted(places(one.next_batches(12))) == [0, 1]


def test_leaving_clients_never_trip_a_breaker():
    state = endpoint(0)
    one = with_endpoints(state)
    for _ in range(20):
        (asked,) = submitted(one, job())
        batch = only(one.next_batches(0))
        one.cancel(asked, 0)
        one.finish(batch, CANCELLED, 0)
    assert state.breaker.state(0) is BreakerState.CLOSED


def test_a_busy_endpoint_is_skipped_until_then_and_the_breaker_does_not_count_it():
    occupied, free = endpoint(0), endpoint(1, slots=5)
    one = with_endpoints(occupied, free)
    for _ in range(10):
        submitted(one, job())
        batch = next(batch for batch in one.next_batches(0))
        one.finish(batch, busy(5) if batch.endpoint_id == 0 else drawn(batch), 0)
    while batches := one.next_batches(0):
        for batch in batches:
            one.finish(batch, drawn(batch), 0)
    assert occupied.breaker.state(0) is BreakerState.CLOSED
    assert occupied.calls == 1
    submitted(one, job(), job())
    assert places(one.next_batches(4.9)) == [1, 1]
    submitted(one, job())
    assert places(one.next_batches(5)) == [0]


def test_a_new_task_waits_for_a_busy_endpoint_and_is_served_when_it_is_free():
    state = endpoint(0)
    one = with_endpoints(state)
    state.busy_until = 5.0
    (asked,) = submitted(one, job())
    assert one.next_batches(4.9) == []
    batch = only(one.next_batches(5))
    assert one.finish(batch, drawn(batch), 6) == [asked]


def test_a_second_try_waits_for_a_busy_endpoint_and_is_served_when_it_is_free():
    first, second = endpoint(0), endpoint(1)
    one = with_endpoints(first, second)
    second.busy_until = 5.0
    (asked,) = submitted(one, job())
    batch = only(one.next_batches(0))
    assert one.finish(batch, FAILED, 1) == []
    assert (one.next_batches(4.9), one.queued) == ([], 1)
    again = only(one.next_batches(5))
    assert again.endpoint_id == 1
    assert one.finish(again, drawn(again), 6) == [asked]


def test_a_lower_tier_serves_while_the_first_is_busy():
    state = endpoint(0, "a")
    one = with_endpoints(state, endpoint(1, "b"))
    state.busy_until = 5.0
    submitted(one, job(("a", 0), ("b", 1)))
    assert places(one.next_batches(0)) == [1]


def test_an_endpoint_that_is_busy_past_the_deadline_is_a_last_hope():
    state = endpoint(0)
    one = with_endpoints(state)
    state.busy_until = 500.0
    (asked,) = submitted(one, job(patience=10))
    batch = only(one.next_batches(0))
    assert one.finish(batch, busy(400), 0) == [asked]
    assert isinstance(asked.error, NoUsableBackend)
    assert asked.error.retry_after_seconds == 400


def test_a_job_that_only_met_endpoints_busy_past_its_deadline_is_told_when_they_are_free():
    one = with_endpoints(endpoint(0), endpoint(1))
    (asked,) = submitted(one, job(patience=5))
    seconds = iter((30, 7))
    while batches := one.next_batches(0):
        one.finish(only(batches), busy(next(seconds)), 0)
    assert isinstance(asked.error, NoUsableBackend)
    assert (asked.error.retry_after_seconds, asked.error.should_retry) == (7, None)


def test_a_job_that_only_met_busy_endpoints_waits_for_the_first_to_be_free():
    one = with_endpoints(endpoint(0), endpoint(1))
    (asked,) = submitted(one, job(patience=100))
    seconds = iter((30, 7))
    while batches := one.next_batches(0):
        one.finish(only(batches), busy(next(seconds)), 0)
    assert one.next_batches(6.9) == []
    batch = only(one.next_batches(7))
    assert one.finish(batch, drawn(batch), 8) == [asked]
    assert asked.status is JobStatus.SUCCEEDED


def test_endpoints_that_are_busy_again_and_again_are_not_asked_without_end():
    one = with_endpoints(endpoint(0))
    (asked,) = submitted(one, job(patience=1000))
    now = 0.0
    while not asked.is_over and now < 1000:
        for batch in one.next_batches(now):
            one.finish(batch, busy(1), now)
        now += 1.0
    assert isinstance(asked.error, NoUsableBackend)
    assert asked.attempts == 20


def test_a_job_that_may_have_been_drawn_is_not_to_be_repeated_although_another_endpoint_is_busy():
    one = with_endpoints(endpoint(0, retry_unknown=False), endpoint(1))
    one._fleet._by_backend["a"][1].busy_until = 5.0
    (asked,) = submitted(one, job())
    assert tried_until_the_end(one, UNKNOWN) == [0]
    assert isinstance(asked.error, AllAttemptsFailed)
    assert asked.error.should_retry is False


# what can be looked at


def test_a_snapshot_says_how_much_waits_and_for_how_long():
    one = with_endpoints(endpoint(0))
    submitted(one, job(now=1), job(now=2), job(now=3))
    one.next_batches(3)
    snapshot = one.snapshot(10)
    assert (snapshot.queued, snapshot.running, snapshot.oldest_seconds) == (2, 1, 8)
    assert [(state.in_flight, state.calls) for state in snapshot.endpoints] == [(1, 1)]


def test_the_estimate_follows_latency_and_slots():
    one = with_endpoints(endpoint(0, slots=2))
    assert one.wait_estimate(0) == 1
    (first,) = submitted(one, job())
    batch = only(one.next_batches(0))
    assert one.finish(batch, drawn(batch), 4.0) == [first]
    submitted(one, job(n=10))
    assert one.wait_estimate(0) == pytest.approx(20, rel=0.1)
