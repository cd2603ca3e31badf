"""The owner of every background task: strong references, no lost exception, and an end at stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")

OnError = Callable[[str, BaseException], None]
"""(name of the task, what it raised): called for every exception that nobody expected."""


class TaskRegistry:
    """Holds tasks until they are done. The event loop itself keeps only weak references: a task without an owner can vanish."""

    def __init__(self, on_error: OnError) -> None:
        """`on_error` hears of every task that ended with an exception; a cancellation is none."""
        self._on_error = on_error
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coro: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
        """Run `coro` as a task of this registry, in the running loop."""
        try:
            task = asyncio.get_running_loop().create_task(coro, name=name)
        except BaseException:
            coro.close()
            raise
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def cancel_all(self, timeout_seconds: float) -> tuple[str, ...]:
        """Cancel every task, also those that start meanwhile, and wait for them; returns the names of those still running.

        Each is cancelled once, so that its cleaning up is not interrupted. A task that calls this is spared.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_seconds
        told: set[asyncio.Task[Any]] = set()
        if (caller := asyncio.current_task()) is not None:
            told.add(caller)
        while left := self._tasks - {caller}:
            for task in left - told:
                task.cancel()
            told |= left
            # one at a time, so that what a task starts on its way out is seen while the others still clean up
            ended, _ = await asyncio.wait(left, timeout=max(0.0, until - loop.time()), return_when="FIRST_COMPLETED")
            if not ended:
                break
        return tuple(sorted(task.get_name() for task in self._tasks - {caller}))

    def names(self) -> tuple[str, ...]:
        """The names of the tasks that are not done, sorted."""
        return tuple(sorted(task.get_name() for task in self._tasks))

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"<TaskRegistry {', '.join(self.names()) or 'empty'}>"

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(task.get_name(), error)
