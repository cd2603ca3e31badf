"""Samplers by their older names, which carry a schedule at their end."""

from __future__ import annotations

import pytest

from img_serving.backends.samplers import sampler_and_schedule, samplers_with_schedules
from img_serving.domain.vocabulary import Vocabulary

SCHEDULES = Vocabulary(["karras", "sgm_uniform", "simple"], {"SGM Uniform": "sgm_uniform"})
SAMPLERS = samplers_with_schedules(["Euler", "DPM++ 2M", "DPM++ 2M SDE"], {"k_dpmpp_2m": "DPM++ 2M"}, SCHEDULES)


@pytest.mark.parametrize(
    ("sampler", "schedule", "found"),
    [
        ("Euler", None, ("Euler", None)),
        ("dpm++ 2m karras", None, ("DPM++ 2M", "karras")),
        ("DPM++ 2M SDE SGM Uniform", None, ("DPM++ 2M SDE", "sgm_uniform")),
        ("DPM++ 2M Karras", "simple", ("DPM++ 2M", "simple")),
        ("k_dpmpp_2m", None, ("DPM++ 2M", None)),
        (None, "SGM uniform", (None, "sgm_uniform")),
        (None, None, (None, None)),
        ("nonsense", "nonsense", ("nonsense", "nonsense")),
    ],
)
def test_a_schedule_at_the_end_of_a_name_counts_unless_another_is_given(sampler, schedule, found):
    assert sampler_and_schedule(sampler, schedule, SAMPLERS, SCHEDULES) == found


def test_where_no_lists_are_known_names_stay_as_they_are():
    assert sampler_and_schedule("a Karras", "b", None, None) == ("a Karras", "b")


def test_a_server_without_schedules_has_its_samplers_only():
    bare = samplers_with_schedules(["Euler"], {}, None)
    assert (bare.find("euler"), bare.find("Euler Karras")) == ("Euler", None)
