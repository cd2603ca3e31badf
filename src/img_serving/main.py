"""The composition root: the only file that names concrete classes. Ordered start, drain, stop."""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from img_serving import __version__
from img_serving.api.app import App
from img_serving.api.origin import Origin
from img_serving.api.server import Server, listen
from img_serving.api.services import Services
from img_serving.backends.a1111 import DEFAULT_BATCH, A1111Backend
from img_serving.backends.builtin import BuiltinBackend
from img_serving.backends.comfyui import ComfyUIBackend
from img_serving.backends.detection import DetectingBackend
from img_serving.backends.openai import OpenAIBackend
from img_serving.backends.scripted import ScriptedBackend
from img_serving.config import BackendConfig, Config, EndpointConfig
from img_serving.domain.errors import GatewayError, StartError, StorageFailed
from img_serving.domain.stored import StoredJob
from img_serving.domain.tenants import Tenant
from img_serving.gateway.delivery import Delivery
from img_serving.gateway.dispatcher import Dispatcher
from img_serving.gateway.job_records import JobRecords
from img_serving.gateway.jobs import Jobs
from img_serving.gateway.options import breaker_options, job_options, routing_options, scheduler_options
from img_serving.gateway.pipeline import Pipeline
from img_serving.gateway.registry import Registry
from img_serving.gateway.returns import Returns
from img_serving.gateway.tasks import TaskRegistry
from img_serving.gateway.webhooks import WebhookDeliverer, event_for
from img_serving.policy.api_keys import KeyRing, digest_of
from img_serving.policy.rate_limits import Allowance, RateLimits
from img_serving.policy.scheduler import Scheduler
from img_serving.ports import ArtifactStore, Backend, State, StoredWebhook
from img_serving.state.admin_key import ENV_KEY, admin_key, remember_keys
from img_serving.state.ownership import LOCK_FILE, owned
from img_serving.state.sqlite import SqliteState
from img_serving.state.webhook_secret import webhook_secrets
from img_serving.storage.local_disk import LocalDiskStore
from img_serving.storage.memory import MemoryStore
from img_serving.storage.writable import prove_writable
from img_serving.telemetry.logs import RequestLog, choose_format, set_up
from img_serving.telemetry.metrics import Metrics
from img_serving.telemetry.service_manager import ServiceManager
from img_serving.transport.event_loop import run as run  # noqa: PLC0414 - `main.run` is how a gateway is run
from img_serving.transport.fetch import FetchFailed, SafeFetcher
from img_serving.transport.http import HttpTransport, make_ssl_context
from img_serving.transport.proxy import proxy_from_environment
from img_serving.transport.webhook_post import SafePoster
from img_serving.wire import hush_grpc

log = logging.getLogger("img_serving")

BUILTIN = BackendConfig(name="procedural", protocol="builtin")
"""What serves while the configuration names no backend."""

STATE_FILE = "img-serving.db"
JOB_INPUTS = "job_inputs"
"""The folder in the data directory with the input pictures of durable jobs."""

SWEEP_SECONDS = 60.0


@dataclass(slots=True)
class Gateway:
    """The assembled parts, with their start and their end."""

    config: Config
    services: Services
    app: App
    state: State
    store: ArtifactStore
    registry: Registry
    dispatcher: Dispatcher
    delivery: Delivery
    tasks: TaskRegistry
    request_log: RequestLog

    async def start(self) -> None:
        """Bring the backends up. A dead endpoint never stops the start."""
        await self.registry.load(self.config.backends, builtin=BUILTIN)
        left = await self.services.jobs.recover()
        if left:
            log.info("%d jobs from before go on", left)
        if self.config.webhooks.enabled:
            self.tasks.spawn(self.services.webhooks.run(), "webhooks")
        self.tasks.spawn(self._sweep(), "sweeper")

    async def drain(self, seconds: float) -> None:
        """Take no new work, let what runs finish and what was drawn be kept, answer the rest with 503."""
        until = self.services.clock() + seconds
        await self.dispatcher.drain(seconds)
        await self.services.jobs.drain(max(1.0, until - self.services.clock()))

    def abort(self) -> None:
        """Answer everything with 503 at once."""
        self.dispatcher.abort()

    async def stop(self) -> None:
        """Let go of everything, in the reverse order of the start."""
        self.dispatcher.abort()
        await self.registry.close()
        await self.services.webhooks.close(timeout_seconds=2.0)
        await self.tasks.cancel_all(2.0)
        self.delivery.close()
        self.store.close()
        await self.state.close()
        self.request_log.flush()

    async def _sweep(self) -> None:
        while True:
            try:
                swept = await self.store.sweep()
            except (OSError, StorageFailed) as error:
                log.warning("cleaning up old images failed: %s", error)
            else:
                if swept:
                    self.services.metrics.artifacts.add("swept", by=swept)
            try:
                await self.services.jobs.sweep()
            except GatewayError as error:
                log.warning("cleaning up old jobs failed: %s", error)
            # with a limit in bytes it is looked at more often: much can be drawn in a minute
            await asyncio.sleep(SWEEP_SECONDS if not self.config.storage.max_bytes else SWEEP_SECONDS / 12)


