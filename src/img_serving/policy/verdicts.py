"""What an ended call says: of its endpoint (breaker, speed, last error), and to a client whose last attempt it was."""

from __future__ import annotations

from collections.abc import Sequence

from img_serving.domain.errors import AllAttemptsFailed, GatewayError, NoUsableBackend
from img_serving.domain.images import Artifact, ItemFailure
from img_serving.domain.jobs import Batch, Ended, Task
from img_serving.policy.circuit_breaker import BreakerState
from img_serving.policy.endpoint import EndpointState


def judge(endpoint: EndpointState, batch: Batch, ended: Ended, now: float) -> bool:
    """Note how a call went; returns whether the endpoint has recovered by it.

    Cancellations, refusals, "busy" and what was not the endpoint's fault count for nothing.
    """
    results = ended.results
    breaker = endpoint.breaker
    if batch.loads_model and results is None:
        endpoint.loaded_model = None  # whether it came so far nobody knows
    if results and (isinstance(results[0], Artifact) or any(isinstance(result, Artifact) for result in results)):
        before = breaker.standing
        endpoint.learn(batch, max(now - batch.started_at, 1e-6), now)
        breaker.end(batch.era, ok=True, now=now)
        return before is BreakerState.HALF_OPEN and breaker.standing is BreakerState.CLOSED
    if ended.results is not None:
        # Not one picture: its speed says nothing, and it has failed unless it refused.
        failures = [result.message for result in ended.results if isinstance(result, ItemFailure)]
        refused = any(isinstance(result, ItemFailure) and result.refused for result in ended.results)
        if not refused:
            endpoint.failures += 1
            endpoint.last_error = failures[-1]
        breaker.end(batch.era, ok=None if refused else False, now=now)
    elif ended.outcome is None or ended.busy_seconds is not None or ended.is_blameless:
        breaker.end(batch.era, ok=None, now=now)
        if ended.busy_seconds is not None:
            endpoint.busy_until = now + ended.busy_seconds
        if ended.outcome is not None:
            endpoint.last_error = ended.message
    else:
        endpoint.failures += 1
        endpoint.last_error = ended.message
        breaker.end(batch.era, ok=False, now=now, timed_out=ended.timed_out)
    return False


def final_error(task: Task, endpoints: Sequence[EndpointState], message: str, now: float) -> GatewayError:
    """What the client is told when a task was tried for the last time; `endpoints` are those of its route."""
    if not task.attempts:
        # Nothing was drawn or paid: where an endpoint said when it is free again, the caller may come back then.
        busy = [one.busy_until - now for one in endpoints if one.enabled and one.busy_until > now]
        if busy:
            return NoUsableBackend(message, retry_after_seconds=max(1.0, min(busy)))
    if task.job.panicked:
        wait = min((one.breaker.opens_in(now) for one in endpoints), default=1.0)
        return NoUsableBackend(
            f"no endpoint of the route is usable; the last one tried said: {message}",
            retry_after_seconds=max(1.0, wait),
        )
    return AllAttemptsFailed(message, should_retry=False)
