"""When each endpoint would have a task done: from what runs there, what is promised, what is known, and models to load."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.virtual_fleet import endpoint

from img_serving.domain.jobs import Batch
from img_serving.policy.endpoint import EndpointState, ExclusiveGroup
from img_serving.policy.forecast import Forecast

steady = settings(deadline=None, derandomize=True)


def busy(one: EndpointState, *ends: float, cost: float = 10.0) -> EndpointState:
    """With a call that is expected to end at each of those moments."""
    for end in ends:
        batch = Batch(one.id, one.backend, "m", (), 0, cost, 0.0)
        batch.expected_end = end
        one.start(batch)
    return one


def forecast(*endpoints: EndpointState, now: float = 0.0, **promised: float) -> Forecast:
    return Forecast(endpoints, {}, now, {int(name[1:]): until for name, until in promised.items()})


def test_an_idle_endpoint_is_free_now_and_a_full_one_when_its_first_call_should_end():
    one = forecast(endpoint(0), busy(endpoint(1), 7.0), busy(endpoint(2, slots=2), 9.0, 8.0), now=5.0)
    assert one.frees == [5.0, 7.0, 8.0]


def test_an_endpoint_with_a_free_slot_is_free_now():
    assert forecast(busy(endpoint(0, slots=2), 9.0), now=5.0).frees == [5.0]


def test_a_call_that_is_late_is_taken_to_need_as_long_again():
    assert forecast(busy(endpoint(0), 7.0), now=10.0).frees == [13.0]


def test_an_endpoint_whose_gpu_another_holds_is_free_when_all_calls_there_should_have_ended():
    gpu = ExclusiveGroup("gpu")
    holder, other = busy(endpoint(0, slots=3, group=gpu), 4.0, 6.0), endpoint(1, group=gpu)
    assert forecast(holder, other, now=1.0).frees == [1.0, 6.0]


def test_what_others_were_promised_is_not_free_before():
    assert forecast(endpoint(0), endpoint(1), now=1.0, e1=5.0).frees == [1.0, 5.0]


def test_one_that_nobody_measured_is_as_fast_for_its_weight_as_the_fastest_other():
    one = forecast(endpoint(0, speed=4.0), endpoint(1, speed=2.0, weight=2.0), endpoint(2), endpoint(3, weight=2.0))
    assert one.slopes == [4.0, 2.0, 4.0, 2.0]
    assert forecast(endpoint(0), endpoint(1, weight=2.0)).slopes == [1.0, 0.5]


def test_a_model_that_must_be_loaded_first_counts_and_one_into_an_empty_engine_does_not():
    engines = [endpoint(number, speed=1.0, switches=True) for number in range(3)]
    for engine, model in zip(engines, ("wanted", "other", None), strict=True):
        engine.loaded_model = model
        engine.switch_seconds = 7.0
    assert Forecast(engines, {"a": "wanted"}, 0.0, {}).heads == [0.0, 7.0, 0.0]
    assert Forecast(engines, {"a": None}, 0.0, {}).heads == [0.0, 0.0, 0.0]


def test_what_runs_beside_it_slows_a_task_down_by_its_share_of_the_slots():
    one = forecast(busy(endpoint(0, speed=1.0, slots=4), 9.0, 9.0, cost=10.0), endpoint(1, speed=1.0, slots=4))
    assert one.heads == [2 * 10.0 / 4, 0.0]


def test_the_soonest_has_it_done_first_and_among_equals_had_its_turn_longest_ago():
    slow, fast = endpoint(0, speed=2.0), busy(endpoint(1, speed=1.0), 15.0)
    assert forecast(slow, fast).soonest(10.0) == 0  # 20 s, and 15 + 10 s
    assert forecast(slow, fast).soonest(20.0) == 1  # 40 s, and 15 + 20 s
    twins = endpoint(0, speed=1.0), endpoint(1, speed=1.0)
    twins[0].picked_at = 1
    assert forecast(*twins).soonest(10.0) == 1


def test_what_is_promised_moves_the_next_task_back():
    one = forecast(endpoint(0, speed=1.0), endpoint(1, speed=1.5))
    order: list[int] = []
    for _ in range(5):
        index = one.soonest(10.0)
        order.append(index)
        one.promise(index, 10.0)
    assert order == [0, 1, 0, 0, 1]
    assert one.frees == [30.0, 30.0]


def test_a_promise_takes_only_its_part_of_the_slots_and_of_a_shared_call():
    wide, batching = endpoint(0, speed=1.0, slots=4), endpoint(1, speed=1.0, shape="items", size=5)
    batching.speed.overhead = 10.0
    one = forecast(wide, batching)
    one.promise(0, 8.0)
    one.promise(1, 8.0)
    assert one.frees == [8.0 / 4, 8.0 + 10.0 / 5]


def test_some_are_through_with_work_when_all_of_them_are():
    one = forecast(endpoint(0, speed=1.0), busy(endpoint(1, speed=0.5), 6.0), endpoint(2, speed=9.0))
    two = one.level_of([0, 1])
    assert two.through(3.0) == 3.0
    assert two.through(12.0) == pytest.approx((0.0 + 6.0 * 2 + 12.0) / 3)
    assert one.level_of([0]).through(12.0) == 12.0
    assert one.level_of([]).through(12.0) == float("inf")


@steady
@given(
    known=st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 50)), min_size=1, max_size=20),
    work=st.floats(0.1, 1000),
)
def test_the_work_done_by_a_moment_and_the_moment_of_some_work_are_each_others_inverse(known, work):
    endpoints = [endpoint(number, speed=speed) for number, (speed, _) in enumerate(known)]
    for one, (_, end) in zip(endpoints, known, strict=True):
        if end:
            busy(one, end)
    everybody = forecast(*endpoints)
    indices = range(len(endpoints))
    level = everybody.level_of(indices)
    assert level.work_by(level.through(work)) == pytest.approx(work, rel=1e-6)
    assert everybody.work_by(level.through(work), indices) == pytest.approx(work, rel=1e-6)


@steady
@given(
    known=st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 50), st.floats(0, 20)), min_size=1, max_size=40),
    costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=8),
)
def test_whom_the_cheapest_and_the_dearest_of_some_tasks_would_choose_is_among_the_contenders(known, costs):
    endpoints = [endpoint(number, speed=speed) for number, (speed, _, _) in enumerate(known)]
    for one, (_, end, overhead) in zip(endpoints, known, strict=True):
        one.speed.overhead = overhead
        if end:
            busy(one, end)
    everybody = forecast(*endpoints)
    few = everybody.narrowed(everybody.contenders(costs, [])[0])
    assert len(few.endpoints) == len(set(few.endpoints)) <= len(endpoints)
    for cost in (min(costs), max(costs)):
        assert few.endpoints[few.soonest(cost)] is everybody.endpoints[everybody.soonest(cost)]


def test_the_best_of_the_idle_ones_is_a_contender_however_slow():
    one = forecast(
        *[endpoint(number, speed=1.0) for number in range(5)], endpoint(5, speed=50.0), endpoint(6, speed=90.0)
    )
    assert one.contenders([1.0], []) == ([0, 1, 2, 3, 4], [])
    assert one.contenders([1.0], [5, 6])[0] == [0, 1, 2, 3, 4, 5]


@steady
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 50)), max_size=30))
def test_promises_only_ever_move_an_endpoint_back(promises):
    one = forecast(*[endpoint(number, speed=1.0 + number, slots=1 + number) for number in range(4)])
    for index, cost in promises:
        before = list(one.frees)
        one.promise(index, cost)
        assert all(now >= then for now, then in zip(one.frees, before, strict=True))
        assert one.frees[index] > before[index]
