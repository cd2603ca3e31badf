"""The connections to one origin: which may be used again, and each one's exchange of a request for a reply."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from img_serving.domain.errors import Outcome
from img_serving.ports import UpstreamReply
from img_serving.transport.reply import SCRATCH_BYTES, BadReply, ReplyReader

_JOIN_LIMIT_BYTES = 64 * 1024
_CLOSE_SECONDS = 5.0
_QUIET_SECONDS = 1.0
_TIMER_SLACK_SECONDS = 0.002  # uvloop's clock and timers count whole milliseconds


@dataclass(frozen=True, slots=True)
class TransportStatistics:
    """A picture of a transport's connections: open now, idle among them, and opened since the start."""

    open_connections: int
    idle_connections: int
    connections_opened: int


@dataclass(frozen=True, slots=True)
class Broken:
    """How an exchange ended without a reply. `unanswered`: the peer closed before the first byte of one."""

    outcome: Outcome
    reason: str
    unanswered: bool = False


class ConnectionPool:
    """All open connections, and those of them that are idle, the newest last. Decides only; does no I/O but closing."""

    def __init__(self, *, keepalive_seconds: float, max_idle: int) -> None:
        """Connections are kept idle for at most `keepalive_seconds`, and at most `max_idle` of them."""
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._keepalive_seconds = keepalive_seconds
        self._max_idle = max_idle
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._connections_opened = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._open)} open, {len(self._idle)} idle"
        return f"<ConnectionPool {state}>"

    @property
    def is_closed(self) -> bool:
        """Has `close` been called?"""
        return self._closed

    @property
    def statistics(self) -> TransportStatistics:
        """How many connections there are now."""
        return TransportStatistics(len(self._open), len(self._idle), self._connections_opened)

    def take(self, now: float) -> Connection | None:
        """The newest idle connection that may be used; those met on the way that may not are closed."""
        while self._idle:
            connection = self._idle.pop()
            connection.idle = False
            if connection.is_usable(now):
                return connection
            connection.drop()
        return None

    async def close(self) -> None:
        """Close all; exchanges in flight end `UNKNOWN`. Returns when the sockets are closed."""
        self._closed = True
        for connection in tuple(self._open):
            connection.give_up(Outcome.UNKNOWN, "the connection was closed: shutting down")
        # bounded: a socket that does not close must not keep the whole gateway from stopping
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._empty.wait()

    # What connections tell.

    def opened(self, connection: Connection) -> None:
        """There is one more."""
        self._open.add(connection)
        self._connections_opened += 1
        self._empty.clear()

    def offer(self, connection: Connection, server_limit_seconds: float | None) -> float:
        """Keep a connection that has become free; returns for how many seconds, 0.0 for not at all."""
        if self._closed or len(self._idle) >= self._max_idle:
            return 0.0
        limit = self._keepalive_seconds
        if server_limit_seconds is not None and server_limit_seconds < limit:
            limit = server_limit_seconds
        if limit <= 0:
            return 0.0
        self._idle.append(connection)
        connection.idle = True
        return limit

    def withdraw(self, connection: Connection) -> None:
        """It is no longer for use, if it was."""
        if connection.idle:
            connection.idle = False
            self._idle.remove(connection)

    def ended(self, connection: Connection) -> None:
        """Its socket is being closed."""
        self._open.discard(connection)
        if not self._open:
            self._empty.set()


