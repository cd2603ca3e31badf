"""Hazards of scheduling that are easy to fall for: in fairness, in estimates, in waiting, in where work goes, in what grows."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.policy.virtual_fleet import FAILED, VirtualFleet, drawn, endpoint, job, only, places, scheduler

from img_serving.domain.errors import ContentRefused, GatewayError, Outcome
from img_serving.domain.jobs import Batch, Ended, Job
from img_serving.domain.tenants import Tenant
from img_serving.policy.endpoint import EndpointState, ExclusiveGroup
from img_serving.policy.retry import RetryOptions
from img_serving.policy.speed import Speed

A, B, C = Tenant("a"), Tenant("b"), Tenant("c")


def kept_busy(fleet: VirtualFleet, *backends: str, tenant: Tenant, depth: int = 3, model: str = "m") -> None:
    """A tenant that always has `depth` jobs of one route waiting or running."""
    before = fleet.after_each

    def again(batch: Batch) -> None:
        before(batch)
        for task in batch.tasks:
            if task.job.tenant is tenant and task.job.is_over and task.job.route == job(*backends, model=model).route:
                fleet.scheduler.submit(job(*backends, tenant=tenant, model=model, now=fleet.now))

    fleet.after_each = again
    fleet.submit(*[job(*backends, tenant=tenant, model=model, now=fleet.now) for _ in range(depth)])


# fairness between tenants of different backends


def test_a_newcomer_does_not_stand_behind_what_others_had_of_endpoints_that_it_does_not_use():
    """A clock of the whole gateway would be as far as whoever had most, on whatever backend."""
    fleet = VirtualFleet(endpoint(0, "a", speed=0.01, slots=5), endpoint(1, "b", speed=0.1))
    kept_busy(fleet, "a", tenant=A, depth=20)
    kept_busy(fleet, "b", tenant=B)
    fleet.run(20.0)
    newcomer = job("b", tenant=C, now=20.0)
    fleet.submit(newcomer)
    fleet.run(120.0)
    assert newcomer.started_at is not None
    assert newcomer.started_at <= 25.0


def test_who_had_much_of_one_backend_waits_for_another_no_longer_than_for_a_fair_share():
    fleet = VirtualFleet(endpoint(0, "a", speed=0.01, slots=5), endpoint(1, "b", speed=0.1))
    kept_busy(fleet, "a", tenant=A, depth=20)
    kept_busy(fleet, "b", tenant=B)
    fleet.run(20.0)
    other = job("b", tenant=A, now=20.0)
    fleet.submit(other)
    fleet.run(120.0)
    assert other.started_at is not None


# estimates that refuse what would have been in time


def with_overhead(one: EndpointState, overhead: float, per_unit: float) -> EndpointState:
    one.speed.learn(10.0, overhead + 10.0 * per_unit, 0.0)
    one.speed.overhead, one.speed.per_unit = overhead, per_unit
    return one


def test_a_small_picture_behind_big_ones_is_not_told_that_they_take_as_long_a_unit_as_it_does():
    """The fixed part of a call belongs to the calls of what waits, not to the arriving picture."""
    fleet = VirtualFleet(with_overhead(endpoint(0), 5.0, 0.1), seconds=lambda batch: 5.0 + 0.1 * batch.cost)
    for _ in range(11):
        fleet.submit(job(cost=100))
    fleet.run(1.0)
    small = job(cost=1, now=1.0, patience=200.0)
    fleet.submit(small)
    told = fleet.scheduler.estimate(small, 1.0).eta_seconds
    fleet.run(1e6)
    assert small.finished_at == pytest.approx(11 * 15.0 + 5.1)
    assert told == pytest.approx(169.1, rel=0.2)


def test_a_big_picture_behind_small_ones_is_told_of_their_calls():
    fleet = VirtualFleet(with_overhead(endpoint(0), 5.0, 0.1), seconds=lambda batch: 5.0 + 0.1 * batch.cost)
    for _ in range(101):
        fleet.submit(job(cost=1))
    big = job(cost=100)
    fleet.submit(big)
    told = fleet.scheduler.estimate(big, 0.0).eta_seconds
    fleet.run(1e6)
    assert told == pytest.approx(big.finished_at, rel=0.2)


def test_what_a_more_important_tenant_may_not_have_drawn_yet_keeps_nobody_from_idle_slots():
    capped = Tenant("capped", max_running=1, priority=1)
    fleet = VirtualFleet(endpoint(0, speed=1.0, slots=10))
    for _ in range(100):
        fleet.submit(job(tenant=capped))
    fleet.submit(job(patience=60.0))
    assert len(fleet.started) == 2


def test_with_least_work_a_few_slow_slots_do_not_make_a_fast_endpoint_unreachable():
    """Its time on an average slot says nothing where the fast endpoint would have it."""
    fleet = VirtualFleet(
        endpoint(0, "a", speed=0.1), *[endpoint(n, "b", speed=10.0) for n in range(1, 33)], strategy="least_work"
    )
    for _ in range(2):
        fleet.submit(job("a"))
    quick = job("a", "b", patience=10.0)
    fleet.submit(quick)
    fleet.run(100.0)
    assert quick.finished_at is not None
    assert quick.finished_at <= 10.0


def test_a_picture_is_not_refused_at_the_pace_of_a_smaller_one_that_came_just_before():
    """What is kept of a route for a moment must not depend on who asked first."""
    capped = Tenant("capped", max_running=1)
    fleet = VirtualFleet(with_overhead(endpoint(0, slots=2), 5.0, 0.1))
    fleet.submit(job(cost=1, tenant=capped))
    fleet.submit(job(cost=1, tenant=capped))
    fleet.submit(job(cost=100, tenant=capped, patience=100.0))


def test_a_wait_behind_ones_own_work_in_another_line_of_the_same_endpoint_is_told():
    fleet = VirtualFleet(endpoint(0, speed=0.1))
    for _ in range(101):
        fleet.submit(job(model="m1"))
    last = job(model="m2", now=0.0)
    fleet.submit(last)
    told = fleet.scheduler.estimate(last, 0.0).wait_seconds
    fleet.run(1e6)
    assert told == pytest.approx(last.started_at, rel=0.2)


def test_a_second_try_is_at_the_head_and_told_so():
    one = scheduler(endpoint(0, speed=0.1), endpoint(1, speed=0.1))
    first = job()
    one.submit(first)
    one.submit(job())
    batch, _ = one.next_batches(0.0)
    for _ in range(20):
        one.submit(job())
    one.finish(batch, FAILED, 1.0)
    one.next_batches(1.0)
    assert one.estimate(first, 1.0).position == 0


def test_calls_of_very_different_sizes_are_foretold():
    """Doubt about the fixed part has to fade with the calls, although only some twenty are remembered."""
    speed = Speed()
    for _ in range(500):
        for cost in (1.0, 100.0):
            speed.learn(cost, 5.0 + 0.1 * cost, 0.0)
    assert speed.seconds(1.0) == pytest.approx(5.1, rel=0.5)
    assert speed.seconds(100.0) == pytest.approx(15.0, rel=0.5)


# waiting for what does not come


def test_with_least_work_a_task_does_not_wait_for_ever_for_an_endpoint_whose_gpu_others_hold():
    """Who is better off waiting for a GPU has to ask for it, too."""
    gpu = ExclusiveGroup("gpu")
    fleet = VirtualFleet(
        endpoint(0, "x", speed=0.1, slots=2, group=gpu),
        endpoint(1, "a", speed=0.1, group=gpu),
        endpoint(2, "c", speed=100.0),
        strategy="least_work",
    )
    fleet.submit(job("x", tenant=A))
    fleet.run(0.5)
    kept_busy(fleet, "x", tenant=A, depth=4)
    patient = job("a", "c", tenant=B, now=0.5)
    fleet.submit(patient)
    fleet.run(200.0)
    assert patient.started_at is not None


def test_with_least_work_nobody_waits_for_ever_for_a_fast_endpoint_that_goes_to_others_beside_an_idle_one():
    """Every forecast is for the moment, and the next call always goes to somebody else: waiting has to be bounded."""
    fleet = VirtualFleet(
        endpoint(0, "a", speed=0.1), endpoint(1, "c", speed=1.0), strategy="least_work", ageing_seconds=0.0
    )
    kept_busy(fleet, "a", tenant=Tenant("important", priority=1), depth=5)
    patient = job("a", "c", tenant=B)
    fleet.submit(patient)
    fleet.run(500.0)
    assert patient.started_at is not None


@pytest.mark.parametrize("why", ["busy", "broken"])
def test_who_waits_beside_a_full_endpoint_is_woken_when_another_may_be_used_again(why):
    """Also where another endpoint is usable, and full."""
    back = endpoint(1)
    one = scheduler(endpoint(0), back)
    if why == "busy":
        back.busy_until = 10.0
    else:
        for _ in range(3):
            back.breaker.end(back.breaker.start(0.0), False, 0.0)
    for _ in range(2):
        one.submit(job())
    assert places(one.next_batches(0.0)) == [0]
    assert one.wakes_at(0.0) == 10.0
    assert places(one.next_batches(10.0)) == [1]


def test_a_linger_that_can_bring_nobody_does_not_happen():
    """Only pictures of one job share a call of this shape, and all of them are here."""
    one = scheduler(endpoint(0, shape="request", size=4, linger_seconds=1.0))
    one.submit(job())
    assert len(one.next_batches(0.0)) == 1


def test_a_claim_of_somebody_who_left_does_not_keep_a_second_call_away():
    gpu = ExclusiveGroup("gpu")
    one = scheduler(
        endpoint(0, "a", speed=0.1, cheap=True),
        endpoint(1, "b", cheap=True, group=gpu),
        endpoint(2, "c", group=gpu),
        retry=RetryOptions(hedge_after_factor=3.0),
    )
    one.submit(job("a", "b"))
    one.submit(job("b"))
    assert places(one.next_batches(0.0)) == [0, 1]
    waiting = job("c")
    one.submit(waiting)
    assert one.next_batches(0.0) == []
    holder = next(batch for batch in one._running if batch.endpoint_id == 1)
    one.cancel(waiting, 1.0)
    one.finish(holder, drawn(holder), 1.0)
    assert one.next_batches(1.0) == []
    assert places(one.look_after(10.0)) == [1]


# the wrong place


def capped_backlog(fleet: VirtualFleet, *backends: str) -> None:
    fleet.submit(job(*backends, tenant=Tenant("capped", max_running=1), n=100))


def test_with_least_work_a_backlog_that_may_not_run_sends_nobody_to_a_slow_endpoint():
    """What caps hold back is not what the others have to get through."""
    fleet = VirtualFleet(endpoint(0, speed=0.1), endpoint(1, speed=5.0), strategy="least_work")
    capped_backlog(fleet)
    quick = job(tenant=B)
    fleet.submit(quick)
    fleet.run(1000.0)
    assert quick.finished_at is not None
    assert quick.finished_at <= 3.0


def test_a_backlog_that_may_not_run_makes_nobodys_batches_bigger():
    fleet = VirtualFleet(*[endpoint(number, speed=0.1, shape="items", size=8) for number in range(5)])
    capped_backlog(fleet)
    fleet.submit(job(tenant=B, n=4))
    assert [len(batch.tasks) for batch in fleet.started] == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("speed", [2.0, None])
def test_the_next_tier_gets_nothing_while_the_first_has_a_free_slot(speed):
    """An overflow begins where the first tier is full."""
    one = scheduler(
        *[endpoint(number, "a", speed=speed) for number in (0, 1)],
        *[endpoint(number, "b", speed=speed) for number in (2, 3)],
        tier_overflow_seconds=5.0,
    )
    for now in (0.0, 20.0, 40.0):
        one.submit(job(("a", 0), ("b", 1), n=2, now=now))
        batches = one.next_batches(now)
        assert places(batches) == [0, 1]
        for batch in batches:
            one.finish(batch, drawn(batch), now + 20.0)


def test_two_models_on_one_engine_are_not_loaded_in_turn_for_every_picture():
    """Under load everybody has waited for longer than that: patience begins when a line is first passed over."""
    engine = endpoint(0, speed=0.1, switches=True)
    fleet = VirtualFleet(engine, seconds=lambda batch: 1.0 + 10.0 * batch.loads_model)
    for index in range(100):
        for tenant, model in ((A, "x"), (B, "y")):
            fleet.scheduler.submit(job(model=model, tenant=tenant, now=index / 1000))
    fleet.pump()
    fleet.run(1e6)
    assert len(fleet.started) == 200
    assert fleet.started[-1].started_at <= 2 * 200.0  # 200 s of drawing; it takes 2109 s, with 192 loads


# priorities


def test_what_waits_on_a_route_that_nobody_serves_lifts_no_fresh_work_over_a_higher_priority():
    one = scheduler(endpoint(0, "a"), endpoint(1, "b"), panic_mode=False)
    one.set_endpoint_state(1, 0.0, healthy=False)
    one.submit(job("b", tenant=A))
    one.submit(job("a", tenant=A, now=590.0))
    batch = only(one.next_batches(590.0))
    high = job("a", tenant=Tenant("high", priority=5), now=598.0)
    one.submit(high)
    one.submit(job("a", tenant=B, now=599.0))
    one.finish(batch, drawn(batch), 600.0)
    assert only(one.next_batches(600.0)).tasks[0].job is high


def test_what_a_tenants_cap_keeps_waiting_lifts_no_fresh_work_of_others_over_a_higher_priority():
    one = scheduler(endpoint(0, slots=2))
    for _ in range(2):
        one.submit(job(tenant=Tenant("capped", max_running=1)))
    one.next_batches(0.0)
    one.submit(job(tenant=A, now=590.0))
    batch = only(one.next_batches(590.0))
    high = job(tenant=Tenant("high", priority=5), now=598.0)
    one.submit(high)
    one.submit(job(tenant=B, now=599.0))
    one.finish(batch, drawn(batch), 600.0)
    assert only(one.next_batches(600.0)).tasks[0].job is high


# failures


def test_a_batch_that_was_refused_after_one_of_two_jobs_had_left_does_not_fail_the_other_for_it():
    one = scheduler(endpoint(0, shape="items", size=2))
    good, poison = job(), job(prompt="poison")
    one.submit(good)
    one.submit(poison)
    batch = only(one.next_batches(0.0))
    one.cancel(poison, 1.0)
    assert one.finish(batch, Ended(refusal=ContentRefused("not that")), 2.0) == []
    assert only(one.next_batches(2.0)).tasks[0].job is good


def test_a_large_batch_that_failed_on_the_only_endpoint_is_taken_apart_to_its_last_member():
    """It was one call that failed: the budget's floor of ten must not leave the last of sixteen without a try of their own."""
    fleet = VirtualFleet(
        endpoint(0, speed=0.1, shape="items", size=16),
        ends=lambda batch: FAILED if len(batch.tasks) > 1 else drawn(batch),
    )
    jobs = [job() for _ in range(16)]
    for each in jobs:
        fleet.scheduler.submit(each)
    fleet.pump()
    fleet.run(1000.0)
    assert Counter(str(each.status) for each in jobs) == {"succeeded": 16}


