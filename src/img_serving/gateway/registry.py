"""The registry: the backends there are, their endpoints and adapters, who probes them, and what routing may know of them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import msgspec

from img_serving.config import BackendConfig, EndpointConfig, backend_from_mapping, backend_to_mapping
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import Conflict, NotFound
from img_serving.domain.jobs import Batch, Job
from img_serving.domain.vocabulary import shown
from img_serving.gateway.tasks import TaskRegistry
from img_serving.policy.circuit_breaker import BreakerOptions, BreakerState, CircuitBreaker
from img_serving.policy.endpoint import EndpointSnapshot, EndpointState, ExclusiveGroup
from img_serving.policy.health import Health, HealthOptions, HealthRecord
from img_serving.policy.routing import Candidate
from img_serving.policy.scheduler import Scheduler
from img_serving.ports import Backend, HealthReport, StateStore
from img_serving.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

Origin = Literal["file", "api", "builtin"]
AdapterFactory = Callable[[BackendConfig, EndpointConfig], Backend]

PROBE_TIMEOUT_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Endpoint:
    """One address of a backend: the scheduler's state of it, its adapter, and the models that it told."""

    state: EndpointState
    adapter: Backend
    config: EndpointConfig
    models: tuple[str, ...] = ()
    found: str = ""
    """Which program speaks there, and how that is known."""
    faults: tuple[str, ...] = ()
    """What of its configuration cannot work there, as the log has it."""
    breaker: BreakerState = BreakerState.CLOSED
    """What the log last said of its breaker."""


@dataclass(slots=True, eq=False)
class BackendEntry:
    """A configured backend and what runs for it."""

    config: BackendConfig
    origin: Origin
    endpoints: list[Endpoint] = field(default_factory=list)

    @property
    def models(self) -> tuple[str, ...]:
        """What is configured, else what its endpoints told, in order and once each."""
        if self.config.models:
            return tuple(self.config.models)
        return tuple(dict.fromkeys(model for endpoint in self.endpoints for model in endpoint.models))


@dataclass(frozen=True, slots=True)
class BackendSnapshot:
    """One backend at one moment: for the API, health, metrics and tests. Holds no secret."""

    name: str
    protocol: str
    detected: str | None
    origin: Origin
    enabled: bool
    healthy: bool
    weight: float
    tier: int
    models: tuple[str, ...]
    endpoints: tuple[EndpointSnapshot, ...]
    found: tuple[str, ...]
    """For each endpoint, which program speaks there and how that is known; "" where it is not."""
    capabilities: Capabilities


