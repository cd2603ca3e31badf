"""Dispatchers that bind early: whom they choose, and that they meet the same noise as the scheduler's strategies."""

from __future__ import annotations

from random import Random

import pytest

from img_serving.simulation import (
    Arrival,
    Client,
    EarlyRule,
    Kind,
    Noise,
    SimulatedEndpoint,
    Terms,
    Workload,
    poisson,
    simulate,
    simulate_early,
    trace,
)

UNIT = Kind(1000, 1000, 5)  # 10 megapixel-steps
STILL = Noise("none")
FAST, SLOW = SimulatedEndpoint("fast", speed=10), SimulatedEndpoint("slow", speed=4)


def arriving(*times: float) -> Workload:
    return trace((UNIT,), [Arrival(at, 0) for at in times], noise=STILL, rng=Random(1))


def ends(rule: EarlyRule, *times: float) -> list[float]:
    return list(simulate_early((FAST, SLOW), arriving(*times), rule).finished)


def test_the_reference_waits_for_the_faster_one_where_that_is_sooner() -> None:
    # fast: 1 s a picture, slow: 2.5 s
    assert ends("reference", 0, 0, 0, 0) == [1, 2, 2.5, 3]


def test_the_reference_knows_means_and_not_the_noise() -> None:
    load = Workload(kinds=(UNIT,), at=arriving(0, 1).at, kind=arriving(0, 1).kind, sender=arriving(0, 1).sender)
    load.noise.extend([3.0, 1.0])
    # at second 1 the first should be done any moment, so the second one waits for it until second 3
    assert list(simulate_early((FAST, SLOW), load, "reference").finished) == [3, 4]


def test_round_robin_takes_turns_whatever_waits() -> None:
    assert ends("early_round_robin", 0, 0, 0, 0) == [1, 2.5, 2, 5]


def test_least_connections_counts_what_is_outstanding_and_takes_turns_among_equals() -> None:
    # at 1.1 only the slow one is busy; at 1.2 both have one, and it is the slow one's turn
    assert ends("early_least_connections", 0, 0, 1.1, 1.2) == [1, 2.5, 2.1, 5]
    assert ends("early_least_connections", 0, 2) == [1, 4.5]


def test_slots_of_an_endpoint_draw_side_by_side() -> None:
    two = SimulatedEndpoint("two", speed=10, slots=2)
    for rule in ("reference", "early_round_robin", "early_least_connections"):
        assert list(simulate_early((two,), arriving(0, 0, 0), rule).finished) == [1, 1, 2]


@pytest.mark.parametrize("rule", ["reference", "early_round_robin", "early_least_connections"])
def test_on_one_endpoint_everybody_is_the_same(rule: EarlyRule) -> None:
    load = poisson((UNIT, Kind(512, 512, 20)), 0.9, count=300, rng=Random(3))
    early = simulate_early((FAST,), load, rule)
    late = simulate((FAST,), load, Terms(), rng=Random(1))
    assert list(early.finished) == pytest.approx(list(late.finished))


def test_a_job_of_several_pictures_ends_with_its_last() -> None:
    load = trace((Kind(1000, 1000, 5, images=3),), [Arrival(0, 0)], noise=STILL, rng=Random(1))
    report = simulate_early((FAST, SLOW), load, "reference")
    assert (list(report.started), list(report.finished), report.images) == ([0], [2.5], 3)


def test_clients_who_wait_are_refused() -> None:
    with pytest.raises(ValueError, match="clients"):
        simulate_early((FAST,), Workload(kinds=(UNIT,), clients=(Client(0, count=1),)), "reference")
