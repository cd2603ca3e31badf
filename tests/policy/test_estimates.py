"""What is told of waits: positions, paces and ends, and that they come true where speeds are what they seem."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.virtual_fleet import VirtualFleet, drawn, endpoint, job, only, scheduler

from img_serving.domain.jobs import Batch, Job, Task
from img_serving.domain.tenants import Tenant
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.snapshots import JobEstimate

steady = settings(deadline=None, derandomize=True)


# positions


def test_a_job_that_runs_is_at_the_head_and_done_when_its_last_call_is():
    fleet = VirtualFleet(endpoint(0, speed=1.0, slots=2))
    first = job(n=2)
    fleet.submit(first)
    fleet.run(4.0)
    assert fleet.scheduler.estimate(first, 4.0) == JobEstimate(0, 0.0, 6.0)


def test_a_job_that_runs_on_an_endpoint_that_was_not_measured_has_no_end_yet():
    one = scheduler(endpoint(0))
    first = job()
    one.submit(first)
    one.next_batches(0.0)
    assert one.estimate(first, 0.0) == JobEstimate(0, 0.0, None)


def test_without_a_speed_there_is_a_position_but_no_wait():
    one = scheduler(endpoint(0))
    for _ in range(4):
        one.submit(job())
    last = job()
    one.submit(last)
    assert one.estimate(last, 0.0) == JobEstimate(4, None, None)


def test_a_position_counts_every_picture_before_ones_own_wherever_one_stands():
    one = scheduler(endpoint(0, speed=1.0))
    jobs = [job(n=1 + index % 3) for index in range(31)]
    for each in jobs:
        one.submit(each)
    before = [sum(earlier.request.n for earlier in jobs[:index]) for index in range(31)]
    assert [one.estimate(each, 0.0).position for each in jobs] == before


def test_whoever_stands_last_is_told_so_without_a_walk_along_the_line():
    one = scheduler(endpoint(0, speed=1.0))
    jobs = [job() for _ in range(50)]
    for each in jobs:
        one.submit(each)
    looked_at = 0

    class Watched(OrderedDict[Task, None]):
        def __iter__(self):
            nonlocal looked_at
            for task in super().__iter__():
                looked_at += 1
                yield task

    lane = jobs[-1].tasks[0].place
    lane.tasks = Watched(lane.tasks)
    assert one.estimate(jobs[-1], 0.0).position == 49
    assert 0 < looked_at < 5


def test_tenants_share_so_a_position_counts_others_only_as_far_as_they_go_first():
    one = scheduler(endpoint(0, speed=1.0))
    for _ in range(40):
        one.submit(job(tenant=Tenant("a")))
    mine = [job(tenant=Tenant("b", weight=2.0)) for _ in range(4)]
    for each in mine:
        one.submit(each)
    assert [one.estimate(each, 0.0).position for each in mine] == [
        0,
        2,
        4,
        5,
    ]  # its own, and half as many of the other's


def test_a_priority_stands_before_all_of_a_lower_one():
    one = scheduler(endpoint(0, speed=1.0))
    low, high = job(tenant=Tenant("a")), job(tenant=Tenant("b", priority=1))
    one.submit(low)
    one.submit(job(tenant=Tenant("a")))
    one.submit(high)
    assert (one.estimate(high, 0.0).position, one.estimate(low, 0.0).position) == (0, 1)


def test_work_in_other_lines_counts_only_where_it_goes_to_the_same_endpoints():
    one = scheduler(endpoint(0, "a", speed=1.0), endpoint(1, "b", speed=1.0))
    for _ in range(40):
        one.submit(job("a", tenant=Tenant("a")))
    strange, fits = job("b", tenant=Tenant("b")), job("a", model="another", tenant=Tenant("b"), n=5)
    one.submit(strange)
    one.submit(fits)
    one.submit(last := job("a", model="another", tenant=Tenant("b")))
    assert one.estimate(strange, 0.0).position == 0
    assert 8 <= one.estimate(last, 0.0).position <= 12  # five of its own, and as many of the other's


# whether they come true


def with_overhead(one: EndpointState, seconds: float) -> EndpointState:
    one.speed.overhead = seconds
    return one


@pytest.mark.parametrize(
    "endpoints",
    [
        [endpoint(0, speed=1.0)],
        [endpoint(0, speed=1.0, slots=4)],
        [endpoint(0, speed=1.0), endpoint(1, speed=0.5, slots=2)],
        [endpoint(0, speed=0.1), endpoint(1, speed=1.0)],
        [with_overhead(endpoint(0, speed=0.1), 10.0)],
        [with_overhead(endpoint(0, speed=0.1, shape="items", size=4), 10.0)],
    ],
    ids=["one", "slots", "two speeds", "one much faster", "a fixed part", "a fixed part shared by batches"],
)
def test_the_end_of_a_long_line_comes_true(endpoints):
    known = {one.id: (one.speed.overhead, one.speed.per_unit) for one in endpoints}

    def seconds(batch: Batch) -> float:
        overhead, per_unit = known[batch.endpoint_id]
        assert per_unit is not None
        return float(overhead + per_unit * batch.cost)

    fleet = VirtualFleet(*endpoints, seconds=seconds)
    jobs = [job() for _ in range(60)]
    for each in jobs:
        fleet.scheduler.submit(each)
    fleet.pump()
    estimate = fleet.scheduler.estimate(jobs[-1], 0.0)
    fleet.run(1e6)
    last = max(each.finished_at or 0.0 for each in jobs)
    assert estimate.wait_seconds == pytest.approx(jobs[-1].started_at, rel=0.2)
    assert estimate.eta_seconds == pytest.approx(last, rel=0.2)


@steady
@given(
    speeds=st.lists(st.sampled_from([0.5, 1.0]), min_size=1, max_size=3),
    slots=st.integers(1, 3),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=15),
)
def test_waits_and_ends_come_true_to_within_two_calls_where_all_pictures_are_alike(speeds, slots, sizes):
    tenants = [Tenant("a"), Tenant("b", weight=2.0), Tenant("c")]
    fleet = VirtualFleet(*[endpoint(number, speed=speed, slots=slots) for number, speed in enumerate(speeds)])
    jobs: list[Job] = []
    for n, which in sizes:
        jobs.append(job(n=n, tenant=tenants[which]))
        fleet.submit(jobs[-1])
    told = [fleet.scheduler.estimate(each, 0.0) for each in jobs]
    fleet.run(1e6)
    longest = 10.0 * max(speeds)
    for each, estimate in zip(jobs, told, strict=True):
        assert each.started_at is not None
        assert each.finished_at is not None
        if each.started_at:  # else it is told of the first of its pictures that waits
            assert estimate.wait_seconds == pytest.approx(each.started_at, abs=2 * longest)
        assert estimate.eta_seconds == pytest.approx(each.finished_at, abs=3 * longest)


@steady
@given(
    cap=st.integers(1, 4),
    slots=st.integers(1, 6),
    count=st.integers(1, 12),
    others=st.integers(0, 6),
)
def test_the_end_under_a_cap_comes_true_to_within_two_calls(cap, slots, count, others):
    capped = Tenant("capped", max_running=cap)
    fleet = VirtualFleet(endpoint(0, speed=1.0, slots=slots))
    jobs = [job(tenant=capped) for _ in range(count)]
    for each in jobs:
        fleet.submit(each)
    for _ in range(others):
        fleet.submit(job())
    told = fleet.scheduler.estimate(jobs[-1], 0.0).eta_seconds
    fleet.run(1e6)
    assert told == pytest.approx(jobs[-1].finished_at, abs=20.0)


# the snapshot and the wait


def test_a_snapshot_has_the_figures_of_every_backend_and_of_every_tenant():
    fleet = VirtualFleet(endpoint(0, "a", speed=1.0), endpoint(1, "b", speed=1.0))
    a, b = Tenant("a"), Tenant("b", weight=2.0, priority=1, max_running=1)
    fleet.submit(job("a", tenant=a), *[job("a", tenant=a) for _ in range(3)])
    fleet.submit(job("b", tenant=b), job("b", tenant=b))
    fleet.run(4.0)
    snapshot = fleet.scheduler.snapshot(4.0)
    assert (snapshot.queued, snapshot.running, snapshot.work, snapshot.oldest_seconds) == (4, 2, 40.0, 4.0)
    first, second = snapshot.backends
    assert (first.backend, first.depth, first.running, first.work, first.oldest_seconds) == ("a", 3, 1, 30.0, 4.0)
    assert (second.backend, second.depth, second.running, second.work) == ("b", 1, 1, 10.0)
    assert first.eta_seconds == pytest.approx(36.0)
    assert second.eta_seconds == pytest.approx(16.0)
    mine, theirs = sorted(snapshot.tenants, key=lambda one: one.tenant)
    assert (mine.tenant, mine.depth, mine.running, mine.work) == ("a", 3, 1, 30.0)
    assert mine.eta_seconds == pytest.approx(26.0)
    assert (theirs.priority, theirs.weight, theirs.max_running, theirs.depth, theirs.running) == (1, 2.0, 1, 1, 1)
    assert theirs.eta_seconds == pytest.approx(6.0)


def test_a_task_counts_for_every_backend_that_could_have_it():
    one = scheduler(endpoint(0, "a"), endpoint(1, "b"))
    for _ in range(5):
        one.submit(job("a", "b"))
    assert [backend.depth for backend in one.snapshot(0.0).backends] == [5, 5]
    assert one.snapshot(0.0).queued == 5


def test_the_wait_of_a_route_is_its_own_and_without_one_it_is_the_slowest():
    one = scheduler(endpoint(0, "a", speed=1.0), endpoint(1, "b", speed=1.0))
    for _ in range(10):
        one.submit(job("a"))
    for _ in range(3):
        one.submit(job("b"))
    assert one.wait_estimate(0.0, job("b").route) == pytest.approx(30.0)
    assert one.wait_estimate(0.0) == pytest.approx(100.0)
    assert one.wait_estimate(0.0, job("a", "b").route) == 1.0


def test_the_estimate_of_a_job_whose_call_has_taken_longer_than_it_should_is_now():
    one = scheduler(endpoint(0, speed=1.0))
    first = job()
    one.submit(first)
    batch = only(one.next_batches(0.0))
    assert one.estimate(first, 50.0).eta_seconds == 0.0
    one.finish(batch, drawn(batch), 51.0)
