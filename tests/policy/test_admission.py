"""Who may stand in line: as many as fit, and whoever can be served in time."""

from __future__ import annotations

from typing import Any

import pytest
from tests.policy.virtual_fleet import FAILED, VirtualFleet, drawn, endpoint, job, only, scheduler

from img_serving.domain.errors import DeadlineUnreachable, QueueFull, RateLimited
from img_serving.domain.tenants import Tenant

A = Tenant("a")
CAPPED = Tenant("capped", max_running=1)


def test_as_many_tasks_wait_as_may_and_all_of_a_job_or_none():
    one = scheduler(endpoint(0), max_tasks=3)
    one.submit(job(n=2))
    with pytest.raises(QueueFull, match="holds 2 of at most 3 tasks; 2 more do not fit"):
        one.submit(job(n=2))
    one.submit(job())
    assert one.queued == 3


def test_tasks_that_run_do_not_count():
    one = scheduler(endpoint(0), max_tasks=1)
    one.submit(job())
    one.next_batches(0.0)
    one.submit(job())
    with pytest.raises(QueueFull):
        one.submit(job())


def test_as_much_work_waits_as_may():
    one = scheduler(endpoint(0), max_work=100.0)
    one.submit(job(cost=60))
    with pytest.raises(QueueFull, match="holds 60 of at most 100 megapixel-steps of work; 60 more do not fit"):
        one.submit(job(cost=60))
    one.submit(job(cost=40))
    assert one.snapshot(0.0).work == 100.0


def test_work_that_has_left_makes_room():
    one = scheduler(endpoint(0), max_work=100.0)
    first, second = job(cost=60), job(cost=40)
    one.submit(first)
    one.submit(second)
    one.next_batches(0.0)
    one.submit(job(cost=50))
    one.cancel(second, 0.0)
    one.submit(job(cost=50))


def test_a_job_that_is_more_work_than_may_wait_is_taken_while_nobody_waits():
    one = scheduler(endpoint(0), max_work=100.0)
    one.submit(job(cost=1000))
    assert len(one.next_batches(0.0)) == 1


def test_who_is_refused_for_a_full_queue_is_told_when_it_has_been_worked_off():
    one = scheduler(endpoint(0, speed=1.0), max_tasks=4)
    one.submit(job())
    one.next_batches(0.0)
    for _ in range(4):
        one.submit(job())
    with pytest.raises(QueueFull) as caught:
        one.submit(job())
    assert caught.value.retry_after_seconds == pytest.approx(50.0)
    assert caught.value.status == 503


# deadlines


def waiting(*tenants: Tenant, **options: Any) -> VirtualFleet:
    """One slot of 1 s a megapixel-step, one task of 10 that has run for 1 s, and one of each tenant's waiting."""
    fleet = VirtualFleet(endpoint(0, speed=1.0), **options)
    fleet.submit(job())
    for tenant in tenants:
        fleet.submit(job(tenant=tenant))
    fleet.run(1.0)
    return fleet


def test_who_could_only_be_late_is_refused_at_once_with_an_honest_estimate():
    fleet = waiting(*[A] * 8)
    with pytest.raises(DeadlineUnreachable, match=r"done in 99 s, and its deadline is in 98 s") as caught:
        fleet.submit(job(tenant=A, now=1.0, patience=98.0))
    assert caught.value.retry_after_seconds == pytest.approx(89.0)
    assert caught.value.status == 503
    last = job(tenant=A, now=1.0, patience=100.0)
    fleet.submit(last)
    fleet.run(1000.0)
    assert (last.started_at, last.finished_at) == (90.0, 100.0)


def test_who_would_start_later_than_it_may_wait_is_refused():
    fleet = waiting(*[A] * 3, max_wait_seconds=35.0)
    with pytest.raises(DeadlineUnreachable, match=r"would start in 39 s, and may wait 35 s") as caught:
        fleet.submit(job(tenant=A, now=1.0))
    assert caught.value.retry_after_seconds == pytest.approx(39.0)


def test_pictures_of_one_job_count_one_after_the_other():
    fleet = waiting(A)
    with pytest.raises(DeadlineUnreachable, match=r"done in 59 s"):
        fleet.submit(job(n=4, tenant=A, now=1.0, patience=58.0))
    last = job(n=4, tenant=A, now=1.0, patience=60.0)
    fleet.submit(last)
    fleet.run(1000.0)
    assert last.finished_at == 60.0


