"""Retries: by outcome, by attempts, and never more than a share of the traffic."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.domain.errors import Outcome
from img_serving.policy.retry import RetryBudget, RetryOptions

steady = settings(deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("outcome", "attempts", "retry_unknown", "allowed"),
    [
        (Outcome.NOT_STARTED, 0, False, True),
        (Outcome.NOT_STARTED, 99, False, True),
        (Outcome.FAILED, 1, False, True),
        (Outcome.FAILED, 2, True, True),
        (Outcome.FAILED, 3, True, False),
        (Outcome.UNKNOWN, 1, True, True),
        (Outcome.UNKNOWN, 1, False, False),
        (Outcome.UNKNOWN, 3, True, False),
        (Outcome.OK, 1, True, False),
    ],
)
def test_what_may_be_tried_again(outcome, attempts, retry_unknown, allowed):
    budget = RetryBudget(RetryOptions(max_attempts=3), now=0)
    assert budget.allows(outcome, attempts, retry_unknown=retry_unknown) is allowed


def test_a_share_of_the_traffic_may_be_retries():
    budget = RetryBudget(RetryOptions(budget_ratio=0.25, floor_per_second=1e-6), now=0)
    assert [budget.spend(0), budget.spend(0)] == [True, False]  # the floor's burst of one
    for _ in range(8):
        budget.earn()
    assert [budget.spend(0) for _ in range(3)] == [True, True, False]


def test_a_floor_holds_without_any_traffic():
    budget = RetryBudget(RetryOptions(floor_per_second=10), now=0)
    assert sum(budget.spend(0) for _ in range(100)) == 10
    assert sum(budget.spend(1) for _ in range(100)) == 10


def test_a_quiet_day_does_not_save_up_a_storm():
    budget = RetryBudget(RetryOptions(budget_ratio=1, floor_per_second=1e-6), now=0)
    for _ in range(100_000):
        budget.earn()
    assert sum(budget.spend(0) for _ in range(1000)) <= 101


@steady
@given(st.lists(st.booleans(), max_size=300), st.sampled_from([0.0, 0.1, 0.2, 1.0]))
def test_retries_never_exceed_the_ratio_and_the_floor(events, ratio):
    budget = RetryBudget(RetryOptions(budget_ratio=ratio, floor_per_second=5), now=0)
    earned = spent = 0
    for first in events:
        if first:
            budget.earn()
            earned += 1
        elif budget.spend(0):
            spent += 1
    assert spent <= earned * ratio + 5 + 1e-9