def test_a_job_whose_deadline_has_passed_is_not_started_at_once():
    one = scheduler(endpoint(0))
    assert one.start_at_once(job(patience=5.0), 6.0) is None


# what grows


def test_clients_of_a_tenant_at_its_cap_that_come_and_go_leave_nothing_behind():
    capped = Tenant("capped", max_running=1)
    one = scheduler(endpoint(0, slots=2))
    one.submit(job(tenant=capped))
    one.next_batches(0.0)
    for _ in range(1000):
        passing = job(tenant=capped)
        one.submit(passing)
        one.next_batches(0.0)
        one.cancel(passing, 0.0)
    assert len(one._lines.account(capped).parked) < 100


def test_tenants_that_come_and_go_behind_a_blocked_one_leave_nothing_behind():
    one = scheduler(endpoint(0))
    one.submit(job(tenant=A))
    one.next_batches(0.0)
    one.submit(job(tenant=A))
    for _ in range(1000):
        passing = job(tenant=B)
        one.submit(passing)
        one.next_batches(0.0)
        one.cancel(passing, 0.0)
    (line,) = one._lines
    assert sum(len(level._heap) for level in line.queue.levels) < 100


def looked_at(lines: int) -> int:
    """How often a line is ranked when one call ends while so many lines wait."""
    one = scheduler(endpoint(0), endpoint(1))
    for index in range(lines):
        for _ in range(2):
            one.submit(job(model=f"m{index}"))
    batch, _ = one.next_batches(0.0)
    count = 0
    rank = one._placement.rank

    def counted(line):
        nonlocal count
        count += 1
        return rank(line)

    one._placement.rank = counted  # type: ignore[method-assign]
    one.finish(batch, Ended(outcome=Outcome.NOT_STARTED, message="no"), 1.0)
    one.next_batches(1.0)
    return count


