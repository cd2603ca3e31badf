"""The way of an image request, on one screen: route, submit, wait, deliver."""

from __future__ import annotations

from collections.abc import Callable

from img_serving.domain.images import ImageRequest
from img_serving.domain.jobs import Job, Route
from img_serving.domain.tenants import Tenant
from img_serving.gateway.delivery import Answer, Delivery, ResponseFormat
from img_serving.gateway.dispatcher import Dispatcher
from img_serving.gateway.identifiers import new_id
from img_serving.gateway.registry import Registry
from img_serving.policy.routing import Candidate, RoutingOptions, ignored_by, plan

MAX_PLANS = 1024
"""Routes remembered at most; past it all are forgotten."""


class Pipeline:
    """What happens to a request after it was authenticated, charged, parsed and normalised."""

    def __init__(
        self,
        registry: Registry,
        dispatcher: Dispatcher,
        delivery: Delivery,
        routing: RoutingOptions,
        clock: Callable[[], float],
        *,
        timeout_seconds: float,
    ) -> None:
        """`timeout_seconds` is a job's deadline: waiting, attempts and delivery live inside it."""
        self._registry = registry
        self._dispatcher = dispatcher
        self._delivery = delivery
        self._routing = routing
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._plans: dict[tuple[object, ...], Route] = {}
        self._planned_with: tuple[Candidate, ...] = ()

    def admit(self, tenant: Tenant, request: ImageRequest, request_id: str, traceparent: str | None = None) -> Job:
        """Find the route and make the job.

        Raises:
            GatewayError: nobody can, or may, serve this.
        """
        now = self._clock()
        return Job(
            id=new_id("job_"),
            request=request,
            route=self._route(tenant, request),
            tenant=tenant,
            submitted_at=now,
            deadline=now + self._timeout_seconds,
            request_id=request_id,
            traceparent=traceparent,
        )

    def _route(self, tenant: Tenant, request: ImageRequest) -> Route:
        """`plan`, remembered for as long as the backends are what they were: most requests are like one before."""
        candidates = self._registry.candidates()
        if candidates is not self._planned_with or len(self._plans) >= MAX_PLANS:
            self._plans.clear()
            self._planned_with = candidates
        key = (
            tenant.name,
            request.model,
            request.backend,
            request.operation,
            request.width,
            request.height,
            request.given if request.strict else None,
        )
        route = self._plans.get(key)
        if route is None:
            route = self._plans[key] = plan(request, tenant, candidates, self._routing)
        return route

    async def run(self, job: Job, response_format: ResponseFormat, base_url: Callable[[], str]) -> Answer:
        """Wait for the pictures and make the answer of them; `base_url` is asked for where URLs are made."""
        await self._dispatcher.run(job)
        transparent = job.request.background == "transparent" and "background" not in self.ignored(job)
        return await self._delivery.answer(job, response_format, base_url, transparent=transparent)

    def ignored(self, job: Job) -> tuple[str, ...]:
        """Parameters the client set that the backend which drew could not honour."""
        if not job.request.given:
            return ()
        for candidate in self._registry.candidates():
            if candidate.name == job.backend:
                if job.request.given <= candidate.capabilities.honours:
                    return ()
                return ignored_by(job.request, candidate.capabilities)
        return ()
