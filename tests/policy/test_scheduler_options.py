"""Every option and feature of the scheduler has its effect, in virtual time and through what a gateway calls."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tests.policy.virtual_fleet import FAILED, VirtualFleet, drawn, endpoint, job, only, places, scheduler

from img_serving.domain.errors import AllAttemptsFailed, ContentRefused, NoUsableBackend, Outcome
from img_serving.domain.images import ItemFailure
from img_serving.domain.jobs import CANCELLED, Batch, Ended, Job, JobStatus
from img_serving.domain.tenants import Tenant
from img_serving.policy.circuit_breaker import BreakerOptions
from img_serving.policy.endpoint import EndpointState, ExclusiveGroup
from img_serving.policy.retry import RetryOptions
from img_serving.policy.scheduler import Scheduler

A, B = Tenant("a"), Tenant("b")
HIGH = Tenant("high", priority=1)


def backlog(count: int, *backends: str, tenant: Tenant = A, **more: Any) -> list[Job]:
    return [job(*backends, tenant=tenant, **more) for _ in range(count)]


def names(jobs: list[Job]) -> str:
    return "".join(one.tenant.name for one in jobs)


def kept_busy(fleet: VirtualFleet, *backends: str, tenant: Tenant, depth: int = 3, **more: Any) -> None:
    """A tenant that always has `depth` jobs waiting or running, whatever happens to them."""
    before = fleet.after_each

    def again(batch: Batch) -> None:
        before(batch)
        for task in batch.tasks:
            if task.job.tenant is tenant and task.job.is_over:
                fleet.scheduler.submit(job(*backends, tenant=tenant, now=fleet.now, **more))

    fleet.after_each = again
    fleet.submit(*backlog(depth, *backends, tenant=tenant, now=fleet.now, **more))


# priorities


def test_a_higher_priority_goes_first():
    fleet = VirtualFleet(endpoint(0, speed=0.1))
    fleet.submit(job())
    fleet.submit(*backlog(3), *backlog(2, tenant=HIGH))
    fleet.run(100.0)
    assert [one.tenant.name for one in fleet.order()[1:]] == ["high", "high", "a", "a", "a"]


@pytest.mark.parametrize(("ageing_seconds", "begins"), [(0.0, None), (60.0, 60.0), (20.0, 20.0)])
def test_who_has_waited_for_ageing_seconds_counts_one_priority_more(ageing_seconds, begins):
    fleet = VirtualFleet(endpoint(0, speed=0.1), ageing_seconds=ageing_seconds)
    kept_busy(fleet, tenant=HIGH)
    patient = job(tenant=A)
    fleet.submit(patient)
    fleet.run(500.0)
    assert patient.started_at == (None if begins is None else pytest.approx(begins, abs=2.0))


def test_two_priorities_up_take_twice_as_long_to_make_up_for():
    fleet = VirtualFleet(endpoint(0, speed=0.1), ageing_seconds=20.0)
    kept_busy(fleet, tenant=Tenant("highest", priority=2))
    patient = job(tenant=A)
    fleet.submit(patient)
    fleet.run(500.0)
    assert patient.started_at == pytest.approx(40.0, abs=2.0)


# fairness


def test_weights_are_shares_of_what_is_drawn():
    fleet = VirtualFleet(endpoint(0, speed=0.1, slots=2))
    heavy = Tenant("heavy", weight=3.0)
    kept_busy(fleet, tenant=heavy, depth=10)
    kept_busy(fleet, tenant=B, depth=10)
    fleet.run(200.0)
    counts = Counter(task.job.tenant.name for batch in fleet.started for task in batch.tasks)
    assert counts["heavy"] == pytest.approx(300, abs=4)
    assert counts["b"] == pytest.approx(100, abs=4)


def test_fairness_holds_over_two_routes_that_share_an_endpoint():
    fleet = VirtualFleet(endpoint(0, "a", speed=0.1), endpoint(1, "b", speed=0.1))
    kept_busy(fleet, "a", tenant=A, depth=10)
    kept_busy(fleet, "a", tenant=B, model="another", depth=3)
    fleet.run(200.0)
    counts = Counter(batch.tasks[0].job.tenant.name for batch in fleet.started)
    assert abs(counts["a"] - counts["b"]) <= 2


def test_one_tenants_tasks_on_two_routes_of_an_endpoint_go_in_the_order_they_came():
    fleet = VirtualFleet(endpoint(0, speed=0.1))
    jobs = [job(model=f"m{index % 3}", now=index / 100) for index in range(12)]
    fleet.submit(*jobs)
    fleet.run(100.0)
    assert fleet.order() == jobs


# caps


def running_at_most(fleet: VirtualFleet, tenant: Tenant) -> int:
    """The most tasks of the tenant that ran at the same time."""
    tasks = [task for batch in fleet.started for task in batch.tasks if task.job.tenant is tenant]
    moments = {batch.started_at for batch in fleet.started}
    spans = [
        (batch.started_at, batch.started_at + fleet.seconds(batch)) for batch in fleet.started for _ in batch.tasks
    ]
    assert tasks
    return max(sum(start <= moment < end - 1e-6 for start, end in spans) for moment in moments)


def test_a_cap_counts_pictures_and_not_jobs():
    capped = Tenant("capped", max_running=2)
    fleet = VirtualFleet(endpoint(0, speed=0.1, slots=8))
    asked = job(tenant=capped, n=5)
    fleet.submit(asked)
    assert len(fleet.started) == 2
    fleet.run(10.0)
    assert asked.status is JobStatus.SUCCEEDED
    assert (running_at_most(fleet, capped), asked.finished_at) == (2, 3.0)


def test_a_cap_counts_the_members_of_a_batch():
    capped = Tenant("capped", max_running=3)
    fleet = VirtualFleet(endpoint(0, speed=0.1, shape="items", size=8))
    fleet.submit(job(tenant=capped, n=8))
    assert [len(batch.tasks) for batch in fleet.started] == [3]


def test_a_cap_holds_over_two_routes_and_leaves_the_rest_to_others():
    capped = Tenant("capped", max_running=2)
    fleet = VirtualFleet(endpoint(0, "a", speed=0.1, slots=2), endpoint(1, "b", speed=0.1, slots=4))
    fleet.submit(*backlog(3, "a", tenant=capped), *backlog(3, "b", tenant=capped), *backlog(2, "b", tenant=B))
    assert Counter(batch.tasks[0].job.tenant.name for batch in fleet.started) == {"capped": 2, "b": 2}
    fleet.run(20.0)
    assert all(batch.tasks[0].job.is_over for batch in fleet.started)
    assert len(fleet.started) == 8


@pytest.mark.parametrize("how", [FAILED, CANCELLED, Ended(outcome=Outcome.NOT_STARTED, message="no")])
def test_a_task_that_is_tried_again_counts_once(how):
    capped = Tenant("capped", max_running=1)
    one = scheduler(endpoint(0), endpoint(1))
    first, second = job(tenant=capped), job(tenant=capped)
    one.submit(first)
    one.submit(second)
    batch = only(one.next_batches(0.0))
    assert one.next_batches(0.0) == []
    one.finish(batch, how, 1.0)
    again = only(one.next_batches(1.0))
    assert again.tasks[0].job is first
    assert one.next_batches(1.0) == []
    assert one.finish(again, drawn(again), 2.0) == [first]
    assert only(one.next_batches(2.0)).tasks[0].job is second


def test_a_cap_holds_for_a_job_that_could_start_at_once():
    capped = Tenant("capped", max_running=1)
    one = scheduler(endpoint(0, slots=3))
    assert one.start_at_once(job(tenant=capped), 0.0) is not None
    assert one.start_at_once(job(tenant=capped), 0.0) is None
    assert one.start_at_once(job(tenant=B), 0.0) is not None


def test_a_second_call_for_the_same_picture_does_not_count_against_a_cap():
    capped = Tenant("capped", max_running=2)
    one = hedging(endpoint(0, speed=0.1, cheap=True), endpoint(1, cheap=True), endpoint(2, cheap=True))
    one.submit(job(tenant=capped))
    first = only(one.next_batches(0.0))
    (hedge,) = one.look_after(10.0)
    one.submit(job(tenant=capped))
    assert len(one.next_batches(10.0)) == 1
    one.finish(hedge, drawn(hedge), 11.0)
    assert one.unwanted() == [first]


# longest wait


@pytest.mark.parametrize(("max_wait_seconds", "expired"), [(None, False), (5.0, True)])
def test_who_has_waited_for_max_wait_seconds_without_a_slot_is_told_so(max_wait_seconds, expired):
    one = scheduler(endpoint(0), max_wait_seconds=max_wait_seconds)
    one.submit(job(n=2))
    one.next_batches(0.0)
    patient = job()
    one.submit(patient)
    assert one.expire(4.9) == []
    assert one.expire(5.0) == ([patient] if expired else [])


# batches


def test_a_batch_that_is_not_full_lingers_for_company_and_says_until_when():
    one = scheduler(endpoint(0, shape="items", size=3, linger_seconds=0.5))
    assert one.start_at_once(job(), 0.0) is None
    one.submit(job(now=0.0))
    assert (one.next_batches(0.0), one.wakes_at(0.0)) == ([], 0.5)
    one.submit(job(now=0.2))
    assert (one.next_batches(0.2), one.wakes_at(0.2)) == ([], 0.5)
    assert len(only(one.next_batches(0.5)).tasks) == 2
    assert one.wakes_at(0.5) is None


def test_a_full_batch_does_not_linger():
    one = scheduler(endpoint(0, shape="items", size=3, linger_seconds=0.5))
    for _ in range(3):
        one.submit(job())
    assert len(only(one.next_batches(0.0)).tasks) == 3


def test_a_batch_that_its_pixels_make_full_does_not_linger():
    one = scheduler(endpoint(0, shape="items", size=8, linger_seconds=0.5, max_batch_pixels=2_000_000))
    one.submit(job())
    assert one.next_batches(0.0) == []
    one.submit(job())
    assert len(only(one.next_batches(0.0)).tasks) == 2


def test_an_endpoint_that_takes_one_picture_a_call_does_not_linger():
    one = scheduler(endpoint(0, linger_seconds=0.5))
    assert one.start_at_once(job(), 0.0) is not None


def test_while_one_endpoint_lingers_another_serves():
    one = scheduler(endpoint(0, "a", shape="items", size=3, linger_seconds=0.5), endpoint(1, "b"))
    one.submit(job("a", "b"))
    assert places(one.next_batches(0.0)) == [1]


@pytest.mark.parametrize(
    ("max_batch_pixels", "sizes"), [(None, [8]), (8_000_000, [8]), (3_500_000, [3, 3, 2]), (1, [1] * 8)]
)
def test_a_call_holds_no_more_pixels_than_it_may(max_batch_pixels, sizes):
    fleet = VirtualFleet(endpoint(0, speed=0.1, shape="items", size=8, max_batch_pixels=max_batch_pixels))
    fleet.submit(job(n=8))
    fleet.run(100.0)
    assert [len(batch.tasks) for batch in fleet.started] == sizes


def test_a_large_job_is_spread_over_the_endpoints_that_are_free():
    one = scheduler(*[endpoint(number, shape="items", size=8) for number in range(4)])
    one.submit(job(n=8))
    assert [(batch.endpoint_id, len(batch.tasks)) for batch in one.next_batches(0.0)] == [
        (0, 2),
        (1, 2),
        (2, 2),
        (3, 2),
    ]


def test_a_batch_that_failed_on_the_only_endpoint_is_taken_apart_there_and_a_poisonous_prompt_fails_alone():
    def ends(batch: Batch) -> Ended:
        return FAILED if any(task.job.request.prompt == "poison" for task in batch.tasks) else drawn(batch)

    fleet = VirtualFleet(endpoint(0, speed=0.1, shape="items", size=4), ends=ends)
    poison, *others = [job(prompt=prompt) for prompt in ("poison", "cat", "dog", "cow")]
    for each in (poison, *others):
        fleet.scheduler.submit(each)
    fleet.pump()
    fleet.run(100.0)
    assert [len(batch.tasks) for batch in fleet.started] == [4, 1, 1, 1, 1]
    assert isinstance(poison.error, AllAttemptsFailed)
    assert [each.status for each in others] == [JobStatus.SUCCEEDED] * 3
    assert [each.attempts for each in (poison, *others)] == [2, 2, 2, 2]


def test_a_picture_that_failed_alone_on_the_only_endpoint_is_not_asked_for_there_again():
    fleet = VirtualFleet(endpoint(0, speed=0.1), ends=lambda batch: FAILED)
    fleet.submit(job())
    fleet.run(100.0)
    assert len(fleet.started) == 1


def test_a_batch_that_failed_goes_elsewhere_where_there_is_an_elsewhere():
    one = scheduler(endpoint(0, "a", shape="items", size=2), endpoint(1, "b", slots=2))
    for _ in range(2):
        one.submit(job(("a", 0), ("b", 1)))
    batch = only(one.next_batches(0.0))
    one.finish(batch, FAILED, 1.0)
    assert places(one.next_batches(1.0)) == [1, 1]


# least_work


def test_least_work_waits_for_a_faster_endpoint_and_others_do_not():
    def began(strategy: str) -> int:
        fleet = VirtualFleet(endpoint(0, speed=0.1), endpoint(1, speed=5.0), strategy=strategy)
        fleet.submit(job())
        fleet.submit(job())
        fleet.run(1.0)
        return fleet.started[-1].endpoint_id

    assert began("least_work") == 0  # done after 2 s instead of 50
    assert began("round_robin") == 1


def test_least_work_lets_later_tasks_pass_whom_a_slower_endpoint_suits():
    fleet = VirtualFleet(
        endpoint(0, "fast", speed=0.1), endpoint(1, "slow", speed=0.8), strategy="least_work", max_tasks=100
    )
    big, small = job("fast", "slow", cost=100), job("fast", "slow", cost=5)
    fleet.submit(job("fast", "slow", cost=60))
    fleet.scheduler.submit(big)  # 6 + 10 s there and 80 s here
    fleet.scheduler.submit(small)  # 16 + 0.5 s there and 4 s here
    fleet.pump()
    assert [(batch.tasks[0].job, batch.endpoint_id) for batch in fleet.started[1:]] == [(small, 1)]
    fleet.run(6.0)
    assert (fleet.started[-1].tasks[0].job, fleet.started[-1].endpoint_id) == (big, 0)


def test_least_work_uses_a_slow_endpoint_when_much_waits():
    def used(count: int) -> list[int]:
        one = scheduler(endpoint(0, speed=0.1), endpoint(1, speed=3.0), strategy="least_work")
        for _ in range(count):
            one.submit(job())
        return sorted(places(one.next_batches(0.0)))

    # one takes the slow one 30 s: that is worth it for those behind when the fast one is busy for 20
    assert used(16) == [0]
    assert used(24) == [0, 1]
    assert used(100) == [0, 1]


def test_with_least_work_the_one_that_a_slow_endpoint_takes_is_far_behind_and_not_the_next():
    one = scheduler(endpoint(0, speed=0.1), endpoint(1, speed=3.0), strategy="least_work")
    jobs = [job() for _ in range(40)]
    for each in jobs:
        one.submit(each)
    slow = next(batch for batch in one.next_batches(0.0) if batch.endpoint_id == 1)
    assert 17 <= jobs.index(slow.tasks[0].job) <= 22


def test_least_work_gives_a_free_endpoint_what_would_be_only_a_little_sooner_elsewhere():
    def began(speed: float) -> int:
        fleet = VirtualFleet(endpoint(0, speed=0.1), endpoint(1, speed=speed), strategy="least_work")
        fleet.submit(job())
        fleet.submit(job())
        return fleet.started[-1].endpoint_id if len(fleet.started) == 2 else 0

    assert began(0.28) == 1  # 2.8 s instead of 2: whoever comes next finds the fast one free
    assert began(0.32) == 0


def test_least_work_looks_again_when_the_endpoint_that_it_waits_for_is_late():
    fleet = VirtualFleet(
        endpoint(0, speed=0.1), endpoint(1, speed=1.0), strategy="least_work", seconds=lambda batch: 1e6
    )
    first, second = job(cost=50), job(cost=50)
    fleet.submit(first)
    fleet.submit(second)
    assert len(fleet.started) == 1
    assert fleet.scheduler.wakes_at(0.0) == pytest.approx(5.5)
    fleet.run(1e5)
    assert fleet.started[-1].endpoint_id == 1
    # it is taken to need as long again as it is late: then the slow one's 50 s are hardly later
    assert 20.0 <= fleet.started[-1].started_at <= 50.0


def test_with_one_endpoint_least_work_waits_for_nothing():
    fleet = VirtualFleet(endpoint(0, speed=0.1), strategy="least_work")
    fleet.submit(*backlog(3))
    fleet.run(100.0)
    assert [batch.started_at for batch in fleet.started] == [0.0, 1.0, 2.0]


# models


def engine(number: int = 0, model: str | None = None, **more: Any) -> EndpointState:
    one = endpoint(number, speed=0.1, switches=True, **more)
    one.loaded_model = model
    return one


def test_work_goes_to_the_engine_that_has_its_model_loaded():
    one = scheduler(engine(0, "x"), engine(1, "y"))
    one.submit(job(model="y"))
    one.submit(job(model="x"))
    assert [(batch.endpoint_id, batch.model) for batch in one.next_batches(0.0)] == [(1, "y"), (0, "x")]


@pytest.mark.parametrize(("affinity_seconds", "place"), [(0.0, 1), (15.0, 0)])
def test_a_task_waits_for_the_engine_that_has_its_model_if_that_is_sooner_than_loading_it(affinity_seconds, place):
    fleet = VirtualFleet(engine(0, "x"), engine(1, "y"), affinity_seconds=affinity_seconds)
    fleet.submit(job(model="x", cost=20))  # 2 s; loading takes 10
    fleet.submit(job(model="x"))
    fleet.run(5.0)
    assert fleet.started[-1].endpoint_id == place


def test_it_does_not_wait_for_one_that_is_free_later_than_another_could_load_it():
    fleet = VirtualFleet(engine(0, "x"), engine(1, "y"))
    fleet.submit(job(model="x", cost=200))  # 20 s
    fleet.submit(job(model="x"))
    assert places(fleet.started) == [0, 1]


def test_it_waits_for_affinity_seconds_at_most():
    fleet = VirtualFleet(engine(0, "x"), engine(1, "y"), affinity_seconds=3.0, seconds=lambda batch: 1e6)
    patient = job(model="x")
    fleet.submit(job(model="x"))
    fleet.submit(patient)
    assert fleet.scheduler.wakes_at(0.0) == 3.0
    fleet.run(100.0)
    assert (patient.started_at, fleet.started[-1].endpoint_id) == (3.0, 1)


@pytest.mark.parametrize(("affinity_seconds", "order"), [(0.0, "ababab"), (15.0, "aaabbb")])
def test_who_needs_another_model_is_passed_over_for_those_whose_model_is_loaded(affinity_seconds, order):
    fleet = VirtualFleet(engine(0, "x"), affinity_seconds=affinity_seconds)
    for tenant, model in ((A, "x"), (B, "y")):
        for each in backlog(3, model=model, tenant=tenant):
            fleet.scheduler.submit(each)
    fleet.pump()
    fleet.run(1000.0)
    assert names(fleet.order()) == order
    assert sum(batch.loads_model for batch in fleet.started) == (5 if order == "ababab" else 1)


@pytest.mark.parametrize("strategy", ["round_robin", "least_work"])
def test_it_is_passed_over_for_affinity_seconds_at_most(strategy):
    fleet = VirtualFleet(engine(0, "x"), strategy=strategy)
    kept_busy(fleet, model="x", tenant=A, depth=5)
    fleet.run(5.0)
    patient = job(model="y", tenant=B, now=5.0)
    fleet.submit(patient)
    fleet.run(100.0)
    assert patient.started_at == pytest.approx(20.0, abs=1.1)


def test_whoever_is_passed_over_is_woken_when_it_has_waited_long_enough():
    """The engine has x loaded, whose task lingers for company: nothing else happens."""
    one = scheduler(engine(0, "x", shape="items", size=2, linger_seconds=5.0), affinity_seconds=2.0)
    one.submit(job(model="x", tenant=A))
    one.submit(job(model="y", tenant=B, n=2))
    assert one.next_batches(0.0) == []
    assert one.wakes_at(0.0) == 2.0
    assert only(one.next_batches(2.0)).model == "y"


def test_an_engine_whose_model_nobody_waits_for_loads_another_at_once():
    one = scheduler(engine(0, "x"))
    one.submit(job(model="y"))
    assert only(one.next_batches(0.0)).loads_model


def test_an_engine_that_loads_a_model_is_expected_to_take_longer_and_its_speed_is_not_learned_from_that():
    one = engine(0, "x")
    held = scheduler(one)
    held.submit(job(model="y"))
    batch = only(held.next_batches(0.0))
    assert (batch.expected_seconds, batch.expected_end) == (11.0, 11.0)
    held.finish(batch, drawn(batch), 21.0)
    assert (one.speed.seconds(10.0), one.loaded_model, one.switch_seconds) == (1.0, "y", 15.0)


# slow start


@pytest.mark.parametrize(("slow_start_seconds", "slots"), [(0.0, [10, 10, 10]), (30.0, [1, 5, 10]), (60.0, [1, 3, 10])])
def test_an_endpoint_that_has_recovered_gets_its_slots_one_after_the_other(slow_start_seconds, slots):
    def taken(after: float) -> int:
        one = scheduler(endpoint(0, slots=10), endpoint(1), slow_start_seconds=slow_start_seconds)
        one.set_endpoint_state(0, 0.0, healthy=False)
        one.set_endpoint_state(0, 0.0, healthy=True)
        for _ in range(20):
            one.submit(job())
        return places(one.next_batches(after)).count(0)

    assert [taken(after) for after in (0.0, 15.0, 60.0)] == slots


def test_an_endpoint_whose_breaker_has_closed_starts_slowly_too():
    other = endpoint(1)
    one = scheduler(endpoint(0, slots=10), other)
    other.enabled = False
    for _ in range(3):
        one.submit(job())
        one.finish(only(one.next_batches(0.0)), FAILED, 0.0)
    one.submit(job())
    trial = only(one.next_batches(10.0))
    one.finish(trial, drawn(trial), 11.0)
    other.enabled = True
    for _ in range(20):
        one.submit(job())
    assert sorted(places(one.next_batches(11.0))) == [0, 1]
    assert places(one.next_batches(26.0)) == [0] * 4


def test_an_endpoint_that_has_recovered_is_not_spared_where_there_is_no_other():
    one = scheduler(endpoint(0, slots=10))
    one.set_endpoint_state(0, 0.0, healthy=False)
    one.set_endpoint_state(0, 0.0, healthy=True)
    for _ in range(20):
        one.submit(job())
    assert len(one.next_batches(0.0)) == 10


def test_whoever_waits_for_a_recovering_endpoint_is_woken_when_it_has_its_next_slot():
    fleet = VirtualFleet(endpoint(0, slots=10), endpoint(1), seconds=lambda batch: 1e6)
    fleet.scheduler.set_endpoint_state(0, 0.0, healthy=False)
    fleet.scheduler.set_endpoint_state(0, 0.0, healthy=True)
    for _ in range(11):
        fleet.submit(job())
    fleet.run(40.0)
    assert len(fleet.started) == 11
    assert fleet.started[5].started_at == pytest.approx(12.0, abs=4.0)


def test_a_good_check_lets_a_broken_endpoint_be_tried_before_its_breaker_would():
    one = scheduler(endpoint(0), panic_mode=False)
    for _ in range(3):
        one.submit(job())
        one.finish(only(one.next_batches(0.0)), FAILED, 0.0)
    one.set_endpoint_state(0, 1.0, healthy=False)
    one.submit(job())
    assert one.next_batches(2.0) == []
    one.set_endpoint_state(0, 3.0, healthy=True)
    assert places(one.next_batches(3.0)) == [0]


# tiers


@pytest.mark.parametrize(("tier_overflow_seconds", "helps_at"), [(None, None), (30.0, 4), (5.0, 2)])
def test_the_next_tier_helps_while_this_one_would_take_longer_than_tier_overflow_seconds(
    tier_overflow_seconds, helps_at
):
    """One call of 10 s runs; each that waits is another 10 s."""
    one = scheduler(
        endpoint(0, "a", speed=1.0),
        endpoint(1, "b", speed=1.0, slots=100),
        tier_overflow_seconds=tier_overflow_seconds,
    )
    helped: int | None = None
    for count in range(1, 10):
        one.submit(job(("a", 0), ("b", 1)))
        if any(batch.endpoint_id == 1 for batch in one.next_batches(0.0)):
            helped = count
            break
    assert helped == helps_at


def test_the_next_tier_helps_only_until_the_first_is_through_in_time():
    one = scheduler(endpoint(0, "a", speed=1.0), endpoint(1, "b", speed=1.0, slots=100), tier_overflow_seconds=45.0)
    for _ in range(10):
        one.submit(job(("a", 0), ("b", 1)))
    assert Counter(places(one.next_batches(0.0))) == {0: 1, 1: 6}
    assert one.queued == 3


def test_a_tier_without_a_usable_endpoint_is_passed_by_without_overflow():
    first = endpoint(0, "a")
    one = scheduler(first, endpoint(1, "b"))
    one.set_endpoint_state(0, 0.0, healthy=False)
    one.submit(job(("a", 0), ("b", 1)))
    assert places(one.next_batches(0.0)) == [1]


# groups


def sharing(*slots: int, speed: float = 0.1) -> list[EndpointState]:
    gpu = ExclusiveGroup("gpu")
    return [endpoint(number, "ab"[number], speed=speed, slots=count, group=gpu) for number, count in enumerate(slots)]


def at_once(fleet: VirtualFleet) -> set[frozenset[int]]:
    """Which endpoints had calls in flight at the same time."""
    spans = [(one.started_at, one.started_at + fleet.seconds(one), one.endpoint_id) for one in fleet.started]
    return {
        frozenset(place for start, end, place in spans if start <= moment < end - 1e-6)
        for moment in {span[0] for span in spans}
    }


@pytest.mark.parametrize("slots", [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("strategy", ["round_robin", "least_work"])
def test_endpoints_of_a_group_take_turns_and_neither_side_starves(strategy, slots):
    fleet = VirtualFleet(*sharing(*slots), strategy=strategy)
    kept_busy(fleet, "a", tenant=A, depth=8)
    kept_busy(fleet, "b", tenant=B, depth=8)
    fleet.run(200.0)
    assert at_once(fleet) == {frozenset({0}), frozenset({1})}
    counts = Counter(batch.endpoint_id for batch in fleet.started)
    assert min(counts.values()) >= 0.3 * max(counts.values())


def test_without_a_group_they_run_at_the_same_time():
    fleet = VirtualFleet(endpoint(0, "a", speed=0.1), endpoint(1, "b", speed=0.1))
    fleet.submit(job("a"), job("b"))
    assert at_once(fleet) == {frozenset({0, 1})}


def test_a_holder_of_several_slots_drains_for_who_waits_for_the_gpu():
    fleet = VirtualFleet(*sharing(3, 1), seconds=lambda batch: 1.0 + len(fleet.started) / 10)
    kept_busy(fleet, "a", tenant=A, depth=10)
    fleet.run(3.0)
    other = job("b", tenant=B, now=3.0)
    fleet.submit(other)
    fleet.run(20.0)
    assert other.started_at is not None
    assert other.started_at <= 10.0


@pytest.mark.parametrize("strategy", ["round_robin", "least_work"])
def test_one_tenants_work_for_both_sides_of_a_group_starves_neither(strategy):
    fleet = VirtualFleet(*sharing(2, 1), strategy=strategy)
    kept_busy(fleet, "a", tenant=A, depth=6)
    other = job("b", tenant=A, now=0.5)
    fleet.run(0.5)
    fleet.submit(other)
    fleet.run(100.0)
    assert other.started_at is not None
    assert other.started_at <= 10.0


# wedged endpoints


def wedged() -> tuple[Scheduler, Batch]:
    """An endpoint of 1 s a call whose call has been silent for 100 s, beside one that is well."""
    one = scheduler(endpoint(0, speed=0.1, slots=4), endpoint(1, speed=0.1))
    one.submit(job())
    batch = only(one.next_batches(0.0))
    one.look_after(100.0)
    return one, batch


def test_an_endpoint_whose_call_is_silent_for_far_too_long_gets_no_new_work():
    one, batch = wedged()
    assert [state.suspect for state in one.snapshot(100.0).endpoints] == [True, False]
    for _ in range(3):
        one.submit(job(now=100.0))
    assert places(one.next_batches(100.0)) == [1]
    assert not batch.tasks[0].job.is_over


@pytest.mark.parametrize("how", ["over", "speaks"])
def test_it_is_trusted_again_when_one_of_its_calls_is_over_or_speaks(how):
    one, batch = wedged()
    if how == "over":
        one.finish(batch, drawn(batch), 101.0)
    else:
        one.heard_of(batch, 101.0)
    one.look_after(101.0)
    for _ in range(5):
        one.submit(job(now=101.0))
    assert Counter(places(one.next_batches(101.0)))[0] == (4 if how == "over" else 3)


def test_a_call_that_speaks_now_and_then_is_never_suspected():
    one = scheduler(endpoint(0, speed=0.1))
    one.submit(job())
    batch = only(one.next_batches(0.0))
    for second in range(1, 200):
        one.heard_of(batch, float(second))
        one.look_after(float(second))
        assert not one.snapshot(float(second)).endpoints[0].suspect


def test_an_endpoint_that_nobody_has_measured_is_never_suspected():
    one = scheduler(endpoint(0))
    one.submit(job())
    one.next_batches(0.0)
    one.look_after(1e6)
    assert not one.snapshot(1e6).endpoints[0].suspect


def test_a_suspect_endpoint_is_a_last_hope_where_there_is_no_other():
    one = scheduler(endpoint(0, speed=0.1, slots=2))
    one.submit(job())
    one.next_batches(0.0)
    one.look_after(100.0)
    one.submit(job(now=100.0))
    assert places(one.next_batches(100.0)) == [0]


# panic


@pytest.mark.parametrize("second_try", [False, True])
def test_with_panic_an_unusable_endpoint_gets_one_chance_and_without_it_everybody_waits(second_try):
    def places_of(*, panic_mode: bool) -> list[int]:
        one = scheduler(endpoint(0), endpoint(1), panic_mode=panic_mode)
        one.set_endpoint_state(1, 0.0, healthy=False)
        one.submit(job())
        if second_try:
            one.finish(only(one.next_batches(0.0)), FAILED, 0.0)
        else:
            one.set_endpoint_state(0, 0.0, healthy=False)
        return places(one.next_batches(0.0))

    assert places_of(panic_mode=True) == [1 if second_try else 0]
    assert places_of(panic_mode=False) == []


def test_without_panic_who_waits_is_served_when_an_endpoint_recovers():
    one = scheduler(endpoint(0), panic_mode=False)
    one.set_endpoint_state(0, 0.0, healthy=False)
    one.submit(job())
    assert one.next_batches(0.0) == []
    assert one.start_at_once(job(), 0.0) is None
    one.set_endpoint_state(0, 5.0, healthy=True)
    assert places(one.next_batches(5.0)) == [0]


def test_without_panic_who_waits_for_a_breaker_is_woken_when_it_lets_one_through():
    fleet = VirtualFleet(endpoint(0, speed=0.1), panic_mode=False)
    for _ in range(3):
        fleet.ends = lambda batch: FAILED
        fleet.submit(job(now=fleet.now))
        fleet.run(fleet.now + 1.0)
    fleet.ends = drawn
    patient = job(now=3.0)
    fleet.submit(patient)
    fleet.run(100.0)
    assert patient.started_at == 13.0


# second calls for slow ones


def hedging(*endpoints: EndpointState, factor: float | None = 3.0, **retry: Any) -> Scheduler:
    return scheduler(*endpoints, retry=RetryOptions(hedge_after_factor=factor, **retry))


def hedged(**more: Any) -> tuple[Scheduler, Job, Batch, Batch]:
    """A job whose call of 1 s is asked for a second time after 3 s."""
    one = hedging(endpoint(0, "slow", speed=0.1, cheap=True, **more), endpoint(1, "quick", cheap=True, **more))
    asked = job("slow", "quick")
    one.submit(asked)
    first = only(one.next_batches(0.0))
    (second,) = one.look_after(3.0)
    return one, asked, first, second


@pytest.mark.parametrize(("factor", "after"), [(None, None), (3.0, 3), (8.0, 8)])
def test_a_call_that_takes_so_many_times_as_long_as_it_should_is_made_a_second_time(factor, after):
    one = hedging(endpoint(0, speed=0.1, cheap=True), endpoint(1, cheap=True), factor=factor)
    one.submit(job())
    one.next_batches(0.0)
    second = next((now for now in range(1, 20) if one.look_after(float(now))), None)
    assert second == after
    assert one.running == (1 if after is None else 2)


def test_a_call_is_made_a_second_time_only_once():
    one, _, _, _ = hedged()
    assert one.look_after(100.0) == []


@pytest.mark.parametrize("cheap", [(False, True), (True, False)])
def test_there_is_no_second_call_where_either_endpoint_costs_money(cheap):
    one = hedging(endpoint(0, speed=0.1, cheap=cheap[0]), endpoint(1, cheap=cheap[1]))
    one.submit(job())
    one.next_batches(0.0)
    assert one.look_after(100.0) == []


def test_there_is_no_second_call_while_others_wait():
    one = hedging(endpoint(0, "a", speed=0.1, cheap=True), endpoint(1, "b", cheap=True), endpoint(2, "c"))
    one.submit(job("a", "b"))
    one.submit(job("c"))
    one.submit(job("c"))
    assert len(one.next_batches(0.0)) == 2
    assert one.look_after(100.0) == []


def test_second_calls_come_out_of_the_budget_for_retries():
    one = hedging(
        *[endpoint(number, speed=0.1, cheap=True) for number in range(8)], budget_ratio=0.0, floor_per_second=1e-6
    )
    for _ in range(4):
        one.submit(job())
    one.next_batches(0.0)
    assert len(one.look_after(100.0)) == 1


def test_where_the_second_call_wins_the_first_is_told_that_it_is_unwanted():
    one, asked, first, second = hedged()
    assert one.finish(second, drawn(second), 4.0) == [asked]
    assert (asked.status, asked.backend) == (JobStatus.SUCCEEDED, "quick")
    assert one.unwanted() == [first]
    assert one.finish(first, CANCELLED, 4.0) == []
    assert (one.running, one.queued) == (0, 0)


def test_where_the_first_call_wins_the_second_is_told_that_it_is_unwanted():
    one, asked, first, second = hedged()
    assert one.finish(first, drawn(first), 4.0) == [asked]
    assert (asked.status, asked.backend) == (JobStatus.SUCCEEDED, "slow")
    assert one.unwanted() == [second]
    assert one.finish(second, CANCELLED, 4.0) == []
    assert (one.running, one.queued) == (0, 0)


@pytest.mark.parametrize("which", [0, 1])
def test_where_one_of_both_fails_the_other_may_still_win(which):
    one, asked, *both = hedged()
    assert one.finish(both[which], FAILED, 4.0) == []
    assert (one.queued, one.unwanted()) == (0, [])
    assert one.finish(both[1 - which], drawn(both[1 - which]), 5.0) == [asked]
    assert asked.status is JobStatus.SUCCEEDED


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_where_both_fail_the_picture_is_tried_elsewhere_and_then_no_more(order):
    one, asked, *both = hedged()
    one.add_endpoint(endpoint(2, "quick"))
    for which in order:
        assert one.finish(both[which], FAILED, 4.0) == []
    last = only(one.next_batches(5.0))
    assert (last.endpoint_id, last.is_hedge) == (2, False)
    assert one.finish(last, FAILED, 6.0) == [asked]
    assert isinstance(asked.error, AllAttemptsFailed)
    assert asked.attempts == 3


def test_a_refusal_by_either_ends_the_job_and_both_calls():
    one, asked, first, second = hedged()
    assert one.finish(second, Ended(refusal=ContentRefused("no")), 4.0) == [asked]
    assert one.unwanted() == [first]


def test_a_job_that_is_cancelled_meanwhile_leaves_both_calls_unwanted():
    one, asked, first, second = hedged()
    assert set(map(id, one.cancel(asked, 4.0))) == {id(first), id(second)}
    one.finish(first, CANCELLED, 4.0)
    one.finish(second, CANCELLED, 4.0)
    assert one.running == 0


def test_a_second_call_for_one_of_a_batch_leaves_the_others_theirs():
    one = hedging(endpoint(0, "slow", speed=0.1, shape="items", size=2, cheap=True), endpoint(1, "quick", cheap=True))
    jobs = [job(("slow", 0), ("quick", 1)) for _ in range(2)]
    for each in jobs:
        one.submit(each)
    batch = only(one.next_batches(0.0))
    one.add_endpoint(endpoint(2, "slow", cheap=True))
    (second,) = one.look_after(100.0)
    assert one.finish(second, drawn(second), 101.0) == [second.tasks[0].job]
    assert one.unwanted() == []
    (other,) = [each for each in jobs if not each.is_over]
    assert one.finish(batch, drawn(batch), 102.0) == [other]


def test_a_second_call_on_a_backend_that_is_removed_ends_as_it_ends():
    one, asked, first, second = hedged()
    assert one.remove_backend("quick", 4.0) == []
    assert one.finish(second, drawn(second), 5.0) == [asked]
    one.finish(first, CANCELLED, 5.0)
    assert one.running == 0


# breakers


def opened(options: BreakerOptions, endings: list[Ended], *, every: float = 0.0) -> bool:
    one = scheduler(endpoint(0, breaker=options))
    for index, ended in enumerate(endings):
        now = index * every
        one.submit(job(now=now))
        batch = only(one.next_batches(now))
        one.finish(batch, drawn(batch) if ended.results is not None else ended, now)
    return one.snapshot(len(endings) * every).endpoints[0].breaker == "open"


OK = Ended(results=())
TIMED_OUT = Ended(outcome=Outcome.UNKNOWN, message="silent", timed_out=True)
LENIENT = BreakerOptions(failures=1000, timeouts=1000, min_calls=1000, jitter=0)


@pytest.mark.parametrize(
    ("option", "endings", "opens"),
    [
        ({"failures": 3}, [FAILED] * 2, False),
        ({"failures": 3}, [FAILED] * 3, True),
        ({"failures": 3}, [FAILED, FAILED, OK, FAILED], False),
        ({"timeouts": 2}, [TIMED_OUT], False),
        ({"timeouts": 2}, [TIMED_OUT] * 2, True),
        ({"timeouts": 2}, [TIMED_OUT, FAILED, TIMED_OUT], False),
        ({"min_calls": 6, "error_share": 0.5}, [OK, FAILED] * 2, False),
        ({"min_calls": 6, "error_share": 0.5}, [OK, FAILED] * 3, True),
        ({"min_calls": 6, "error_share": 0.9}, [OK, FAILED] * 3, False),
        ({"min_calls": 6}, [OK, Ended(refusal=ContentRefused("no")), FAILED, OK, FAILED], False),
    ],
)
def test_each_option_of_the_breaker_opens_it(option, endings, opens):
    assert opened(replace(LENIENT, **option), endings) is opens


def test_calls_that_ended_longer_ago_than_window_seconds_do_not_count():
    options = BreakerOptions(failures=1000, timeouts=1000, min_calls=6, window_seconds=30.0, jitter=0)
    assert opened(options, [OK, FAILED] * 3, every=2.0)
    assert not opened(options, [OK, FAILED] * 3, every=20.0)


def test_calls_from_before_it_opened_do_not_close_it():
    one = scheduler(endpoint(0, slots=8), endpoint(1, slots=8))
    for _ in range(16):
        one.submit(job())
    calls = [batch for batch in one.next_batches(0.0) if batch.endpoint_id == 0]
    for batch in calls[:3]:
        one.finish(batch, FAILED, 1.0)
    one.finish(calls[3], drawn(calls[3]), 2.0)
    assert one.snapshot(2.0).endpoints[0].breaker == "open"
    assert one.snapshot(11.0).endpoints[0].breaker == "half_open"


# what an operator or a check says


def test_a_disabled_endpoint_gets_no_work_and_an_enabled_one_does():
    one = scheduler(endpoint(0))
    one.set_endpoint_state(0, 0.0, enabled=False)
    with pytest.raises(NoUsableBackend):
        one.submit(job())
    assert one.set_endpoint_state(0, 0.0, enabled=True) is False
    one.submit(job())
    one.set_endpoint_state(0, 0.0, enabled=False)
    assert one.next_batches(0.0) == []
    one.set_endpoint_state(0, 0.0, enabled=True)
    assert places(one.next_batches(0.0)) == [0]


def test_it_says_whether_the_verdict_changed_and_keeps_the_detail():
    one = scheduler(endpoint(0))
    said = [one.set_endpoint_state(0, 0.0, healthy=ok, detail=f"{ok}") for ok in (True, True, False, False, True)]
    assert said == [True, False, True, False, True]
    (state,) = one.snapshot(0.0).endpoints
    assert (state.health, state.health_detail) == ("up", "True")


def test_an_endpoint_that_is_up_from_the_first_does_not_start_slowly():
    one = scheduler(endpoint(0, slots=10))
    one.set_endpoint_state(0, 0.0, healthy=True)
    for _ in range(10):
        one.submit(job())
    assert len(one.next_batches(0.0)) == 10


def test_slots_that_come_while_a_call_runs_are_used_at_once():
    states = [endpoint(0, speed=1.0), endpoint(1, speed=1.0)]
    one = scheduler(*states, strategy="least_work")
    for _ in range(6):
        one.submit(job())
    assert len(one.next_batches(0.0)) == 2
    states[0].resize(3)
    one.endpoint_changed()
    assert places(one.next_batches(0.0)) == [0, 0]


def test_pictures_that_fail_inside_a_good_answer_are_tried_again_and_the_others_kept():
    one = scheduler(endpoint(0, "a", shape="items", size=2), endpoint(1, "b"))
    asked = job(("a", 0), ("b", 1), n=2)
    one.submit(asked)
    batch = only(one.next_batches(0.0))
    good = drawn(batch).results
    assert good is not None
    one.finish(batch, Ended(results=(good[0], ItemFailure("smudged"))), 1.0)
    again = only(one.next_batches(1.0))
    assert (again.endpoint_id, len(again.tasks)) == (1, 1)
