"""Health: thresholds to fall and to rise, and sooner checks after bad news."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.policy.health import Health, HealthOptions, HealthRecord

steady = settings(deadline=None, derandomize=True)

STEADY = HealthOptions(interval_seconds=30, fall=2, rise=3, jitter=0)


def test_an_endpoint_that_nobody_asked_is_not_down():
    record = HealthRecord(STEADY)
    assert (record.health, record.is_down) == (Health.UNKNOWN, False)


@pytest.mark.parametrize(("ok", "health"), [(True, Health.UP), (False, Health.DOWN)])
def test_the_very_first_answer_decides_at_once(ok, health):
    record = HealthRecord(STEADY)
    assert record.record(ok, "said so") is True
    assert (record.health, record.detail) == (health, "said so")


def test_it_falls_after_so_many_bad_answers_in_a_row():
    record = HealthRecord(STEADY)
    changes = [record.record(ok, "") for ok in (True, False, True, False, False)]
    assert changes == [True, False, False, False, True]
    assert record.is_down


def test_it_rises_after_so_many_good_answers_in_a_row():
    record = HealthRecord(STEADY)
    changes = [record.record(ok, "") for ok in (False, True, True, False, True, True, True)]
    assert changes == [True, False, False, False, False, False, True]
    assert record.health is Health.UP


def test_after_bad_news_it_is_asked_sooner_and_then_less_and_less_often():
    record, waits = HealthRecord(STEADY), []
    for _ in range(7):
        record.record(ok=False, detail="")
        waits.append(record.next_check_in(Random(1)))
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    record.record(ok=True, detail="")
    assert record.next_check_in(Random(1)) == 30


@steady
@given(st.integers(), st.integers(0, 50), st.floats(0, 0.5))
def test_the_next_check_is_never_far_off_its_interval(seed, failures, jitter):
    record = HealthRecord(HealthOptions(interval_seconds=30, jitter=jitter))
    for _ in range(failures):
        record.record(ok=False, detail="")
    assert 0 < record.next_check_in(Random(seed)) <= 30 * (1 + jitter)


@steady
@given(st.lists(st.booleans(), min_size=1))
def test_the_verdict_follows_only_runs_of_equal_answers(answers):
    """Said again as a fold over the whole history."""
    record, expected = HealthRecord(HealthOptions(fall=2, rise=1)), Health.UNKNOWN
    for index, ok in enumerate(answers):
        record.record(ok, "")
        fell_before = expected is not Health.UP
        expected = Health.UP if ok or not (fell_before or answers[index - 1] is False) else Health.DOWN
        assert record.health is expected
