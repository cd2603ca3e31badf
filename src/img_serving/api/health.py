"""`/health`, `/livez`, `/readyz` and `/metrics`: what probes and monitoring ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

from img_serving.api.exchange import Exchange, Reply
from img_serving.api.services import Services
from img_serving.domain.errors import Draining
from img_serving.telemetry.metrics import Labels
from img_serving.telemetry.process import render_process


class BackendCounts(msgspec.Struct, frozen=True):
    """Enabled backends; a healthy one has at least one usable endpoint."""

    total: int
    healthy: int
    unhealthy: int


class HealthReply(msgspec.Struct, frozen=True):
    """Body of `GET /health`."""

    status: Literal["healthy", "degraded", "unhealthy"]
    version: str
    backends: BackendCounts


class Alive(msgspec.Struct, frozen=True):
    """Body of `GET /livez` and `/readyz`."""

    status: Literal["ok"]


_ALIVE = msgspec.json.encode(Alive("ok"))
_BREAKER = {"closed": 0, "half_open": 1, "open": 2}


class Health:
    """Handlers of the probe routes."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def health(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /health`: always 200; the body tells."""
        enabled = [one for one in self._services.registry.snapshots() if one.enabled]
        healthy = sum(one.healthy for one in enabled)
        status: Literal["healthy", "degraded", "unhealthy"] = "degraded"
        if healthy == len(enabled) and enabled:
            status = "healthy"
        elif not healthy:
            status = "unhealthy"
        counts = BackendCounts(total=len(enabled), healthy=healthy, unhealthy=len(enabled) - healthy)
        return Reply(200, (msgspec.json.encode(HealthReply(status, self._services.version, counts)),))

    async def livez(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /livez`: the process answers."""
        return Reply(200, (_ALIVE,))

    async def readyz(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /readyz`: work is accepted."""
        if self._services.dispatcher.is_draining:
            raise Draining("the gateway is stopping")
        return Reply(200, (_ALIVE,))

    async def metrics(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /metrics`: Prometheus text."""
        body = self._services.metrics.render(self._gauges())
        return Reply(200, (body, render_process()), media_type=b"text/plain; version=0.0.4; charset=utf-8")

    def _gauges(self) -> Iterator[tuple[str, str, Mapping[Labels, float]]]:
        services = self._services
        now = services.clock()
        scheduler = services.dispatcher.scheduler.snapshot(now, with_waits=False)
        yield "queue_depth", "Tasks that wait.", {(): scheduler.queued}
        yield "queue_work", "Megapixel-steps that wait.", {(): scheduler.work}
        yield "queue_oldest_seconds", "How long the oldest waiting task has waited.", {(): scheduler.oldest_seconds}
        waiting = [((("backend", one.backend),), one) for one in scheduler.backends]
        yield "backend_queue_depth", "Tasks that could go to a backend.", {key: one.depth for key, one in waiting}
        yield (
            "backend_eta_seconds",
            "How long a new request would wait for a backend.",
            {key: one.eta_seconds for key, one in waiting if one.eta_seconds is not None},
        )
        tenants = [((("tenant", one.tenant),), one) for one in scheduler.tenants]
        yield "tenant_queue_depth", "Tasks of a tenant that wait.", {key: one.depth for key, one in tenants}
        yield "tenant_running", "Tasks of a tenant that are drawn.", {key: one.running for key, one in tenants}
        yield (
            "tenant_oldest_seconds",
            "The longest wait of a tenant.",
            {key: one.oldest_seconds for key, one in tenants},
        )
        yield "batches_running", "Calls in flight.", {(): scheduler.running}
        yield (
            "live_jobs",
            "Jobs apart from a connection that are not over: on disk, or in memory alone.",
            {(("kept", where),): count for where, count in services.jobs.live_counts().items()},
        )
        endpoints = [
            ((("backend", one.backend), ("endpoint", one.url)), one)
            for backend in services.registry.snapshots()
            if backend.enabled  # what is switched off on purpose is no endpoint that is down
            for one in backend.endpoints
        ]
        yield "slots", "Calls that an endpoint may have in flight.", {key: one.slots for key, one in endpoints}
        yield "slots_in_use", "Calls that an endpoint has in flight.", {key: one.in_flight for key, one in endpoints}
        yield "endpoint_usable", "1 if the endpoint may be given work.", {key: one.usable for key, one in endpoints}
        yield (
            "breaker_state",
            "Circuit breaker: 0 closed, 1 half-open, 2 open.",
            {key: _BREAKER[one.breaker] for key, one in endpoints},
        )
        yield (
            "endpoint_suspect",
            "1 if calls there are silent for far too long.",
            {k: one.suspect for k, one in endpoints},
        )
        yield "endpoint_work", "Megapixel-steps in flight there.", {key: one.outstanding for key, one in endpoints}
        yield (
            "endpoint_seconds_per_unit",
            "Learned seconds a megapixel-step.",
            {key: one.seconds_per_unit for key, one in endpoints if one.seconds_per_unit is not None},
        )
        yield (
            "endpoint_overhead_seconds",
            "Learned seconds a call, beside those by cost.",
            {key: one.overhead_seconds for key, one in endpoints if one.overhead_seconds is not None},
        )
        yield "info", "The version that runs.", {(("version", services.version),): 1}
