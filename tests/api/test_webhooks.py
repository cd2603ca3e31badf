"""`/v1/webhooks`: what became of events, page by page, and sending one again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any

import msgspec
import pytest

from img_serving.api.asgi import AsgiConnection
from img_serving.api.exchange import Exchange, Reply
from img_serving.api.webhooks import Webhooks
from img_serving.domain.errors import GatewayError, InvalidRequest, NotFound
from img_serving.gateway.webhooks import WebhookDeliverer, event_for
from img_serving.ports import PostReply, StoredWebhook
from img_serving.state.memory import MemoryState
from img_serving.telemetry.metrics import Metrics


def event(number: int) -> StoredWebhook:
    return event_for(
        b"{}",
        job_id=f"job_{number}",
        tenant="team",
        status="succeeded",
        url="https://hooks.test/done",
        ended_at=float(number),
    )


def exchange(query: str = "", **variables: str) -> Exchange:
    async def never(*_: Any) -> Any:
        raise AssertionError

    scope = {"type": "http", "method": "GET", "path": "/v1/webhooks", "query_string": query.encode(), "headers": []}
    made = Exchange(AsgiConnection(scope, never, never), 0.0)
    made.variables = variables
    return made


def answer(reply: Reply) -> Any:
    return json.loads(b"".join(bytes(part) for part in reply.parts))


def run(check: Callable[[Webhooks, MemoryState], Awaitable[None]]) -> None:
    """With five events: 2 was delivered, 4 was given up, the others wait."""

    async def post(url: str, headers: Sequence[tuple[str, str]], body: bytes, timeout_seconds: float) -> PostReply:
        raise AssertionError

    async def main() -> None:
        state = MemoryState()
        for number in range(1, 6):
            await state.add_webhook(event(number))
        await state.record_webhook(event(2).event_id, attempts=1, next_at=None, delivered_at=9.0, last_error="")
        await state.record_webhook(event(4).event_id, attempts=7, next_at=None, delivered_at=None, last_error="no")
        deliverer = WebhookDeliverer(
            state, post, (b"x" * 32,), clock_unix=lambda: 50.0, rng=Random(1), metrics=Metrics()
        )
        await check(Webhooks(deliverer), state)

    asyncio.run(main())


def test_events_are_listed_newest_first_without_their_payload():
    async def check(webhooks, _):
        reply = await webhooks.list(exchange())
        assert reply.status == 200
        found = answer(reply)
        assert [one["job_id"] for one in found["data"]] == ["job_5", "job_4", "job_3", "job_2", "job_1"]
        assert (found["object"], found["has_more"]) == ("list", False)
        assert (found["first_id"], found["last_id"]) == (event(5).event_id, event(1).event_id)
        assert found["data"][1] == {
            "object": "webhook",
            "id": event(4).event_id,
            "type": "job.succeeded",
            "job_id": "job_4",
            "tenant": "team",
            "url": "https://hooks.test/done",
            "state": "failed",
            "attempts": 7,
            "created_at": 4.0,
            "next_at": None,
            "delivered_at": None,
            "last_error": "no",
        }

    run(check)


@pytest.mark.parametrize(
    ("query", "jobs"),
    [
        ("state=failed", ["job_4"]),
        ("state=delivered", ["job_2"]),
        ("state=pending&limit=2", ["job_5", "job_3"]),
        ("job_id=job_3", ["job_3"]),
        ("job_id=job_9", []),
        ("state=&job_id=&after=&limit=", ["job_5", "job_4", "job_3", "job_2", "job_1"]),
    ],
)
def test_what_is_listed_can_be_chosen(query, jobs):
    async def check(webhooks, _):
        assert [one["job_id"] for one in answer(await webhooks.list(exchange(query)))["data"]] == jobs

    run(check)


def test_pages_follow_each_other_and_the_last_says_so():
    async def check(webhooks, _):
        seen, after = [], ""
        for _ in range(3):
            page = answer(await webhooks.list(exchange(f"limit=2&after={after}")))
            seen += [one["job_id"] for one in page["data"]]
            after = page["last_id"]
        assert seen == ["job_5", "job_4", "job_3", "job_2", "job_1"]
        assert page["has_more"] is False
        nothing = answer(await webhooks.list(exchange(f"after={after}")))
        assert (nothing["data"], nothing["first_id"], nothing["has_more"]) == ([], None, False)

    run(check)


@pytest.mark.parametrize(
    ("query", "error", "param"),
    [
        ("limit=0", InvalidRequest, "limit"),
        ("limit=101", InvalidRequest, "limit"),
        ("limit=%D9%A3", InvalidRequest, "limit"),
        ("limit=ten", InvalidRequest, "limit"),
        ("state=lost", InvalidRequest, "state"),
        ("after=evt_nobody", NotFound, None),
    ],
)
def test_a_bad_question_is_refused(query, error, param):
    async def check(webhooks, _):
        with pytest.raises(GatewayError) as caught:
            await webhooks.list(exchange(query))
        assert isinstance(caught.value, error)
        assert caught.value.param == param

    run(check)


def test_one_event_is_looked_at():
    async def check(webhooks, _):
        assert answer(await webhooks.get(exchange(event_id=event(2).event_id)))["state"] == "delivered"
        with pytest.raises(NotFound):
            await webhooks.get(exchange(event_id="evt_nobody"))

    run(check)


def test_an_event_is_sent_again():
    async def check(webhooks, state):
        reply = await webhooks.redeliver(exchange(event_id=event(4).event_id))
        assert reply.status == 202
        assert (answer(reply)["state"], answer(reply)["next_at"]) == ("pending", 50.0)
        assert event(4).event_id in [one.event_id for one in await state.due_webhooks(50.0, 9)]

    run(check)


@pytest.mark.parametrize("rest", ["evt_nobody", "{}/", "{}/again", "{}/redeliver", "/{}"])
def test_nothing_else_is_sent_again(rest):
    async def check(webhooks, state):
        with pytest.raises(NotFound):
            await webhooks.redeliver(exchange(event_id=rest.format(event(4).event_id)))
        assert [one.attempts for one in await state.find_webhooks(state="failed", limit=9)] == [7]

    run(check)


def test_the_answers_are_what_the_command_line_reads():
    async def check(webhooks, _):
        from img_serving.api.webhooks import WebhookList

        found = msgspec.json.decode(msgspec.json.encode(answer(await webhooks.list(exchange()))), type=WebhookList)
        assert len(found.data) == 5

    run(check)
