"""What an endpoint's calls teach about its speed: the two parts of it, stalls, change, and how long it is believed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.policy.speed import OUTLIER, STALE_SECONDS, Speed

steady = settings(deadline=None, derandomize=True)

COSTS = st.floats(1e-6, 1e5)
SECONDS = st.floats(1e-6, 1e5)


def learned(*calls: tuple[float, float], now: float = 0.0) -> Speed:
    speed = Speed()
    for cost, seconds in calls:
        speed.learn(cost, seconds, now)
    return speed


def foretold(speed: Speed, cost: float) -> float:
    seconds = speed.seconds(cost)
    assert seconds is not None
    return seconds


def test_nobody_knows_how_long_a_call_takes_before_one_was_made():
    assert Speed().seconds(10.0) is None


def test_after_one_call_seconds_grow_with_the_cost():
    speed = learned((10.0, 5.0))
    assert (speed.overhead, speed.per_unit) == (0.0, 0.5)
    assert foretold(speed, 40.0) == pytest.approx(20.0)


def test_calls_of_one_size_show_no_fixed_part():
    speed = learned(*[(10.0, 5.0)] * 50)
    assert speed.overhead == pytest.approx(0.0, abs=1e-9)
    assert foretold(speed, 10.0) == pytest.approx(5.0)


def test_calls_of_two_sizes_show_the_fixed_part():
    speed = learned(*[(10.0, 3.0 + 10.0 * 0.2), (100.0, 3.0 + 100.0 * 0.2)] * 40)
    assert speed.overhead == pytest.approx(3.0, rel=0.25)
    assert speed.per_unit == pytest.approx(0.2, rel=0.3)


@pytest.mark.parametrize("cost", [10.0, 100.0])
def test_both_of_two_sizes_are_foretold_well(cost):
    speed = learned(*[(10.0, 3.0 + 10.0 * 0.2), (100.0, 3.0 + 100.0 * 0.2)] * 40)
    assert foretold(speed, cost) == pytest.approx(3.0 + cost * 0.2, rel=0.2)


def test_a_single_stall_counts_as_three_times_what_was_expected():
    calm, stalled, limit = (learned(*[(10.0, 1.0)] * 10) for _ in range(3))
    stalled.learn(10.0, 500.0, 0.0)
    limit.learn(10.0, OUTLIER * 1.0, 0.0)
    assert foretold(stalled, 10.0) == foretold(limit, 10.0)
    assert foretold(stalled, 10.0) < 1.3 * foretold(calm, 10.0)


def test_the_first_calls_are_believed_however_much_they_differ():
    assert foretold(learned((10.0, 1.0), (10.0, 99.0)), 10.0) > 45.0


def test_an_engine_that_has_become_slower_is_known_to_be_after_some_dozens_of_calls():
    speed = learned(*[(10.0, 1.0)] * 100, *[(10.0, 8.0)] * 60)
    assert foretold(speed, 10.0) == pytest.approx(8.0, rel=0.1)


def test_an_engine_that_has_become_faster_is_known_to_be_after_some_dozens_of_calls():
    speed = learned(*[(10.0, 8.0)] * 100, *[(10.0, 1.0)] * 60)
    assert foretold(speed, 10.0) == pytest.approx(1.0, rel=0.5)


def test_what_was_learned_is_believed_for_an_hour_or_two_hundred_calls_whichever_is_longer():
    assert learned((10.0, 1.0), now=100.0).stale_at == 100.0 + STALE_SECONDS
    assert learned((10.0, 30.0), now=100.0).stale_at == 100.0 + 200 * 30.0


@steady
@given(st.lists(st.tuples(COSTS, SECONDS), min_size=1, max_size=40), COSTS)
def test_no_calls_whatever_teach_a_negative_speed_or_a_fixed_part_that_is_all_of_it(calls, cost):
    speed = learned(*calls)
    assert speed.overhead >= 0.0
    assert speed.per_unit is not None
    assert speed.per_unit > 0.0
    assert foretold(speed, cost) > 0.0
    assert foretold(speed, 2 * cost) > foretold(speed, cost)


@steady
@given(st.floats(0, 10), st.floats(0.01, 5), st.permutations([5.0, 10.0, 20.0, 40.0]))
def test_calls_of_four_sizes_in_turn_are_foretold_within_a_quarter(units, per_unit, costs):
    """Where the fixed part is at most as long as drawing 10 megapixel-steps."""
    overhead = units * per_unit
    speed = learned(*[(cost, overhead + per_unit * cost) for cost in costs * 20])
    for cost in costs:
        assert foretold(speed, cost) == pytest.approx(overhead + per_unit * cost, rel=0.25)


def test_it_can_be_looked_at():
    assert repr(Speed()) == "? s/MP-step"
    assert repr(learned((10.0, 5.0))) == "0.5 s/MP-step"
    assert repr(learned(*[(10.0, 5.0), (100.0, 23.0)] * 200)).startswith("2.")
