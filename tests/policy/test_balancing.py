"""The strategies: each does what its name says, also while endpoints come and go."""

from __future__ import annotations

import math
from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.jobs import Batch
from img_serving.policy.balancing import STRATEGIES, Strategy
from img_serving.policy.circuit_breaker import BreakerOptions, CircuitBreaker
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.forecast import Forecast
from img_serving.policy.health import HealthOptions, HealthRecord

steady = settings(deadline=None, derandomize=True)


def endpoint(
    number: int, weight: float = 1.0, *, slots: int = 100, speed: float | None = None, **known: float | None
) -> EndpointState:
    """`speed` in seconds a megapixel-step."""
    one = EndpointState(
        id=number,
        backend="a",
        url=f"http://{number}",
        slots=slots,
        weight=weight,
        capabilities=Capabilities(),
        max_batch_size=1,
        breaker=CircuitBreaker(BreakerOptions(), Random(0)),
        health=HealthRecord(HealthOptions()),
    )
    for name, value in known.items():
        setattr(one, name, value)
    if speed is not None:
        one.speed.learn(1.0, speed, 0.0)
    return one


class Turns:
    """Chooses as the scheduler does, which notes whose turn it was."""

    def __init__(self, strategy: Strategy, seed: int = 1) -> None:
        self.choose, self.rng, self.turn = STRATEGIES[strategy], Random(seed), 0

    def __call__(self, candidates: list[EndpointState], cost: float = 1.0) -> int:
        chosen = self.choose(candidates, cost, 0.0, self.rng)
        self.turn += 1
        chosen.picked_at = self.turn
        return chosen.id


def test_round_robin_is_even_over_three():
    turns, three = Turns("round_robin"), [endpoint(number) for number in range(3)]
    assert [turns(three) for _ in range(9)] == [0, 1, 2] * 3


def test_round_robin_stays_even_while_one_comes_and_goes():
    turns, three = Turns("round_robin"), [endpoint(number) for number in range(3)]
    together, apart = Counter[int](), Counter[int]()
    for step in range(300):
        if step % 10 < 5:
            together[turns(three)] += 1
        else:
            apart[turns(three[:2])] += 1
    assert max(apart.values()) - min(apart[number] for number in (0, 1)) <= 30
    assert max(together.values()) - min(together.values()) <= 60
    assert abs(together[0] + apart[0] - together[1] - apart[1]) <= 1


@steady
@given(st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=60))
def test_round_robin_never_repeats_one_while_another_candidate_waits_longer(sets):
    turns, five = Turns("round_robin"), [endpoint(number) for number in range(5)]
    last = dict.fromkeys(range(5), -1)
    for step, numbers in enumerate(sets):
        chosen = turns([five[number] for number in sorted(numbers)])
        assert last[chosen] == min(last[number] for number in numbers)
        last[chosen] = step


def test_smooth_weighted_round_robin_gives_the_sequence_of_nginx():
    turns, three = Turns("weighted_round_robin"), [endpoint(0, 5), endpoint(1, 1), endpoint(2, 1)]
    assert "".join("abc"[turns(three)] for _ in range(14)) == "aabacaa" * 2


@steady
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_weighted_round_robin_gives_each_exactly_its_share(weights):
    turns, all_of_them = Turns("weighted_round_robin"), [endpoint(*pair) for pair in enumerate(weights)]
    counts = Counter(turns(all_of_them) for _ in range(sum(weights) * 3))
    assert [counts[number] for number in range(len(weights))] == [weight * 3 for weight in weights]


def test_random_keeps_to_the_weights():
    turns, two = Turns("random"), [endpoint(0, 3), endpoint(1, 1)]
    counts = Counter(turns(two) for _ in range(4000))
    assert counts[0] == pytest.approx(3000, rel=0.05)


def test_least_connections_takes_the_least_busy_by_weight():
    turns = Turns("least_connections")
    assert turns([endpoint(0, in_flight=2), endpoint(1, in_flight=1)]) == 1
    assert turns([endpoint(0, 4, in_flight=2), endpoint(1, in_flight=1)]) == 0


def test_least_connections_takes_turns_among_equals():
    turns, two = Turns("least_connections"), [endpoint(0), endpoint(1)]
    assert [turns(two) for _ in range(4)] == [0, 1, 0, 1]


def test_least_work_takes_the_one_done_soonest():
    turns = Turns("least_work")
    slow, fast = endpoint(0, speed=2.0, slots=1), endpoint(1, speed=0.5, slots=1)
    assert turns([slow, fast]) == 1
    fast.expected_free = 1.4  # 1.4 + 0.5 < 2
    assert turns([slow, fast]) == 1
    fast.expected_free = 1.6
    assert turns([slow, fast]) == 0


