"""The breaker: opens on failures in a row, lets one trial through, and ignores news from before."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.policy.circuit_breaker import BreakerOptions, BreakerState, CircuitBreaker

steady = settings(deadline=None, derandomize=True)

OPTIONS = BreakerOptions(failures=3, open_seconds=10, max_open_seconds=40, jitter=0, min_calls=1000)


def breaker(options: BreakerOptions = OPTIONS) -> CircuitBreaker:
    return CircuitBreaker(options, Random(1))


def call(one: CircuitBreaker, ok: bool | None, now: float) -> None:
    one.end(one.start(now), ok, now)


def opened(now: float = 0.0) -> CircuitBreaker:
    one = breaker()
    for _ in range(3):
        call(one, ok=False, now=now)
    assert one.state(now) is BreakerState.OPEN
    return one


def test_it_opens_after_so_many_failures_in_a_row():
    one = breaker()
    for _ in range(2):
        call(one, ok=False, now=0)
        assert one.admits(0)
    call(one, ok=False, now=0)
    assert not one.admits(0)
    assert one.opens_in(4) == 6


def test_a_success_between_failures_starts_the_count_again():
    one = breaker()
    for _ in range(10):
        call(one, ok=False, now=0)
        call(one, ok=False, now=0)
        call(one, ok=True, now=0)
    assert one.admits(0)


def test_a_cancelled_call_counts_for_nothing():
    one = breaker()
    for _ in range(2):
        call(one, ok=False, now=0)
    for _ in range(10):
        call(one, ok=None, now=0)
    assert one.admits(0)
    call(one, ok=False, now=0)
    assert not one.admits(0)


def test_half_open_lets_exactly_one_through():
    one = opened()
    assert one.admits(10)
    assert one.admits(10)  # asking changes nothing
    one.start(10)
    assert one.state(10) is BreakerState.HALF_OPEN
    assert not one.admits(10)
    assert not one.admits(1000)


def test_a_trial_that_succeeds_closes_it():
    one = opened()
    call(one, ok=True, now=10)
    assert one.state(10) is BreakerState.CLOSED
    assert one.admits(10)


def test_a_trial_that_fails_opens_it_for_twice_as_long_up_to_the_limit():
    one, now, waits = opened(), 0.0, []
    for _ in range(5):
        waits.append(one.opens_in(now))
        now += one.opens_in(now)
        call(one, ok=False, now=now)
    assert waits == [10, 20, 40, 40, 40]


@pytest.mark.parametrize(("quiet_seconds", "wait"), [(39.9, 40), (40, 10)])
def test_after_a_quiet_time_the_waits_start_small_again(quiet_seconds, wait):
    one = opened()
    call(one, ok=False, now=10)
    call(one, ok=True, now=30)
    for _ in range(3):
        call(one, ok=False, now=30 + quiet_seconds)
    assert one.opens_in(30 + quiet_seconds) == pytest.approx(wait)


def test_it_opens_when_half_of_the_calls_of_late_have_failed():
    one = breaker(BreakerOptions(failures=1000, error_share=0.5, window_seconds=30, min_calls=10))
    for second in range(8):
        call(one, ok=second % 2 == 0, now=second)
    assert one.admits(8)  # four of eight, but eight calls say too little
    call(one, ok=True, now=8)
    call(one, ok=False, now=9)
    assert not one.admits(9)


def test_calls_of_long_ago_do_not_count():
    one = breaker(BreakerOptions(failures=1000, error_share=0.5, window_seconds=30, min_calls=10))
    for _ in range(9):
        call(one, ok=False, now=0)
    call(one, ok=False, now=31)
    assert one.admits(31)


def test_good_calls_before_the_first_failure_count_too():
    one = breaker(BreakerOptions(failures=1000, error_share=0.5, window_seconds=30, min_calls=10))
    for _ in range(100):
        call(one, ok=True, now=0)
    for _ in range(20):
        call(one, ok=False, now=1)
    assert one.admits(1)


def test_a_window_shorter_than_a_second_is_still_one():
    one = breaker(BreakerOptions(failures=1000, window_seconds=0.5, min_calls=2))
    for moment in (0.9, 1.9, 2.9):
        call(one, ok=False, now=moment)
    assert one.admits(2.9)
    call(one, ok=False, now=2.95)
    assert not one.admits(2.95)


def test_few_time_outs_in_a_row_are_enough():
    one = breaker(BreakerOptions(failures=5, timeouts=2))
    one.end(one.start(0), False, 0, timed_out=True)
    one.end(one.start(0), False, 0)
    one.end(one.start(0), False, 0, timed_out=True)
    assert one.admits(0)
    one.end(one.start(0), False, 0, timed_out=True)
    assert not one.admits(0)


def test_a_cancelled_trial_does_not_jam_it():
    one = opened()
    call(one, ok=None, now=10)
    assert one.admits(10)
    call(one, ok=True, now=10)
    assert one.state(10) is BreakerState.CLOSED


def test_a_call_from_before_it_opened_cannot_close_it():
    one = breaker()
    early = one.start(0)
    for _ in range(3):
        call(one, ok=False, now=0)
    one.end(early, ok=True, now=1)
    assert not one.admits(1)


def test_a_call_from_before_it_opened_can_neither_fail_nor_free_the_trial():
    one = breaker()
    early = [one.start(0), one.start(0)]
    for _ in range(3):
        call(one, ok=False, now=0)
    trial = one.start(10)
    one.end(early[0], ok=False, now=11)
    assert one.state(11) is BreakerState.HALF_OPEN
    one.end(early[1], ok=None, now=11)
    assert not one.admits(11)
    one.end(trial, ok=True, now=12)
    assert one.admits(12)


def test_a_last_hope_called_while_open_neither_frees_nor_decides_the_trial():
    one = opened()
    hopes = [one.start(5), one.start(5)]
    trial = one.start(10)
    one.end(hopes[0], ok=None, now=11)
    assert not one.admits(11)
    one.end(hopes[1], ok=False, now=11)
    assert one.state(11) is BreakerState.HALF_OPEN
    one.end(trial, ok=True, now=12)
    assert one.admits(12)


def test_a_last_hope_beside_a_trial_does_not_free_it_when_cancelled():
    one = opened()
    one.start(10)
    call(one, ok=None, now=11)
    assert not one.admits(11)


def test_a_last_hope_that_succeeds_while_open_closes_it():
    one = opened()
    call(one, ok=True, now=5)
    assert one.admits(5)


@steady
@given(st.integers(0, 2**32), st.floats(0, 0.9))
def test_the_wait_is_jittered_within_its_bounds(seed, jitter):
    one = CircuitBreaker(BreakerOptions(failures=1, open_seconds=10, jitter=jitter), Random(seed))
    call(one, ok=False, now=0)
    assert 10 * (1 - jitter) - 1e-9 <= one.opens_in(0) <= 10 * (1 + jitter) + 1e-9


@steady
@given(st.lists(st.tuples(st.sampled_from(["start", "ok", "bad", "cancel", "time"]), st.integers(0, 5)), max_size=80))
def test_whatever_happens_once_all_calls_have_ended_it_admits_one_in_time(events):
    """No order of starts, ends and cancellations leaves it closed to everybody for ever."""
    one, now, running = breaker(), 0.0, []
    for event, which in events:
        if event == "time":
            now += which * 5
        elif event == "start":
            trial_was_free = one.admits(now)
            running.append(one.start(now))
            if one.state(now) is BreakerState.HALF_OPEN and trial_was_free:
                assert not one.admits(now)
        elif running:
            era = running.pop(which % len(running))
            one.end(era, {"ok": True, "bad": False, "cancel": None}[event], now)
    for era in running:
        one.end(era, None, now)
    assert one.admits(now + OPTIONS.max_open_seconds)


@pytest.mark.parametrize("ok", [True, False, None])
def test_its_state_can_be_looked_at(ok):
    one = breaker()
    call(one, ok=ok, now=0)
    assert repr(one) == f"<CircuitBreaker closed failures={1 if ok is False else 0} era=0>"