async def build(
    config: Config,
    *,
    state: State,
    store: ArtifactStore,
    key_hashes: list[bytes],
    request_log: RequestLog,
    config_file: str | None = None,
    rng: Random | None = None,
    clock: Callable[[], float] = time.monotonic,
    unix_clock: Callable[[], float] = time.time,
    spool: ArtifactStore | None = None,
    webhook_secrets: tuple[bytes, ...] = (),
) -> Gateway:
    """Put the parts together on the running loop. Nothing is started yet.

    `spool` keeps the input pictures of durable jobs; `webhook_secrets` sign what their clients are told.

    `clock` gives seconds that never go back; the loop's own would do, but uvloop's has steps of a millisecond.
    """
    rng = rng if rng is not None else Random()  # noqa: S311 - it spreads load and jitter, and guards nothing
    metrics = Metrics()

    def on_task_error(name: str, error: BaseException) -> None:
        metrics.internal_errors.add(name)
        log.error("the task %r broke", name, exc_info=error)

    tasks = TaskRegistry(on_task_error)
    scheduler = Scheduler(scheduler_options(config), rng, clock())
    registry = Registry(
        scheduler=scheduler,
        factory=make_adapter,
        state=state,
        tasks=tasks,
        clock=clock,
        rng=rng,
        metrics=metrics,
        config_file=config_file,
        breaker=breaker_options(config),
    )
    dispatcher = Dispatcher(scheduler, registry, tasks, metrics, clock)
    registry.on_resolved = dispatcher.settle_all
    delivery = Delivery(store, metrics, clock, strip=config.storage.strip_metadata)
    keys = _key_ring(config, key_hashes)
    pipeline = Pipeline(
        registry,
        dispatcher,
        delivery,
        routing_options(config),
        clock,
        timeout_seconds=config.queue.request_timeout_seconds,
    )
    records = JobRecords(dispatcher, delivery, clock)
    webhooks = WebhookDeliverer(
        state,
        SafePoster(allow_private_addresses=config.webhooks.allow_private_addresses, proxy_of=proxy_from_environment),
        webhook_secrets,
        clock_unix=unix_clock,
        rng=rng,
        metrics=metrics,
        max_age_seconds=config.webhooks.max_age_hours * 3600,
    )

    async def event_of(stored: StoredJob) -> StoredWebhook | None:
        if stored.webhook_url is None or not config.webhooks.enabled:
            return None
        record = msgspec.json.encode(await records.full(stored, inline=False))
        return event_for(
            record,
            job_id=stored.id,
            tenant=stored.tenant,
            status=stored.status,
            url=stored.webhook_url,
            ended_at=stored.finished_at or unix_clock(),
        )

    jobs = Jobs(
        pipeline=pipeline,
        dispatcher=dispatcher,
        delivery=delivery,
        store=state,
        spool=spool if spool is not None else MemoryStore(),
        tasks=tasks,
        metrics=metrics,
        unix_clock=unix_clock,
        tenant_of=keys.tenant_named,
        event_of=event_of,
        on_event=webhooks.wake,
        options=job_options(config),
    )
    dispatcher.journal = jobs.journal
    services = Services(
        config=config,
        version=__version__,
        started_at=int(time.time()),
        clock=clock,
        unix_clock=unix_clock,
        tasks=tasks,
        keys=keys,
        limits=_limits(config),
        registry=registry,
        dispatcher=dispatcher,
        pipeline=pipeline,
        delivery=delivery,
        jobs=jobs,
        records=records,
        webhooks=webhooks,
        returns=Returns(clock),
        store=store,
        metrics=metrics,
        request_log=request_log,
        origin=Origin(config.server.trusted_proxies, config.server.public_url),
    )
    return Gateway(
        config=config,
        services=services,
        app=App(services),
        state=state,
        store=store,
        registry=registry,
        dispatcher=dispatcher,
        delivery=delivery,
        tasks=tasks,
        request_log=request_log,
    )