class Connection(asyncio.BufferedProtocol):
    """One connection: sends a request, reads its reply, and goes back to the pool if it is clean.

    One lazy timer serves both the deadline of an exchange and the end of idleness: it is never armed later than the next
    thing due, and when it fires early it is armed again. A steady stream of requests so costs next to no timers.
    """

    __slots__ = (
        "_due",
        "_loop",
        "_pool",
        "_reader",
        "_timer",
        "_timer_at",
        "_transport",
        "_waiter",
        "free_since",
        "idle",
    )

    def __init__(self, pool: ConnectionPool, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._reader = ReplyReader(pool.scratch)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[UpstreamReply | Broken] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._due = 0.0
        self.free_since = 0.0
        self.idle = False

    # What the pool and a request ask of it.

    def is_usable(self, now: float) -> bool:
        """Can a request be sent? One that was quiet for a while is polled: the peer's close may not be read yet."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        if not self.free_since:
            return True
        if now >= self._due:
            return False
        return now - self.free_since < _QUIET_SECONDS or not _has_something_to_read(transport)

    def send(
        self,
        head: bytes,
        body: bytes | None,
        deadline: float,
        *,
        head_only: bool,
        limit_bytes: int,
        on_event_bytes: Callable[[bytes], None] | None = None,
    ) -> asyncio.Future[UpstreamReply | Broken]:
        """Begin an exchange. What breaks it is the future's *result*: an exception that nobody fetches would be noise."""
        transport = self._transport
        assert transport is not None  # noqa: S101 - the pool asked is_usable
        self._reader.begin(head_only=head_only, limit_bytes=limit_bytes, on_event_bytes=on_event_bytes)
        self._waiter = waiter = self._loop.create_future()
        self._watch(deadline)
        if not body:
            transport.write(head)
        elif len(body) <= _JOIN_LIMIT_BYTES:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        return waiter

    def leave(self, waiter: asyncio.Future[UpstreamReply | Broken]) -> None:
        """Whoever waited is gone: close if the exchange still runs (it was cancelled). It may serve another by now."""
        if self._waiter is waiter:
            self._waiter = None
            self.drop()

    def give_up(self, outcome: Outcome, reason: str, *, unanswered: bool = False) -> None:
        """End the exchange, if there is one, with an error, and close."""
        waiter, self._waiter = self._waiter, None
        self.drop()
        if waiter is not None and not waiter.done():
            waiter.set_result(Broken(outcome, reason, unanswered))

    def drop(self) -> None:
        """Close at once: nothing that is still buffered is worth sending."""
        self._pool.withdraw(self)
        if self._transport is not None:
            self._transport.abort()

    # What the event loop tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """There is a connection (for TLS: after the handshake)."""
        self._transport = transport  # type: ignore[assignment] # TCP and TLS give full transports
        self._pool.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the loop knows less than the reader
        """Where the next bytes go."""
        return self._reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        if self._waiter is None:
            self.drop()  # unasked: a late 408, or a second reply to something
            return
        try:
            if self._reader.received(nbytes):
                self._finish()
        except BadReply as error:
            self.give_up(Outcome.FAILED, str(error))

    def eof_received(self) -> None:
        """The peer sends no more; an idle connection leaves the pool at once."""
        if self._waiter is None:
            self.drop()
        else:
            self._cut(clean=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed, by whomever; a reset is no proper end of a body."""
        if self._waiter is not None:
            self._cut(clean=exc is None)
        self._transport = None
        self._reader.forget()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pool.withdraw(self)
        self._pool.ended(self)

    def _finish(self) -> None:
        reply = self._reader.reply()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(reply)
        transport = self._transport
        # A reply that came before the whole request was sent leaves the rest of it on the way.
        if self._reader.reusable and transport is not None and not transport.get_write_buffer_size():
            seconds = self._pool.offer(self, self._reader.idle_limit_seconds())
            if seconds:
                self.free_since = self._loop.time()
                self._watch(self.free_since + seconds)
                return
        self.drop()

    def _cut(self, *, clean: bool) -> None:
        """The peer has closed: the end of a body that lasts until then, or too early."""
        try:
            if clean and self._reader.ended():
                self._finish()
                return
        except BadReply as error:
            self.give_up(Outcome.FAILED, str(error))
            return
        if self._reader.started:
            self.give_up(Outcome.UNKNOWN, "the reply was cut short")
        else:
            self.give_up(Outcome.UNKNOWN, "the connection was closed without a reply", unanswered=True)

    def _watch(self, due: float) -> None:
        self._due = due
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._due - self._loop.time() > _TIMER_SLACK_SECONDS:
            self._watch(self._due)
        else:
            what = "the reply was not complete in time" if self._reader.started else "no reply in time"
            self.give_up(Outcome.UNKNOWN, what)


def _has_something_to_read(transport: asyncio.Transport) -> bool:
    """Has an idle connection's peer closed it, or spoken unasked, since the loop looked last? One system call."""
    handle = transport.get_extra_info("socket")
    if handle is None or not hasattr(select, "poll"):
        return False
    poller = select.poll()
    poller.register(handle.fileno(), select.POLLIN)
    return bool(poller.poll(0))
