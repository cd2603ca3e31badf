"""What an operator may say of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from img_serving.policy.balancing import Strategy
from img_serving.policy.retry import RetryOptions


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """How work waits and where it goes.

    - `max_tasks` may wait, and `max_work` megapixel-steps of them (None: no bound); `max_wait_seconds` None means until
      the deadline.
    - A priority counts one more for every `ageing_seconds` that its oldest task has waited (0: never).
    - `affinity_seconds`: how long a task may be passed over for others whose model an engine has loaded, and may itself wait
      for the engine that has its own (0: not at all).
    - `slow_start_seconds`: how long an endpoint that has recovered takes to get all of its share again (0: at once).
    - `tier_overflow_seconds`: the next tier helps while what waits for this one would take longer (None: only when the
      tier has no usable endpoint).
    - `panic_mode`: where no endpoint of a route is usable, each is tried once all the same, instead of waiting for one to
      recover.
    """

    strategy: Strategy = "round_robin"
    max_tasks: int = 1000
    max_work: float | None = None
    max_wait_seconds: float | None = None
    ageing_seconds: float = 60.0
    affinity_seconds: float = 15.0
    slow_start_seconds: float = 30.0
    tier_overflow_seconds: float | None = None
    panic_mode: bool = True
    retry: RetryOptions = field(default_factory=RetryOptions)


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How long things last, in seconds."""

    max_age_seconds: float = 24 * 3600.0
    result_ttl_seconds: float = 24 * 3600.0