def make_adapter(config: BackendConfig, endpoint: EndpointConfig) -> Backend:
    """The adapter for one endpoint of a backend.

    Raises:
        ValueError: an option of its protocol's own table is wrong.
    """
    if config.protocol == "builtin":
        return BuiltinBackend(_procedural, models=tuple(config.models) or ("procedural",))
    if config.protocol == "scripted":
        return ScriptedBackend(config.options())
    if config.protocol in {"grpc", "kserve"}:
        return _over_grpc(config, endpoint)
    tls = make_ssl_context(config.ca_file, config.tls_verify) if endpoint.url.startswith("https:") else None
    # as many connections are kept as calls may be in flight: a burst must not end in a storm of reconnecting
    transport = HttpTransport(
        endpoint.url,
        ssl_context=tls,
        max_idle=max(64, endpoint.max_concurrency or 0),
        proxy=proxy_from_environment(endpoint.url),
    )
    headers = tuple(config.headers.items())
    basic = (_basic(config.username, config.password or ""),) if config.username is not None else ()
    bearer = (("Authorization", f"Bearer {config.api_key}"),) if config.api_key is not None else ()
    try:
        fetch = SafeFetcher(
            trusted_url=endpoint.url,
            headers=(*headers, *basic, *bearer),
            ssl_context=tls,
            proxy_of=proxy_from_environment,
        )
    except FetchFailed as error:
        raise ValueError(f"endpoints: {error.message}") from None
    openai = OpenAIBackend(
        transport,
        options=config.options() if config.protocol == "openai" else {},
        url=endpoint.url,
        api_key=config.api_key,
        headers=(*headers, *basic),
        health_check_path=config.health_check_path,
        fetch=fetch,
        models=config.models,
        secrets=() if config.password is None else (config.password,),
    )
    if config.protocol == "openai":
        return openai
    a1111 = A1111Backend(
        transport,
        username=config.username,
        password=config.password,
        headers=(*headers, *bearer),
        health_check_path=config.health_check_path,
        max_batch_size=config.max_batch_size or DEFAULT_BATCH,
        slots=endpoint.max_concurrency or 1,
        shared=config.shared,
        options=config.options() if config.protocol == "a1111" else None,
    )
    if config.protocol == "a1111":
        return a1111
    comfyui = ComfyUIBackend(
        transport,
        websocket_url=f"ws{endpoint.url.removeprefix('http')}/ws",
        proxy=proxy_from_environment(endpoint.url),
        ssl_context=tls,
        headers=headers,
        api_key=config.api_key,
        username=config.username,
        password=config.password,
        options=config.options() if config.protocol == "comfyui" else None,
        health_check_path=config.health_check_path,
        shared=config.shared,
    )
    if config.protocol == "comfyui":
        return comfyui
    adapters: dict[str, Backend] = {"openai": openai, "a1111": a1111, "comfyui": comfyui}
    return DetectingBackend(adapters, transport, headers=(*headers, *basic, *bearer))


def _over_grpc(config: BackendConfig, endpoint: EndpointConfig) -> Backend:
    hush_grpc()
    try:
        # imported late: gRPC takes a tenth of a second and some megabytes
        from img_serving.backends.grpc import GrpcBackend  # noqa: PLC0415
        from img_serving.backends.kserve import KServeBackend  # noqa: PLC0415
        from img_serving.backends.rpc import Line  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"protocol: gRPC is not installed ({error.name}): install img-serving with its extra `grpc`"
        ) from None
    basic = (_basic(config.username, config.password or ""),) if config.username is not None else ()
    proxy = proxy_from_environment(f"http{endpoint.url.removeprefix('grpc').removeprefix('http')}")
    way: dict[str, Any] = {
        "ca_file": config.ca_file,
        "tls_verify": config.tls_verify,
        "api_key": config.api_key,
        "headers": (*config.headers.items(), *basic),
        "proxy": proxy.url if proxy is not None else None,
    }
    if config.protocol == "grpc":
        return GrpcBackend(endpoint.url, options=config.options(), models=config.models, **way)
    return KServeBackend(
        Line(endpoint.url, **way),
        options=config.options(),
        models=config.models,
        max_batch_size=config.max_batch_size,
    )


def _basic(username: str, password: str) -> tuple[str, str]:
    return "Authorization", "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


def _procedural() -> Any:
    # imported late: numpy is not needed before the first picture
    from img_serving.engines.procedural import ProceduralEngine  # noqa: PLC0415

    return ProceduralEngine()


def _key_ring(config: Config, hashes: list[bytes]) -> KeyRing:
    entries = [(digest_of(key.key), key.tenant()) for key in config.auth.key_list()]
    entries += [(digest, Tenant(name="admin", role="admin")) for digest in hashes]
    return KeyRing(entries)


