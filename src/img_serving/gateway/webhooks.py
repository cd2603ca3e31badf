"""Webhooks on their way: makes the event of a job that ended, and calls its receiver until it is taken or its time is over.

The outbox in the state store is the truth: what is there and due is sent, and how that ended is noted after the call. So an
event is sent at least once, also by the process that comes after a crash; its id tells a receiver what it has seen before.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Final

from img_serving import __version__
from img_serving.domain.errors import GatewayError, NotFound
from img_serving.policy.webhooks import Answer, heeded_retry_after, meaning_of, next_try_at, signed_headers
from img_serving.ports import StoredWebhook, WebhookPoster, WebhookState, WebhookStore
from img_serving.telemetry.logs import timestamp
from img_serving.telemetry.metrics import Metrics
from img_serving.transport.safe_connection import ExchangeFailed

log = logging.getLogger(__name__)

TIMEOUT_SECONDS: Final = 15.0
"""How long a receiver may take to answer."""

MAX_AT_ONCE: Final = 8
"""Calls in flight: that many events are in memory."""

MAX_AT_ONCE_PER_HOST: Final = 2
"""A receiver that hangs holds no more of them than this."""

KEPT_SECONDS: Final = 24 * 3600.0
"""How long an event is remembered after its last call could have been, for those who look or want it again."""

POLL_SECONDS: Final = 60.0
"""The outbox is looked at so often even if nobody says that there is something: clocks are set, files are shared."""

STORE_PAUSE_SECONDS: Final = 5.0
"""Before a store that failed is asked again."""

SWEEP_SECONDS: Final = 3600.0


def event_for(record: bytes, *, job_id: str, tenant: str, status: str, url: str, ended_at: float) -> StoredWebhook:
    """The event of a job that ended: due at once, and the same whenever it is made of the same job.

    Args:
        record: the job as JSON, which goes into the payload as it is.
        job_id: together with the status it gives the event its id.
        tenant: whose job it is.
        status: how it ended: `succeeded`, `failed`, `cancelled` or `expired`.
        url: the receiver.
        ended_at: Unix seconds.
    """
    kind = f"job.{status}"
    head = f'{{"type":"{kind}","timestamp":"{timestamp(ended_at)}","data":'.encode()
    return StoredWebhook(
        event_id="evt_" + hashlib.sha256(f"{job_id}:{status}".encode()).hexdigest()[:24],
        job_id=job_id,
        tenant=tenant,
        url=url,
        type=kind,
        created_at=ended_at,
        payload=b"".join((head, record, b"}")),
        queued_at=ended_at,
        next_at=ended_at,
    )


class WebhookDeliverer:
    """Sends what is due in the outbox. `run` is a task of the gateway's; `wake` says that there may be something new."""

    def __init__(
        self,
        store: WebhookStore,
        poster: WebhookPoster,
        secrets: Sequence[bytes],
        *,
        clock_unix: Callable[[], float],
        rng: Random,
        metrics: Metrics,
        max_age_seconds: float = 24 * 3600.0,
    ) -> None:
        """`secrets` sign every call, each of them; an event is tried for `max_age_seconds` after it was queued."""
        self._store = store
        self._poster = poster
        self._secrets = tuple(secrets)
        self._clock_unix = clock_unix
        self._rng = rng
        self._metrics = metrics
        self._max_age_seconds = max_age_seconds
        self._woken = asyncio.Event()
        self._ended = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._is_closing = False
        self._store_failed = False
        self._in_flight: set[str] = set()
        self._wanted_again: set[str] = set()
        self._busy: Counter[str] = Counter()
        self._swept_at = float("-inf")

    def __repr__(self) -> str:
        return f"<WebhookDeliverer {len(self._in_flight)} of {MAX_AT_ONCE} calls in flight>"

    async def run(self) -> None:
        """Deliver until `close`, or until cancelled: calls in flight are cut then, and made again by whoever runs next."""
        self._runner = asyncio.current_task()
        try:
            async with asyncio.TaskGroup() as calls:
                while not self._is_closing:
                    self._woken.clear()
                    pause = await self._start_due(calls)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await self._woken.wait()
        finally:
            self._ended.set()

    def wake(self) -> None:
        """Look at the outbox now: a job ended."""
        self._woken.set()

    async def find(
        self, *, job_id: str | None = None, state: WebhookState | None = None, limit: int, after: str | None = None
    ) -> list[StoredWebhook]:
        """Events, newest first: see `WebhookStore.find_webhooks`.

        Raises:
            NotFound: there is no event `after`.
        """
        if after is not None:
            await self.get(after)
        return await self._store.find_webhooks(job_id=job_id, state=state, limit=limit, after=after)

    async def get(self, event_id: str) -> StoredWebhook:
        """One event.

        Raises:
            NotFound: there is none of that id, or it is forgotten.
        """
        found = await self._store.find_webhooks(event_id=event_id, limit=1)
        if not found:
            raise NotFound(f"there is no webhook event {event_id[:100]}", code="webhook_not_found")
        return found[0]

    async def redeliver(self, event_id: str) -> StoredWebhook:
        """Send an event again from now on, whatever became of it: the same id, the same body, the whole schedule.

        One that is on its way this very moment counts as sent again if it arrives.

        Raises:
            NotFound: there is none of that id, or it is forgotten.
        """
        if event_id in self._in_flight:
            self._wanted_again.add(event_id)
        else:
            await self._store.requeue_webhook(event_id, self._clock_unix())
        found = await self.get(event_id)
        self.wake()
        return found

    async def close(self, timeout_seconds: float = 2.0) -> None:
        """Start no more calls, give those in flight so long to end, and cut the rest."""
        self._is_closing = True
        self.wake()
        if self._runner is None:
            return
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._ended.wait()
        except TimeoutError:
            self._runner.cancel()
            await self._ended.wait()

    async def _start_due(self, calls: asyncio.TaskGroup) -> float:
        """Begin the calls that are due and that there is room for; returns for how many seconds nothing else will be."""
        now = self._clock_unix()
        try:
            await self._fill(calls, now)
            await self._sweep(now)
            following = await self._store.next_webhook_at(now)
        except GatewayError as error:
            self._store_is_failing(error)
            return STORE_PAUSE_SECONDS
        self._store_failed = False
        # what is due and has no room begins when a call ends, which wakes us
        return POLL_SECONDS if following is None else min(POLL_SECONDS, max(0.0, following - self._clock_unix()))

    async def _fill(self, calls: asyncio.TaskGroup, now: float) -> None:
        while (free := MAX_AT_ONCE - len(self._in_flight)) > 0 and not self._is_closing:
            busy = [host for host, count in self._busy.items() if count >= MAX_AT_ONCE_PER_HOST]
            due = await self._store.due_webhooks(now, free, except_events=tuple(self._in_flight), except_hosts=busy)
            if not due:
                return
            for webhook in due:
                if self._busy[webhook.host] < MAX_AT_ONCE_PER_HOST:
                    self._in_flight.add(webhook.event_id)
                    self._busy[webhook.host] += 1
                    calls.create_task(self._call(webhook), name=f"webhook {webhook.event_id}")

    async def _call(self, webhook: StoredWebhook) -> None:
        """One call and its end."""
        try:
            answer, error, retry_after = await self._post(webhook)
            await self._note(webhook, answer, error, retry_after)
        finally:
            self._in_flight.discard(webhook.event_id)
            self._wanted_again.discard(webhook.event_id)
            self._busy[webhook.host] -= 1
            if not self._busy[webhook.host]:
                del self._busy[webhook.host]
            self.wake()

    async def _post(self, webhook: StoredWebhook) -> tuple[Answer, str, float]:
        """What the receiver made of it, what was wrong ("" if nothing), and how long it asks to be left alone."""
        sent_at = int(self._clock_unix())
        headers = [
            ("content-type", "application/json"),
            ("user-agent", f"img-serving/{__version__}"),
            *signed_headers(self._secrets, webhook.event_id, sent_at, webhook.payload),
        ]
        try:
            reply = await self._poster(webhook.url, headers, webhook.payload, TIMEOUT_SECONDS)
        except ExchangeFailed as failure:
            return "again", failure.message, 0.0
        except Exception as error:
            # one bad event must not end the others' task group, nor be tried without a pause
            log.exception("unexpected error", extra={"fields": {"event_id": webhook.event_id}})
            self._metrics.internal_errors.add("webhooks")
            return "again", f"an internal error ({type(error).__name__})", 0.0
        answer = meaning_of(reply.status)
        wrong = "" if answer == "delivered" else f"the receiver answered HTTP {reply.status}"
        return answer, wrong, heeded_retry_after(reply.status, reply.retry_after_seconds)

    async def _note(self, webhook: StoredWebhook, answer: Answer, wrong: str, retry_after: float) -> None:
        """Keep what became of the call, count it, and tell of an event that is given up."""
        now = self._clock_unix()
        attempts = webhook.attempts + 1
        next_at = None
        if answer == "again":
            next_at = next_try_at(
                attempts,
                webhook.queued_at,
                now,
                max_age_seconds=self._max_age_seconds,
                rng=self._rng,
                at_least_seconds=retry_after,
            )
        is_delivered = answer == "delivered"
        await self._surely(
            lambda: self._store.record_webhook(
                webhook.event_id,
                attempts=attempts,
                next_at=next_at,
                delivered_at=now if is_delivered else None,
                last_error=wrong,
            )
        )
        if webhook.event_id in self._wanted_again and not is_delivered:
            await self._surely(lambda: self._store.requeue_webhook(webhook.event_id, now))
        elif not is_delivered and next_at is None:
            self._tell_of_the_end(webhook, attempts, wrong)
        self._metrics.webhooks.add("delivered" if is_delivered else "failed")

    def _tell_of_the_end(self, webhook: StoredWebhook, attempts: int, wrong: str) -> None:
        self._metrics.webhooks.add("given_up")
        fields = {
            "event_id": webhook.event_id,
            "job_id": webhook.job_id,
            "tenant": webhook.tenant,
            "host": webhook.host,
            "attempts": attempts,
            "reason": wrong,
        }
        log.warning("a webhook is given up", extra={"fields": fields})

    async def _surely(self, write: Callable[[], Awaitable[object]]) -> None:
        """Write into the store, again and again if it must be: a call that was not noted would be made again at once."""
        while True:
            try:
                await write()
            except GatewayError as error:
                self._store_is_failing(error)
                await asyncio.sleep(STORE_PAUSE_SECONDS)
            else:
                return

    async def _sweep(self, now: float) -> None:
        if now - self._swept_at < SWEEP_SECONDS:
            return
        if not await self._store.sweep_webhooks(now - self._max_age_seconds - KEPT_SECONDS):
            self._swept_at = now  # only then: one call forgets a bounded number
        else:
            self.wake()

    def _store_is_failing(self, error: GatewayError) -> None:
        if not self._store_failed:
            log.warning("the outbox of webhooks cannot be used, they wait: %s", error.message)
        self._store_failed = True
