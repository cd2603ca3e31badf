"""Webhooks from the state file to a receiver's socket: verified by the official library, and across a kill."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from standardwebhooks import Webhook, WebhookVerificationError
from tests.support.receivers import Receiver

from img_serving.gateway import webhooks
from img_serving.gateway.webhooks import WebhookDeliverer, event_for
from img_serving.policy.webhooks import written_secret
from img_serving.ports import StoredWebhook
from img_serving.state.sqlite import SqliteState
from img_serving.telemetry.metrics import Metrics
from img_serving.transport.webhook_post import SafePoster

KEY, OLD_KEY = b"k" * 32, b"an old secret, in plain text"


def event(url: str, number: int = 1) -> StoredWebhook:
    return event_for(
        '{"id":"job_%d","prompt":"등대 🗼"}'.encode() % number,
        job_id=f"job_{number}",
        tenant="team",
        status="succeeded",
        url=url,
        ended_at=time.time(),
    )


@asynccontextmanager
async def delivering(
    path: Path, keys: Sequence[bytes] = (KEY,), *, allow_private_addresses: bool = True
) -> AsyncIterator[tuple[SqliteState, WebhookDeliverer]]:
    state = SqliteState(path)
    deliverer = WebhookDeliverer(
        state,
        SafePoster(allow_private_addresses=allow_private_addresses),
        keys,
        clock_unix=time.time,
        rng=Random(7),
        metrics=Metrics(),
    )
    running = asyncio.create_task(deliverer.run())
    try:
        yield state, deliverer
    finally:
        await deliverer.close(0.1)
        await asyncio.gather(running, return_exceptions=True)
        await state.close()


async def ended(deliverer: WebhookDeliverer, event_id: str) -> StoredWebhook:
    """The event, once a try of it was noted."""
    async with asyncio.timeout(10):
        while True:
            one = await deliverer.get(event_id)
            if one.attempts:
                return one
            await asyncio.sleep(0.01)


def test_the_official_library_verifies_what_is_sent(tmp_path):
    async def main() -> None:
        async with Receiver() as receiver, delivering(tmp_path / "state.db", (KEY, OLD_KEY)) as (state, deliverer):
            one = event(receiver.url)
            await state.add_webhook(one)
            deliverer.wake()
            assert (await ended(deliverer, one.event_id)).state == "delivered"
            (call,) = receiver.calls
            for key in (KEY, OLD_KEY):  # either, while one replaces the other
                told = Webhook(written_secret(key)).verify(call.body, call.headers)
                assert told["type"] == "job.succeeded"
                assert told["data"]["prompt"] == "등대 🗼"
            with pytest.raises(WebhookVerificationError):
                Webhook(written_secret(b"x" * 32)).verify(call.body, call.headers)
            with pytest.raises(WebhookVerificationError):
                Webhook(written_secret(KEY)).verify(call.body + b" ", call.headers)
            with pytest.raises(WebhookVerificationError):
                Webhook(written_secret(KEY)).verify(call.body, {**call.headers, "webhook-id": "evt_other"})

    asyncio.run(main())


def test_a_receiver_in_a_private_network_is_never_connected_to(tmp_path):
    async def main() -> None:
        async with (
            Receiver() as receiver,
            delivering(tmp_path / "state.db", allow_private_addresses=False) as (state, deliverer),
        ):
            one = event(receiver.url)
            await state.add_webhook(one)
            deliverer.wake()
            tried = await ended(deliverer, one.event_id)
            assert (tried.state, receiver.calls) == ("pending", [])
            assert "not a public address" in tried.last_error

    asyncio.run(main())


def test_a_receiver_that_hangs_is_left_and_the_others_are_called_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(webhooks, "TIMEOUT_SECONDS", 0.3)

    async def main() -> None:
        async with (
            Receiver(None) as dead,
            Receiver() as fine,
            delivering(tmp_path / "state.db") as (state, deliverer),
        ):
            stuck = event(dead.url)
            taken = event(fine.url.replace("127.0.0.1", "localhost"), 2)
            for one in (stuck, taken):
                await state.add_webhook(one)
            deliverer.wake()
            assert (await ended(deliverer, taken.event_id)).state == "delivered"
            tried = await ended(deliverer, stuck.event_id)
            assert (tried.state, tried.last_error) == ("pending", "no answer within 0.3 s")

    asyncio.run(main())


SENDER = """
import asyncio, sys, time
from pathlib import Path
from random import Random
from img_serving.gateway.webhooks import WebhookDeliverer
from img_serving.state.sqlite import SqliteState
from img_serving.telemetry.metrics import Metrics
from img_serving.transport.webhook_post import SafePoster

async def main():
    poster = SafePoster(allow_private_addresses=True)
    deliverer = WebhookDeliverer(
        SqliteState(sys.argv[1]), poster, (b"k" * 32,), clock_unix=time.time, rng=Random(7), metrics=Metrics()
    )
    await deliverer.run()

asyncio.run(main())
"""


def test_what_was_on_its_way_when_the_process_was_killed_is_sent_by_the_next_one_and_then_no_more(tmp_path):
    path = tmp_path / "state.db"

    async def main() -> None:
        async with Receiver(None) as receiver:
            first = SqliteState(path)
            events = [event(receiver.url, number) for number in range(1, 6)]
            for one in events:
                await first.add_webhook(one)
            await first.close()
            sender = await asyncio.create_subprocess_exec(sys.executable, "-c", SENDER, str(path))
            async with asyncio.timeout(20):
                await receiver.called.wait()
            sender.kill()
            await sender.wait()
            cut = [call.headers["webhook-id"] for call in receiver.calls]
            assert cut
            receiver.status = 204
            receiver.calls.clear()
            async with delivering(path) as (_, deliverer):
                for one in events:
                    assert (await ended(deliverer, one.event_id)).state == "delivered"
                await asyncio.sleep(0.1)
                sent = [call.headers["webhook-id"] for call in receiver.calls]
                assert sorted(sent) == sorted(one.event_id for one in events)
                assert set(cut) <= set(sent)
                assert json.loads(receiver.calls[0].body)["type"] == "job.succeeded"

    asyncio.run(main())