def _limits(config: Config) -> RateLimits:
    limit = config.rate_limit
    if not limit.enabled:
        return RateLimits(None)

    def allowance(one: Any) -> Allowance | None:
        return None if one is None else Allowance(one.requests_per_second, one.burst_size)

    return RateLimits(allowance(limit), everybody=allowance(limit.global_), per_address=allowance(limit.address))


def open_state(config: Config) -> SqliteState:
    """The state store in the data directory.

    Raises:
        StartError: the directory cannot be written.
    """
    directory = Path(config.server.data_dir)
    prove_writable(
        directory,
        what="the data directory",
        setting="server.data_dir",
        ours=(LOCK_FILE, STATE_FILE, f"{STATE_FILE}-wal", f"{STATE_FILE}-shm", JOB_INPUTS),
    )
    return SqliteState(directory / STATE_FILE)


def open_store(config: Config) -> LocalDiskStore:
    """The artifact store on local disk."""
    ttl = config.storage.ttl_hours * 3600
    return LocalDiskStore(Path(config.storage.dir), ttl_seconds=ttl or None, max_bytes=config.storage.max_bytes)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - what a person who starts it reads; the log goes to standard error


async def serve(
    config: Config,
    *,
    source: Path | None,
    notes: tuple[str, ...] = (),
    env_file: Path | None = None,
    announce: Callable[[str], None] = _say,
) -> None:
    """Run the gateway until a signal ends it.

    Raises:
        StartError: it cannot start.
    """
    chosen = choose_format(config.logging.format, sys.stderr)
    set_up(config.logging.level, chosen)
    for note in notes:
        log.warning("%s", note)
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(closing(listen(config.server.host, config.server.port)))
        state = open_state(config)
        stack.enter_context(owned(Path(config.server.data_dir)))
        await state.open()
        stack.push_async_callback(state.close)
        store = open_store(config)
        stack.callback(store.close)
        inputs = Path(config.server.data_dir) / JOB_INPUTS
        spool = LocalDiskStore(inputs, ttl_seconds=None, max_bytes=0, is_ours_alone=True)
        stack.callback(spool.close)
        prove_writable(Path(config.storage.dir), what="the directory of pictures", setting="storage.dir")
        try:
            if inputs.is_dir():  # only edits make it
                await spool.prepare()
            await store.prepare()
        except StorageFailed as error:
            raise StartError(error.message) from error
        digests, new_key = await admin_key(config, state, env_file)
        gateway = await build(
            config,
            state=state,
            store=store,
            key_hashes=digests,
            request_log=RequestLog(sys.stderr.fileno(), chosen, enabled=logging.getLogger().isEnabledFor(logging.INFO)),
            config_file=str(source) if source else None,
            spool=spool,
            webhook_secrets=await webhook_secrets(config, state),
        )
        stack.push_async_callback(gateway.stop)
        await gateway.start()
        _spare_the_collector()
        if new_key is not None:
            _show_key(new_key, env_file, announce)
            await remember_keys(digests, state)
        _announce(config, listener, source, gateway, announce)
        manager = ServiceManager(os.environ)
        await Server(gateway.app, gateway, config.server.drain_timeout_seconds, manager).serve(sockets=[listener])


def _spare_the_collector() -> None:
    """Keep the cyclic garbage collector off what was there at the start, and let it look less often.

    Requests leave hardly any cycles behind; at the default threshold the collector took a tenth of a small request's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _show_key(key: str, env_file: Path | None, announce: Callable[[str], None]) -> None:
    announce(f"admin API key (shown once): {key}")
    if env_file is not None:
        place = env_file if env_file.is_absolute() else f"./{env_file}"
        announce(f"it is also in {env_file} as {ENV_KEY}: run `. {place}` and use ${ENV_KEY}")


def _announce(
    config: Config, listener: socket.socket, source: Path | None, gateway: Gateway, announce: Callable[[str], None]
) -> None:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    names = ", ".join(one.name for one in gateway.registry.snapshots())
    announce(f"configuration: {source or 'defaults'}; backends: {names}")
    announce(f"img-serving {__version__} listens on http://{shown}:{port}  (docs: /docs)")
    if not config.auth.enabled and host not in {"127.0.0.1", "::1"}:
        log.warning(
            "AUTHENTICATION IS OFF and the gateway listens on %s: everybody who reaches it may draw, and may add and "
            'remove backends. Set auth.enabled = true, or server.host = "127.0.0.1"',
            host,
        )
