"""What the configuration means for the policies: one translation, for the gateway and for its simulation."""

from __future__ import annotations

from img_serving.config import Config
from img_serving.policy.circuit_breaker import BreakerOptions
from img_serving.policy.options import JobOptions, SchedulerOptions
from img_serving.policy.retry import RetryOptions
from img_serving.policy.routing import RoutingOptions


def scheduler_options(config: Config) -> SchedulerOptions:
    """`[routing]`, `[queue]` and `[retry]` as the scheduler takes them."""
    queue, retry, routing = config.queue, config.retry, config.routing
    return SchedulerOptions(
        strategy=routing.strategy,
        max_tasks=queue.max_tasks,
        max_work=queue.max_work,
        max_wait_seconds=queue.max_wait_seconds,
        ageing_seconds=queue.ageing_seconds,
        affinity_seconds=routing.affinity_seconds,
        slow_start_seconds=routing.slow_start_seconds,
        tier_overflow_seconds=routing.tier_overflow_seconds,
        panic_mode=routing.panic_mode,
        retry=RetryOptions(
            max_attempts=retry.max_attempts,
            budget_ratio=retry.budget_ratio,
            hedge_after_factor=retry.hedge_after_factor,
        ),
    )


def breaker_options(config: Config) -> BreakerOptions:
    """`[breaker]` as every endpoint's breaker takes it."""
    breaker = config.breaker
    return BreakerOptions(
        failures=breaker.consecutive_failures,
        timeouts=breaker.consecutive_timeouts,
        error_share=breaker.error_share,
        window_seconds=breaker.window_seconds,
        min_calls=breaker.min_calls,
        open_seconds=breaker.open_seconds,
        max_open_seconds=breaker.max_open_seconds,
    )


def routing_options(config: Config) -> RoutingOptions:
    """What `[routing]` says of models and backends."""
    routing = config.routing
    return RoutingOptions(
        default_backend=routing.default_backend,
        aliases=dict(routing.aliases),
        unknown_model=routing.unknown_model,
    )


def job_options(config: Config) -> JobOptions:
    """`[jobs]`, in seconds."""
    jobs = config.jobs
    return JobOptions(
        max_age_seconds=jobs.max_age_hours * 3600,
        result_ttl_seconds=jobs.result_ttl_hours * 3600,
    )
