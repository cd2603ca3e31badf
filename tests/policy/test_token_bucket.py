"""The token bucket: never more than rate x time + burst, and an honest word on when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.policy.token_bucket import TokenBucket

steady = settings(deadline=None, derandomize=True)

rates = st.floats(0.01, 10_000)
bursts = st.floats(1, 10_000)
steps = st.lists(st.floats(0, 100), max_size=60)


def test_it_starts_full_and_then_refuses():
    bucket = TokenBucket(1, 3, now=0)
    assert [bucket.take(1, now=0) for _ in range(4)] == [0, 0, 0, 1]


def test_it_refills_with_time_up_to_the_burst():
    bucket = TokenBucket(2, 4, now=0)
    bucket.take(4, now=0)
    assert bucket.remaining(0) == 0
    assert bucket.remaining(0.5) == 1
    assert bucket.remaining(1000) == 4
    assert bucket.full_in(0) == 2
    assert bucket.full_in(1000) == 0


def test_a_cost_above_the_burst_is_charged_as_the_burst():
    bucket = TokenBucket(1, 2, now=0)
    assert bucket.take(100, now=0) == 0
    assert bucket.take(100, now=0) == 2


def test_a_clock_that_goes_back_neither_gives_nor_takes():
    bucket = TokenBucket(1, 2, now=100)
    bucket.take(2, now=100)
    assert bucket.take(1, now=50) == 1
    assert bucket.remaining(50) == 0
    assert bucket.take(1, now=101) == 0


def test_what_is_given_back_can_be_taken_again_but_never_overfills():
    bucket = TokenBucket(1, 2, now=0)
    bucket.take(2, now=0)
    bucket.give_back(1)
    assert bucket.remaining(0) == 1
    bucket.give_back(5)
    assert bucket.remaining(0) == 2


@steady
@given(rate=st.floats(0.01, 50), burst=st.floats(1, 50), gaps=st.lists(st.floats(0, 2), max_size=30))
def test_never_more_is_granted_than_rate_times_time_plus_burst(rate, burst, gaps):
    bucket, now, granted = TokenBucket(rate, burst, now=0.0), 0.0, 0
    for gap in gaps:
        now += gap
        while bucket.take(1, now) == 0:
            granted += 1
        assert granted <= rate * now + burst + 1e-6


@steady
@given(rate=rates, burst=bursts, cost=st.floats(0.1, 20_000))
def test_the_wait_it_names_is_enough_and_not_too_much(rate, burst, cost):
    bucket = TokenBucket(rate, burst, now=0)
    bucket.take(burst, now=0)
    wait = bucket.take(cost, now=0)
    assert wait == pytest.approx(min(cost, burst) / rate)
    assert bucket.take(cost, now=wait * 0.99) > 0
    assert bucket.take(cost, now=wait * (1 + 1e-9)) == 0


@steady
@given(rate=rates, burst=bursts, gaps=steps)
def test_a_refusal_costs_nothing(rate, burst, gaps):
    bucket, now = TokenBucket(rate, burst, now=0), 0.0
    for gap in gaps:
        now += gap
        before = bucket.remaining(now)
        if bucket.take(1, now) > 0:
            assert bucket.remaining(now) == before == 0
