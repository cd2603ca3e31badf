"""`least_work` in one pass: what it thought through for one start holds for the next."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.virtual_fleet import drawn, endpoint, job, places, scheduler

from img_serving.policy.least_work import LeastWork
from img_serving.policy.lines import Line
from img_serving.policy.placement import Found
from img_serving.policy.scheduler import Scheduler

SPEEDS = st.lists(st.sampled_from([0.1, 0.13, 0.2, 0.5, 1.0, 2.7]), min_size=2, max_size=30)
COSTS = st.lists(st.integers(1, 60), min_size=1, max_size=16)


def fleet(speeds: list[float]) -> Scheduler:
    return scheduler(*[endpoint(number, speed=speed) for number, speed in enumerate(speeds)], strategy="least_work")


def forgetful(one: Scheduler) -> Scheduler:
    """The same scheduler, which thinks anew about every start."""
    placement = one._placement
    assert isinstance(placement, LeastWork)
    remembers = placement.place

    def place(line: Line) -> Found | None:
        placement._plan = None
        return remembers(line)

    vars(placement)["place"] = place
    return one


@settings(deadline=None, max_examples=200)
@given(speeds=SPEEDS, first=COSTS, then=COSTS, ended=st.sets(st.integers(0, 29)))
def test_a_pass_that_goes_on_with_its_plan_decides_as_one_that_begins_anew(speeds, first, then, ended):
    both = [fleet(speeds), forgetful(fleet(speeds))]
    for one in both:
        for cost in first:
            one.submit(job(cost=cost))
    started = [one.next_batches(0.0) for one in both]
    assert places(started[0]) == places(started[1])
    for one, batches in zip(both, started, strict=True):
        for batch in batches:
            if batch.endpoint_id in ended:
                one.finish(batch, drawn(batch), 1.0)
        for cost in then[: 16 - len(first)]:
            one.submit(job(cost=cost, now=1.0))
    again = [one.next_batches(1.0) for one in both]
    assert [(batch.endpoint_id, batch.cost) for batch in again[0]] == [
        (batch.endpoint_id, batch.cost) for batch in again[1]
    ]


def test_all_that_are_free_are_given_work_in_one_pass():
    one = fleet([1.0] * 40)
    for _ in range(100):
        one.submit(job())
    assert sorted(places(one.next_batches(0.0))) == list(range(40))
