"""What every state store promises: one suite, run on each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from img_serving.ports import StoredWebhook, WebhookStore
from img_serving.state.memory import MemoryState
from img_serving.state.sqlite import SqliteState, StateError

State = MemoryState | SqliteState
Check = Callable[[State], Awaitable[None]]


@pytest.fixture(params=["memory", "sqlite"])
def run(request, tmp_path):
    """Runs a check on a fresh store, in a loop of its own."""

    def start(check: Check) -> None:
        async def main() -> None:
            state: State = MemoryState() if request.param == "memory" else SqliteState(tmp_path / "state.db")
            await state.open()
            try:
                await check(state)
            finally:
                await state.close()

        asyncio.run(main())

    return start


def test_nothing_is_there_at_first(run):
    async def check(state):
        assert await state.backends() == []
        assert await state.get_value("key") is None

    run(check)


def test_backends_come_back_oldest_first_and_byte_for_byte(run):
    async def check(state):
        records = {"zoe": b'{"name": "zoe"}', "amy": bytes(range(256)), "mia": b""}
        for name, record in records.items():
            await state.put_backend(name, record)
        assert await state.backends() == list(records.values())

    run(check)


def test_a_replaced_backend_keeps_its_place(run):
    async def check(state):
        for name in ("one", "two"):
            await state.put_backend(name, name.encode())
        await state.put_backend("one", b"new")
        assert await state.backends() == [b"new", b"two"]

    run(check)


def test_a_backend_deleted_and_added_again_is_the_newest(run):
    async def check(state):
        for name in ("one", "two"):
            await state.put_backend(name, name.encode())
        await state.delete_backend("one")
        await state.put_backend("one", b"one")
        assert await state.backends() == [b"two", b"one"]

    run(check)


def test_deleting_what_is_not_there_is_fine(run):
    async def check(state):
        await state.delete_backend("nobody")

    run(check)


@pytest.mark.parametrize("text", ["", "plain", "그림 🎨", "it's; DROP TABLE backends --", "a\nb\0c"])
def test_names_and_values_are_any_text(run, text):
    async def check(state):
        await state.put_value(text, text)
        await state.put_backend(text, b"x")
        assert await state.get_value(text) == text
        await state.delete_backend(text)
        assert await state.backends() == []

    run(check)


def test_a_value_is_replaced(run):
    async def check(state):
        await state.put_value("key", "old")
        await state.put_value("key", "new")
        assert await state.get_value("key") == "new"

    run(check)


def test_calls_at_once_are_all_kept(run):
    async def check(state):
        await asyncio.gather(*(state.put_value(f"key {index}", str(index)) for index in range(50)))
        assert [await state.get_value(f"key {index}") for index in range(50)] == [str(index) for index in range(50)]

    run(check)


# the outbox of webhooks


def webhook(number: int, *, host: str = "hooks.test", due: float | None = None, **more: Any) -> StoredWebhook:
    """An event that came up at second `number`, and is due at once unless something else is said."""
    return StoredWebhook(
        event_id=f"evt_{number}",
        job_id=f"job_{number}",
        tenant="팀",
        url=f"https://{host.upper()}:8443/done?{number}",
        type="job.succeeded",
        created_at=float(number),
        payload=b'{"number":%d}' % number,
        queued_at=float(number),
        next_at=float(number) if due is None else due,
        **more,
    )


async def ids_of_due(state: WebhookStore, now: float, limit: int = 100, **more: Any) -> list[str]:
    return [one.event_id for one in await state.due_webhooks(now, limit, **more)]


async def ids_found(store: WebhookStore, limit: int = 100, **more: Any) -> list[str]:
    return [one.event_id for one in await store.find_webhooks(limit=limit, **more)]


def test_an_empty_outbox_has_nothing_due(run):
    async def check(state):
        assert await state.due_webhooks(1e12, 10) == []
        assert await state.next_webhook_at(0.0) is None
        assert await state.find_webhooks(limit=10) == []
        assert await state.requeue_webhook("evt_1", 1.0) is False
        assert await state.sweep_webhooks(1e12) == 0
        await state.record_webhook("evt_1", attempts=1, next_at=1.0, delivered_at=None, last_error="")
        assert await state.find_webhooks(limit=10) == []

    run(check)


def test_an_event_comes_back_whole(run):
    async def check(state):
        whole = webhook(1, attempts=3, delivered_at=9.5, last_error="HTTP 500")
        await state.add_webhook(whole)
        assert await state.find_webhooks(limit=1) == [whole]
        assert await state.due_webhooks(1.0, 1) == [whole]

    run(check)


def test_an_event_that_is_added_again_is_left_as_it_is(run):
    async def check(state):
        await state.add_webhook(webhook(1))
        await state.record_webhook("evt_1", attempts=1, next_at=None, delivered_at=2.0, last_error="")
        await state.add_webhook(webhook(1))
        assert await ids_of_due(state, 100.0) == []
        (found,) = await state.find_webhooks(limit=10)
        assert (found.attempts, found.delivered_at) == (1, 2.0)

    run(check)


def test_those_never_tried_are_due_first_and_of_each_kind_the_longest_due(run):
    async def check(state):
        await state.add_webhook(webhook(1, due=30.0, attempts=1))
        await state.add_webhook(webhook(2, due=20.0, attempts=5))
        await state.add_webhook(webhook(3, due=50.0))
        await state.add_webhook(webhook(4, due=40.0))
        await state.add_webhook(webhook(5, due=60.1))
        assert await ids_of_due(state, 60.0) == ["evt_4", "evt_3", "evt_2", "evt_1"]
        assert await ids_of_due(state, 60.0, limit=3) == ["evt_4", "evt_3", "evt_2"]
        assert await ids_of_due(state, 60.0, limit=1) == ["evt_4"]
        assert await state.next_webhook_at(0.0) == 20.0
        assert await state.next_webhook_at(20.0) == 30.0
        assert await state.next_webhook_at(60.0) == 60.1
        assert await state.next_webhook_at(60.1) is None

    run(check)


def test_events_and_hosts_that_are_busy_are_passed_over(run):
    async def check(state):
        for number in range(1, 5):
            await state.add_webhook(webhook(number, host="busy.test" if number % 2 else "free.test"))
        assert await ids_of_due(state, 9.0, except_hosts=["busy.test"]) == ["evt_2", "evt_4"]
        assert await ids_of_due(state, 9.0, except_events={"evt_2"}) == ["evt_1", "evt_3", "evt_4"]
        assert await ids_of_due(state, 9.0, 1, except_events={"evt_2"}, except_hosts=["busy.test"]) == ["evt_4"]

    run(check)


def test_how_a_try_ended_is_noted(run):
    async def check(state):
        for number in range(1, 4):
            await state.add_webhook(webhook(number))
        await state.record_webhook("evt_1", attempts=1, next_at=None, delivered_at=5.0, last_error="")
        await state.record_webhook("evt_2", attempts=9, next_at=None, delivered_at=None, last_error="HTTP 410")
        await state.record_webhook("evt_3", attempts=1, next_at=99.0, delivered_at=None, last_error="HTTP 500")
        assert [(one.state, one.attempts, one.last_error) for one in await state.find_webhooks(limit=9)] == [
            ("pending", 1, "HTTP 500"),
            ("failed", 9, "HTTP 410"),
            ("delivered", 1, ""),
        ]
        assert await ids_of_due(state, 98.0) == []
        assert await ids_of_due(state, 99.0) == ["evt_3"]

    run(check)


def test_events_are_found_newest_first_by_what_they_are(run):
    async def check(state):
        for number in range(1, 7):
            await state.add_webhook(webhook(number))
        for number in (2, 4):
            await state.record_webhook(f"evt_{number}", attempts=1, next_at=None, delivered_at=9.0, last_error="")
        await state.record_webhook("evt_5", attempts=1, next_at=None, delivered_at=None, last_error="HTTP 410")
        assert await ids_found(state) == ["evt_6", "evt_5", "evt_4", "evt_3", "evt_2", "evt_1"]
        assert await ids_found(state, state="pending") == ["evt_6", "evt_3", "evt_1"]
        assert await ids_found(state, state="delivered") == ["evt_4", "evt_2"]
        assert await ids_found(state, state="failed") == ["evt_5"]
        assert await ids_found(state, job_id="job_3") == ["evt_3"]
        assert await ids_found(state, event_id="evt_3") == ["evt_3"]
        assert await ids_found(state, event_id="evt_3", state="failed") == []
        assert await ids_found(state, 2) == ["evt_6", "evt_5"]
        assert await ids_found(state, 2, after="evt_5") == ["evt_4", "evt_3"]
        assert await ids_found(state, after="evt_4", state="delivered") == ["evt_2"]
        assert await ids_found(state, after="evt_1") == []
        assert await ids_found(state, after="evt_unknown") == []

    run(check)


def test_an_event_that_is_wanted_again_starts_anew(run):
    async def check(state):
        await state.add_webhook(webhook(1))
        await state.record_webhook("evt_1", attempts=7, next_at=None, delivered_at=5.0, last_error="once")
        assert await state.requeue_webhook("evt_1", 1000.0) is True
        (due,) = await state.due_webhooks(1000.0, 10)
        assert (due.state, due.attempts, due.queued_at, due.created_at, due.last_error) == (
            ("pending", 0, 1000.0, 1.0, "")
        )
        assert due.payload == b'{"number":1}'

    run(check)


def test_old_events_are_forgotten_unless_they_are_still_tried(run):
    async def check(state):
        for number in (1, 2, 3, 4):
            await state.add_webhook(webhook(number))
        await state.record_webhook("evt_1", attempts=1, next_at=None, delivered_at=9.0, last_error="")
        await state.record_webhook("evt_2", attempts=1, next_at=None, delivered_at=None, last_error="no")
        await state.record_webhook("evt_4", attempts=1, next_at=None, delivered_at=9.0, last_error="")
        assert await state.sweep_webhooks(4.0) == 2
        assert await ids_found(state) == ["evt_4", "evt_3"]

    run(check)


def test_closing_twice_is_fine_and_a_call_afterwards_says_why_it_fails(run):
    async def check(state):
        await state.close()
        await state.close()
        with pytest.raises(StateError, match="closed"):
            await state.get_value("key")

    run(check)
