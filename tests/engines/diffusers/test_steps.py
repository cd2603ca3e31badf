"""The one count of steps that a call in several parts has."""

import pytest

from img_serving.engines.diffusers.steps import Steps
from img_serving.engines.engine import GenerationCancelled, OnStep


def test_parts_are_counted_as_one_and_a_part_that_is_drawn_again_makes_the_whole_longer() -> None:
    seen: list[tuple[int, int]] = []
    steps = Steps(OnStep(lambda done, total, _: seen.append((done, total))))
    steps.begin(2)
    steps.stepped(1, 2)
    steps.stepped(2, 2)
    steps.begin(3)  # there was not enough memory after all: two halves, and the other part
    for _ in range(3):
        steps.stepped(1, 2)
        steps.stepped(2, 2)
        steps.begin(1)
    assert seen == [(1, 4), (2, 4), (3, 8), (4, 8), (5, 6), (6, 6), (7, 8), (8, 8)]


def test_where_nobody_wants_the_pictures_both_ways_to_ask_say_so() -> None:
    steps = Steps(OnStep(None, lambda: True))
    with pytest.raises(GenerationCancelled):
        steps.check()
    with pytest.raises(GenerationCancelled):
        steps.stepped(1, 2)
