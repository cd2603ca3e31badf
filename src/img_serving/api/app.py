"""The HTTP application: finds the route, authenticates, charges, calls the handler, and answers whatever happens.

The order is the policy: a key before a charge (only somebody can be charged), a charge before the body is read (a refused
caller costs no body bytes).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from img_serving.api.a1111_facade import A1111Facade
from img_serving.api.a1111_shapes import PREFIX, a1111_reply_to, is_a1111, key_of_basic
from img_serving.api.asgi import AsgiConnection, Receive, Scope, Send
from img_serving.api.backends import Backends
from img_serving.api.cross_origin import CrossOrigin
from img_serving.api.docs import Docs
from img_serving.api.errors import reply_to
from img_serving.api.exchange import ClientDisconnected, Connection, Exchange, Headers, Reply
from img_serving.api.files import Files
from img_serving.api.health import Health
from img_serving.api.images import Images
from img_serving.api.jobs import Jobs
from img_serving.api.keep_alive import KeepAlive
from img_serving.api.models import Models
from img_serving.api.queue import Queue
from img_serving.api.services import Services
from img_serving.api.webhooks import Webhooks
from img_serving.domain.errors import (
    Cancelled,
    Draining,
    Forbidden,
    GatewayError,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    Unauthorized,
)
from img_serving.domain.jobs import Job
from img_serving.domain.tenants import ANONYMOUS, Tenant
from img_serving.policy.rate_limits import FREE, Charge
from img_serving.telemetry.logs import timestamp

log = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[Reply]]
Access = Literal["public", "user", "admin"]


class InternalError(GatewayError):
    """Something unexpected: the log has it under the request's id."""

    default_code = "internal_error"


@dataclass(frozen=True, slots=True)
class Route:
    """One path. With a `variable` what stands between `path` and `suffix` goes into it, slashes too."""

    path: str
    access: Access
    handlers: dict[str, Handler]
    variable: str | None = None
    suffix: str = ""
    alone: bool = False
    """Nothing but this very path leads here: not `/v1` before it, nor a slash after it."""

    @property
    def allow(self) -> bytes:
        """The value of an Allow header."""
        return ", ".join(sorted({*self.handlers, "OPTIONS"})).encode()


