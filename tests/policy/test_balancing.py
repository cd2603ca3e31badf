"""The strategies: each does what its name says, also while endpoints come and go."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.domain.capabilities import Capabilities
from img_serving.policy.balancing import STRATEGIES, Strategy
from img_serving.policy.circuit_breaker import BreakerOptions, CircuitBreaker
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.health import HealthOptions, HealthRecord

steady = settings(deadline=None, derandomize=True)


def endpoint(number: int, weight: float = 1.0, **known: float) -> EndpointState:
    one = EndpointState(
        id=number,
        backend="a",
        url=f"http://{number}",
        slots=100,
        weight=weight,
        capabilities=Capabilities(),
        max_batch_size=1,
        breaker=CircuitBreaker(BreakerOptions(), Random(0)),
        health=HealthRecord(HealthOptions()),
    )
    for name, value in known.items():
        setattr(one, name, value)
    return one


class Turns:
    """Chooses as the scheduler does, which notes whose turn it was."""

    def __init__(self, strategy: Strategy, seed: int = 1) -> None:
        self.choose, self.rng, self.turn = STRATEGIES[strategy], Random(seed), 0

    def __call__(self, candidates: list[EndpointState], cost: float = 1.0) -> int:
        chosen = self.choose(candidates, cost, self.rng)
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
    slow = endpoint(0, seconds_per_unit=2.0, latency_seconds=1.0)
    fast = endpoint(1, seconds_per_unit=0.5, latency_seconds=1.0, outstanding_cost=2.0)
    assert turns([slow, fast], cost=1.0) == 1  # (2 + 1) x 0.5 < 1 x 2
    fast.outstanding_cost = 4.0
    assert turns([slow, fast], cost=1.0) == 0


def test_least_work_takes_an_unmeasured_endpoint_to_be_as_fast_as_the_others():
    turns = Turns("least_work")
    known = endpoint(0, seconds_per_unit=3.0, latency_seconds=1.0, outstanding_cost=1.0)
    assert turns([known, endpoint(1)]) == 1
    assert turns([known, endpoint(1, outstanding_cost=5.0)]) == 0


def test_peak_ewma_weighs_latency_by_what_is_in_flight():
    turns = Turns("peak_ewma")
    quick = endpoint(0, latency_seconds=1.0, seconds_per_unit=1.0, in_flight=4)
    slow = endpoint(1, latency_seconds=3.0, seconds_per_unit=1.0)
    assert turns([quick, slow]) == 1
    quick.in_flight = 1
    assert turns([quick, slow]) == 0


def test_peak_ewma_measures_a_new_endpoint_first():
    assert Turns("peak_ewma")([endpoint(0, latency_seconds=0.1, seconds_per_unit=1.0), endpoint(1)]) == 1


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
        endpoint(number, weight, in_flight=busy, outstanding_cost=work, seconds_per_unit=speed, latency_seconds=speed)
        for number, (weight, busy, work, speed) in enumerate(data)
    ]
    assert Turns(strategy)(candidates) in range(len(data))


def test_speed_is_a_moving_average_of_measurements():
    one = endpoint(0)
    one.learn(cost=2.0, seconds=4.0)
    assert (one.seconds_per_unit, one.latency_seconds) == (2.0, 4.0)
    one.learn(cost=1.0, seconds=3.0)
    assert one.seconds_per_unit == pytest.approx(2.3)
    assert one.latency_seconds == pytest.approx(3.7)


def test_an_endpoint_can_be_looked_at():
    one = endpoint(0)
    assert repr(one) == (
        "<Endpoint a http://0: 0/100 slots, unknown, <CircuitBreaker closed failures=0 era=0>, ? s/MP-step>"
    )
    snapshot = one.snapshot(0)
    assert (snapshot.slots, snapshot.in_flight, snapshot.usable, snapshot.breaker) == (100, 0, True, "closed")