def test_a_tenant_with_little_before_it_is_not_refused_for_what_others_have():
    fleet = waiting(*[A] * 50)
    quick = job(tenant=Tenant("b"), now=1.0, patience=45.0)
    fleet.submit(quick)
    fleet.run(1000.0)
    assert quick.finished_at is not None
    assert quick.finished_at <= 40.0


def test_a_higher_priority_is_not_refused_for_what_waits_behind_it():
    fleet = waiting(*[A] * 50)
    quick = job(tenant=Tenant("b", priority=1), now=1.0, patience=25.0)
    fleet.submit(quick)
    fleet.run(1000.0)
    assert quick.finished_at == 20.0


def test_a_lower_priority_is_refused_for_what_waits_before_it():
    fleet = waiting(*[A] * 8)
    with pytest.raises(DeadlineUnreachable, match=r"done in 99 s"):
        fleet.submit(job(tenant=Tenant("b", priority=-1), now=1.0, patience=90.0))


def test_nobody_is_refused_while_no_speed_is_known():
    one = scheduler(endpoint(0))
    for _ in range(100):
        one.submit(job(patience=0.001))
    assert one.queued == 100


def test_nobody_is_refused_for_work_that_goes_elsewhere():
    fleet = VirtualFleet(endpoint(0, "a", speed=1.0), endpoint(1, "b", speed=1.0))
    for _ in range(50):
        fleet.submit(job("a"))
    fleet.submit(job("b", patience=10.5))
    assert len(fleet.started) == 2


# a tenant's own cap


def test_who_is_late_because_of_its_own_cap_is_told_so_with_another_status():
    fleet = VirtualFleet(endpoint(0, speed=1.0, slots=10))
    for _ in range(3):
        fleet.submit(job(tenant=CAPPED))
    fleet.run(1.0)
    with pytest.raises(RateLimited, match="this key may have one picture drawn at a time") as caught:
        fleet.submit(job(tenant=CAPPED, now=1.0, patience=35.0))
    assert (caught.value.status, caught.value.code) == (429, "max_running_reached")
    assert caught.value.retry_after_seconds == pytest.approx(29.0)
    fleet.submit(job(now=1.0, patience=15.0))
    assert len(fleet.started) == 2


def test_pictures_of_a_job_that_its_cap_holds_up_are_counted_by_the_cap():
    fleet = VirtualFleet(endpoint(0, speed=1.0, slots=10))
    fleet.submit(job(tenant=CAPPED))
    fleet.run(1.0)
    with pytest.raises(RateLimited, match=r"done in 49 s"):
        fleet.submit(job(tenant=CAPPED, n=4, now=1.0, patience=48.0))
    last = job(tenant=CAPPED, n=4, now=1.0, patience=50.0)
    fleet.submit(last)
    fleet.run(1000.0)
    assert last.finished_at == 50.0


def test_a_tenant_with_room_under_its_cap_is_not_held_to_it():
    fleet = VirtualFleet(endpoint(0, speed=1.0, slots=2))
    two = Tenant("two", max_running=2)
    fleet.submit(job(tenant=two))
    fleet.submit(job(tenant=two, patience=10.5))
    assert len(fleet.started) == 2


# what expired is never begun


@pytest.mark.parametrize("strategy", ["round_robin", "least_work"])
def test_work_whose_deadline_has_passed_is_never_begun_even_if_nobody_has_said_so_yet(strategy):
    one = scheduler(endpoint(0), endpoint(1, "b"), strategy=strategy)
    running, late, fine = job("a", "b"), job("a", "b", patience=5.0), job("a", "b")
    one.submit(running)
    one.submit(job("a", "b"))
    batch, _ = one.next_batches(0.0)
    one.submit(late)
    one.submit(fine)
    one.finish(batch, drawn(batch), 5.0)
    assert only(one.next_batches(5.0)).tasks[0].job is fine
    assert one.expire(5.0) == [late]


def test_a_second_try_whose_deadline_has_passed_is_never_begun():
    one = scheduler(endpoint(0), endpoint(1))
    late = job(patience=5.0)
    one.submit(late)
    one.finish(only(one.next_batches(0.0)), FAILED, 1.0)
    assert one.next_batches(5.0) == []
    assert one.expire(5.0) == [late]
