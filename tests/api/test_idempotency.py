"""`Idempotency-Key`: one request is drawn and paid for once, however often it is sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.asgi import Client, Reply
from tests.support.frames import frames_of
from tests.support.gateways import Harness, running, scripted
from tests.support.virtual_time import run_virtual

KEYS = "".join(f'[[auth.api_keys]]\nname = "{name}"\nkey = "sk-{name}"\n' for name in ("amy", "bob"))


def slow(**more: Any) -> str:
    return scripted("one", **{"latency_seconds": 10, "steps": 10, **more})


async def ask(gateway: Harness, key: str = "k", client: Client | None = None, **fields: Any) -> Reply:
    options = {name: fields.pop(name) for name in ("leave", "headers") if name in fields}
    headers = {"idempotency-key": key, **options.pop("headers", {})}
    body = {"prompt": "a fox", "size": "64x64", **fields}
    return await (client or gateway.client).post("/v1/images/generations", body, headers=headers, **options)


@pytest.mark.parametrize("response_format", ["url", "b64_json"])
def test_a_replay_is_the_same_body_and_draws_nothing(response_format: str) -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            first = await ask(gateway, response_format=response_format, n=2)
            drawn = gateway.adapter("one").count
            again = await ask(gateway, response_format=response_format, n=2)
            assert first.status == again.status == 200
            assert first.body == again.body
            assert "idempotent-replayed" not in first.headers
            assert again.headers["idempotent-replayed"] == "true"
            for name in ("x-job-id", "x-backend", "x-attempts"):
                assert first.headers[name] == again.headers[name]
            assert gateway.adapter("one").count == drawn

    run_virtual(main())


def test_the_order_of_fields_and_blanks_do_not_make_another_request() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            headers = {"idempotency-key": "k", "content-type": "application/json"}
            first = await gateway.client.post(
                "/v1/images/generations", raw=b'{"prompt":"x","size":"64x64"}', headers=headers
            )
            again = await gateway.client.post(
                "/v1/images/generations", raw=b'{ "size" : "64x64",\n "prompt":"\\u0078" }', headers=headers
            )
            assert first.body == again.body

    run_virtual(main())


def test_the_same_key_with_another_body_is_a_conflict_that_is_not_tried_again() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            await ask(gateway)
            for running_still in (False, True):
                if running_still:
                    other = asyncio.ensure_future(ask(gateway, "other"))
                    await asyncio.sleep(1)
                    assert not other.done()
                reply = await ask(gateway, "other" if running_still else "k", n=2)
                assert reply.status == 409
                assert reply.error["code"] == "idempotency_key_reused"
                assert reply.headers["x-should-retry"] == "false"
            await asyncio.sleep(20)
            assert gateway.adapter("one").count == 2

    run_virtual(main())


def test_a_retry_while_the_first_is_drawn_joins_it() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            replies = await asyncio.gather(*[ask(gateway) for _ in range(20)])
            assert {reply.status for reply in replies} == {200}
            assert len({reply.body for reply in replies}) == 1
            assert gateway.adapter("one").count == 1

    run_virtual(main())


def test_a_client_that_leaves_does_not_end_it_and_its_result_is_found() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            gone = asyncio.Event()
            asking = asyncio.ensure_future(ask(gateway, leave=gone, headers={"x-request-id": "r1"}))
            await asyncio.sleep(5)
            gone.set()
            assert (await asking).status == 0
            await asyncio.sleep(20)
            assert gateway.adapter("one").cancelled == 0
            for query in ("idempotency_key=k", "request_id=r1"):
                (record,) = (await gateway.client.get(f"/v1/jobs?{query}")).json()["data"]
                assert record["status"] == "succeeded"
                assert record["result"]["data"][0]["url"]
            assert (await ask(gateway)).json() == record["result"]
            assert gateway.adapter("one").count == 1

    run_virtual(main())


def test_a_failure_is_told_again_and_not_tried_again() -> None:
    async def main() -> None:
        async with running(slow(sequence=["fail", "ok"])) as gateway:
            first, again = await ask(gateway), await ask(gateway)
            assert first.status == again.status == 502
            assert first.error == again.error
            assert again.headers["x-should-retry"] == "false"
            assert gateway.adapter("one").count == 1
            assert (await ask(gateway, "another")).status == 200

    run_virtual(main())


def test_what_was_refused_before_it_was_taken_does_not_use_the_key_up() -> None:
    async def main() -> None:
        async with running(slow(max_concurrency=1, max_batch_size=1) + "[queue]\nmax_tasks = 1\n") as gateway:
            filling = [asyncio.ensure_future(gateway.client.draw(size="64x64")) for _ in range(2)]
            await asyncio.sleep(1)
            assert (await ask(gateway)).status == 503
            assert (await ask(gateway, n=0)).status == 400
            await asyncio.gather(*filling)
            assert (await ask(gateway)).status == 200

    run_virtual(main())


def test_a_key_is_its_tenants_own_and_lasts_a_day() -> None:
    async def main() -> None:
        async with running(slow() + KEYS) as gateway:
            amy, bob = Client(gateway.gateway.app, "sk-amy"), Client(gateway.gateway.app, "sk-bob")
            hers = await ask(gateway, client=amy)
            assert (await ask(gateway, client=bob)).body != hers.body
            await asyncio.sleep(24 * 3600 - 60)
            assert (await ask(gateway, client=amy)).body == hers.body
            await asyncio.sleep(120)
            assert (await ask(gateway, client=amy)).body != hers.body

    run_virtual(main())


def test_a_result_that_is_kept_for_less_than_a_day_does_not_shorten_its_key() -> None:
    async def main() -> None:
        async with running(slow() + "[jobs]\nresult_ttl_hours = 1\n") as gateway:
            first = await ask(gateway)
            await asyncio.sleep(3 * 3600)
            assert (await ask(gateway)).body == first.body

    run_virtual(main())


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "caf\xe9", "tab\tkey", " leading"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    async def main() -> Reply:
        async with running(slow()) as gateway:
            return await ask(gateway, key)

    reply: Reply = run_virtual(main())
    assert reply.status == 400
    assert reply.error["param"] == "Idempotency-Key"


def test_jobs_and_async_requests_honour_it_too() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            body = {"operation": "generation", "body": {"prompt": "x"}}
            headers = {"idempotency-key": "k"}
            first = await gateway.client.post("/v1/jobs", body, headers=headers)
            again = await gateway.client.post("/v1/jobs", body, headers=headers)
            assert first.status == again.status == 202
            assert first.json()["id"] == again.json()["id"]
            assert again.headers["idempotent-replayed"] == "true"
            plain = {"prompt": "x"}
            asynchronous = await gateway.client.post(
                "/v1/images/generations", plain, headers={**headers, "prefer": "respond-async"}
            )
            assert asynchronous.json()["id"] == first.json()["id"]
            waited = await gateway.client.post("/v1/images/generations", plain, headers=headers)
            assert waited.headers["x-job-id"] == first.json()["id"]
            assert gateway.adapter("one").count == 1

    run_virtual(main())


def test_a_stream_with_a_key_can_be_joined_and_told_again() -> None:
    async def main() -> None:
        async with running(slow(previews=True)) as gateway:
            gone = asyncio.Event()
            fields: dict[str, Any] = {"stream": True, "partial_images": 2}
            first = asyncio.ensure_future(ask(gateway, leave=gone, **fields))
            await asyncio.sleep(8)
            gone.set()
            await first
            joined = await ask(gateway, **fields)
            assert len(frames_of(joined.body)) == 3
            told = await ask(gateway, **fields)
            assert [frame.event for frame in frames_of(told.body)] == ["image_generation.completed"]
            done, again = frames_of(joined.body)[-1].data, frames_of(told.body)[-1].data
            assert done["b64_json"] == again["b64_json"]
            assert done["seed"] == again["seed"]
            assert gateway.adapter("one").count == 1

    run_virtual(main())


def test_coalescing_shares_equal_requests_with_a_seed_while_they_run() -> None:
    async def main(toml: str) -> int:
        async with running(slow() + toml) as gateway:
            fields: dict[str, Any] = {"size": "64x64", "seed": 5}
            replies = await asyncio.gather(
                *[gateway.client.draw(**fields) for _ in range(4)],
                gateway.client.draw(size="64x64"),
                gateway.client.draw(size="64x64", seed=6),
            )
            assert {reply.status for reply in replies} == {200}
            await gateway.client.draw(**fields)
            return sum(len(call.items) for call in gateway.adapter("one").calls)

    assert run_virtual(main("[queue]\ncoalesce = true\n")) == 4
    assert run_virtual(main("")) == 7


def test_of_coalesced_clients_the_last_to_leave_ends_the_job() -> None:
    async def main() -> None:
        async with running(slow() + "[queue]\ncoalesce = true\n") as gateway:
            gone = [asyncio.Event() for _ in range(3)]
            body = {"prompt": "x", "seed": 1}
            asking = [
                asyncio.ensure_future(gateway.client.post("/v1/images/generations", body, leave=one)) for one in gone
            ]
            await asyncio.sleep(1)
            for number, one in enumerate(gone):
                assert gateway.adapter("one").cancelled == 0, number
                one.set()
                await asyncio.sleep(0.1)
            assert gateway.adapter("one").cancelled == 1
            await asyncio.gather(*asking)
            assert not gateway.gateway.services.returns

    run_virtual(main())


def test_a_coalesced_client_gets_its_picture_though_the_first_one_left() -> None:
    async def main() -> None:
        async with running(slow() + "[queue]\ncoalesce = true\n") as gateway:
            gone = asyncio.Event()
            body = {"prompt": "x", "seed": 1, "size": "64x64"}
            first = asyncio.ensure_future(gateway.client.post("/v1/images/generations", body, leave=gone))
            await asyncio.sleep(1)
            second = asyncio.ensure_future(gateway.client.post("/v1/images/generations", body))
            await asyncio.sleep(1)
            gone.set()
            await first
            reply = await second
            assert reply.status == 200
            assert reply.json()["data"][0]["seed"] == 1
            assert gateway.adapter("one").count == 1

    run_virtual(main())


def test_a_failure_in_which_nothing_was_drawn_frees_the_key() -> None:
    async def main() -> None:
        async with running(slow(sequence=["not_started", "ok"], repeat="last")) as gateway:
            assert (await ask(gateway)).status == 502
            again = await ask(gateway)
            assert again.status == 200
            assert "idempotent-replayed" not in again.headers
            assert (await ask(gateway)).body == again.body

    run_virtual(main())