class Registry:
    """Adds, lists and removes backends while the gateway runs; in-flight work on a removed one finishes."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        factory: AdapterFactory,
        state: StateStore,
        tasks: TaskRegistry,
        clock: Callable[[], float],
        rng: Random,
        metrics: Metrics,
        config_file: str | None = None,
        breaker: BreakerOptions | None = None,
    ) -> None:
        """`config_file` is named when somebody tries to delete what it defines."""
        self._breaker = breaker if breaker is not None else BreakerOptions()
        self._groups: dict[str, ExclusiveGroup] = {}
        self._scheduler = scheduler
        self._factory = factory
        self._state = state
        self._tasks = tasks
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._config_file = config_file
        self._ids = itertools.count(1)
        self._entries: dict[str, BackendEntry] = {}
        self._by_id: dict[int, tuple[BackendEntry, Endpoint]] = {}
        self._leaving: dict[int, Endpoint] = {}
        """Endpoints of removed backends that still have calls."""
        self._probers: dict[int, asyncio.Task[None]] = {}
        self._candidates: tuple[Candidate, ...] | None = None
        self.on_resolved: Callable[[list[Job]], None] = lambda _: None
        """Who wakes the waiters of jobs that lost their backend; set by the composition root."""
        self._lock = asyncio.Lock()

    async def load(self, configured: tuple[BackendConfig, ...], *, builtin: BackendConfig) -> None:
        """Bring up the file's backends (or the built-in one where there are none), then those added over the API.

        A stored record that cannot be read any more is named in the log and kept on disk.
        """
        for config in configured:
            self._bring_up(config, "file")
        if not configured:
            self._bring_up(builtin, "builtin")
        for record in await self._state.backends():
            try:
                config = backend_from_mapping(msgspec.json.decode(record))
                if config.name not in self._entries:
                    self._bring_up(config, "api")
                    continue
            except (ValueError, OSError, msgspec.DecodeError) as error:
                log.error(  # noqa: TRY400 - the record is at fault, not the code: no traceback
                    "a backend stored in the data directory cannot be used and is left out: %s", error
                )
                continue
            log.warning("the stored backend %r is hidden by the one of the same name in the file", config.name)
        for entry in self._entries.values():
            await self._ask_in_process(entry)

    async def add(self, config: BackendConfig) -> BackendSnapshot:
        """Add a backend at once, on disk before this returns.

        Raises:
            Conflict: the name is taken.
            ValueError: its adapter refuses an option.
        """
        async with self._lock:
            if config.name in self._entries:
                raise Conflict(f"a backend named {config.name!r} exists already", code="backend_exists", param="name")
            self._bring_up(config, "api")
            try:
                await self._state.put_backend(config.name, msgspec.json.encode(backend_to_mapping(config)))
            except BaseException:
                self.on_resolved(self._take_down(config.name))
                raise
            await self._ask_in_process(self._entries[config.name])
        return self.snapshot(config.name)

    async def remove(self, name: str) -> tuple[BackendSnapshot, list[Job]]:
        """Remove a backend that was added over the API. What runs there finishes.

        Returns its last snapshot, and the waiting jobs that nobody else can serve (they are resolved with an error).

        Raises:
            NotFound: there is none of that name.
            Conflict: a file defines it.
        """
        async with self._lock:
            entry = self._entry(name)
            if entry.origin == "builtin":
                raise Conflict(
                    f"{name!r} is the built-in backend, there while the configuration names no backend; "
                    "configure [[backends]] to replace it",
                    code="backend_in_file",
                    param="name",
                )
            if entry.origin == "file":
                raise Conflict(
                    f"{name!r} is defined in {self._config_file or 'the configuration'}; remove it there, "
                    "or set enabled = false",
                    code="backend_in_file",
                    param="name",
                )
            last = self.snapshot(name)
            await self._state.delete_backend(name)
            return last, self._take_down(name)

    # what others look up

    def adapter_of(self, endpoint_id: int) -> Backend:
        """The adapter that speaks to this endpoint."""
        return self._by_id[endpoint_id][1].adapter

    def timeout_of(self, backend: str) -> float:
        """Seconds that one attempt may go without an answer or progress."""
        return self._entries[backend].config.timeout_ms / 1000

    def size_of(self, backend: str, model: str | None = None) -> tuple[int, int]:
        """The size in pixels of a picture that nobody said a size for: as configured, else the model's own, else 1024x1024."""
        entry = self._entries[backend]
        own = None if entry.config.default_size is not None else _capabilities(entry).of(model).default_size
        return own if own is not None else entry.config.default_dimensions()

    def candidates(self) -> tuple[Candidate, ...]:
        """The backends as routing sees them, in file order; kept until something changes."""
        if self._candidates is None:
            self._candidates = tuple(_candidate(entry) for entry in self._entries.values())
        return self._candidates

    def snapshots(self) -> list[BackendSnapshot]:
        """All backends, in file order."""
        return [self.snapshot(name) for name in self._entries]

    def snapshot(self, name: str) -> BackendSnapshot:
        """One backend.

        Raises:
            NotFound: there is none of that name.
        """
        entry = self._entry(name)
        now = self._clock()
        endpoints = tuple(endpoint.state.snapshot(now) for endpoint in entry.endpoints)
        config = entry.config
        detected = next(
            (one.adapter.protocol for one in entry.endpoints if one.adapter.protocol != config.protocol), None
        )
        return BackendSnapshot(
            name=config.name,
            protocol=config.protocol,
            detected=detected,
            origin=entry.origin,
            enabled=config.enabled,
            healthy=config.enabled and any(endpoint.usable for endpoint in endpoints),
            weight=config.weight,
            tier=config.tier,
            models=entry.models,
            endpoints=endpoints,
            found=tuple(endpoint.found for endpoint in entry.endpoints),
            capabilities=_capabilities(entry),
        )

    def batch_ended(self, batch: Batch) -> None:
        """Tell of a breaker that moved, and close a removed endpoint's adapter once its last batch is over."""
        known = self._by_id.get(batch.endpoint_id)
        if known is not None:
            _, endpoint = known
            state = endpoint.state.breaker.standing
            if state is not endpoint.breaker:
                endpoint.breaker = state
                fields = {"backend": batch.backend, "endpoint": endpoint.state.url, "error": endpoint.state.last_error}
                level = logging.WARNING if state is BreakerState.OPEN else logging.INFO
                log.log(level, "circuit breaker is %s", state.value, extra={"fields": fields})
                if state is BreakerState.OPEN:
                    self._metrics.breaker_openings.add(batch.backend, endpoint.state.url)
        leaving = self._leaving.get(batch.endpoint_id)
        if leaving is not None and not leaving.state.in_flight:
            del self._leaving[batch.endpoint_id]
            self._retire(leaving)

    async def close(self) -> None:
        """Stop probing and close every adapter."""
        for prober in self._probers.values():
            prober.cancel()
        await asyncio.gather(*self._probers.values(), return_exceptions=True)
        self._probers.clear()
        for _, endpoint in list(self._by_id.values()):
            await endpoint.adapter.close()
        self._by_id.clear()

    # bringing up and taking down

    def _entry(self, name: str) -> BackendEntry:
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(self._entries) or "none"
            raise NotFound(f"there is no backend {name!r} (known: {known})", code="backend_not_found", param="name")
        return entry

    def _bring_up(self, config: BackendConfig, origin: Origin) -> None:
        entry = BackendEntry(config, origin)
        # every adapter first: one that refuses its options leaves nothing half done
        endpoints = config.endpoint_list() or (_in_process(config),)
        made = [(endpoint, self._factory(config, endpoint)) for endpoint in endpoints]
        for endpoint_config, adapter in made:
            capabilities = adapter.capabilities
            state = EndpointState(
                id=next(self._ids),
                backend=config.name,
                url=endpoint_config.url,
                slots=_slots(endpoint_config, adapter),
                weight=endpoint_config.weight,
                capabilities=capabilities,
                max_batch_size=_batch_size(config, adapter),
                max_batch_pixels=config.max_batch_pixels,
                linger_seconds=config.max_wait_ms / 1000,
                breaker=CircuitBreaker(self._breaker, self._rng),
                health=HealthRecord(
                    HealthOptions(
                        interval_seconds=config.health_check_interval_secs,
                        rise=config.health_check_rise,
                        fall=config.health_check_fall,
                    )
                ),
                enabled=config.enabled,
                retry_unknown=config.retries_unknown(),
                group=self._group(config.exclusive_group),
                cheap=config.cheap,
            )
            endpoint = Endpoint(state, adapter, endpoint_config)
            entry.endpoints.append(endpoint)
            self._by_id[state.id] = (entry, endpoint)
            self._scheduler.add_endpoint(state)
            if config.enabled:
                self._probers[state.id] = self._tasks.spawn(self._probe(entry, endpoint), "prober")
        self._entries[config.name] = entry
        self._candidates = None

    def _group(self, name: str | None) -> ExclusiveGroup | None:
        return None if name is None else self._groups.setdefault(name, ExclusiveGroup(name))

    def _take_down(self, name: str) -> list[Job]:
        entry = self._entries.pop(name)
        self._candidates = None
        for endpoint in entry.endpoints:
            prober = self._probers.pop(endpoint.state.id, None)
            if prober is not None:
                prober.cancel()
        resolved = self._scheduler.remove_backend(name, self._clock())
        for endpoint in entry.endpoints:
            if endpoint.state.in_flight:
                self._leaving[endpoint.state.id] = endpoint
            else:
                self._retire(endpoint)
        return resolved

    def _retire(self, endpoint: Endpoint) -> None:
        self._by_id.pop(endpoint.state.id, None)
        self._tasks.spawn(endpoint.adapter.close(), "close adapter")

    # probing

    async def _ask_in_process(self, entry: BackendEntry) -> None:
        """A backend that draws by itself answers at once: its models are known before anybody asks for them."""
        if not entry.config.endpoints:
            for endpoint in entry.endpoints:
                self._take_in(entry, endpoint, await endpoint.adapter.check(PROBE_TIMEOUT_SECONDS))

    async def _probe(self, entry: BackendEntry, endpoint: Endpoint) -> None:
        """Check one endpoint for as long as it is here."""
        state = endpoint.state
        while True:
            try:
                report = await endpoint.adapter.check(PROBE_TIMEOUT_SECONDS)
            except Exception as error:
                log.exception("the health check of %s broke", state.url)
                report = HealthReport(healthy=False, detail=f"{type(error).__name__} in the health check")
            self._take_in(entry, endpoint, report)
            await asyncio.sleep(state.health.next_check_in(self._rng))

    def _take_in(self, entry: BackendEntry, endpoint: Endpoint, report: HealthReport) -> None:
        state = endpoint.state
        if self._scheduler.set_endpoint_state(state.id, self._clock(), healthy=report.healthy, detail=report.detail):
            level = logging.INFO if state.health.health is Health.UP else logging.WARNING
            fields = {"backend": state.backend, "endpoint": state.url, "detail": report.detail}
            log.log(level, "endpoint is %s", state.health.health.value, extra={"fields": fields})
        if report.models is not None and report.models != endpoint.models:
            endpoint.models = report.models
            state.models = frozenset(report.models)
            self._scheduler.endpoint_changed()
            self._candidates = None
        if report.found and report.found != endpoint.found:
            endpoint.found = report.found
            fields = {"backend": state.backend, "endpoint": state.url, "protocol": endpoint.adapter.protocol}
            log.info("found %s", report.found, extra={"fields": fields})
        faults = (*report.faults, *_unlisted(entry.config, report))
        for fault in faults:
            if fault not in endpoint.faults:
                log.warning("%s", fault, extra={"fields": {"backend": state.backend, "endpoint": state.url}})
        if report.healthy:
            endpoint.faults = faults
        capabilities = endpoint.adapter.capabilities
        if capabilities is not state.capabilities and capabilities != state.capabilities:
            state.capabilities = capabilities
            state.resize(_slots(endpoint.config, endpoint.adapter))
            state.max_batch_size = _batch_size(entry.config, endpoint.adapter)
            self._scheduler.endpoint_changed()
            self._candidates = None


