"""Webhooks on their way: every event arrives at least once, in its time, and no receiver holds up another."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from itertools import pairwise
from random import Random
from typing import Any

import msgspec
import pytest
from tests.support.virtual_time import run_virtual

from img_serving.domain.errors import NotFound
from img_serving.gateway.webhooks import (
    KEPT_SECONDS,
    MAX_AT_ONCE,
    MAX_AT_ONCE_PER_HOST,
    TIMEOUT_SECONDS,
    WebhookDeliverer,
    event_for,
)
from img_serving.policy.webhooks import sign
from img_serving.ports import PostReply, StoredWebhook
from img_serving.state.memory import MemoryState
from img_serving.state.sqlite import StateError
from img_serving.telemetry.metrics import Metrics
from img_serving.transport.safe_connection import ExchangeFailed

SECRET = b"a secret of thirty-two bytes ..."
HOUR = 3600.0
DAY = 24 * HOUR

Answer = PostReply | ExchangeFailed | Exception | None
"""None: hangs until it is timed out."""


class Receivers:
    """Plays every receiver: `answer` says how, by event; calls are remembered with their time."""

    def __init__(self, answer: Callable[[str, int], Answer]) -> None:
        self.answer = answer
        self.calls: list[tuple[float, str, str, dict[str, str], bytes]] = []
        self.in_flight: Counter[str] = Counter()
        self.most_at_once: Counter[str] = Counter()

    async def __call__(
        self, url: str, headers: Sequence[tuple[str, str]], body: bytes, timeout_seconds: float
    ) -> PostReply:
        named = dict(headers)
        event_id = named["webhook-id"]
        self.calls.append((asyncio.get_running_loop().time(), event_id, url, named, body))
        host = url.split("/")[2]
        self.in_flight[host] += 1
        self.in_flight["all"] += 1
        for one in (host, "all"):
            self.most_at_once[one] = max(self.most_at_once[one], self.in_flight[one])
        try:
            answer = self.answer(event_id, self.count(event_id))
            if answer is None:
                await asyncio.sleep(timeout_seconds)
                raise ExchangeFailed(f"no answer within {timeout_seconds:g} s", is_definite=False)
            await asyncio.sleep(0.01)
            if isinstance(answer, Exception):
                raise answer
            return answer
        finally:
            self.in_flight[host] -= 1
            self.in_flight["all"] -= 1

    def count(self, event_id: str) -> int:
        return sum(one[1] == event_id for one in self.calls)

    def times(self, event_id: str) -> list[float]:
        return [one[0] for one in self.calls if one[1] == event_id]


def event(number: int = 1, host: str = "hooks.test", now: float = 1000.0) -> StoredWebhook:
    return event_for(
        b'{"id":"job_%d","status":"succeeded"}' % number,
        job_id=f"job_{number}",
        tenant="team",
        status="succeeded",
        url=f"https://{host}/done",
        ended_at=now,
    )


class Post:
    """The parts around a deliverer, in virtual time."""

    def __init__(self, answer: Callable[[str, int], Answer], state: MemoryState | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.state = state if state is not None else MemoryState()
        self.receivers = Receivers(answer)
        self.metrics = Metrics()
        self.deliverer = WebhookDeliverer(
            self.state,
            self.receivers,
            (SECRET,),
            clock_unix=self.loop.time,
            rng=Random(7),
            metrics=self.metrics,
            max_age_seconds=DAY,
        )
        self.task = self.loop.create_task(self.deliverer.run())

    async def add(self, *events: StoredWebhook) -> None:
        for one in events:
            await self.state.add_webhook(one)
        self.deliverer.wake()

    async def state_of(self, event_id: str) -> str:
        return (await self.deliverer.get(event_id)).state

    async def stop(self) -> None:
        await self.deliverer.close()
        with suppress(asyncio.CancelledError):
            await self.task

    @property
    def counts(self) -> dict[str, float]:
        return {label: value for (label,), value in self.metrics.webhooks.values.items()}


def flow(check: Callable[[Post], Coroutine[Any, Any, None]], answer: Callable[[str, int], Answer]) -> None:
    async def main() -> None:
        post = Post(answer)
        try:
            await check(post)
        finally:
            await post.stop()

    run_virtual(main())


def taken(event_id: str, tries: int) -> Answer:
    return PostReply(204)


def refused(event_id: str, tries: int) -> Answer:
    return PostReply(500)


def hangs(event_id: str, tries: int) -> Answer:
    return None


# the event


def test_the_payload_holds_the_record_as_it_is():
    made = event_for(
        b'{"id": "job_1", "prompt": "\xed\x95\x9c"}',
        job_id="job_1",
        tenant="team",
        status="failed",
        url="https://hooks.test/",
        ended_at=1674087231.5,
    )
    assert made.payload == (
        b'{"type":"job.failed","timestamp":"2023-01-19T00:13:51.500Z","data":{"id": "job_1", "prompt": "\xed\x95\x9c"}}'
    )
    assert msgspec.json.decode(made.payload)["data"]["id"] == "job_1"
    assert (made.type, made.state, made.created_at, made.next_at) == (
        "job.failed",
        "pending",
        1674087231.5,
        1674087231.5,
    )


def test_the_same_end_of_the_same_job_is_the_same_event():
    assert event(1).event_id == event(1, host="other.test", now=5.0).event_id
    assert event(1).event_id != event(2).event_id
    other = event_for(b"{}", job_id="job_1", tenant="t", status="failed", url="https://hooks.test/", ended_at=1.0)
    assert other.event_id != event(1).event_id
    assert event(1).event_id.startswith("evt_")
    assert "." not in event(1).event_id


# the way


def test_an_event_is_sent_at_once_signed_and_never_again():
    async def check(post: Post) -> None:
        one = event()
        await post.add(one)
        await asyncio.sleep(DAY)
        ((at, event_id, url, headers, body),) = post.receivers.calls
        assert (at, event_id, url, body) == (1000.0, one.event_id, one.url, one.payload)
        assert headers["webhook-timestamp"] == "1000"
        assert headers["webhook-signature"] == sign(SECRET, one.event_id, 1000, one.payload)
        assert headers["content-type"] == "application/json"
        assert await post.state_of(one.event_id) == "delivered"
        assert post.counts == {"delivered": 1}

    flow(check, taken)


def test_a_receiver_that_comes_back_gets_it_in_the_end():
    async def check(post: Post) -> None:
        one = event()
        await post.add(one)
        await asyncio.sleep(HOUR)
        at = post.receivers.times(one.event_id)
        waits = [later - earlier for earlier, later in pairwise(at)]
        assert len(at) == 4
        for wait, nominal in zip(waits, (5, 30, 120), strict=True):
            assert 0.75 * nominal <= wait <= 1.25 * nominal + 1
        stamps = [int(call[3]["webhook-timestamp"]) for call in post.receivers.calls]
        assert stamps == [int(moment) for moment in at]
        assert {call[4] for call in post.receivers.calls} == {one.payload}
        found = await post.deliverer.get(one.event_id)
        assert (found.state, found.attempts, found.last_error) == ("delivered", 4, "")
        assert post.counts == {"failed": 3, "delivered": 1}

    flow(check, lambda event_id, tries: PostReply(204 if tries == 4 else 503))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (PostReply(500), "the receiver answered HTTP 500"),
        (PostReply(302), "the receiver answered HTTP 302"),
        (ExchangeFailed("hooks.test is not a public address, so it is not connected to"), "not a public address"),
        (None, f"no answer within {TIMEOUT_SECONDS:g} s"),
        (RuntimeError("a bug"), "an internal error (RuntimeError)"),
    ],
)
def test_what_is_never_taken_is_given_up_after_a_day_and_told_in_one_line(answer, said, caplog):
    async def check(post: Post) -> None:
        one = event()
        await post.add(one)
        await asyncio.sleep(DAY + 60)
        at = post.receivers.times(one.event_id)
        assert 15 <= len(at) <= 22
        assert abs(at[-1] - (1000.0 + DAY)) < 1
        found = await post.deliverer.get(one.event_id)
        assert (found.state, found.attempts) == ("failed", len(at))
        assert said in found.last_error
        assert post.counts == {"failed": len(at), "given_up": 1}

    with caplog.at_level(logging.WARNING):
        flow(check, lambda event_id, tries: answer)
    (line,) = [one for one in caplog.records if one.getMessage() == "a webhook is given up"]
    assert line.fields["event_id"] == event().event_id
    assert line.fields["host"] == "hooks.test"
    assert "/done" not in str(line.fields)


def test_a_receiver_that_is_gone_is_not_called_again(caplog):
    async def check(post: Post) -> None:
        one = event()
        await post.add(one)
        await asyncio.sleep(DAY)
        assert len(post.receivers.calls) == 1
        found = await post.deliverer.get(one.event_id)
        assert (found.state, found.last_error) == ("failed", "the receiver answered HTTP 410")
        assert post.counts == {"failed": 1, "given_up": 1}

    flow(check, lambda event_id, tries: PostReply(410))
    assert "a webhook is given up" in caplog.text


def test_a_receiver_that_asks_for_time_gets_it():
    async def check(post: Post) -> None:
        await post.add(event())
        await asyncio.sleep(0.99 * HOUR)
        assert [round(moment) for moment in post.receivers.times(event().event_id)] == [1000, 1900]

    flow(check, lambda event_id, tries: PostReply(204) if tries == 2 else PostReply(429, 900.0))


def test_a_receiver_that_hangs_holds_up_nobody_else():
    async def check(post: Post) -> None:
        stuck = [event(number, "dead.test") for number in range(100)]
        await post.add(*stuck)
        await asyncio.sleep(1.0)
        fine = [event(number, "fine.test") for number in range(100, 140)]
        await post.add(*fine)
        await asyncio.sleep(0.5)
        assert {await post.state_of(one.event_id) for one in fine} == {"delivered"}
        assert post.receivers.most_at_once["dead.test"] == MAX_AT_ONCE_PER_HOST
        assert post.receivers.most_at_once["fine.test"] == MAX_AT_ONCE_PER_HOST
        assert post.receivers.calls[2][1] == fine[0].event_id

    dead = {event(number).event_id for number in range(100)}
    flow(check, lambda event_id, tries: None if event_id in dead else PostReply(200))


def test_an_event_never_tried_goes_before_those_that_failed():
    async def check(post: Post) -> None:
        old = [event(number, f"dead{number}.test") for number in range(40)]
        await post.add(*old)
        await asyncio.sleep(200.0)
        await post.add(event(99, "fine.test", post.loop.time()))
        await asyncio.sleep(TIMEOUT_SECONDS + 1)
        assert await post.state_of(event(99).event_id) == "delivered"

    fine = event(99).event_id
    flow(check, lambda event_id, tries: PostReply(200) if event_id == fine else None)


def test_memory_is_bounded_by_the_calls_in_flight():
    async def check(post: Post) -> None:
        asked: list[int] = []
        ask = post.state.due_webhooks

        async def due_webhooks(now: float, limit: int, **more: Any) -> list[StoredWebhook]:
            asked.append(limit)
            return await ask(now, limit, **more)

        post.state.due_webhooks = due_webhooks  # type: ignore[method-assign]
        await post.add(*(event(number, f"h{number}.test") for number in range(200)))
        await asyncio.sleep(60.0)
        assert post.receivers.most_at_once["all"] == MAX_AT_ONCE
        assert max(asked) <= MAX_AT_ONCE
        assert len({call[1] for call in post.receivers.calls}) == 200

    flow(check, taken)


# again, and the end


def test_a_delivered_event_can_be_had_again_with_the_same_id_and_body():
    async def check(post: Post) -> None:
        one = event()
        await post.add(one)
        await asyncio.sleep(2 * HOUR)
        queued = await post.deliverer.redeliver(one.event_id)
        assert (queued.state, queued.attempts) == ("pending", 0)
        await asyncio.sleep(1.0)
        assert len(post.receivers.calls) == 2
        assert post.receivers.calls[0][4] == post.receivers.calls[1][4]
        assert await post.state_of(one.event_id) == "delivered"

    flow(check, taken)


def test_an_event_that_was_given_up_has_the_whole_schedule_again():
    async def check(post: Post) -> None:
        one = event()
        await post.add(one)
        await asyncio.sleep(DAY + HOUR)
        before = len(post.receivers.calls)
        await post.deliverer.redeliver(one.event_id)
        await asyncio.sleep(DAY + HOUR)
        assert len(post.receivers.calls) >= before + 15
        assert await post.state_of(one.event_id) == "failed"

    flow(check, refused)


def test_an_event_that_is_wanted_again_while_it_is_on_its_way_is_queued_only_if_it_fails():
    async def check(post: Post) -> None:
        await post.add(event(1))
        await asyncio.sleep(0.005)
        await post.deliverer.redeliver(event(1).event_id)
        await asyncio.sleep(1.0)
        assert post.receivers.count(event(1).event_id) == 2  # 410, and once more
        await post.add(event(2))
        await asyncio.sleep(0.005)
        await post.deliverer.redeliver(event(2).event_id)
        await asyncio.sleep(HOUR)
        assert post.receivers.count(event(2).event_id) == 1

    first = event(1).event_id
    flow(check, lambda event_id, tries: PostReply(410 if event_id == first and tries == 1 else 200))


def test_an_unknown_event_is_not_found():
    async def check(post: Post) -> None:
        with pytest.raises(NotFound, match="evt_nobody"):
            await post.deliverer.redeliver("evt_nobody")
        with pytest.raises(NotFound):
            await post.deliverer.find(limit=3, after="evt_nobody")

    flow(check, taken)


def test_old_events_are_forgotten_a_day_after_their_last_call():
    async def check(post: Post) -> None:
        await post.add(event())
        await asyncio.sleep(DAY + KEPT_SECONDS - HOUR)
        assert len(await post.deliverer.find(limit=9)) == 1
        await asyncio.sleep(3 * HOUR)
        assert await post.deliverer.find(limit=9) == []

    flow(check, taken)


def test_closing_lets_calls_in_flight_end():
    async def main() -> None:
        post = Post(taken)
        await post.add(event())
        await asyncio.sleep(0.005)
        await post.stop()
        assert await post.state_of(event().event_id) == "delivered"
        assert post.loop.time() < 1001

    run_virtual(main())


def test_closing_cuts_what_hangs_and_the_next_process_sends_it_again():
    async def main() -> None:
        post = Post(hangs)
        await post.add(event())
        await asyncio.sleep(1.0)
        await post.stop()
        assert post.loop.time() <= 1003.1
        assert await post.state_of(event().event_id) == "pending"
        following = Post(taken, post.state)
        await asyncio.sleep(1.0)
        assert await following.state_of(event().event_id) == "delivered"
        assert following.receivers.count(event().event_id) == 1
        await following.stop()

    run_virtual(main())


def test_closing_what_never_ran_returns_at_once():
    async def main() -> float:
        state = MemoryState()
        deliverer = WebhookDeliverer(
            state, Receivers(taken), (SECRET,), clock_unix=lambda: 0.0, rng=Random(1), metrics=Metrics()
        )
        await deliverer.close()
        assert repr(deliverer) == f"<WebhookDeliverer 0 of {MAX_AT_ONCE} calls in flight>"
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 1000.0


class Failing(MemoryState):
    """A store whose disk is full for a while."""

    is_failing = False

    async def record_webhook(self, *args: Any, **more: Any) -> None:
        await self._fail()
        await super().record_webhook(*args, **more)

    async def due_webhooks(self, *args: Any, **more: Any) -> list[StoredWebhook]:
        await self._fail()
        return await super().due_webhooks(*args, **more)

    async def _fail(self) -> None:
        if self.is_failing:
            raise StateError("the disk is full")


def test_a_store_that_fails_neither_ends_the_work_nor_floods_a_receiver(caplog):
    async def main() -> None:
        state = Failing()
        post = Post(taken, state)
        await post.add(event(1))
        await asyncio.sleep(0.005)
        state.is_failing = True
        await asyncio.sleep(120.0)
        assert len(post.receivers.calls) == 1
        state.is_failing = False
        await post.add(event(2))
        await asyncio.sleep(10.0)
        assert len(post.receivers.calls) == 2
        assert await post.state_of(event(1).event_id) == await post.state_of(event(2).event_id) == "delivered"
        await post.stop()

    with caplog.at_level(logging.WARNING):
        run_virtual(main())
    assert len([one for one in caplog.records if "they wait: the disk is full" in one.getMessage()]) <= 2


def test_two_secrets_make_two_signatures():
    async def main() -> None:
        post = Post(taken)
        post.deliverer._secrets = (SECRET, b"x" * 32)
        await post.add(event())
        await asyncio.sleep(1.0)
        (_, event_id, _, headers, body) = post.receivers.calls[0]
        assert headers["webhook-signature"].split(" ") == [
            sign(SECRET, event_id, 1000, body),
            sign(b"x" * 32, event_id, 1000, body),
        ]
        await post.stop()

    run_virtual(main())
