"""What becomes of the work of a client that leaves: cancelled, as the backend sees it, for every form that is, and no other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.asgi import Reply
from tests.support.gateways import Harness, running, scripted
from tests.support.virtual_time import run_virtual

from img_serving.domain.errors import StorageFailed
from img_serving.ports import StoredArtifact
from img_serving.storage.memory import MemoryStore

SDK = {"x-stainless-retry-count": "0"}
RETRY = {"x-stainless-retry-count": "1"}
BODY = {"prompt": "x", "size": "64x64"}


def slow(**more: Any) -> str:
    return scripted("one", **{"latency_seconds": 20, "steps": 20, "previews": True, **more})


async def leave_after(
    gateway: Harness,
    seconds: float,
    path: str = "/v1/images/generations",
    *,
    headers: dict[str, str] | None = None,
    **body: Any,
) -> Reply:
    gone = asyncio.Event()
    asking = asyncio.ensure_future(gateway.client.post(path, {**BODY, **body}, leave=gone, headers=headers or {}))
    await asyncio.sleep(seconds)
    gone.set()
    await asyncio.sleep(0.01)
    return Reply(0, {}, b"") if not asking.done() else await asking


@pytest.mark.parametrize(
    ("headers", "body", "toml", "cancelled_after"),
    [
        ({}, {}, "", 0.0),
        ({}, {"stream": True}, "", 0.0),
        ({}, {"cancel_on_disconnect": True}, "", 0.0),
        (SDK, {}, "", 2.0),
        (SDK, {"stream": True}, "", 2.0),
        (SDK, {}, "[jobs]\ndisconnect_grace_seconds = 5\n", 5.0),
        (SDK, {}, "[jobs]\ndisconnect_grace_seconds = 0\n", 0.0),
        ({}, {"cancel_on_disconnect": False}, "", None),
        ({}, {"cancel_on_disconnect": False, "stream": True}, "", None),
        (SDK, {"cancel_on_disconnect": False}, "", None),
        ({"idempotency-key": "k"}, {}, "", None),
        ({"idempotency-key": "k"}, {"stream": True}, "", None),
        ({"prefer": "respond-async"}, {}, "", None),
        ({}, {}, "[jobs]\ncancel_on_disconnect = false\n", None),
        ({}, {"stream": True}, "[jobs]\ncancel_on_disconnect = false\n", None),
        ({}, {"cancel_on_disconnect": True}, "[jobs]\ncancel_on_disconnect = false\n", None),
    ],
)
def test_the_call_at_the_backend_is_closed_when_it_should_be(
    headers: dict[str, str], body: dict[str, Any], toml: str, cancelled_after: float | None
) -> None:
    async def main() -> None:
        async with running(slow() + toml) as gateway:
            adapter = gateway.adapter("one")
            await leave_after(gateway, 5, headers=headers, **body)
            if cancelled_after is None:
                await asyncio.sleep(30)
                assert adapter.cancelled == 0
                assert adapter.in_flight == 0
                return
            if cancelled_after:
                await asyncio.sleep(cancelled_after - 0.2)
                assert adapter.cancelled == 0
                await asyncio.sleep(0.2)
            assert adapter.cancelled == 1
            await asyncio.sleep(1)
            assert gateway.gateway.dispatcher._waiting == {}
            assert not gateway.gateway.services.returns

    run_virtual(main())


def test_a_job_that_waits_in_line_vanishes_with_its_client() -> None:
    async def main() -> None:
        async with running(slow(max_concurrency=1, max_batch_size=1)) as gateway:
            first = asyncio.ensure_future(gateway.client.draw(size="64x64"))
            await asyncio.sleep(1)
            await leave_after(gateway, 1)
            assert gateway.gateway.dispatcher.scheduler.queued == 0
            await first
            assert gateway.adapter("one").count == 1

    run_virtual(main())


def test_a_retry_in_time_joins_the_job_that_still_runs() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            await leave_after(gateway, 5, headers=SDK)
            await asyncio.sleep(1)
            reply = await gateway.client.post("/v1/images/generations", BODY, headers=RETRY)
            assert reply.status == 200
            assert reply.headers["x-attempts"] == "1"
            assert gateway.adapter("one").count == 1
            assert not gateway.gateway.services.returns

    run_virtual(main())


class _FullDisk(MemoryStore):
    async def put(self, *args: Any) -> StoredArtifact:
        raise StorageFailed("the disk is full")


def test_a_retry_that_joined_needs_no_storage_where_its_answer_does_not() -> None:
    async def main() -> None:
        async with running(slow(), store=_FullDisk()) as gateway:
            await leave_after(gateway, 5, headers=SDK, response_format="b64_json")
            body = {**BODY, "response_format": "b64_json"}
            reply = await gateway.client.post("/v1/images/generations", body, headers=RETRY)
            assert reply.status == 200
            assert reply.json()["data"][0]["b64_json"]
            assert gateway.adapter("one").count == 1

    run_virtual(main())


def test_a_retry_finds_what_was_finished_while_nobody_listened() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            await leave_after(gateway, 19, headers=SDK)
            await asyncio.sleep(1.5)
            reply = await gateway.client.post("/v1/images/generations", BODY, headers=RETRY)
            assert reply.status == 200
            assert gateway.adapter("one").count == 1
            listed = (await gateway.client.get("/v1/jobs")).json()["data"]
            assert [one["result"] for one in listed] == [reply.json()]

    run_virtual(main())


@pytest.mark.parametrize(("body", "who"), [({"n": 2}, "admin"), ({}, "amy")])
def test_another_request_or_another_tenant_joins_nothing(body: dict[str, Any], who: str) -> None:
    async def main() -> None:
        async with running(slow() + '[[auth.api_keys]]\nname = "amy"\nkey = "sk-amy"\n') as gateway:
            await leave_after(gateway, 5, headers=SDK)
            if who == "amy":
                gateway.client.key = "sk-amy"
            reply = await gateway.client.post("/v1/images/generations", {**BODY, **body}, headers=RETRY)
            assert reply.status == 200
            assert gateway.adapter("one").count >= 2
            assert gateway.adapter("one").cancelled == 1

    run_virtual(main())


def test_a_retry_that_leaves_too_has_its_own_grace() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            await leave_after(gateway, 5, headers=SDK)
            await asyncio.sleep(1)
            await leave_after(gateway, 5, headers=RETRY)
            await asyncio.sleep(1.9)
            assert gateway.adapter("one").cancelled == 0
            await asyncio.sleep(0.2)
            assert gateway.adapter("one").cancelled == 1

    run_virtual(main())


def test_a_retry_is_told_the_failure_of_what_it_joined() -> None:
    async def main() -> None:
        async with running(slow(sequence=["refuse"])) as gateway:
            await leave_after(gateway, 19, headers=SDK)
            reply = await gateway.client.post("/v1/images/generations", BODY, headers=RETRY)
            assert reply.status == 400
            assert gateway.adapter("one").count == 1

    run_virtual(main())


def test_the_result_of_a_job_that_was_not_cancelled_is_kept_and_found() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            kept = []
            for name, body in (("plain", {"response_format": "b64_json"}), ("stream", {"stream": True})):
                headers = {"x-request-id": name}
                await leave_after(gateway, 5, headers=headers, cancel_on_disconnect=False, **body)
                await asyncio.sleep(30)
                kept += (await gateway.client.get(f"/v1/jobs?request_id={name}")).json()["data"]
            plain, stream = kept
            assert plain["status"] == stream["status"] == "succeeded"
            assert plain["result"]["data"][0]["b64_json"]
            assert stream["result"]["data"][0]["url"]
            again = (await gateway.client.get(f"/v1/jobs/{plain['id']}")).json()
            assert again["result"] == plain["result"]

    run_virtual(main())


def test_a_client_that_stays_costs_no_record() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            assert (await gateway.client.post("/v1/images/generations", BODY, headers=SDK)).status == 200
            assert (await gateway.client.get("/v1/jobs")).json()["data"] == []
            assert not gateway.gateway.services.returns

    run_virtual(main())