def _in_process(config: BackendConfig) -> EndpointConfig:
    """The one endpoint of a backend that draws by itself."""
    return EndpointConfig(url=f"{config.protocol}:", weight=config.weight, max_concurrency=config.max_concurrency)


def _unlisted(config: BackendConfig, report: HealthReport) -> list[str]:
    """That none of the configured models is in the server's list: it may serve them all the same, but hardly does."""
    if not (config.models and report.models):
        return []
    listed = {_plain(name) for name in report.models}
    missing = [name for name in config.models if _plain(name) not in listed]
    few = ", ".join(shown(name) for name in report.models[:5]) + (", …" if len(report.models) > 5 else "")
    return [f"the server does not list the configured model {name!r} (it lists: {few})" for name in missing[:8]]


def _plain(model: str) -> str:
    """A model's name without what is spelt differently here and there: case, folder, and the extension of its file."""
    name = model.replace("\\", "/").rpartition("/")[2].casefold()
    stem, _, suffix = name.rpartition(".")
    return stem if suffix in {"safetensors", "ckpt", "gguf", "pt", "sft"} else name


def _slots(endpoint: EndpointConfig, adapter: Backend) -> int:
    return endpoint.max_concurrency or adapter.capabilities.max_concurrency


def _batch_size(config: BackendConfig, adapter: Backend) -> int:
    able = adapter.capabilities.max_batch_size
    return able if config.max_batch_size is None else min(able, config.max_batch_size)


def _capabilities(entry: BackendEntry) -> Capabilities:
    """Those of the first endpoint that has told something of itself, else of the first."""
    told = next((one for one in entry.endpoints if one.found or one.models), entry.endpoints[0])
    return told.adapter.capabilities


def _differing(entry: BackendEntry) -> tuple[tuple[int, Capabilities], ...]:
    """Each endpoint's own capabilities, where they differ. One that has not told what it is is taken to be like the others."""
    usual = _capabilities(entry)
    able = tuple(
        (one.state.id, one.adapter.capabilities if one.found or one.models else usual) for one in entry.endpoints
    )
    return able if any(can != usual for _, can in able) else ()


def _candidate(entry: BackendEntry) -> Candidate:
    config = entry.config
    return Candidate(
        name=config.name,
        models=entry.models,
        capabilities=_capabilities(entry),
        endpoints=_differing(entry),
        enabled=config.enabled,
        tier=config.tier,
        serves_any=entry.origin == "builtin",
        default_pixels=math.prod(config.default_dimensions()),
    )
