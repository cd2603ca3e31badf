"""The worker's life: listen, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from img_serving import __version__
from img_serving.backends.rpc import MAX_MESSAGE_BYTES
from img_serving.domain.errors import AttemptError, StartError
from img_serving.engines.engine import Engine
from img_serving.wire.generation import SERVICE
from img_serving.worker.metrics_page import MetricsPage
from img_serving.worker.options import WorkerOptions
from img_serving.worker.service import GenerationService, TokenInterceptor, handler_of
from img_serving.worker.workshop import Loading, Workshop

log = logging.getLogger("img_serving.worker")

LEAST_PING_SECONDS: Final = 5
"""Gateways ask whether a silent worker is still there; more often than this is taken for an attack."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # two workers on one port would share its calls by chance
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", LEAST_PING_SECONDS * 1000),
    # a gateway that vanished without a word: its calls are cancelled
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
LAST_WORDS_SECONDS: Final = 0.5
"""For the last answers to be on their way when everything is drawn."""

_WATCHERS: Final = 16
_QUESTIONS: Final = 64 + _WATCHERS
"""Health checks and the like at the same time."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Announce = Callable[[str], None]


async def serve(
    engine_factory: Callable[[], Engine],
    options: WorkerOptions,
    *,
    announce: Announce,
    on_loading: Callable[[Loading | None], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a worker until SIGTERM, Ctrl-C or `stop`. It listens at once, and draws as soon as the model is loaded.

    `announce` is given the lines that a person reads. `on_loading` is told how far the model is, None when it is ready.

    Raises:
        StartError: it cannot listen, or the engine cannot be loaded.
    """
    stop = stop if stop is not None else asyncio.Event()
    async with AsyncExitStack() as stack:
        workshop = Workshop(engine_factory, options)
        stack.callback(workshop.close)
        service = GenerationService(workshop)
        health_service = BoundedHealth()
        server = grpc.aio.server(
            # each of them may carry input images
            maximum_concurrent_rpcs=options.slots + options.queue_size + _QUESTIONS,
            interceptors=() if options.token is None else (TokenInterceptor(options.token),),
            options=_OPTIONS,
        )
        server.add_generic_rpc_handlers((handler_of(service),))
        health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
        await _say_health(health_service, _NOT_SERVING)
        port = _listen(server, options)
        await server.start()
        stack.push_async_callback(server.stop, None)
        if options.metrics_port is not None:
            loop = asyncio.get_running_loop()
            page = MetricsPage(options.host, options.metrics_port, workshop.render_metrics, loop)
            stack.push_async_callback(asyncio.to_thread, page.close)
            announce(f"metrics: http://{_shown(options.host)}:{page.port}/metrics")
        stack.enter_context(_Signals(stop))  # before anybody can know that there is somebody to stop
        announce(f"img-serving worker {__version__} listens on {_shown(options.host)}:{port} and loads {options.model}")
        _warn_if_open(options)
        if not await _load(workshop, on_loading, stop):
            return
        await _say_health(health_service, _SERVING)
        announce(f"ready after {workshop.counts.load_seconds:.1f} s: {_summary(workshop)}")
        await stop.wait()
        await _drain(server, service, health_service, workshop)


async def _load(workshop: Workshop, on_loading: Callable[[Loading | None], None] | None, stop: asyncio.Event) -> bool:
    """Load the model; False: told to stop before it was ready."""

    def tell(loading: Loading) -> None:
        if on_loading is not None:
            on_loading(loading)
        else:
            log.info("loading", extra={"fields": {"share": round(loading.share, 2), "doing": loading.doing}})

    loading = asyncio.ensure_future(workshop.load(tell))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return False
        loading.result()
    except AttemptError as error:
        raise StartError(error.message) from error.__cause__
    finally:
        loading.cancel()
        stopping.cancel()
    if on_loading is not None:
        on_loading(None)
    return True


