"""The server: uvicorn's, with our socket, our signals and our order of stopping."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import uvicorn

from img_serving.api.http_protocol import Application, HttpProtocol, close_stalled
from img_serving.domain.errors import StartError
from img_serving.telemetry.service_manager import ServiceManager

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
"""Longer than the usual minute of load balancers and clients: the side that keeps for shorter should be theirs."""


class Stoppable(Protocol):
    """What the server stops with."""

    async def drain(self, seconds: float) -> None:
        """Take no new work, let what runs finish, answer the rest with 503."""
        ...

    def abort(self) -> None:
        """Answer everything with 503 at once."""
        ...


class Server(uvicorn.Server):
    """uvicorn's server with our order of stopping: no new connections, drain, then close."""

    def __init__(
        self,
        application: Application,
        stoppable: Stoppable,
        drain_seconds: float,
        manager: ServiceManager | None = None,
    ) -> None:
        """`drain_seconds` is what running work has after the first signal. `manager` hears when we listen and when we stop."""
        super().__init__(
            uvicorn.Config(
                application,  # type: ignore[arg-type] # our protocol calls `serve`, not ASGI
                http=HttpProtocol,
                loop="none",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=2,
                proxy_headers=False,
            )
        )
        self._stoppable = stoppable
        self._drain_seconds = drain_seconds
        self._manager = manager if manager is not None else ServiceManager({})
        self._stop_now = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop in order; a second one stops at once. The exit code stays 0."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {sig: signal.signal(sig, self.handle_exit) for sig in signals}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the handler's shape
        """First signal: stop in order. Second: at once."""
        if self.should_exit:
            self.force_exit = True
            asyncio.get_running_loop().call_soon_threadsafe(self._stop_now.set)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and say so."""
        await super().startup(sockets)
        addresses = (one.getsockname()[:2] for one in sockets or [])
        self._manager.ready("listens on " + ", ".join(f"{host} port {port}" for host, port in addresses))

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn calls this ten times a second; once a second stalled connections are looked for."""
        now = asyncio.get_running_loop().time()
        self._manager.beat(now)
        if counter % 10 == 0:
            close_stalled(list(self.server_state.connections), now, self.config.timeout_keep_alive)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let what runs finish or answer it with 503, then close connections."""
        self._manager.stopping()
        for server in self.servers:
            server.close()
        for one in sockets or []:
            one.close()
        log.info("stopping: no new connections; work in flight has %g s", self._drain_seconds)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._drain_seconds
        drain = asyncio.ensure_future(self._stoppable.drain(self._drain_seconds))
        stop = asyncio.ensure_future(self._stop_now.wait())
        await asyncio.wait({drain, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not drain.done():
            drain.cancel()
            self._stoppable.abort()
        await asyncio.wait({drain, stop})
        # the jobs are over; their pictures may still be encoded, stored or on the way to a slow client
        left = set(self.server_state.tasks)
        if left and not self.force_exit:
            await asyncio.wait(left, timeout=max(2.0, until - loop.time()))
        await super().shutdown(sockets=None)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        StartError: the address is taken, or not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(8192)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartError(
            f"cannot listen on {host}:{port}: {reason}. Choose another with --port, or server.port in the configuration"
        ) from error
    listener.setblocking(False)
    return listener
