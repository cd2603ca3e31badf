"""What is kept at hand of endpoints: it is what asking them anew would say, whatever happened to them."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.virtual_fleet import BREAKER, endpoint

from img_serving.domain.jobs import Batch
from img_serving.policy.circuit_breaker import BreakerOptions
from img_serving.policy.endpoint import EndpointState
from img_serving.policy.forecast import Forecast
from img_serving.policy.tier import Tier

steady = settings(deadline=None, derandomize=True)


def names(endpoints: list[EndpointState]) -> list[int]:
    return [one.id for one in endpoints]


def fail(one: EndpointState, now: float, times: int = BREAKER.failures) -> None:
    for _ in range(times):
        one.breaker.end(one.breaker.start(now), False, now)


def test_a_disabled_removed_suspect_or_ailing_endpoint_is_out_at_once_and_back_at_once():
    endpoints = [endpoint(number) for number in range(5)]
    tier = Tier(endpoints)
    assert names(tier.usable(0.0)) == [0, 1, 2, 3, 4]
    endpoints[0].enabled = False
    assert names(tier.usable(0.0)) == [1, 2, 3, 4]
    endpoints[1].removed = True
    assert names(tier.usable(0.0)) == [2, 3, 4]
    endpoints[2].suspect = True
    assert names(tier.usable(0.0)) == [3, 4]
    endpoints[3].health.record(False, "down")
    assert names(tier.usable(0.0)) == [4]
    endpoints[4].busy_until = 5.0
    assert names(tier.usable(0.0)) == []
    endpoints[0].enabled = True
    endpoints[2].suspect = False
    endpoints[3].health.record(True, "up")
    endpoints[4].busy_until = 0.0
    assert names(tier.usable(0.0)) == [0, 2, 3, 4]


def test_a_busy_endpoint_is_back_when_it_said_it_would_be():
    one = endpoint(0)
    tier = Tier([one, endpoint(1)])
    one.busy_until = 5.0
    assert names(tier.usable(4.9)) == [1]
    assert names(tier.usable(5.0)) == [0, 1]


def test_a_broken_endpoint_is_back_for_one_trial_when_its_breaker_lets_it():
    one = endpoint(0)
    tier = Tier([one, endpoint(1)])
    assert names(tier.usable(0.0)) == [0, 1]
    fail(one, 0.0)
    assert names(tier.usable(9.9)) == [1]
    assert names(tier.usable(10.0)) == [0, 1]
    era = one.breaker.start(10.0)
    assert names(tier.usable(10.0)) == [1]
    one.breaker.end(era, None, 11.0)
    assert names(tier.usable(11.0)) == [0, 1]


def test_a_full_endpoint_is_usable():
    one = endpoint(0)
    one.start(Batch(0, "a", "m", (), 0, 1.0, 0.0))
    assert names(Tier([one]).usable(0.0)) == [0]


def test_speeds_that_grow_stale_by_themselves_are_asked_for_again_in_time():
    fast, slow = endpoint(0, speed=1.0), endpoint(1, speed=2.0)
    fast.speed.learn(10.0, 10.0, 3000.0)
    tier = Tier([fast, slow])
    now = slow.speed.stale_at - 1.0
    assert tier.forecast(now).slopes == [1.0, 2.0]
    assert tier.forecast(now + 1.0).slopes == [1.0, 1.0]


class World:
    """Things that happen to three endpoints."""

    def __init__(self, seed: int, *, measured: bool) -> None:
        self.rng = Random(seed)
        self.now = 1000.0
        options = BreakerOptions(failures=2, open_seconds=5.0)
        self.endpoints = [
            endpoint(number, slots=number + 1, weight=1.0 + number, breaker=options, speed=1.0 if measured else None)
            for number in range(3)
        ]
        self.running: list[tuple[EndpointState, Batch]] = []

    def happens(self, what: str) -> None:
        one = self.rng.choice(self.endpoints)
        if what == "start" and one.in_flight < one.slots:
            cost = self.rng.choice([1.0, 5.0, 20.0])
            batch = Batch(one.id, "a", "m", (), one.breaker.start(self.now), cost, self.now)
            batch.expected_end = self.now + self.rng.choice([0.5, 3.0, 30.0])
            one.start(batch)
            self.running.append((one, batch))
        elif what in ("ok", "failed", "cancelled") and self.running:
            one, batch = self.running.pop(self.rng.randrange(len(self.running)))
            one.end(batch)
            if what == "ok":
                one.learn(batch, self.rng.choice([0.1, 2.0, 9.0]), self.now)
            one.breaker.end(batch.era, {"ok": True, "failed": False, "cancelled": None}[what], self.now)
        elif what == "time":
            self.now += self.rng.choice([0.0, 0.3, 2.0, 6.0])
        elif what == "busy":
            one.busy_until = self.now + self.rng.choice([0.0, 1.0, 4.0])
        elif what == "check":
            one.health.record(self.rng.random() < 0.6, "")
        elif what == "toggle":
            one.enabled = not one.enabled


EVENTS = st.lists(
    st.sampled_from(["start", "start", "start", "ok", "ok", "failed", "cancelled", "time", "busy", "check", "toggle"]),
    max_size=60,
)


@steady
@given(EVENTS, st.integers(0, 2**32), st.booleans())
def test_it_says_what_asking_every_endpoint_would_say(events, seed, measured):
    world = World(seed, measured=measured)
    tier = Tier(world.endpoints)
    for what in events:
        world.happens(what)
        usable = [one for one in world.endpoints if one.is_usable(world.now)]
        assert tier.usable(world.now) == usable
        if world.rng.random() < 0.7 and usable:
            kept, fresh = tier.forecast(world.now), Forecast(usable, {}, world.now, {})
            assert kept.endpoints == fresh.endpoints
            assert kept.frees == pytest.approx(fresh.frees)
            assert kept.slopes == pytest.approx(fresh.slopes)
            assert kept.heads == pytest.approx(fresh.heads)