async def _drain(
    server: grpc.aio.Server, service: GenerationService, health_service: health.aio.HealthServicer, workshop: Workshop
) -> None:
    """Take no new calls, and let those that run finish while there is time."""
    seconds = workshop.options.drain_seconds
    service.is_draining = True
    await health_service.enter_graceful_shutdown()
    if workshop.in_flight:
        log.info("stopping", extra={"fields": {"calls": workshop.in_flight, "drain_seconds": seconds}})
    stopping = asyncio.ensure_future(server.stop(seconds))
    emptied = asyncio.ensure_future(workshop.emptied())
    await asyncio.wait({stopping, emptied}, return_when=asyncio.FIRST_COMPLETED)
    if not emptied.done():
        emptied.cancel()
        log.warning("drain time is over; %d calls were cut", workshop.in_flight)
    # who only watches its health is not waited for
    await server.stop(min(seconds, LAST_WORDS_SECONDS))
    await stopping


class BoundedHealth(health.aio.HealthServicer):
    """The standard health service. Watching needs no token and lasts, so only so many may."""

    def __init__(self) -> None:
        super().__init__()
        self._watching = 0

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - gRPC's name
        """Tell how it is, now and whenever that changes."""
        if self._watching >= _WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_WATCHERS} watch already: use Check")
        self._watching += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watching -= 1


async def _say_health(health_service: health.aio.HealthServicer, status: int) -> None:
    for name in (health.OVERALL_HEALTH, SERVICE):
        await health_service.set(name, status)


def _listen(server: grpc.aio.Server, options: WorkerOptions) -> int:
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.port}"
    _check_free(options)
    try:
        if options.tls_cert is None or options.tls_key is None:
            return server.add_insecure_port(address)
        pair = (Path(options.tls_key).read_bytes(), Path(options.tls_cert).read_bytes())
        return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except OSError as error:
        raise StartError(f"{error.filename} cannot be read ({error.strerror or error})") from error
    except RuntimeError as error:
        if options.tls_cert is not None:
            raise StartError(f"{options.tls_cert} and {options.tls_key} are no certificate and its key") from error
        raise StartError(f"the worker cannot listen on {address}") from error


def _check_free(options: WorkerOptions) -> None:
    """Whether the port is free on every address of the host: gRPC is content with one of them."""
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StartError(f"the worker cannot listen on {options.host}: {error.strerror or error}") from error
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
        except OSError as error:
            if len(found) > 1 and error.errno in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
                continue  # a machine without IPv6
            raise StartError(
                f"the worker cannot listen on {options.host}:{options.port} ({error.strerror or error}): the port is taken, "
                "or the address is none of this machine; choose another with --host and --port"
            ) from error


def _warn_if_open(options: WorkerOptions) -> None:
    if options.token is None and options.host not in {"127.0.0.1", "::1", "localhost"}:
        log.warning(
            "anybody who reaches %s:%d may draw here: set IMG_SERVING_WORKER_TOKEN, or listen on 127.0.0.1",
            options.host,
            options.port,
        )


def _shown(host: str) -> str:
    return {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)


def _summary(workshop: Workshop) -> str:
    can, options = workshop.capabilities, workshop.options
    parts = [", ".join(sorted(can.operations)), f"batches of up to {can.max_batch_size}"]
    if options.slots > 1:
        parts.append(f"{options.slots} at the same time")
    if options.any_model:
        parts.append("under any model name")
    return "; ".join(parts)


class _Signals:
    """SIGTERM and Ctrl-C set `stop`; a second one ends the program at once, as if nobody listened."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._held: list[signal.Signals] = []

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._loop.add_signal_handler(number, self._heard)
            except (NotImplementedError, RuntimeError, ValueError):  # no main thread, or no signals here
                continue
            self._held.append(number)

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _heard(self) -> None:
        self._stop.set()
        self._let_go()

    def _let_go(self) -> None:
        for number in self._held:
            self._loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        self._held.clear()