class App:
    """The gateway's HTTP face: `serve` for our own server's connections, a plain ASGI callable for any other."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._auth = services.config.auth.enabled
        self._prompts = services.config.logging.prompts
        self._cross_origin = CrossOrigin(services.config.server.cors_allow_origins)
        self._keep_alive = KeepAlive(
            services.config.server.keepalive_after_seconds,
            services.tasks,
            services.metrics,
            services.clock,
            self._head,
        )
        images, models, backends = Images(services, self._keep_alive), Models(services), Backends(services)
        jobs, webhooks = Jobs(services, images), Webhooks(services.webhooks)
        files, health, docs = Files(services), Health(services), Docs(services)
        a1111 = A1111Facade(services, images, models)
        metrics_access: Access = "public" if services.config.auth.metrics_public else "admin"
        routes = [
            Route("/images/generations", "user", {"POST": images.generate}),
            Route("/images/edits", "user", {"POST": images.edit}),
            Route("/images/variations", "user", {"POST": images.vary}),
            Route("/jobs", "user", {**_read(jobs.list), "POST": jobs.create}),
            Route("/jobs/", "user", _read(jobs.follow), "id", "/events"),
            Route("/jobs/", "user", {**_read(jobs.get), "DELETE": jobs.cancel}, "id"),
            Route("/models", "user", _read(models.list)),
            Route("/models/", "user", _read(models.get), "id"),
            Route("/backends", "admin", {**_read(backends.list), "POST": backends.add}),
            Route("/backends/", "admin", {**_read(backends.get), "DELETE": backends.remove}, "name"),
            Route("/queue", "admin", _read(Queue(services).look)),
            Route("/webhooks", "admin", _read(webhooks.list)),
            Route("/webhooks/", "admin", {"POST": webhooks.redeliver}, "event_id", "/redeliver"),
            Route("/webhooks/", "admin", _read(webhooks.get), "event_id"),
            Route("/images/", "public", _read(files.get), "name"),
            *_a1111_routes(a1111),
            Route("/health", "public", _read(health.health)),
            Route("/livez", "public", _read(health.livez)),
            Route("/readyz", "public", _read(health.readyz)),
            # whoever keeps the figures from the outside does it by this path, in a proxy
            Route("/metrics", metrics_access, _read(health.metrics), alone=True),
            Route("/openapi.json", "public", _read(docs.openapi)),
            Route("/docs", "public", _read(docs.page)),
            Route("/", "public", _read(docs.index)),
        ]
        self._exact = {route.path: route for route in routes if route.variable is None}
        self._prefixed = [route for route in routes if route.variable is not None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI request; scopes other than HTTP are none of ours (lifespan is the server's)."""
        if scope["type"] == "http":
            await self.serve(AsgiConnection(scope, receive, send))

    async def serve(self, connection: Connection) -> None:
        """Answer one request, whatever happens."""
        exchange = Exchange(connection, self._services.clock())
        try:
            await self._serve(exchange)
        finally:
            if exchange.trickle is not None:
                exchange.trickle.end()
            on_end, exchange.on_end = exchange.on_end, None  # it may hold the exchange, and a job with its pictures
            if on_end is not None:
                # the handler has ended, or its stream has: there is nothing left to stop
                connection.on_disconnect(None)
                on_end()

    async def _serve(self, exchange: Exchange) -> None:
        services = self._services
        keep_alive = True
        try:
            reply = await self._answer(exchange)
        except GatewayError as error:
            keep_alive = await exchange.discard_body()
            reply = _told(exchange, error)
            error.__traceback__ = None  # a job holds its error, which would hold the frames that hold the job
        except ClientDisconnected:
            self._client_left(exchange)
            return
        except asyncio.CancelledError:
            # the server's own cancellation, at the end of the drain time
            keep_alive = False
            reply = _told(exchange, Draining("the gateway is stopping", retry_after_seconds=5.0))
        except Exception:
            log.exception("unexpected error", extra={"fields": {"request_id": exchange.request_id}})
            services.metrics.internal_errors.add("api")
            keep_alive = await exchange.discard_body()
            reply = _told(exchange, InternalError(f"an internal error; the log has it as {exchange.request_id}"))
        headers = self._head(exchange)
        if not keep_alive:
            headers.append((b"connection", b"close"))
        try:
            await exchange.send(reply, headers)
        except ClientDisconnected:
            self._client_left(exchange)
            return
        except asyncio.CancelledError:
            if not exchange.disconnected:
                raise
            self._client_left(exchange)
            return
        except Exception:
            # after the first byte nothing can be said any more: the connection is cut by leaving with an error
            log.exception("the reply broke off", extra={"fields": {"request_id": exchange.request_id}})
            services.metrics.internal_errors.add("reply")
            self._finish(exchange)
            raise
        self._finish(exchange)

    def _head(self, exchange: Exchange) -> Headers:
        """The headers that go out with every reply."""
        headers: Headers = [(b"x-request-id", exchange.request_id.encode()), *exchange.extra_headers]
        headers += self._cross_origin.headers(exchange)
        return headers

    async def _answer(self, exchange: Exchange) -> Reply:
        route = self._find(exchange)
        if route is None:
            raise NotFound(f"there is nothing at {exchange.path[:200]}", code="unknown_path")
        exchange.route = route.path
        method = exchange.method
        if method == "OPTIONS":
            return Reply(204, headers=[(b"allow", route.allow), *self._cross_origin.preflight(exchange, route.allow)])
        handler = route.handlers.get(method)
        if handler is None:
            exchange.extra_headers.append((b"allow", route.allow))
            raise MethodNotAllowed(f"{exchange.path[:200]} does not take {method}; it takes {route.allow.decode()}")
        if route.access != "public":
            self._admit(exchange, route.access)
        return await handler(exchange)

    def _find(self, exchange: Exchange) -> Route | None:
        path = exchange.path
        path = path[3:] if path.startswith("/v1/") else path
        if path[-1:] == "/" and len(path) > 1:
            path = path[:-1]  # a redirect would lose the body of a POST, and a 404 helps nobody
        route = self._exact.get(path)
        if route is not None:
            return None if route.alone and exchange.path != route.path else route
        for route in self._prefixed:
            start, stop = len(route.path), len(path) - len(route.suffix)
            if start < stop and path.startswith(route.path) and path.endswith(route.suffix):
                exchange.variables[route.variable or ""] = path[start:stop]
                return route
        return None

    def _admit(self, exchange: Exchange, access: Access) -> None:
        services = self._services
        now = services.clock()
        if services.limits.has_address_limits:
            wait = services.limits.charge_address(services.origin.client_of(exchange), now)
            if wait > 0:
                services.metrics.rate_limited.add("address")
                raise RateLimited("too many requests from this address", retry_after_seconds=wait)
        tenant = exchange.tenant = self._authenticate(exchange)
        charge = services.limits.charge(tenant, now)
        if charge is not FREE:
            exchange.extra_headers += _limit_headers(charge)
        if charge.wait_seconds > 0:
            services.metrics.rate_limited.add("key")
            raise RateLimited("the rate limit of this key is reached", retry_after_seconds=charge.wait_seconds)
        if access == "admin" and tenant.role != "admin":
            raise Forbidden("this route needs an admin key")

    def _authenticate(self, exchange: Exchange) -> Tenant:
        """The owner of the key in `Authorization: Bearer …` or `X-API-Key`; A1111's clients send it as a password.

        Raises:
            Unauthorized: there is none, or nobody has it.
        """
        if not self._auth:
            return ANONYMOUS
        key = b""
        authorization = exchange.header(b"authorization")
        if authorization is not None and authorization[:7].lower() == b"bearer ":
            key = authorization[7:].strip()
        elif authorization is not None and is_a1111(exchange.path):
            key = key_of_basic(authorization)
        key = key or exchange.header(b"x-api-key") or b""
        tenant = self._services.keys.authenticate(key) if key else None
        if tenant is None:
            self._services.metrics.auth_failures.add()
            told = "that API key is not known here" if key else "an API key is needed"
            basic = ", or it as the password of Basic" if is_a1111(exchange.path) else ""
            raise Unauthorized(f"{told}: send Authorization: Bearer <key>, or X-API-Key: <key>{basic}")
        return tenant

    def _client_left(self, exchange: Exchange) -> None:
        self._services.metrics.disconnects.add()
        exchange.status = Cancelled.status
        self._finish(exchange)

    def _finish(self, exchange: Exchange) -> None:
        """Count the exchange and write its line."""
        services = self._services
        seconds = services.clock() - exchange.started
        metrics = services.metrics
        status = str(exchange.status)
        metrics.requests.add(exchange.route, exchange.method if exchange.route != "unknown" else "other", status)
        metrics.bytes_out.add(by=exchange.bytes_out)
        metrics.bytes_in.add(by=exchange.bytes_in)
        job = exchange.job
        if job is not None:
            metrics.stage_seconds.observe(seconds, "total")
        if services.request_log.enabled:
            services.request_log.write(self._line(exchange, seconds, job))

    def _line(self, exchange: Exchange, seconds: float, job: Job | None) -> dict[str, object]:
        """What the log says of an exchange: no secret ever, the prompt only where the operator wants it."""
        line: dict[str, object] = {
            "ts": timestamp(time.time()),
            "level": "info",
            "event": "request",
            "request_id": exchange.request_id,
            "method": exchange.method,
            "path": exchange.path if exchange.path.isprintable() else ascii(exchange.path),
            "status": exchange.status,
            "tenant": exchange.tenant.name,
            "ms": round(seconds * 1000, 2),
            "bytes": exchange.bytes_out,
        }
        if job is not None:
            line["job_id"] = job.id
            line["model"] = job.request.model
            line["n"] = job.request.n
            line["backend"] = job.backend
            line["attempts"] = job.attempts
            line["outcome"] = job.status
            if job.started_at is not None:
                line["queue_ms"] = round((job.started_at - job.submitted_at) * 1000, 2)
                if job.finished_at is not None:
                    line["run_ms"] = round((job.finished_at - job.started_at) * 1000, 2)
            if self._prompts:
                line["prompt"] = job.request.prompt
        return line