def test_lines_are_not_all_compared_with_all():
    """A client makes a thousand lines by naming models of an engine that lists none."""
    assert looked_at(100) <= 10 * 100


def refused(fleet: VirtualFleet, asked: Job) -> GatewayError | None:
    try:
        fleet.submit(asked)
    except GatewayError as error:
        return error
    return None


def test_who_could_not_even_be_served_by_an_idle_fleet_is_not_told_to_come_back_at_once():
    """What stands in other lines is not in its way."""
    fleet = VirtualFleet(endpoint(0, "a", speed=1.0), endpoint(1, "b", speed=1.0))
    for _ in range(3):
        fleet.submit(job("a"))
    error = refused(fleet, job("b", cost=100, patience=50.0))
    assert error is None or error.should_retry is False or (error.retry_after_seconds or 0.0) > 0.0


# of the pools


def test_a_tenant_gets_no_more_for_asking_in_several_ways():
    """Each set of backends is a pool with a share of its own: who names four of them must not get four shares."""
    fleet = VirtualFleet(endpoint(0, "a", speed=0.1), *[endpoint(n, "bcd"[n - 1]) for n in (1, 2, 3)], max_tasks=10_000)
    for number in (1, 2, 3):
        fleet.scheduler.set_endpoint_state(number, 0.0, healthy=False)
    for backends in (("a",), ("a", "b"), ("a", "c"), ("a", "d")):
        for _ in range(100):
            fleet.scheduler.submit(job(*backends, tenant=A))
            fleet.scheduler.submit(job("a", tenant=B))
    fleet.pump()
    fleet.run(100.0)
    counts = Counter(batch.tasks[0].job.tenant.name for batch in fleet.started)
    assert counts["b"] >= 40


