"""Which previews are passed on: as many as are wanted, spread evenly, wherever there are that many."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img_serving.policy.partials import Partials


def shown(wanted: int, shares: list[float]) -> list[tuple[int, float]]:
    partials = Partials[float](wanted)
    found = [one for share in shares for one in partials.offer(share, share)]
    return found + partials.finish()


@pytest.mark.parametrize(
    ("wanted", "steps", "expected"),
    [
        (0, 20, []),
        (1, 20, [0.5]),
        (2, 20, [0.35, 0.7]),
        (3, 20, [0.25, 0.5, 0.75]),
        (3, 4, [0.25, 0.5, 0.75]),
        (3, 3, [1 / 3, 2 / 3, 1.0]),
        (3, 2, [0.5, 1.0]),
        (2, 1, [1.0]),
    ],
)
def test_they_are_spread_evenly_over_the_steps(wanted, steps, expected):
    assert [share for _, share in shown(wanted, [step / steps for step in range(1, steps + 1)])] == expected


def test_one_that_was_passed_over_makes_up_for_one_that_never_came():
    assert shown(2, [0.1, 0.2, 0.9]) == [(0, 0.2), (1, 0.9)]
    assert shown(2, [0.5, 0.6]) == [(0, 0.5), (1, 0.6)]
    assert shown(3, [0.1]) == [(0, 0.1)]


def test_a_second_try_adds_nothing_until_it_is_further():
    assert shown(2, [0.4, 0.1, 0.2, 0.4, 0.7]) == [(0, 0.4), (1, 0.7)]


@given(st.integers(0, 3), st.lists(st.floats(0, 1), max_size=40))
def test_never_more_than_wanted_and_numbered_from_zero(wanted, shares):
    found = shown(wanted, shares)
    assert [number for number, _ in found] == list(range(len(found)))
    assert len(found) <= wanted


@given(st.integers(1, 3), st.integers(1, 60))
def test_with_at_least_as_many_steps_as_wanted_exactly_that_many_are_shown(wanted, steps):
    found = shown(wanted, [step / steps for step in range(1, steps + 1)])
    assert len(found) == min(wanted, steps)
