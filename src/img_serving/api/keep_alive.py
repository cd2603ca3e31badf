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
"""Between two blanks at most: well below the shortest silence that common proxies allow."""


def pause_seconds(after_seconds: float) -> float:
    """Between two signs of life: whoever has the head go out early has a proxy that waits for no longer than that."""
    return min(BLANK_SECONDS, after_seconds) if after_seconds > 0 else BLANK_SECONDS


class Trickle:
    """The head and the blanks of one reply (see `exchange.Trickle`). `is_out`: the head was sent."""

    __slots__ = ("_blank_seconds", "_exchange", "_task", "is_out")

    def __init__(self, exchange: Exchange, headers: Headers, tasks: TaskRegistry, blank_seconds: float) -> None:
        self._exchange = exchange
        self._blank_seconds = blank_seconds
        self.is_out = False
        self._task: asyncio.Task[None] | None = tasks.spawn(self._run(headers), "keeping a reply open")

    async def stop(self) -> None:
        """No more of it before the rest of the reply. One that has not begun yet never does."""
        task = self._task
        self.end()
        if task is not None and not task.done():
            await asyncio.wait({task})

    def end(self) -> None:
        """No more of it: the exchange is over. Asking twice is fine."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    async def _run(self, headers: Headers) -> None:
        """Send the head, then blanks for as long as the client is there."""
        connection = self._exchange.connection
        self.is_out = self._exchange.reply_started = True
        try:
            await connection.begin(200, [*headers, (b"content-type", b"application/json")])
            while True:
                await connection.write(b" ")
                await asyncio.sleep(self._blank_seconds)
        except ClientDisconnected:
            return


class KeepAlive:
    """Every reply that waits, in the order in which they will have waited for too long: one timer for all of them."""

    def __init__(
        self,
        after_seconds: float,
        tasks: TaskRegistry,
        metrics: Metrics,
        clock: Callable[[], float],
        head_of: Callable[[Exchange], Headers],
    ) -> None:
        """`after_seconds` 0 is off. `head_of` gives the headers that go out with every reply to an exchange."""
        self._after_seconds = after_seconds
        self._tasks = tasks
        self._metrics = metrics
        self._clock = clock
        self._head_of = head_of
        self._waiting: dict[Exchange, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def watch(self, exchange: Exchange) -> None:
        """From now on its reply is waited for, until `forget`."""
        after = self._after_seconds
        if after <= 0:
            return
        self._waiting[exchange] = self._clock() + after
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(after, self._look)

    def forget(self, exchange: Exchange) -> None:
        """Its reply is there, or nobody waits for it any more."""
        self._waiting.pop(exchange, None)

    def _look(self) -> None:
        self._timer = None
        now = self._clock()
        while self._waiting:
            exchange, due = next(iter(self._waiting.items()))
            if due > now:
                self._timer = asyncio.get_running_loop().call_later(due - now, self._look)
                return
            del self._waiting[exchange]
            if not exchange.disconnected:
                self._metrics.kept_open.add()
                exchange.trickle = Trickle(
                    exchange, self._head_of(exchange), self._tasks, pause_seconds(self._after_seconds)
                )
