"""Names of an engine, however they are spelled."""

from __future__ import annotations

import pytest

from img_serving.domain.vocabulary import Vocabulary

SAMPLERS = Vocabulary(
    ["Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "DDIM"], {"k_euler_a": "Euler a", "dpmpp_2m": "DPM++ 2M"}
)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("Euler a", "Euler a"),
        ("euler_a", "Euler a"),
        ("EULER-A", "Euler a"),
        ("k_euler_a", "Euler a"),
        ("dpm++2m", "DPM++ 2M"),
        ("dpmpp_2m", "DPM++ 2M"),
        ("DPM 2M", None),
        ("Heun", None),
        ("", None),
    ],
)
def test_a_name_is_found_by_any_of_its_spellings_and_no_other(asked, found):
    assert SAMPLERS.find(asked) == found


def test_a_name_that_is_there_wins_over_an_alias():
    both = Vocabulary(["euler", "euler a"], {"euler a": "euler"})
    assert both.find("euler a") == "euler a"


def test_a_slip_is_answered_with_what_may_be_meant():
    assert SAMPLERS.hint("eular a").startswith("the nearest it has: Euler a")
    assert SAMPLERS.hint("넓은 바다").startswith("it has: Euler, Euler a, DPM++ 2M")
    assert Vocabulary([str(number) for number in range(9)]).hint("x") == "it has: 0, 1, 2, 3, 4, 5, …"


def test_equal_lists_are_equal_vocabularies():
    assert Vocabulary(["a"], {"x": "a"}) == Vocabulary(["a"], {"x": "a"})
    assert Vocabulary(["a"]) != Vocabulary(["b"])
    assert Vocabulary(["a"]) != ["a"]
