"""Clients that leave and come back: what a retry of the same request finds of the first try.

Popular client libraries give up and ask again by themselves, up to two times. So the work of one that has left goes on for a
moment, and its retry joins it instead of paying a second time. The same way identical requests can share one job while it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from img_serving.domain.errors import Cancelled, GatewayError
from img_serving.domain.jobs import Job
from img_serving.gateway.delivery import Answer

REMEMBER_SECONDS = 60.0
"""How long a failure is remembered that its client could not be told any more."""

MOST_FAILURES = 1000

Key = tuple[str, bytes]
"""A tenant's name and a request's fingerprint."""


class Shared:
    """One running request, and the clients that wait for it."""

    __slots__ = ("_cancel", "_future", "followers", "is_drawn", "is_kept", "key", "timer")

    def __init__(self, key: Key, cancel: Callable[[], object], *, is_kept: bool) -> None:
        self.key = key
        self.followers = 1
        self.is_drawn = False
        """Its pictures are there: it is not cancelled any more."""
        self.is_kept = is_kept
        self.timer: asyncio.TimerHandle | None = None
        self._cancel = cancel
        self._future: asyncio.Future[tuple[Answer, Job]] = asyncio.get_running_loop().create_future()

    @property
    def is_over(self) -> bool:
        """Whether its answer, or its failure, is known."""
        return self._future.done()

    async def answer(self) -> tuple[Answer, Job]:
        """Wait for what its runner gets.

        Raises:
            GatewayError: how it failed.
        """
        return await asyncio.shield(self._future)

    def resolve(self, answer: Answer, job: Job) -> None:
        """It has succeeded."""
        if not self._future.done():
            self._future.set_result((answer, job))

    def fail(self, error: GatewayError) -> None:
        """It has failed."""
        if not self._future.done():
            self._future.set_exception(error)
            self._future.exception()  # nobody may be waiting

    def stop(self) -> None:
        """Nobody wants it any more."""
        if not self.is_drawn:
            self._cancel()


class Returns:
    """What can be joined, and failures that wait for a retry to be told."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds that never go back."""
        self._clock = clock
        self._shared: dict[Key, Shared] = {}
        self._failures: dict[Key, tuple[GatewayError, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._shared or self._failures)

    def __repr__(self) -> str:
        return f"<Returns {len(self._shared)} to join, {len(self._failures)} failures to tell>"

    def share(self, key: Key, cancel: Callable[[], object], *, is_kept: bool = False) -> Shared:
        """From now on the same request joins this one. `cancel` stops it; one that `is_kept` goes on by itself."""
        shared = self._shared[key] = Shared(key, cancel, is_kept=is_kept)
        return shared

    def find(self, key: Key) -> Shared | None:
        """The same request, while it can be joined."""
        return self._shared.get(key)

    def join(self, shared: Shared) -> None:
        """One more client waits for it."""
        shared.followers += 1
        if shared.timer is not None:
            shared.timer.cancel()
            shared.timer = None

    def leave(self, shared: Shared, grace_seconds: float) -> None:
        """A client waits no more; the last one's job may be joined for `grace_seconds` longer."""
        shared.followers -= 1
        if shared.followers:
            return
        if grace_seconds > 0:
            shared.timer = asyncio.get_running_loop().call_later(grace_seconds, self._give_up, shared)
        else:
            self._give_up(shared)

    def over(self, shared: Shared) -> None:
        """It has ended. While a client may come back for it, it is kept."""
        if shared.timer is None:
            self._drop(shared)

    def remember(self, key: Key, error: GatewayError) -> None:
        """Tell `error` to the next who asks for the same, once."""
        now = self._clock()
        for old in [one for one, (_, until) in self._failures.items() if until <= now]:
            del self._failures[old]
        if len(self._failures) >= MOST_FAILURES:
            del self._failures[next(iter(self._failures))]
        self._failures[key] = error, now + REMEMBER_SECONDS

    def failure(self, key: Key) -> GatewayError | None:
        """The failure that this retry is to be told; asked once, it is forgotten."""
        error, until = self._failures.pop(key, (None, 0.0))
        return error if until > self._clock() else None

    def _give_up(self, shared: Shared) -> None:
        shared.timer = None
        if shared.is_kept and not shared.is_over:
            return  # whoever comes may join it for as long as it runs
        self._drop(shared)
        if not shared.is_over:
            shared.stop()
            if not shared.is_drawn:
                shared.fail(Cancelled("the client left"))

    def _drop(self, shared: Shared) -> None:
        if self._shared.get(shared.key) is shared:
            del self._shared[shared.key]