def test_least_work_shares_out_what_runs_over_the_slots():
    turns = Turns("least_work")
    slow = endpoint(0, speed=2.0, slots=4)
    fast = endpoint(1, speed=0.5, slots=4, in_flight=3, outstanding_cost=8.0)  # (8 / 4 + 1) x 0.5 < 2
    assert turns([slow, fast]) == 1
    fast.outstanding_cost = 16.0
    assert turns([slow, fast]) == 0


def test_least_work_takes_an_unmeasured_endpoint_to_be_as_fast_as_the_fastest_by_weight():
    turns = Turns("least_work")
    fast, slow = endpoint(0, speed=3.0, slots=1, expected_free=1.0), endpoint(1, speed=6.0, slots=1)
    assert turns([fast, slow, endpoint(2, slots=1)]) == 2
    assert turns([fast, slow, endpoint(2, slots=1, expected_free=2.0)]) == 0
    assert turns([fast, slow, endpoint(2, 0.5, slots=1)]) == 0  # 3 / 0.5


def test_least_work_tries_an_endpoint_again_that_nobody_has_measured_for_long():
    fast, slow = endpoint(0, speed=1.0), endpoint(1, speed=20.0)
    assert Forecast([fast, slow], {}, 3599.0, {}).slopes == [1.0, 20.0]
    fast.speed.learn(1.0, 1.0, 3000.0)
    assert Forecast([fast, slow], {}, 4000.0, {}).slopes == [1.0, 1.0]  # 200 calls of 20 s
    assert Forecast([fast, slow], {}, 3999.0, {}).slopes == [1.0, 20.0]


def test_least_work_takes_turns_among_equals():
    turns, two = Turns("least_work"), [endpoint(0, speed=1.0), endpoint(1, speed=1.0)]
    assert [turns(two) for _ in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("strategy", ["weighted_round_robin", "random", "least_connections", "peak_ewma"])
def test_an_endpoint_that_has_recovered_begins_with_a_part_of_its_share(strategy):
    def share(now: float) -> float:
        old, back = endpoint(0), endpoint(1)
        back.recovered(0.0, slow_start_seconds=10.0)
        for one in (old, back):
            one.latency_seconds = 1.0
        choose, rng, count = STRATEGIES[strategy], Random(1), 0
        for turn in range(1000):
            chosen = choose([old, back], 1.0, now, rng)
            chosen.in_flight += 1
            chosen.picked_at = turn
            count += chosen is back
        return count / 1000

    assert share(0.0) == pytest.approx(1 / 11, abs=0.03)
    assert share(5.0) == pytest.approx(1 / 3, abs=0.05)
    assert share(10.0) == pytest.approx(1 / 2, abs=0.05)


def test_peak_ewma_weighs_latency_by_what_is_in_flight():
    turns = Turns("peak_ewma")
    quick = endpoint(0, latency_seconds=1.0, in_flight=4)
    slow = endpoint(1, latency_seconds=3.0)
    assert turns([quick, slow]) == 1
    quick.in_flight = 1
    assert turns([quick, slow]) == 0


def test_peak_ewma_measures_a_new_endpoint_first():
    assert Turns("peak_ewma")([endpoint(0, latency_seconds=0.1), endpoint(1)]) == 1


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@steady
@given(
    data=st.lists(
        st.tuples(st.floats(0.1, 10), st.integers(0, 5), st.floats(0, 100), st.none() | st.floats(0.001, 10)),
        min_size=1,
    )
)
def test_every_strategy_chooses_one_of_the_candidates(strategy, data):
    candidates = [
        endpoint(number, weight, in_flight=busy, outstanding_cost=work, speed=speed, latency_seconds=speed)
        for number, (weight, busy, work, speed) in enumerate(data)
    ]
    assert Turns(strategy)(candidates) in range(len(data))


def batch_of(cost: float, **more: Any) -> Batch:
    return Batch(0, "a", "m", (), 0, cost, 0.0, **more)


def test_a_peak_of_latency_counts_at_once_and_fades_with_time():
    one = endpoint(0)
    one.learn(batch_of(1.0), 2.0, 0.0)
    assert one.latency_seconds == 2.0
    one.learn(batch_of(1.0), 10.0, 1.0)
    assert one.latency_seconds == 10.0
    one.learn(batch_of(1.0), 2.0, 1.0)
    assert one.latency_seconds == 10.0
    one.learn(batch_of(1.0), 2.0, 61.0)
    assert one.latency_seconds == pytest.approx(2.0 + 8.0 / math.e)


def test_an_endpoint_can_be_looked_at():
    one = endpoint(0)
    assert repr(one) == (
        "<Endpoint a http://0: 0/100 slots, unknown, <CircuitBreaker closed failures=0 era=0>, ? s/MP-step>"
    )
    snapshot = one.snapshot(0)
    assert (snapshot.slots, snapshot.in_flight, snapshot.usable, snapshot.breaker) == (100, 0, True, "closed")
