"""Faults: when they strike, what they make of a call, and which cannot be."""

from __future__ import annotations

from random import Random

import pytest

from img_serving.domain.errors import Outcome
from img_serving.simulation import Fault, SimulatedEndpoint
from img_serving.simulation.faults import ANSWER_SECONDS, HANG_SECONDS, FaultKind, FaultPlan

FAST = SimulatedEndpoint("fast")
SLOW = SimulatedEndpoint("slow-1", backend="slow", timeout_seconds=5)


def ending(plan: FaultPlan, now: float, number: int = 0, rng: Random | None = None) -> tuple[float, Outcome | None]:
    seconds, ended = plan.ending(number, (FAST, SLOW)[number], 10.0, now, rng or Random(1))
    return seconds, None if ended is None else ended.outcome


def plan_of(*faults: Fault) -> FaultPlan:
    return FaultPlan((FAST, SLOW), faults)


@pytest.mark.parametrize(
    ("kind", "amount", "expected"),
    [
        ("down", 1, (ANSWER_SECONDS, Outcome.NOT_STARTED)),
        ("fail", 1, (ANSWER_SECONDS, Outcome.FAILED)),
        ("hang", 1, (HANG_SECONDS, Outcome.UNKNOWN)),
        ("slow", 3, (30.0, None)),
        ("errors", 1, (10.0, Outcome.FAILED)),
        ("errors", 0, (10.0, None)),
    ],
)
def test_a_fault_strikes_from_its_start_until_its_end(
    kind: FaultKind, amount: float, expected: tuple[float, Outcome | None]
) -> None:
    plan = plan_of(Fault("fast", 100, 200, kind, amount))
    assert ending(plan, 99.9) == (10.0, None)
    assert ending(plan, 100) == expected
    assert ending(plan, 199.9) == expected
    assert ending(plan, 200) == (10.0, None)
    assert ending(plan, 150, number=1) == (10.0, None)


def test_a_call_that_hangs_ends_with_the_time_out_of_its_endpoint() -> None:
    assert ending(plan_of(Fault("slow", 0, 1, "hang")), 0, number=1) == (5, Outcome.UNKNOWN)


def test_a_share_of_the_calls_fails() -> None:
    plan, rng = plan_of(Fault("fast", 0, 1, "errors", 0.3)), Random(1)
    failed = sum(ending(plan, 0, rng=rng)[1] is Outcome.FAILED for _ in range(5000))
    assert failed / 5000 == pytest.approx(0.3, abs=0.03)


def test_health_checks_see_what_is_down_or_hangs_and_nothing_else() -> None:
    for kind, seen in (("down", True), ("hang", True), ("fail", False), ("slow", False)):
        plan = plan_of(Fault("fast", 1, 2, kind))  # type: ignore[arg-type]
        assert plan.answers(0, 1.5) is not seen
        assert plan.answers(0, 2.0)


def test_the_name_of_a_backend_strikes_all_its_endpoints() -> None:
    plan = plan_of(Fault("slow", 0, 1, "down"))
    assert (plan.troubled(0), plan.troubled(1)) == (False, True)
    assert plan.cuts() == [(0, 1)]


def test_a_fault_of_nobody_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"no endpoint 'fats'.*fast, slow-1"):
        plan_of(Fault("fats", 0, 1, "down"))


@pytest.mark.parametrize(
    ("start", "end", "kind", "amount"), [(2, 1, "down", 1), (-1, 1, "down", 1), (0, 1, "errors", 2), (0, 1, "slow", 0)]
)
def test_impossible_faults_are_refused(start: float, end: float, kind: FaultKind, amount: float) -> None:
    with pytest.raises(ValueError, match=r"fault|share|factor"):
        Fault("fast", start, end, kind, amount)