def test_a_head_that_cannot_wait_for_a_busy_endpoint_does_not_keep_the_others_from_being_woken():
    """The first task expires before the endpoint is free; those behind it do not."""
    state = endpoint(0)
    one = scheduler(state)
    one.submit(job())
    one.next_batches(0.0)
    state.busy_until = 10.0
    one.submit(job(patience=5.0))
    one.submit(job(patience=100.0))
    assert one.next_batches(0.0) == []
    assert one.wakes_at(0.0) == 10.0


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_head_of_a_tenants_lane_is_not_passed_over_for_ever_by_its_own_small_pictures_that_travel_as_company(
    weight,
):
    """They move its tenant's clock on, too: without a bound the big one would never have a turn of its own."""
    fleet = VirtualFleet(endpoint(0, speed=0.1, shape="items", size=2))
    slow = Tenant("slow", weight=weight)
    big = job(tenant=slow, cost=10)

    def again(batch: Batch) -> None:
        for task in batch.tasks:
            if task.job is not big:
                fleet.scheduler.submit(job(tenant=task.job.tenant, cost=2, now=fleet.now))

    fleet.after_each = again
    fleet.submit(job(tenant=A, cost=2), job(tenant=slow, cost=2))
    fleet.submit(big)
    fleet.run(200.0)
    assert big.started_at is not None


def test_a_thousand_second_tries_are_not_all_asked_at_every_event():
    one = scheduler(
        endpoint(0, "a", slots=1000), endpoint(1, "b"), endpoint(2, "c"), retry=RetryOptions(floor_per_second=1e6)
    )
    blocker = job("b")
    one.submit(blocker)
    one.next_batches(0.0)
    for _ in range(500):
        one.submit(job("a", "b"))
    for batch in one.next_batches(0.0):
        one.finish(batch, FAILED, 0.0)
    asked = 0
    pick = one._placement.pick_again

    def counted(task):
        nonlocal asked
        asked += 1
        return pick(task)

    one._placement.pick_again = counted  # type: ignore[method-assign]
    one.next_batches(0.0)
    assert 0 < asked <= 64
