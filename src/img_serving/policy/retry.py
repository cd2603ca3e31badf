"""Whether a failed task is tried elsewhere: by outcome, by attempts made, and by one budget for the whole gateway."""

from __future__ import annotations

from dataclasses import dataclass

from img_serving.domain.errors import Outcome
from img_serving.policy.token_bucket import TokenBucket


@dataclass(frozen=True, slots=True)
class RetryOptions:
    """`max_attempts` a task; retries may be `budget_ratio` of the traffic, but `floor_per_second` always.

    `hedge_after_factor`: a call to a cheap endpoint that takes this many times as long as it should is made a second time
    elsewhere; None: never.
    """

    max_attempts: int = 3
    budget_ratio: float = 0.2
    floor_per_second: float = 10.0
    hedge_after_factor: float | None = None


class RetryBudget:
    """A share of traffic that may be retries, so that a failing fleet is not buried under its own second tries."""

    def __init__(self, options: RetryOptions, now: float) -> None:
        """Starts with the floor's burst."""
        self._options = options
        self._earned = 0.0
        self._floor = TokenBucket(options.floor_per_second, max(1.0, options.floor_per_second), now)

    def earn(self) -> None:
        """A first attempt was made: a share of a retry is earned (a hundred at most are kept)."""
        self._earned = min(self._earned + self._options.budget_ratio, 100.0)

    def spend(self, now: float) -> bool:
        """Take one retry if there is one."""
        if self._earned >= 1.0:
            self._earned -= 1.0
            return True
        return self._floor.take(1, now) == 0.0

    def allows(self, outcome: Outcome, attempts: int, *, retry_unknown: bool) -> bool:
        """Whether an attempt that ended so may be followed by another, budget aside; changes nothing.

        An unknown outcome is tried again only where a duplicate costs no money.
        """
        if outcome is Outcome.NOT_STARTED:
            return True
        if attempts >= self._options.max_attempts:
            return False
        return outcome is Outcome.FAILED or (outcome is Outcome.UNKNOWN and retry_unknown)


class Payment:
    """One retry of the budget, asked for when it is first needed."""

    __slots__ = ("_budget", "_made", "_now")

    def __init__(self, budget: RetryBudget, now: float) -> None:
        self._budget = budget
        self._now = now
        self._made: bool | None = None

    def is_made(self) -> bool:
        """Whether the budget gives it."""
        if self._made is None:
            self._made = self._budget.spend(self._now)
        return self._made
