"""Fleets: how long a call takes, and what the scheduler is told of it."""

from __future__ import annotations

from random import Random

import pytest

from img_serving.domain.errors import NotFound
from img_serving.domain.images import ImageRequest
from img_serving.policy.routing import RoutingOptions
from img_serving.policy.scheduler import Scheduler
from img_serving.simulation import SimulatedEndpoint, Terms, routes_of
from img_serving.simulation.fleet import endpoint_state, new_scheduler


def test_a_call_takes_its_overhead_and_the_cost_of_its_pictures() -> None:
    one = SimulatedEndpoint("a", speed=4, overhead_seconds=1.5)
    assert [one.seconds_of(8 * pictures) for pictures in (1, 2, 4)] == [3.5, 5.5, 9.5]


def test_the_scheduler_is_the_gateways_own() -> None:
    assert type(new_scheduler(Terms(), Random(1))) is Scheduler


def test_the_policies_are_told_everything_but_the_speed() -> None:
    one = SimulatedEndpoint("a", backend="b", speed=4, slots=3, weight=2, max_batch_size=5, batch="seeds")
    state = endpoint_state(7, one, Terms(), Random(1))
    assert (state.id, state.backend, state.url, state.slots, state.weight) == (7, "b", "a", 3, 2)
    assert (state.max_batch_size, state.capabilities.batch) == (5, "seeds")
    assert state.snapshot(0.0).seconds_per_unit is None


def test_where_nobody_names_a_model_every_endpoint_serves_everything() -> None:
    fleet = [SimulatedEndpoint("a"), SimulatedEndpoint("b", tier=1)]
    (route,) = routes_of(fleet, [ImageRequest("cat")], RoutingOptions())
    assert [(target.backend, target.tier) for target in route] == [("a", 0), ("b", 1)]


def test_a_model_goes_to_those_who_have_it() -> None:
    fleet = [SimulatedEndpoint("a", models=("sdxl",)), SimulatedEndpoint("b", models=("sdxl", "flux"))]
    routes = routes_of(fleet, [ImageRequest("cat", model=name) for name in ("sdxl", "flux")], RoutingOptions())
    assert [[target.backend for target in route] for route in routes] == [["a", "b"], ["b"]]
    with pytest.raises(NotFound):
        routes_of(fleet, [ImageRequest("cat", model="sd15")], RoutingOptions())
