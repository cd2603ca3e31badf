"""Workloads: what arrives when, from whom, and that it is the same every time."""

from __future__ import annotations

from collections import Counter
from random import Random
from statistics import mean, pstdev

import pytest

from img_serving.domain.tenants import Tenant
from img_serving.simulation import Arrival, Client, Kind, Noise, Sender, burst, poisson, trace
from img_serving.simulation.workload import MAX_TASKS, TooMuch

SMALL = Kind(512, 512, 20, weight=3)
LARGE = Kind(1024, 1024, 30)


def test_the_cost_of_a_kind_is_that_of_the_gateway() -> None:
    assert pytest.approx(1024 * 1024 * 30 * 2 / 1e6) == LARGE.cost


def test_chance_arrivals_come_at_the_rate_in_the_mix_and_by_share() -> None:
    senders = (Sender(Tenant("a"), share=3), Sender(Tenant("b")))
    load = poisson((SMALL, LARGE), 5, seconds=4000, senders=senders, rng=Random(1))
    assert len(load.at) == pytest.approx(20_000, rel=0.05)
    assert list(load.at) == sorted(load.at)
    assert 0 < load.at[0] < load.at[-1] < 4000
    assert Counter(load.kind)[0] / len(load.at) == pytest.approx(0.75, abs=0.02)
    assert Counter(load.sender)[0] / len(load.at) == pytest.approx(0.75, abs=0.02)


def test_a_seed_gives_the_same_workload_again_and_another_seed_another() -> None:
    def columns(seed: int) -> tuple[object, ...]:
        load = poisson((SMALL, LARGE), 5, count=50, rng=Random(seed))
        return load.at, load.kind, load.noise

    assert columns(1) == columns(1) != columns(2)


def test_a_burst_comes_at_once_and_has_a_factor_for_each_picture() -> None:
    load = burst((Kind(images=4),), 10, rng=Random(1))
    assert list(load.at) == [0.0] * 10
    assert load.images == 40


def test_a_trace_is_put_in_order() -> None:
    load = trace((SMALL, LARGE), [Arrival(5, 1), Arrival(2, 0)], rng=Random(1))
    assert (list(load.at), list(load.kind)) == ([2, 5], [0, 1])


def test_a_sender_may_ask_for_kinds_of_its_own() -> None:
    senders = (Sender(Tenant("a"), kinds=(1,)), Sender(Tenant("b"), kinds=(0,)))
    load = burst((SMALL, LARGE), 100, senders=senders, rng=Random(1))
    assert {(sender, kind) for sender, kind in zip(load.sender, load.kind, strict=True)} == {(0, 1), (1, 0)}


def test_a_sender_without_a_share_sends_nothing_by_itself() -> None:
    senders = (Sender(Tenant("a"), share=0), Sender(Tenant("b")))
    assert set(burst((SMALL,), 50, senders=senders, rng=Random(1)).sender) == {1}
    with pytest.raises(ValueError, match="nobody has a share"):
        burst((SMALL,), 1, senders=senders[:1], rng=Random(1))


@pytest.mark.parametrize("shape", ["uniform", "lognormal"])
def test_noise_has_the_mean_of_one(shape: str) -> None:
    factors = Noise(shape, 0.2).draws(Random(1), 20_000)  # type: ignore[arg-type]
    assert mean(factors) == pytest.approx(1, abs=0.01)
    assert pstdev(factors) == pytest.approx(0.2 if shape == "lognormal" else 0.2 / 3**0.5, rel=0.05)
    if shape == "uniform":
        assert 0.8 <= min(factors) < max(factors) <= 1.2


def test_without_noise_everything_takes_its_mean() -> None:
    assert set(Noise("none").draws(Random(1), 5)) == {1.0}


def test_more_than_a_simulation_takes_is_refused_before_it_is_made() -> None:
    with pytest.raises(TooMuch, match="2,000,000"):
        burst((SMALL,), MAX_TASKS + 1, rng=Random(1))
    with pytest.raises(TooMuch):
        poisson((SMALL,), 1e9, seconds=1e9, rng=Random(1))
    with pytest.raises(TooMuch, match="pictures"):
        burst((Kind(images=MAX_TASKS),), 2, rng=Random(1))


def test_a_client_has_an_end() -> None:
    with pytest.raises(ValueError, match="for ever"):
        Client(0)


def test_how_long_or_how_many_but_not_both() -> None:
    with pytest.raises(ValueError, match="not both"):
        poisson((SMALL,), 1, seconds=1, count=1, rng=Random(1))
