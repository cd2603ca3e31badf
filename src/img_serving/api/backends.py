"""`/v1/backends`: what the gateway stands in front of, seen and changed while it runs."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from img_serving.api.bodies import read_json
from img_serving.api.exchange import Exchange, Reply
from img_serving.api.services import Services
from img_serving.config import ConfigError, backend_from_mapping
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import InvalidRequest
from img_serving.gateway.registry import BackendSnapshot
from img_serving.policy.endpoint import EndpointSnapshot


class EndpointRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint with its live state."""

    url: str
    usable: bool
    health: Literal["unknown", "up", "down"]
    health_detail: str
    breaker: Literal["closed", "open", "half_open"]
    max_concurrency: int
    in_flight: int
    weight: float
    calls: int
    failures: int
    latency_seconds: float | None
    last_error: str | None


class BackendEndpointRecord(EndpointRecord, frozen=True, kw_only=True):
    """One endpoint of a backend. `found`: which program speaks there, and how that is known; "" until it is."""

    found: str = ""


class CapabilitiesRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend can do. `null` means that nobody knows, so anything is tried."""

    operations: list[str]
    parameters: list[str]
    edit_parameters: list[str] | None = None
    """Those of edits, where they differ."""
    batch: Literal["single", "request", "seeds", "items"]
    max_batch_size: int
    size_multiple: int
    sizes: list[str] | None
    default_size: str | None = None
    """What is drawn where nobody says a size, where a model has one of its own."""
    min_side: int
    max_side: int | None
    max_pixels: int | None
    max_steps: int | None
    max_images: int
    masks: bool
    samplers: list[str] | None
    schedulers: list[str] | None
    formats: list[str]
    progress: bool
    previews: bool
    cancels: bool
    models: dict[str, CapabilitiesRecord]
    """Those of its models that can do something else than the rest."""


class BackendRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One backend with its live state. `origin`: defined in a file, added over the API, or built in."""

    object: Literal["backend"] = "backend"
    name: str
    protocol: str
    detected_protocol: str | None
    endpoints: list[BackendEndpointRecord]
    healthy: bool
    enabled: bool
    weight: float
    tier: int
    models: list[str]
    origin: Literal["file", "api", "builtin"]
    capabilities: CapabilitiesRecord | None = None


class BackendList(msgspec.Struct, frozen=True):
    """All backends, in file order."""

    object: Literal["list"]
    data: list[BackendRecord]


class DeletedBackend(msgspec.Struct, frozen=True):
    """What a removal answers."""

    object: Literal["backend"]
    name: str
    deleted: bool


class Backends:
    """Handlers of the backend routes."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._decoder: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])

    async def list(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /v1/backends`."""
        records = [_record(one) for one in self._services.registry.snapshots()]
        return Reply(200, (msgspec.json.encode(BackendList("list", records)),))

    async def get(self, exchange: Exchange) -> Reply:
        """`GET /v1/backends/{name}`."""
        snapshot = self._services.registry.snapshot(exchange.variables["name"])
        return Reply(200, (msgspec.json.encode(_record(snapshot)),))

    async def add(self, exchange: Exchange) -> Reply:
        """`POST /v1/backends`: the keys of `[[backends]]` as JSON."""
        body, _ = await read_json(exchange, self._decoder, self._services.config.server.max_body_bytes)
        try:
            config = backend_from_mapping(body)
        except ConfigError as error:
            first = error.problems[0]
            message = "; ".join(f"{one.path}: {one.message}" if one.path else one.message for one in error.problems)
            raise InvalidRequest(message, code="invalid_backend", param=first.path or None) from None
        try:
            snapshot = await self._services.registry.add(config)
        except ValueError as error:
            raise InvalidRequest(str(error), code="invalid_backend", param=config.protocol) from None
        except OSError as error:
            # the only file that a backend names
            reason = error.strerror or str(error)
            raise InvalidRequest(f"ca_file: {reason}", code="invalid_backend", param="ca_file") from None
        self._services.jobs.try_again()
        return Reply(201, (msgspec.json.encode(_record(snapshot)),))

    async def remove(self, exchange: Exchange) -> Reply:
        """`DELETE /v1/backends/{name}`: no new work at once; what runs there finishes."""
        last, resolved = await self._services.registry.remove(exchange.variables["name"])
        self._services.dispatcher.settle_all(resolved)
        self._services.jobs.try_again()
        return Reply(200, (msgspec.json.encode(DeletedBackend("backend", last.name, deleted=True)),))


def _record(backend: BackendSnapshot) -> BackendRecord:
    return BackendRecord(
        name=backend.name,
        protocol=backend.protocol,
        detected_protocol=backend.detected,
        endpoints=[
            BackendEndpointRecord(**msgspec.structs.asdict(endpoint_record(one)), found=found)
            for one, found in zip(backend.endpoints, backend.found, strict=True)
        ],
        healthy=backend.healthy,
        enabled=backend.enabled,
        weight=backend.weight,
        tier=backend.tier,
        models=list(backend.models),
        origin=backend.origin,
        capabilities=capabilities_record(backend.capabilities),
    )


def capabilities_record(can: Capabilities) -> CapabilitiesRecord:
    """What is shown of what a backend can do."""
    sizes = can.sizes
    return CapabilitiesRecord(
        operations=sorted(can.operations),
        parameters=sorted(can.honours),
        edit_parameters=None if can.honours_in_edits is None else sorted(can.honours_in_edits),
        batch=can.batch,
        max_batch_size=can.max_batch_size,
        size_multiple=sizes.multiple,
        sizes=[f"{width}x{height}" for width, height in sizes.choices] or None,
        default_size=None if can.default_size is None else "{}x{}".format(*can.default_size),
        min_side=sizes.min_side,
        max_side=sizes.max_side,
        max_pixels=sizes.max_pixels,
        max_steps=can.max_steps,
        max_images=can.max_images,
        masks=can.masks,
        samplers=None if can.samplers is None else list(can.samplers.names),
        schedulers=None if can.schedulers is None else list(can.schedulers.names),
        formats=list(can.formats),
        progress=can.progress,
        previews=can.previews,
        cancels=can.cancels,
        models={name: capabilities_record(one) for name, one in can.variants.items()},
    )


def endpoint_record(one: EndpointSnapshot) -> EndpointRecord:
    """What is shown of one endpoint."""
    return EndpointRecord(
        url=one.url,
        usable=one.usable,
        health=one.health,  # type: ignore[arg-type] # the values of policy.health.Health
        health_detail=one.health_detail,
        breaker=one.breaker,  # type: ignore[arg-type] # the values of BreakerState
        max_concurrency=one.slots,
        in_flight=one.in_flight,
        weight=one.weight,
        calls=one.calls,
        failures=one.failures,
        latency_seconds=one.latency_seconds,
        last_error=one.last_error,
    )