def _read(handler: Handler) -> dict[str, Handler]:
    """A handler for GET that serves HEAD too (the server leaves the body out)."""
    return {"GET": handler, "HEAD": handler}


def _a1111_routes(a1111: A1111Facade) -> list[Route]:
    """A1111's API, for clients that speak no other."""
    routes: dict[str, dict[str, Handler]] = {
        "txt2img": {"POST": a1111.txt2img},
        "options": {**_read(a1111.options), "POST": a1111.set_options},
        "sd-models": _read(a1111.checkpoints),
        "samplers": _read(a1111.samplers),
        "schedulers": _read(a1111.schedulers),
        "upscalers": _read(a1111.upscalers),
        "latent-upscale-modes": _read(a1111.nothing),
        "sd-vae": _read(a1111.nothing),
        "sd-modules": _read(a1111.nothing),
        "progress": _read(a1111.progress),
        "interrupt": {"POST": a1111.interrupt},
    }
    return [Route(f"{PREFIX}v1/{name}", "user", handlers) for name, handlers in routes.items()]


def _told(exchange: Exchange, error: GatewayError) -> Reply:
    """What the client reads of an error, in the shape of the API that it speaks."""
    return a1111_reply_to(error) if is_a1111(exchange.path) else reply_to(error)


def _limit_headers(charge: Charge) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit-requests", b"%d" % (charge.limit or 0)),
        (b"x-ratelimit-remaining-requests", b"%d" % charge.remaining),
        (b"x-ratelimit-reset-requests", b"%.3fs" % charge.reset_seconds),
    ]
