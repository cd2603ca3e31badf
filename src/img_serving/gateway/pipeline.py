"""The way of an image request, on one screen: route, submit, wait, deliver."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import structs

from img_serving.domain.errors import InvalidRequest, NoUsableBackend
from img_serving.domain.images import ImageRequest
from img_serving.domain.jobs import Job, Route
from img_serving.domain.stored import ResponseFormat, StoredJob
from img_serving.domain.tenants import Tenant
from img_serving.gateway.delivery import Answer, Delivery
from img_serving.gateway.dispatcher import Dispatcher
from img_serving.gateway.identifiers import new_id
from img_serving.gateway.registry import Registry
from img_serving.policy.routing import Candidate, RoutingOptions, ignored_by, plan, stands_in

MAX_PLANS = 1024
"""Routes remembered at most; past it all are forgotten."""


_NOTHING: frozenset[str] = frozenset()


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
        self._lost: dict[tuple[object, ...], frozenset[str]] = {}
        self._planned_with: tuple[Candidate, ...] = ()

    def admit(
        self,
        tenant: Tenant,
        request: ImageRequest,
        request_id: str,
        traceparent: str | None = None,
        *,
        job_id: str | None = None,
        patience_seconds: float | None = None,
        age_seconds: float = 0.0,
    ) -> Job:
        """Find the route and make the job.

        `job_id` and `age_seconds` are those of one that was there before a restart; `patience_seconds` is how long it may take
        from its arrival, where that is another time than a request's.

        Raises:
            GatewayError: nobody can, or may, serve this.
        """
        arrived = self._clock() - age_seconds
        patience = self._timeout_seconds if patience_seconds is None else patience_seconds
        return Job(
            id=job_id or new_id("job_"),
            request=request,
            route=self._route(tenant, request),
            tenant=tenant,
            submitted_at=arrived,
            deadline=arrived + patience,
            request_id=request_id,
            traceparent=traceparent,
        )

    def placeholder(self, tenant: Tenant, stored: StoredJob) -> Job:
        """A job from before a restart, without a route: `admit` finds one when it is its turn."""
        now = self._clock()
        return Job(
            id=stored.id,
            request=stored.request,
            route=(),
            tenant=tenant,
            submitted_at=now,
            deadline=now,
            request_id=stored.request_id,
            durable=True,
        )

    @property
    def timeout_seconds(self) -> float:
        """How long a request may take whose client waits for it."""
        return self._timeout_seconds

    def _route(self, tenant: Tenant, request: ImageRequest) -> Route:
        """`plan`, remembered for as long as the backends are what they were: most requests are like one before."""
        candidates = self._registry.candidates()
        if candidates is not self._planned_with or len(self._plans) >= MAX_PLANS:
            self._forget(candidates)
        key = (
            tenant.name,
            tenant.role,
            tenant.models,
            tenant.backends,
            request.model,
            request.backend,
            request.operation,
            request.width,
            request.height,
            request.steps,
            request.sampler,
            request.scheduler,
            len(request.images),
            request.mask is None,
            (request.given, *[(one.width, one.height) for one in request.images[:1]]) if request.strict else None,
        )
        route = self._plans.get(key)
        if route is None:
            route = self._plans[key] = plan(request, tenant, candidates, self._routing)
        return route

    def _forget(self, candidates: tuple[Candidate, ...]) -> None:
        self._plans.clear()
        self._lost.clear()
        self._planned_with = candidates

    async def run(self, job: Job, response_format: ResponseFormat, base_url: Callable[[], str]) -> Answer:
        """Wait for the pictures and make the answer of them; `base_url` is asked for where URLs are made.

        Raises:
            GatewayError: as `draw` does; `StorageFailed` where a picture could not be stored.
        """
        ignored = await self.draw(job)
        return await self._delivery.answer(job, response_format, base_url, ignored)

    async def draw(self, job: Job) -> tuple[str, ...]:
        """Wait until every task of the job has its picture; the parameters that were not honoured, sorted.

        Raises:
            GatewayError: how the job failed; `InvalidRequest` also where a strict request was not honoured after all.
        """
        request = job.request
        # an edit without a size keeps its picture's
        wanted = request.width, request.height
        if request.images and request.width is None:
            wanted = request.images[0].width, request.images[0].height
        try:
            await self._dispatcher.run(job)
        except NoUsableBackend as error:
            if request.model is None and request.backend is None and job.route:
                raise NoUsableBackend(
                    f"{error.message} (the request names no model, so it went to the backend {job.route[0].backend}: name a "
                    "model of GET /v1/models, or a backend that is up)",
                    retry_after_seconds=error.retry_after_seconds,
                ) from error
            raise
        finally:
            if request.images:
                # jobs and their tasks refer to each other, and so live on for a while: not with megabytes of input
                job.request = request = structs.replace(request, images=(), mask=None)
        ignored = self._ignored(job, wanted) if request.given or request.model or wanted[0] else ()
        if ignored and request.strict:
            reason = f"{job.backend} could not honour {', '.join(ignored)}"
            raise InvalidRequest(reason, code="unsupported", param=ignored[0])
        return ignored

    def _ignored(self, job: Job, wanted: tuple[int | None, int | None]) -> tuple[str, ...]:
        """Parameters the client set that were not honoured: the backend cannot, or its engine did otherwise.

        `wanted` is the size that the picture should have; (None, None): any.
        """
        request = job.request
        lost = _NOTHING
        for task in job.tasks:
            drawn = task.artifact
            if drawn is None:
                continue
            if drawn.ignored:
                lost |= request.given.intersection(drawn.ignored)
            if wanted[0] and (drawn.width, drawn.height) != wanted:
                lost |= {"size"}
        lost |= self._not_honoured(job)
        return tuple(sorted(lost)) if lost else ()

    def _not_honoured(self, job: Job) -> frozenset[str]:
        """What the backend that drew cannot honour at all; remembered as routes are."""
        request = job.request
        candidates = self._registry.candidates()
        if candidates is not self._planned_with or len(self._lost) >= MAX_PLANS:
            self._forget(candidates)
        key = (job.backend, job.route, request.model, request.operation, request.given)
        found = self._lost.get(key)
        if found is None:
            found = self._lost[key] = self._look_up(job, candidates)
        return found

    def _look_up(self, job: Job, candidates: tuple[Candidate, ...]) -> frozenset[str]:
        request = job.request
        backend = next((one for one in candidates if one.name == job.backend), None)
        if backend is None:
            return _NOTHING  # removed while it drew
        model = next((one.model for one in job.route if one.backend == job.backend), None)
        lost = frozenset(ignored_by(request, backend.capabilities.of(model)))
        return lost | {"model"} if stands_in(request, backend, self._routing) else lost
