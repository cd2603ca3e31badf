"""The dispatcher: runs the batches that the scheduler decides on, and resolves every job exactly once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from img_serving.domain.errors import (
    AllAttemptsFailed,
    AttemptError,
    BackendRefusal,
    Draining,
    GatewayError,
    Outcome,
)
from img_serving.domain.images import Call, Item, Progress
from img_serving.domain.jobs import CANCELLED, Batch, Ended, Job
from img_serving.gateway.tasks import TaskRegistry
from img_serving.policy.scheduler import Scheduler
from img_serving.ports import Backend
from img_serving.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

TICK_SECONDS = 0.1
"""How often time-outs and deadlines are looked at, while there is work: one timer for all instead of one a request."""


TIMER_SLACK_SECONDS = 0.005


class EndpointLookup(Protocol):
    """How the dispatcher finds what a batch needs beyond the scheduler's own state."""

    def adapter_of(self, endpoint_id: int) -> Backend:
        """The adapter that speaks to this endpoint."""
        ...

    def size_of(self, backend: str, model: str | None) -> tuple[int, int]:
        """The default size in pixels of a backend, or of a model there, for requests that name none."""
        ...

    def timeout_of(self, backend: str) -> float:
        """Seconds that one attempt may go without an answer or progress."""
        ...

    def batch_ended(self, batch: Batch) -> None:
        """A batch is over: a removed backend may be waiting for its last one."""
        ...


class AttemptJournal(Protocol):
    """Writes down what happens to durable jobs, so that a crash in the middle of a call is known of afterwards."""

    async def starting(self, batch: Batch) -> None:
        """The batch, which holds durable jobs, is about to be sent: on disk before this returns, where that matters.

        Raises:
            GatewayError: it could not be written down; then it is not sent.
        """
        ...

    def ended(self, batch: Batch, ended: Ended) -> None:
        """Its call is over."""
        ...

    async def filled(self, call: Call) -> Call:
        """The call with the bytes of those of its input pictures that wait on disk.

        Raises:
            GatewayError: one is not there any more.
        """
        ...


class _Attempt:
    """One running call, and why it was stopped, if it was."""

    __slots__ = ("adapter", "batch", "call", "ended", "stopped", "task", "timed_out")

    def __init__(self, batch: Batch, call: Call, adapter: Backend) -> None:
        self.batch = batch
        self.call = call
        self.adapter = adapter
        self.timed_out = False
        self.stopped = False
        # left standing when the task is cancelled, even before its first step: leaving by any door is right
        self.ended = CANCELLED
        self.task: asyncio.Task[None] | None = None


