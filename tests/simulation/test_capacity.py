"""Capacity: how much of what a fleet can do a workload asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from img_serving.policy.routing import RoutingOptions
from img_serving.simulation import Kind, SimulatedEndpoint, load_of, routes_of


def load(fleet: Sequence[SimulatedEndpoint], *kinds: tuple[Kind, float]) -> tuple[Any, Any]:
    asked = [kind for kind, _ in kinds]
    routes = routes_of(fleet, [kind.request() for kind in asked], RoutingOptions())
    found = load_of(fleet, asked, routes, [rate for _, rate in kinds])
    return found.utilisation, found.bottleneck


UNIT = Kind(1000, 1000, 5)  # 10 megapixel-steps


def test_slots_and_speeds_add_up() -> None:
    fleet = [SimulatedEndpoint("a", speed=10, slots=2), SimulatedEndpoint("b", speed=5)]
    assert load(fleet, (UNIT, 2.0)) == (pytest.approx(2.0 / 2.5), ("a", "b"))


def test_a_full_batch_shares_its_overhead() -> None:
    alone, together = (SimulatedEndpoint("a", overhead_seconds=3, max_batch_size=size) for size in (1, 4))
    assert load([alone], (UNIT, 0.1))[0] == pytest.approx(0.1 * 4)
    assert load([together], (UNIT, 0.1))[0] == pytest.approx(0.1 * 1.75)


def test_pictures_of_different_requests_share_nothing_where_they_cannot_travel_together() -> None:
    one = SimulatedEndpoint("a", overhead_seconds=3, max_batch_size=4, batch="seeds")
    assert load([one], (UNIT, 0.1))[0] == pytest.approx(0.1 * 4)
    assert load([one], (Kind(1000, 1000, 5, images=2), 0.1))[0] == pytest.approx(0.2 * 2.5)


def test_the_tightest_part_of_the_fleet_decides() -> None:
    fleet = [SimulatedEndpoint("a", models=("x",)), SimulatedEndpoint("b", models=("x", "y"))]
    y, x = Kind(1000, 1000, 5, model="y"), Kind(1000, 1000, 5, model="x")
    assert load(fleet, (y, 0.9), (x, 0.1)) == (pytest.approx(0.9), ("b",))
    assert load(fleet, (y, 0.1), (x, 1.7)) == (pytest.approx(0.9), ("a", "b"))


def test_a_later_tier_does_not_count() -> None:
    fleet = [SimulatedEndpoint("a"), SimulatedEndpoint("b", tier=1)]
    assert load(fleet, (UNIT, 0.5)) == (pytest.approx(0.5), ("a",))
