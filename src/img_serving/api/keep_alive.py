"""Keeping a waiting reply open: after a while its head goes out, and now and then a blank, until the JSON is there.

Proxies cut a connection on which nothing moves for a minute, and Node's fetch one that has no head after five. White space may
stand before JSON (RFC 8259, section 2). The price: the status is 200 by then, so a failure can only cut the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from img_serving.api.exchange import ClientDisconnected, Exchange, Headers
from img_serving.gateway.tasks import TaskRegistry
from img_serving.telemetry.metrics import Metrics

BLANK_SECONDS = 15.0
"""Between two blanks: well below the shortest silence that common proxies allow."""


class Trickle:
    """The blanks of one reply."""

    __slots__ = ("_is_out", "_keep_alive", "_owner", "task")

    def __init__(self, keep_alive: KeepAlive, exchange: Exchange) -> None:
        self._keep_alive = keep_alive
        self._owner = exchange
        self._is_out = False
        self.task: asyncio.Task[None] | None = None

    @property
    def is_out(self) -> bool:
        """Whether the head is out."""
        return self._is_out

    async def stop(self) -> bool:
        """No more of it before the rest of the reply; whether the head is out."""
        task = self.task
        self.end()
        if task is not None and not task.done():
            await asyncio.wait({task})
        return self._is_out

    def end(self) -> None:
        """No more of it: the exchange is over. Asking twice is fine."""
        self._keep_alive.forget(self)
        task, self.task = self.task, None
        if task is not None:
            task.cancel()

    async def run(self, headers: Headers) -> None:
        """Send the head, then blanks for as long as the client is there."""
        connection = self._owner.connection
        self._is_out = True
        self._owner.reply_started = True
        try:
            await connection.begin(200, [*headers, (b"content-type", b"application/json")])
            while True:
                await connection.write(b" ")
                await asyncio.sleep(BLANK_SECONDS)
        except ClientDisconnected:
            return

    @property
    def exchange(self) -> Exchange:
        """Whose reply it is."""
        return self._owner


class KeepAlive:
    """Every reply that waits, in the order in which they will have waited for too long: one timer for all of them."""

    def __init__(
        self, after_seconds: float, tasks: TaskRegistry, metrics: Metrics, head_of: Callable[[Exchange], Headers]
    ) -> None:
        """`after_seconds` 0 is off. `head_of` gives the headers that go out with every reply to an exchange."""
        self._after_seconds = after_seconds
        self._tasks = tasks
        self._metrics = metrics
        self._head_of = head_of
        self._waiting: dict[Trickle, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def watch(self, exchange: Exchange) -> None:
        """From now on its reply is waited for."""
        if self._after_seconds <= 0:
            return
        loop = asyncio.get_running_loop()
        trickle = exchange.trickle = Trickle(self, exchange)
        self._waiting[trickle] = loop.time() + self._after_seconds
        if self._timer is None:
            self._timer = loop.call_later(self._after_seconds, self._look)

    def forget(self, trickle: Trickle) -> None:
        """Its reply is there, or nobody waits for it any more."""
        self._waiting.pop(trickle, None)

    def close(self) -> None:
        """No more of it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._waiting:
            trickle, due = next(iter(self._waiting.items()))
            if due > now:
                self._timer = loop.call_later(due - now, self._look)
                return
            del self._waiting[trickle]
            exchange = trickle.exchange
            if not (exchange.reply_started or exchange.disconnected):
                self._metrics.kept_open.add()
                trickle.task = self._tasks.spawn(trickle.run(self._head_of(exchange)), "keeping a reply open")