class Dispatcher:
    """Holds the scheduler and does its I/O. `clock` gives seconds that never go back."""

    def __init__(
        self,
        scheduler: Scheduler,
        endpoints: EndpointLookup,
        tasks: TaskRegistry,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.scheduler = scheduler
        self.journal: AttemptJournal | None = None
        self._endpoints = endpoints
        self._tasks = tasks
        self._metrics = metrics
        self._clock = clock
        self._waiting: dict[str, asyncio.Future[None] | None] = {}
        """Who waits for which job; None where the waiter runs the job's only attempt itself."""
        self._attempts: dict[Batch, _Attempt] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wake: asyncio.TimerHandle | None = None
        self._draining = False
        self._idle: asyncio.Future[None] | None = None

    @property
    def is_draining(self) -> bool:
        """Whether new jobs are refused because the gateway is stopping."""
        return self._draining

    def check(self, job: Job, others: int) -> None:
        """Whether a job would be taken now; `others` are tasks that were told so and have not been submitted yet.

        Raises:
            GatewayError: why it would not.
        """
        if self._draining:
            raise Draining("the gateway is stopping", retry_after_seconds=5.0)
        try:
            self.scheduler.check(job, others)
        except GatewayError as refusal:
            self._metrics.queue_refusals.add(refusal.code or "other")
            raise

    async def run(self, job: Job) -> None:
        """Submit a job and wait until it is resolved. A cancelled wait cancels the job, all the way to the endpoint.

        A durable job was checked before it was taken, and is not refused for want of room any more.

        Raises:
            GatewayError: how the job failed.
        """
        if self._draining:
            raise Draining("the gateway is stopping", retry_after_seconds=5.0)
        now = self._clock()
        batch = self.scheduler.start_at_once(job, now)
        if batch is not None:
            self._waiting[job.id] = None
            own: _Attempt | None = self._attempt(batch)
        else:
            try:
                self.scheduler.submit(job)
            except GatewayError as refusal:
                self._metrics.queue_refusals.add(refusal.code or "other")
                raise
            self._waiting[job.id] = None
            own = self._start(job)
        if own is not None:
            await self._run_here(own, job)
        if not job.is_over:
            future = self._waiting[job.id] = asyncio.get_running_loop().create_future()
            try:
                await future
            except asyncio.CancelledError:
                self.cancel(job)
                raise
        if job.error is not None:
            raise job.error

    def cancel(self, job: Job, error: GatewayError | None = None) -> None:
        """Resolve a job now; calls that only it wanted are closed."""
        unwanted = self.scheduler.cancel(job, self._clock(), error)
        self._settle(job)
        self._stop(unwanted)
        self.pump()

    def pump(self) -> None:
        """Start what can start."""
        self._start(None)

    def _start(self, caller: Job | None) -> _Attempt | None:
        """Start what can start, each in a task of its own.

        But for a batch that holds all of `caller`'s pictures and nobody else's: its attempt is returned, for the caller to run
        in its own task. So a request that does not have to wait costs no second task.
        """
        now = self._clock()
        own: _Attempt | None = None
        for batch in self.scheduler.next_batches(now):
            attempt = self._attempt(batch)
            tasks = batch.tasks
            if (
                caller is not None
                and tasks[0].job is caller
                and tasks[-1].job is caller
                and len(tasks) == len(caller.tasks)
            ):
                own = attempt
                continue
            self._spawn(attempt)
        if self.scheduler.queued:
            self._watch_the_clock()
            wakes_at = self.scheduler.wakes_at(now)
            if wakes_at is not None and wakes_at - now < TICK_SECONDS:
                self._wake_in(wakes_at - now)
        return own

    def _spawn(self, attempt: _Attempt) -> None:
        """Run an attempt in a task of its own."""
        attempt.task = self._tasks.spawn(self._run(attempt), "attempt")
        # a callback and not a `finally`: a task cancelled before its first step never enters its `try`
        attempt.task.add_done_callback(lambda _: self._finish(attempt))

    def _wake_in(self, seconds: float) -> None:
        """Look again before the next tick: a batch has lingered for long enough then."""
        if self._wake is None:
            self._wake = asyncio.get_running_loop().call_later(seconds, self._woken)

    def _woken(self) -> None:
        self._wake = None
        self.pump()

    def _attempt(self, batch: Batch) -> _Attempt:
        """What the call needs is looked up now: the backend may be removed before its first step."""
        attempt = _Attempt(batch, self._call(batch), self._endpoints.adapter_of(batch.endpoint_id))
        self._attempts[batch] = attempt
        if batch.watched:
            for task in batch.tasks:
                if task.job.watcher is not None:
                    task.job.watcher.started(attempt.call.width, attempt.call.height)
        self._watch_the_clock()
        return attempt

    def _watch_the_clock(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    async def _run_here(self, attempt: _Attempt, job: Job) -> None:
        """Run an attempt in the task of the only one who wants it."""
        attempt.task = asyncio.current_task()
        try:
            await self._run(attempt)
        except asyncio.CancelledError:
            # the waiter left: its job ends first, so that nobody tries it again
            attempt.task = None
            self.cancel(job)
            raise
        finally:
            attempt.task = None
            self._finish(attempt)

    async def drain(self, seconds: float) -> None:
        """Take no new jobs, let what runs finish for at most `seconds`, then answer the rest with 503."""
        self._draining = True
        for job in list(self.scheduler.jobs):
            if job.durable and job.started_at is None:
                # it goes on after the restart; what runs may finish
                self.cancel(job, Draining("the gateway is stopping", retry_after_seconds=5.0))
        if self._waiting:
            self._idle = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(seconds):
                    await self._idle
            except TimeoutError:
                log.warning("drain time is over; %d jobs are answered with 503", len(self._waiting))
            finally:
                self._idle = None
        self.abort()

    def abort(self) -> None:
        """Resolve every job with 503 at once and stop every call."""
        self._draining = True
        for job in list(self.scheduler.jobs):
            self.cancel(job, Draining("the gateway is stopping", retry_after_seconds=5.0))
        for timer in (self._timer, self._wake):
            if timer is not None:
                timer.cancel()
        self._timer = self._wake = None

    # one attempt

    async def _run(self, attempt: _Attempt) -> None:
        batch = attempt.batch
        call = attempt.call
        try:
            if batch.durable and self.journal is not None:
                try:
                    call = await self.journal.filled(call)
                    await self.journal.starting(batch)
                except GatewayError as error:
                    raise BackendRefusal(error) from error
            results = tuple(await attempt.adapter.generate(call, lambda step: self._on_progress(attempt, step)))
            if len(results) == len(batch.tasks):
                attempt.ended = Ended(results=results)
            else:
                message = f"{batch.backend} answered {len(results)} pictures for {len(batch.tasks)}"
                attempt.ended = Ended(outcome=Outcome.FAILED, message=message)
        except AttemptError as error:
            attempt.ended = Ended(
                outcome=error.outcome,
                message=f"{batch.backend}: {error.message}",
                busy_seconds=error.busy_seconds,
                is_blameless=error.is_blameless,
                timed_out=error.outcome is Outcome.UNKNOWN and self._is_overdue(attempt),
            )
        except BackendRefusal as refusal:
            attempt.ended = Ended(refusal=refusal.error)
        except asyncio.CancelledError:
            if attempt.timed_out:
                message = f"{batch.backend}: no answer within {attempt.call.timeout_seconds:g} s"
                attempt.ended = Ended(outcome=Outcome.UNKNOWN, message=message, timed_out=True)
            elif not attempt.stopped:
                raise
            # it was ours, and meant this call alone
            task = asyncio.current_task()
            if task is not None and task.uncancel() > 0:
                raise  # the waiter left at the same moment
        except Exception as error:
            log.exception("the adapter of %s broke", batch.backend)
            self._metrics.internal_errors.add("adapter")
            message = f"{batch.backend}: {type(error).__name__} in the adapter"
            attempt.ended = Ended(outcome=Outcome.FAILED, message=message)

    def _call(self, batch: Batch) -> Call:
        first = batch.tasks[0].job
        request = first.request
        if request.width is not None and request.height is not None:
            width, height = request.width, request.height
        else:
            # an edit keeps the shape of what it starts from
            width, height = self._endpoints.size_of(batch.backend, None if request.images else batch.model)
            if request.images:
                width, height = request.images[0].fitted(width * height)
        return Call(
            request=request,
            model=batch.model,
            width=width,
            height=height,
            items=tuple(
                [
                    Item(one.prompt, one.negative_prompt, task.seed, one.images, one.mask)
                    for task in batch.tasks
                    for one in (task.job.request,)
                ]
            ),
            # an engine draws a batch's pictures one after the other, more or less
            timeout_seconds=self._endpoints.timeout_of(batch.backend) * len(batch.tasks),
            request_id=first.request_id,
            traceparent=first.traceparent,
            previews=any(task.job.request.previews for task in batch.tasks),
        )

    def _is_overdue(self, attempt: _Attempt) -> bool:
        """Whether it has been silent for as long as it may. An adapter's own timer may ring a moment before ours."""
        return self._clock() - attempt.batch.heard_at >= attempt.call.timeout_seconds - TIMER_SLACK_SECONDS

    def _on_progress(self, attempt: _Attempt, progress: Progress) -> None:
        self.scheduler.heard_of(attempt.batch, self._clock())
        preview = progress.preview
        for index, task in enumerate(attempt.batch.tasks):
            job = task.job
            job.steps_done = progress.done
            job.steps_total = progress.total
            if job.watcher is not None:
                own = preview if preview is not None and preview.index == index else None
                share = progress.done / progress.total if progress.total else 0.0
                job.watcher.progressed(task.index, share, own)

    def _finish(self, attempt: _Attempt) -> None:
        batch, ended = attempt.batch, attempt.ended
        now = self._clock()
        del self._attempts[batch]
        self._metrics.stage_seconds.observe(now - batch.started_at, "attempt")
        self._metrics.attempts.add(batch.backend, _name_of(ended))
        if ended.results is not None:
            self._metrics.batch_sizes.add(batch.backend, str(len(batch.tasks)), by=len(batch.tasks))
        if ended.outcome is not None:
            log.info(
                "attempt %s: %s",
                ended.outcome.value,
                ended.message,
                extra={"fields": {"backend": batch.backend, "request_id": batch.tasks[0].job.request_id}},
            )
        try:
            resolved = self.scheduler.finish(batch, ended, now)
        except Exception:
            # whatever is wrong there, nobody must wait for ever for a call that is over
            log.exception("the scheduler broke on the end of a call to %s", batch.backend)
            self._metrics.internal_errors.add("scheduler")
            error = AllAttemptsFailed("an internal error in the gateway; its log has it", should_retry=False)
            resolved = [task.job for task in batch.tasks]
            for job in resolved:
                self.scheduler.cancel(job, now, error)
        if batch.watched:
            for task in batch.tasks:
                if task.job.watcher is not None and task.artifact is not None:
                    task.job.watcher.drawn(task.index, task.artifact)
        if batch.durable and self.journal is not None:
            self.journal.ended(batch, ended)
        for job in resolved:
            self._settle(job)
        self._stop(self.scheduler.unwanted())
        self._endpoints.batch_ended(batch)
        if self.scheduler.queued:
            self.pump()

    # time

    def _tick(self) -> None:
        self._timer = None
        now = self._clock()
        for attempt in self._attempts.values():
            if attempt.task is not None and not (attempt.timed_out or attempt.stopped) and self._is_overdue(attempt):
                attempt.timed_out = True
                attempt.task.cancel()
        for job in self.scheduler.expire(now):
            self._settle(job)
        self._stop(self.scheduler.unwanted())
        for batch in self.scheduler.look_after(now):
            self._metrics.hedges.add(batch.backend)
            self._spawn(self._attempt(batch))
        self.pump()
        if self._attempts:
            self._watch_the_clock()

    # ends

    def settle_all(self, jobs: list[Job]) -> None:
        """Jobs that were resolved by somebody else's doing (a backend was removed)."""
        for job in jobs:
            self._settle(job)
        self._stop(self.scheduler.unwanted())
        self.pump()

    def _stop(self, batches: list[Batch]) -> None:
        for batch in batches:
            attempt = self._attempts.get(batch)
            # one that has timed out is being cancelled already: a second time would look as if its waiter had left
            if attempt is not None and attempt.task is not None and not (attempt.stopped or attempt.timed_out):
                attempt.stopped = True
                attempt.task.cancel()

    def _settle(self, job: Job) -> None:
        """Wake whoever waits for a resolved job; asking twice is fine."""
        if job.id not in self._waiting:
            return
        future = self._waiting.pop(job.id)
        if job.error is not None:
            for task in job.tasks:
                task.artifact = None  # jobs and tasks hold each other: not with pictures that nobody gets
        self._metrics.jobs.add(job.status)
        self._metrics.stage_seconds.observe(job.queued_seconds, "queue")
        if future is not None and not future.done():
            future.set_result(None)
        if not self._waiting and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


def _name_of(ended: Ended) -> str:
    if ended.results is not None:
        return "ok"
    if ended.refusal is not None:
        return "refused"
    return ended.outcome.value if ended.outcome is not None else "cancelled"
