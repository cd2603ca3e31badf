"""Which endpoints stand behind a route."""

from __future__ import annotations

from tests.policy.virtual_fleet import endpoint

from img_serving.domain.jobs import Target
from img_serving.policy.fleet import Fleet


def fleet(*models: frozenset[str] | None) -> Fleet:
    made = Fleet()
    for number, known in enumerate(models):
        one = endpoint(number)
        one.models = known
        made.add(one)
    return made


def behind(made: Fleet, model: str | None) -> list[int]:
    return [one.id for one in made.of((Target("a", model),))]


def test_an_endpoint_that_lacks_the_model_is_none_of_its_route():
    made = fleet(frozenset({"x"}), frozenset({"x", "y"}), None)
    assert behind(made, "y") == [1, 2]
    assert behind(made, "x") == [0, 1, 2]
    assert behind(made, None) == [0, 1, 2]


def test_a_name_that_no_server_tells_is_the_operators_own_and_goes_to_all():
    assert behind(fleet(frozenset({"x"}), frozenset({"z"}), None), "y") == [0, 1, 2]


def test_routes_to_the_same_endpoints_share_what_is_kept_of_them():
    made = fleet(frozenset({"x", "y"}), frozenset({"x", "y"}), frozenset({"z"}))
    both = made.tiers((Target("a", "x"),))
    assert made.tiers((Target("a", "y"),))[0] is both[0]
    assert made.tiers((Target("a", "z"),))[0] is not both[0]


def test_news_of_models_count_from_when_they_are_told():
    made = fleet(None, None)
    assert behind(made, "x") == [0, 1]
    made[0].models = frozenset({"x"})
    made[1].models = frozenset({"y"})
    made.changed()
    assert behind(made, "x") == [0]


def test_a_route_may_be_for_some_endpoints_of_a_backend_only():
    made = fleet(None, None, None)
    assert [one.id for one in made.of((Target("a", None, only=(0, 2)),))] == [0, 2]
