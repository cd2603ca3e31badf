"""Whom a call is charged to: a refused call costs nobody else's tokens."""

from __future__ import annotations

import pytest

from img_serving.domain.tenants import Tenant
from img_serving.policy import rate_limits
from img_serving.policy.rate_limits import FREE, Allowance, RateLimits

ANN, BOB = Tenant("ann"), Tenant("bob")


def test_without_limits_everything_is_free():
    limits = RateLimits(None)
    assert limits.charge(ANN, 0) is FREE
    assert limits.charge_address("1.2.3.4", 0) == 0


def test_each_key_has_its_own_bucket():
    limits = RateLimits(Allowance(1, 2))
    assert [limits.charge(ANN, 0).wait_seconds for _ in range(3)] == [0, 0, 1]
    assert limits.charge(BOB, 0).wait_seconds == 0


def test_a_charge_says_limit_remaining_and_reset():
    charge = RateLimits(Allowance(2, 10)).charge(ANN, 0)
    assert (charge.wait_seconds, charge.scope, charge.limit, charge.remaining, charge.reset_seconds) == (
        0,
        "key",
        10,
        9,
        0.5,
    )


def test_a_tenants_own_figures_override_the_default():
    limits = RateLimits(Allowance(1, 1))
    rich = Tenant("rich", rate=10, burst=5)
    assert [limits.charge(rich, 0).wait_seconds for _ in range(6)] == [0] * 5 + [0.1]


def test_a_tenants_own_rate_holds_also_where_there_is_no_default():
    limits = RateLimits(None)
    slow = Tenant("slow", rate=1)
    assert [limits.charge(slow, 0).wait_seconds for _ in range(3)] == [0, 0, 1]
    assert limits.charge(ANN, 0) is FREE


def test_each_address_has_its_own_bucket():
    limits = RateLimits(None, per_address=Allowance(1, 1))
    assert [limits.charge_address("1.1.1.1", 0) for _ in range(2)] == [0, 1]
    assert limits.charge_address("2.2.2.2", 0) == 0


def test_everybody_shares_the_global_bucket():
    limits = RateLimits(None, everybody=Allowance(1, 2))
    assert [limits.charge_address(address, 0) for address in "abc"] == [0, 0, 1]


def test_an_address_over_its_limit_does_not_drain_everybodys_bucket():
    limits = RateLimits(None, everybody=Allowance(1, 10), per_address=Allowance(1, 1))
    refused = [limits.charge_address("noisy", 0) for _ in range(100)]
    assert refused.count(0) == 1
    assert [limits.charge_address(f"quiet {index}", 0) for index in range(10)] == [0] * 9 + [1]


def test_a_key_over_its_limit_does_not_drain_everybodys_bucket():
    limits = RateLimits(Allowance(1, 1), everybody=Allowance(1, 10))
    for _ in range(100):
        if limits.charge_address("somewhere", 0) == 0:
            limits.charge(ANN, 0)
    assert limits.charge_address("somewhere", 0) == 0
    assert limits.charge(BOB, 0).wait_seconds == 0


def test_the_memory_for_addresses_is_bounded_and_forgets_the_one_unseen_for_longest(monkeypatch):
    monkeypatch.setattr(rate_limits, "MAX_BUCKETS", 3)
    limits = RateLimits(None, per_address=Allowance(1, 1))
    for address in "abc":
        limits.charge_address(address, 0)
    limits.charge_address("a", 0)
    limits.charge_address("d", 0)
    assert sorted(limits._addresses) == ["a", "c", "d"]


@pytest.mark.parametrize("rate", [0.5, 100])
def test_over_a_long_time_a_key_gets_its_rate(rate):
    limits = RateLimits(Allowance(rate, 1))
    granted = sum(limits.charge(ANN, step / 1000).wait_seconds == 0 for step in range(100_000))
    assert granted == pytest.approx(rate * 100, rel=0.02, abs=1)
