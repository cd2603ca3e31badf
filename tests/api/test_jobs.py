"""`/v1/jobs`: made, looked at, listed, followed, cancelled; and what becomes of them when the gateway stops or dies."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.support.asgi import Client, Reply
from tests.support.frames import comments_of, frames_of
from tests.support.gateways import Harness, running, scripted, wall_clock
from tests.support.virtual_time import run_virtual

from img_serving.domain.stored import StoredJob
from img_serving.ports import StoredArtifact
from img_serving.state.memory import MemoryState
from img_serving.state.sqlite import StateError
from img_serving.storage.memory import MemoryStore

KEYS = "".join(f'[[auth.api_keys]]\nname = "{name}"\nkey = "sk-{name}"\n' for name in ("amy", "bob"))
RECORD = {
    "object", "id", "operation", "status", "model", "n", "position", "eta_seconds", "progress", "attempts", "backend",
    "created_at", "started_at", "finished_at", "expires_at", "request_id", "idempotency_key", "webhook_url", "waiting_for",
    "result", "error",
}  # fmt: skip


def slow(name: str = "one", **more: Any) -> str:
    return scripted(name, **{"latency_seconds": 10, "max_concurrency": 1, "max_batch_size": 1, "steps": 10, **more})


def generation(**fields: Any) -> dict[str, Any]:
    return {"operation": "generation", "body": {"prompt": "a fox", "size": "64x64", **fields}}


async def make(gateway: Harness, client: Client | None = None, **fields: Any) -> dict[str, Any]:
    reply = await (client or gateway.client).post("/v1/jobs", generation(**fields))
    assert reply.status == 202, reply.body
    return dict(reply.json())


async def look(gateway: Harness, job_id: str) -> dict[str, Any]:
    return dict((await gateway.client.get(f"/v1/jobs/{job_id}")).json())


async def until_over(gateway: Harness, job_id: str) -> dict[str, Any]:
    """Followed to its end, by its events."""
    await gateway.client.get(f"/v1/jobs/{job_id}/events")
    return await look(gateway, job_id)


# making and looking


def test_a_job_is_taken_drawn_and_fetched() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            reply = await gateway.client.post("/v1/jobs", generation(n=2, seed=5))
            made = reply.json()
            assert reply.status == 202
            assert made.keys() == RECORD
            assert reply.headers["location"] == f"/v1/jobs/{made['id']}"
            assert reply.headers["x-job-id"] == made["id"]
            assert (made["n"], made["operation"], made["status"]) == (2, "generation", "running")
            done = await until_over(gateway, made["id"])
            assert done["status"] == "succeeded"
            assert done["progress"] == 1
            assert done["created_at"] <= done["started_at"] < done["finished_at"] < done["expires_at"]
            assert done["backend"] == "one"
            assert [one["seed"] for one in done["result"]["data"]] == [5, 6]
            for one in done["result"]["data"]:
                picture = await gateway.nobody.get(one["url"].removeprefix("http://gateway.test"))
                assert picture.status == 200

    run_virtual(main())


def test_the_result_is_the_body_that_the_plain_request_would_have_got() -> None:
    async def main() -> None:
        async with running(scripted("one")) as gateway:
            plain = (await gateway.client.draw(size="64x64", seed=1, response_format="b64_json")).json()
            made = await make(gateway, prompt="a lighthouse", seed=1, response_format="b64_json")
            result = (await until_over(gateway, made["id"]))["result"]
            assert result.keys() == plain.keys()
            assert {**result, "created": 0} == {**plain, "created": 0}

    run_virtual(main())


def test_a_running_job_tells_position_and_progress() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            await until_over(gateway, (await make(gateway))["id"])  # so that its speed is known
            first, second, third = [await make(gateway) for _ in range(3)]
            await asyncio.sleep(5.5)
            records = [await look(gateway, one["id"]) for one in (first, second, third)]
            assert [one["status"] for one in records] == ["running", "queued", "queued"]
            assert records[0]["progress"] == 0.5
            assert [one["position"] for one in records] == [0, 0, 1]
            etas = [one["eta_seconds"] for one in records]
            assert etas[0] < etas[1] < etas[2] < 40

    run_virtual(main())


def test_prefer_respond_async_makes_a_job_of_any_image_request() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            body = {"prompt": "x", "size": "64x64"}
            for prefer in ("respond-async", "wait=10, Respond-Async", "respond-async; foo=1"):
                reply = await gateway.client.post("/v1/images/generations", body, headers={"prefer": prefer})
                assert reply.status == 202
                assert reply.headers["preference-applied"] == "respond-async"
                assert reply.json()["status"] in {"queued", "running"}
            plain = await gateway.client.post("/v1/images/generations", body, headers={"prefer": "not-respond-async"})
            assert plain.status == 200

    run_virtual(main())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "operation"),
        ({"operation": "generation"}, "body"),
        ({"operation": "sing", "body": {}}, "operation"),
        ({"operation": "generation", "body": {}}, "prompt"),
        ({"operation": "generation", "body": 3}, None),
        ({"operation": "generation", "body": {"prompt": "x", "n": 0}}, "n"),
        ({"operation": "generation", "body": {"prompt": "x"}, "color": 1}, "color"),
        ({"operation": "generation", "prompt": "x"}, "prompt"),
        ({"operation": "generation", "body": {"prompt": "x"}, "webhook_url": 7}, "webhook_url"),
    ],
)
def test_a_job_that_cannot_be_is_refused_at_once(body: dict[str, Any], param: str | None) -> None:
    async def main() -> Reply:
        async with running(slow()) as gateway:
            return await gateway.client.post("/v1/jobs", body)

    reply: Reply = run_virtual(main())
    assert reply.status == 400
    assert reply.error["param"] == param


def test_an_unknown_model_and_a_full_queue_are_told_before_the_202() -> None:
    async def main() -> None:
        async with running(slow() + "[queue]\nmax_tasks = 2\n") as gateway:
            reply = await gateway.client.post("/v1/jobs", generation(model="nobody's"))
            assert (reply.status, reply.error["code"]) == (404, "model_not_found")
            replies = await asyncio.gather(*[gateway.client.post("/v1/jobs", generation()) for _ in range(9)])
            taken = [one for one in replies if one.status == 202]
            refused = [one for one in replies if one.status == 503]
            # some may be let in while others are being written down, but never more than fit
            assert 2 <= len(taken) <= 3
            assert len(taken) + len(refused) == 9
            assert refused[0].error["code"] == "queue_full"
            assert "retry-after" in refused[0].headers
            listed = (await gateway.client.get("/v1/jobs")).json()
            assert len(listed["data"]) == len(taken)

    run_virtual(main())


def test_a_job_belongs_to_its_tenant() -> None:
    async def main() -> None:
        async with running(slow() + KEYS) as gateway:
            amy, bob = Client(gateway.gateway.app, "sk-amy"), Client(gateway.gateway.app, "sk-bob")
            made = await make(gateway, amy)
            for client, status in ((amy, 200), (bob, 404), (gateway.client, 404), (gateway.nobody, 401)):
                for path in (f"/v1/jobs/{made['id']}", f"/v1/jobs/{made['id']}/events"):
                    if client is not amy:
                        assert (await client.get(path)).status == status
                assert client is amy or (await client.request("DELETE", f"/v1/jobs/{made['id']}")).status == status
            assert (await bob.get("/v1/jobs")).json()["data"] == []
            assert (await amy.request("DELETE", f"/v1/jobs/{made['id']}")).json()["status"] == "cancelled"
            assert (await bob.get(f"/v1/jobs/{made['id']}")).error["code"] == "job_not_found"

    run_virtual(main())


# lists


def test_the_list_is_newest_first_and_in_pages() -> None:
    async def main() -> None:
        async with running(scripted("one")) as gateway:
            made = [(await make(gateway, prompt=str(number)))["id"] for number in range(5)]
            for job_id in made:
                await until_over(gateway, job_id)
            page = (await gateway.client.get("/v1/jobs?limit=2")).json()
            assert [one["id"] for one in page["data"]] == made[:2:-1]
            assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == (
                "list",
                made[4],
                made[3],
                True,
            )
            rest = (await gateway.client.get(f"/v1/jobs?limit=3&after={page['last_id']}")).json()
            assert [one["id"] for one in rest["data"]] == made[2::-1]
            assert not rest["has_more"]

    run_virtual(main())


def test_the_list_is_filtered() -> None:
    async def main() -> None:
        async with running(slow(sequence=["ok", "fail"], latency_seconds=1)) as gateway:
            headers = {"x-request-id": "my-own", "idempotency-key": "my key"}
            first = (await gateway.client.post("/v1/jobs", generation(), headers=headers)).json()
            await until_over(gateway, first["id"])
            second = await make(gateway)
            await until_over(gateway, second["id"])

            async def ids(query: str) -> list[str]:
                return [one["id"] for one in (await gateway.client.get(f"/v1/jobs?{query}")).json()["data"]]

            assert await ids("status=succeeded") == [first["id"]]
            assert await ids("status=failed") == [second["id"]]
            assert await ids("request_id=my-own") == [first["id"]]
            assert await ids("idempotency_key=my%20key") == [first["id"]]
            assert await ids("operation=edit") == []
            assert await ids("colour=red&operation=generation") == [second["id"], first["id"]]
            bad_limits = ("0", "101", "x", "-1", "01000000", "0001" + "0" * 5000)
            for query in (*[f"limit={one}" for one in bad_limits], "status=odd", "operation=sing"):
                reply = await gateway.client.get(f"/v1/jobs?{query}")
                assert reply.status == 400
                assert reply.error["param"] == query.partition("=")[0]

    run_virtual(main())


def test_running_and_queued_jobs_are_told_apart_in_the_list() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            made = [(await make(gateway))["id"] for _ in range(6)]
            await asyncio.sleep(1)

            async def page(query: str) -> tuple[list[str], bool]:
                found = (await gateway.client.get(f"/v1/jobs?{query}")).json()
                return [one["id"] for one in found["data"]], found["has_more"]

            assert await page("status=running") == (made[:1], False)
            # the store finds the others first, a page at a time
            assert await page("status=running&limit=1") == (made[:1], False)
            assert await page("status=queued&limit=3") == (made[:2:-1], True)
            assert await page(f"status=queued&limit=3&after={made[3]}") == (made[2:0:-1], False)
            assert await page("status=succeeded") == ([], False)
            asking = asyncio.ensure_future(gateway.client.draw())
            await asyncio.sleep(1)
            assert (await page("status=running")) == (made[:1], False)
            # a page always ends with a job that the next one can begin after
            assert await page("limit=1") == (made[5:], True)
            found, _ = await page("limit=3")
            assert (len(found), found[1:]) == (3, made[:3:-1])
            asking.cancel()

    run_virtual(main())


def test_a_list_has_no_pictures_in_it_unless_it_is_of_one_job() -> None:
    async def main() -> None:
        async with running(scripted("one")) as gateway:
            headers = {"x-request-id": "always-the-same"}
            for number in (1, 2):
                body = generation(response_format="b64_json")
                made = (await gateway.client.post("/v1/jobs", body, headers=headers)).json()
                await until_over(gateway, made["id"])
                found = (await gateway.client.get("/v1/jobs?request_id=always-the-same")).json()["data"]
                told = {name for one in found for name in one["result"]["data"][0]}
                assert len(found) == number
                assert ("b64_json" in told, "url" in told) == (number == 1, number == 2)

    run_virtual(main())


def test_a_plain_request_in_flight_is_found_by_its_request_id_and_can_be_cancelled() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            asking = asyncio.ensure_future(
                gateway.client.post("/v1/images/generations", {"prompt": "x"}, headers={"x-request-id": "mine"})
            )
            await asyncio.sleep(1)
            (found,) = (await gateway.client.get("/v1/jobs?request_id=mine")).json()["data"]
            assert found["status"] == "running"
            assert (await look(gateway, found["id"]))["id"] == found["id"]
            reply = await gateway.client.request("DELETE", f"/v1/jobs/{found['id']}")
            assert reply.json()["status"] == "cancelled"
            assert (await asking).status == 499
            assert gateway.adapter("one").cancelled == 1
            assert (await gateway.client.get("/v1/jobs?request_id=mine")).json()["data"] == []

    run_virtual(main())


# cancelling


@pytest.mark.parametrize("waits", [True, False])
def test_a_cancelled_job_stops_at_the_backend_and_stays_cancelled(waits: bool) -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            first = await make(gateway)
            made = await make(gateway) if waits else first
            await asyncio.sleep(2)
            reply = await gateway.client.request("DELETE", f"/v1/jobs/{made['id']}")
            assert reply.status == 200
            assert reply.json()["status"] == "cancelled"
            assert reply.json()["error"]["code"] == "cancelled"
            assert gateway.adapter("one").cancelled == (0 if waits else 1)
            again = await gateway.client.request("DELETE", f"/v1/jobs/{made['id']}")
            assert again.json() == reply.json() == await look(gateway, made["id"])

    run_virtual(main())


def test_cancelling_what_is_over_changes_nothing() -> None:
    async def main() -> None:
        async with running(scripted("one")) as gateway:
            done = await until_over(gateway, (await make(gateway))["id"])
            assert (await gateway.client.request("DELETE", f"/v1/jobs/{done['id']}")).json() == done
            assert (await gateway.client.request("DELETE", "/v1/jobs/job_nobody")).status == 404

    run_virtual(main())


# following


def test_events_tell_the_whole_story_and_end() -> None:
    async def main() -> None:
        async with running(slow(previews=True)) as gateway:
            await make(gateway)
            made = await make(gateway, partial_images=2)
            frames = frames_of((await gateway.client.get(f"/v1/jobs/{made['id']}/events")).body)
            names = [frame.event for frame in frames]
            assert names[0] == "job.queued"
            assert names[1] == "job.running"
            assert names[-1] == "job.succeeded"
            assert names.count("image_generation.partial_image") == 2
            assert names.count("image_generation.completed") == 1
            progress = [frame.data["progress"] for frame in frames if frame.event.startswith("job.")]
            assert progress == sorted(progress)
            assert len(progress) > 8
            ids = [int(frame.id or 0) for frame in frames]
            assert ids == sorted(set(ids))
            assert frames[-1].data == await look(gateway, made["id"])

    run_virtual(main())


def test_events_go_on_where_the_client_stopped_listening() -> None:
    async def main() -> None:
        async with running(slow(previews=True)) as gateway:
            made = await make(gateway, partial_images=3)
            path = f"/v1/jobs/{made['id']}/events"
            gone = asyncio.Event()
            listening = asyncio.ensure_future(gateway.client.get(path))
            await asyncio.sleep(6)
            gone.set()
            whole = frames_of((await listening).body)
            pictures = [frame for frame in whole if frame.event.startswith("image_")]
            for number, frame in enumerate(pictures):
                rest = frames_of((await gateway.client.get(path, headers={"last-event-id": str(frame.id)})).body)
                assert [one.event for one in rest] == ["job.succeeded"], number
            last = {"last-event-id": str(whole[-1].id)}
            assert (await gateway.client.get(path, headers=last)).status == 204
            # the id of another job's event, or one from before the clock was set back, is none that ends this
            for other in ("odd", str(int(whole[-1].id or 0) + 1), "9" * 19):
                rest = frames_of((await gateway.client.get(path, headers={"last-event-id": other})).body)
                assert [one.event for one in rest] == ["job.succeeded"]

    run_virtual(main())


def test_a_listener_that_comes_back_hears_only_what_is_new() -> None:
    async def main() -> None:
        async with running(slow(previews=True, latency_seconds=100)) as gateway:
            made = await make(gateway, partial_images=3)
            path = f"/v1/jobs/{made['id']}/events"
            await asyncio.sleep(55)
            live = gateway.gateway.services.jobs.live(made["id"])
            assert live is not None
            assert len(live.news) == 2
            frames = frames_of((await gateway.client.get(path, headers={"last-event-id": str(live.news_ids[0])})).body)
            indices = [one.data["partial_image_index"] for one in frames if one.event.endswith("partial_image")]
            assert indices == [1, 2]

    run_virtual(main())


def test_silence_is_filled_and_a_listener_that_leaves_does_not_end_the_job() -> None:
    async def main() -> None:
        async with running(slow(latency_seconds=100, steps=0, backend__timeout_ms=200_000)) as gateway:
            made = await make(gateway)
            gone = asyncio.Event()
            path = f"/v1/jobs/{made['id']}/events"
            leaving = asyncio.ensure_future(gateway.client.get(path, leave=gone))
            staying = asyncio.ensure_future(gateway.client.get(path))
            await asyncio.sleep(50)
            gone.set()
            await leaving
            assert comments_of((await staying).body) >= 5
            assert gateway.adapter("one").cancelled == 0
            assert (await look(gateway, made["id"]))["status"] == "succeeded"

    run_virtual(main())


# how they end


def test_a_failed_job_tells_the_error_of_the_plain_request() -> None:
    async def main() -> None:
        async with running(slow(sequence=["refuse_content", "fail"])) as gateway:
            refused = await until_over(gateway, (await make(gateway))["id"])
            assert refused["status"] == "failed"
            assert refused["error"]["code"] == "moderation_blocked"
            failed = await until_over(gateway, (await make(gateway))["id"])
            assert failed["error"]["code"] == "backend_failed"
            assert failed["result"] is None

    run_virtual(main())


def test_a_job_waits_for_a_backend_that_is_away_and_not_only_for_as_long_as_a_request() -> None:
    async def main() -> None:
        async with running(slow(sequence=["not_started"] * 12 + ["ok"], repeat="last")) as gateway:
            made = await make(gateway)
            await asyncio.sleep(3)
            assert (await look(gateway, made["id"]))["status"] in {"queued", "running"}
            done = await until_over(gateway, made["id"])
            assert done["status"] == "succeeded"
            assert done["attempts"] > 3

    run_virtual(main())


def test_a_job_has_a_deadline_of_its_own() -> None:
    async def main() -> None:
        toml = slow(latency_seconds=1000, backend__timeout_ms=10_000_000)
        async with running(toml + "[jobs]\nmax_age_hours = 0.1\n[queue]\nrequest_timeout_seconds = 5\n") as gateway:
            made = await make(gateway)
            await asyncio.sleep(300)
            assert (await look(gateway, made["id"]))["status"] == "running"
            await asyncio.sleep(100)
            record = await look(gateway, made["id"])
            assert record["status"] == "expired"
            assert record["error"]["code"] == "deadline_exceeded"

    run_virtual(main())


def test_a_result_is_forgotten_after_its_time() -> None:
    async def main() -> None:
        async with running(scripted("one") + "[jobs]\nresult_ttl_hours = 1\n") as gateway:
            made = await until_over(gateway, (await make(gateway))["id"])
            await asyncio.sleep(3590)
            assert (await look(gateway, made["id"]))["status"] == "succeeded"
            await asyncio.sleep(20)
            assert (await gateway.client.get(f"/v1/jobs/{made['id']}")).status == 404
            await asyncio.sleep(100)
            assert gateway.gateway.state._jobs == {}  # type: ignore[attr-defined]

    run_virtual(main())


def test_a_result_whose_pictures_were_swept_says_so() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with running(scripted("one"), store=store) as gateway:
            made = await until_over(gateway, (await make(gateway, response_format="b64_json"))["id"])
            for name in await store.names():
                await store.delete(name)
            record = await look(gateway, made["id"])
            assert record["status"] == "succeeded"
            assert record["result"] is None
            assert record["error"]["code"] == "result_expired"

    run_virtual(main())


# restarts


class _Disk(MemoryStore):
    """Keeps what it has when a gateway ends."""

    def close(self) -> None:
        pass


def restarted(toml: str, before: float, *, after_toml: str | None = None) -> tuple[list[dict[str, Any]], Any]:
    """Make three jobs, let the gateway die `before` seconds later, and see what another one makes of them."""

    async def main() -> tuple[list[dict[str, Any]], Any]:
        clock = wall_clock()
        state, store = MemoryState(clock=clock), _Disk()
        async with running(toml, state=state, store=store) as gateway:
            made = [await make(gateway, seed=number) for number in range(3)]
            await asyncio.sleep(before)
            survived = dict(state._jobs)
        revived = MemoryState(clock=clock)
        revived._jobs = survived
        async with running(after_toml or toml, state=revived, store=store) as gateway:
            records = [await until_over(gateway, one["id"]) for one in made]
            return records, (gateway.adapter("one").count, await store.names())

    found: tuple[list[dict[str, Any]], Any] = run_virtual(main())
    return found


def test_after_a_crash_what_waited_and_what_ran_goes_on() -> None:
    records, (calls, names) = restarted(slow(), 15)
    assert [one["status"] for one in records] == ["succeeded"] * 3
    assert calls == 2  # the first was done, the second is drawn again
    assert len(names) == 3


def test_what_may_have_been_paid_for_is_not_drawn_again() -> None:
    records, (calls, names) = restarted(slow(backend__retry_unknown=False), 15)
    assert [one["status"] for one in records] == ["succeeded", "failed", "succeeded"]
    assert records[1]["error"]["code"] == "outcome_unknown"
    assert calls == 1
    assert len(names) == 2


@pytest.mark.parametrize(("stored", "status"), [(2, "succeeded"), (1, "failed")])
def test_what_was_paid_for_and_stored_when_the_gateway_died_is_not_lost(stored: int, status: str) -> None:
    toml = slow(backend__retry_unknown=False)

    class Dying(_Disk):
        async def put(self, data: Any, extension: str, name: str | None = None) -> StoredArtifact:
            if len(await self.names()) == stored:
                await asyncio.get_running_loop().create_future()
            return await super().put(data, extension, name)

    class Written(MemoryState):
        async def save_job(self, job: StoredJob, *more: Any) -> None:
            if not job.is_over:
                await super().save_job(job, *more)

    async def main() -> None:
        clock = wall_clock()
        state, store = Written(clock=clock), Dying()
        async with running(toml, state=state, store=store) as gateway:
            made = await make(gateway, n=2, seed=5, size="32x48")
            await asyncio.sleep(30)
            survived = dict(state._jobs)
            assert len(await store.names()) == stored
        revived, kept = MemoryState(clock=clock), _Disk()
        revived._jobs, kept._pictures = survived, store._pictures
        async with running(toml, state=revived, store=kept) as gateway:
            record = await look(gateway, made["id"])
            assert record["status"] == status
            assert gateway.adapter("one").count == 0
            if status == "succeeded":
                result = record["result"]
                assert [one["seed"] for one in result["data"]] == [5, 6]
                assert result["size"] == "32x48"
                assert len(await kept.names()) == 2
            else:
                assert record["error"]["code"] == "outcome_unknown"
                assert await kept.names() == []

    run_virtual(main())


def test_what_is_known_to_have_failed_cost_nothing_and_is_drawn_again() -> None:
    toml = slow(backend__retry_unknown=False, sequence=["not_started"], latency_seconds=0.1)
    records, _ = restarted(toml, 1.5, after_toml=slow())
    assert [one["status"] for one in records] == ["succeeded"] * 3


def test_a_job_keeps_its_place_its_deadline_and_its_seed() -> None:
    toml = slow() + "[jobs]\nmax_age_hours = 0.005\n"  # 18 seconds
    records, _ = restarted(toml, 5)
    assert [one["status"] for one in records] == ["succeeded", "expired", "expired"]
    assert [one["seed"] for one in records[0]["result"]["data"]] == [0]


def test_a_model_that_is_not_there_yet_is_waited_for_and_one_that_never_comes_is_not() -> None:
    gone = slow("other", models=["another"], backend__models=["another"])
    named = slow(backend__models=["sd"])

    async def main() -> None:
        clock = wall_clock()
        state, store = MemoryState(clock=clock), _Disk()
        async with running(named, state=state, store=store) as gateway:
            made = await make(gateway, model="sd")
            survived = dict(state._jobs)
        revived = MemoryState(clock=clock)
        revived._jobs = survived
        async with running(gone, state=revived, store=store) as gateway:
            await asyncio.sleep(100)
            assert (await look(gateway, made["id"]))["status"] == "queued"
            done = await until_over(gateway, made["id"])
            assert done["error"]["code"] == "model_not_found"

    run_virtual(main())


def test_stopping_in_order_lets_what_runs_finish_and_keeps_what_waits() -> None:
    async def main() -> None:
        state, store = MemoryState(clock=wall_clock()), _Disk()
        async with running(slow(), state=state, store=store) as gateway:
            made = [await make(gateway) for _ in range(3)]
            await asyncio.sleep(5)
            began = asyncio.get_running_loop().time()
            await gateway.gateway.drain(15)
            assert asyncio.get_running_loop().time() - began < 6
            refused = await gateway.client.post("/v1/jobs", generation())
            assert (refused.status, refused.error["code"]) == (503, "draining")
            assert [str(state._jobs[one["id"]].status) for one in made] == ["succeeded", "queued", "queued"]
            survived = dict(state._jobs)
        revived = MemoryState(clock=wall_clock())
        revived._jobs = survived
        async with running(slow(), state=revived, store=store) as gateway:
            assert [(await until_over(gateway, one["id"]))["status"] for one in made] == ["succeeded"] * 3

    run_virtual(main())


def test_a_store_that_cannot_be_written_refuses_the_job_and_keeps_nothing() -> None:

    async def main() -> None:
        async with running(slow()) as gateway:

            async def full(job: object) -> None:
                raise StateError("the disk is full")

            gateway.gateway.state.add_job = full  # type: ignore[method-assign]
            reply = await gateway.client.post("/v1/jobs", generation())
            assert (reply.status, reply.error["code"]) == (503, "state_failed")
            assert repr(gateway.gateway.services.jobs) == "<Jobs 0 live>"
            await asyncio.sleep(60)
            assert gateway.adapter("one").count == 0

    run_virtual(main())


def test_a_plain_request_costs_no_write_to_the_job_store() -> None:
    async def main() -> None:
        async with running(scripted("one")) as gateway:

            async def forbidden(*_: object) -> None:
                raise AssertionError("a write")

            gateway.gateway.state.add_job = forbidden  # type: ignore[method-assign, assignment]
            gateway.gateway.state.save_job = forbidden  # type: ignore[method-assign, assignment]
            assert (await gateway.client.draw(size="64x64")).status == 200
            assert (await gateway.client.draw(size="64x64", stream=True)).status == 200

    run_virtual(main())


def test_a_job_s_log_line_and_counters_are_those_of_any_request() -> None:
    async def main() -> None:
        async with running(scripted("one")) as gateway:
            made = await until_over(gateway, (await make(gateway, n=2))["id"])
            line = next(one for one in gateway.log_lines() if one.get("job_id") == made["id"])
            assert line["status"] == 202
            assert "fox" not in json.dumps(gateway.log_lines())
            metrics = (await gateway.client.get("/metrics")).body.decode()
            assert 'img_serving_jobs_total{status="succeeded"} 1' in metrics
            assert 'img_serving_pictures_total{backend="one"} 2' in metrics
            assert 'img_serving_durable_jobs_total{event="taken"} 1' in metrics
            assert 'img_serving_live_jobs{kept="disk"} 0' in metrics

    run_virtual(main())


class _SlowDisk(MemoryStore):
    """Takes three seconds to store a picture."""

    async def put(self, *args: Any, **more: Any) -> StoredArtifact:
        await asyncio.sleep(3)
        return await super().put(*args, **more)


def test_stopping_in_order_keeps_what_was_drawn_and_paid_for() -> None:
    async def main() -> None:
        state, store = MemoryState(clock=wall_clock()), _SlowDisk()
        async with running(slow(backend__retry_unknown=False), state=state, store=store) as gateway:
            made = await make(gateway, n=2)
            await asyncio.sleep(21)  # both are drawn, none is stored
            assert await store.names() == []
            await gateway.gateway.drain(15)
            assert state._jobs[made["id"]].status == "succeeded"
            assert len(await store.names()) == 2

    run_virtual(main())


@pytest.mark.parametrize("runs", [True, False])
def test_stopping_in_order_neither_fails_nor_waits_for_a_job_that_nobody_could_take(runs: bool) -> None:
    async def main() -> None:
        state = MemoryState(clock=wall_clock())
        async with running(slow(sequence=["not_started"], latency_seconds=2), state=state) as gateway:
            made = await make(gateway)
            following = asyncio.ensure_future(gateway.client.get(f"/v1/jobs/{made['id']}/events"))
            await asyncio.sleep(1 if runs else 60)  # by then it rests for half a minute
            began = asyncio.get_running_loop().time()
            await gateway.gateway.drain(15)
            assert asyncio.get_running_loop().time() - began < 1.1
            frames = frames_of((await following).body)
            assert {frame.event for frame in frames} <= {"job.queued", "job.running", "job.progress"}
            assert state._jobs[made["id"]].status == "queued"

    run_virtual(main())


def test_jobs_that_nobody_can_take_do_not_pile_up_without_bound() -> None:
    async def main() -> None:
        toml = slow(sequence=["not_started"], latency_seconds=0) + "[queue]\nmax_tasks = 4\n"
        async with running(toml) as gateway:
            replies = []
            for _ in range(9):
                replies.append(await gateway.client.post("/v1/jobs", generation()))
                await asyncio.sleep(0.5)
            assert [one.status for one in replies] == [202] * 4 + [503] * 5
            assert replies[-1].error["code"] == "queue_full"
            made = [one.json()["id"] for one in replies[:4]]
            assert (await gateway.client.request("DELETE", f"/v1/jobs/{made[0]}")).json()["status"] == "cancelled"
            assert (await gateway.client.post("/v1/jobs", generation())).status == 202

    run_virtual(main())


def test_a_clock_that_is_set_back_ends_no_job_before_it_began() -> None:
    async def main() -> None:
        async with running(slow()) as gateway:
            jobs = gateway.gateway.services.jobs
            right = jobs._unix_clock
            made = await make(gateway)
            jobs._unix_clock = lambda: right() - 3600
            done = await until_over(gateway, made["id"])
            assert done["status"] == "succeeded"
            assert done["created_at"] <= done["started_at"] <= done["finished_at"] < done["expires_at"]

    run_virtual(main())


class _FullState(MemoryState):
    """Cannot write down the end of a job while it is `full`."""

    full = True

    async def save_job(self, *args: Any) -> None:
        if self.full:
            raise StateError("the disk is full")
        await super().save_job(*args)


def test_an_end_that_cannot_be_written_down_for_long_is_told_and_written_later() -> None:
    async def main() -> None:
        state = _FullState(clock=wall_clock())
        async with running(slow(), state=state) as gateway:
            made = await make(gateway)
            await asyncio.sleep(60)
            told = await look(gateway, made["id"])
            assert (told["status"], told["error"]["code"]) == ("failed", "state_failed")
            assert (await gateway.client.request("DELETE", f"/v1/jobs/{made['id']}")).json() == told
            assert (await gateway.client.get("/v1/jobs?status=failed")).json()[
                "data"
            ] == []  # the store knows no better
            assert [one["id"] for one in (await gateway.client.get("/v1/jobs")).json()["data"]] == [made["id"]]
            assert state._jobs[made["id"]].status == "queued"
            state.full = False
            await asyncio.sleep(61)
            assert state._jobs[made["id"]].status == "failed"
            assert await look(gateway, made["id"]) == told
            assert repr(gateway.gateway.services.jobs) == "<Jobs 0 live>"

    run_virtual(main())


def test_an_idempotency_key_tells_the_same_while_the_end_is_not_written_down() -> None:
    async def main() -> None:
        async with running(slow(), state=_FullState(clock=wall_clock())) as gateway:
            for wait in (0, 0, 600):
                await asyncio.sleep(wait)
                body = {"prompt": "x", "size": "64x64"}
                reply = await gateway.client.post("/v1/images/generations", body, headers={"idempotency-key": "k"})
                assert (reply.status, reply.error["code"]) == (503, "state_failed")
            assert gateway.adapter("one").count == 1
            began = asyncio.get_running_loop().time()
            await gateway.gateway.drain(15)
            assert asyncio.get_running_loop().time() - began < 1

    run_virtual(main())


def test_a_backend_that_is_replaced_finds_its_jobs_again() -> None:
    async def main() -> None:
        own = {
            "name": "own",
            "protocol": "scripted",
            "models": ["sd"],
            "scripted": {"models": ["sd"], "latency_seconds": 5},
        }
        async with running(slow()) as gateway:
            own["scripted"] |= {"max_concurrency": 1, "max_batch_size": 1}  # type: ignore[operator]
            assert (await gateway.client.post("/v1/backends", own)).status == 201
            made = [await make(gateway, model="sd") for _ in range(3)]
            await asyncio.sleep(1)
            assert (await gateway.client.request("DELETE", "/v1/backends/own")).status == 200
            await asyncio.sleep(60)
            assert (await gateway.client.post("/v1/backends", own)).status == 201
            assert [(await until_over(gateway, one["id"]))["status"] for one in made] == ["succeeded"] * 3
            lost = await make(gateway, model="sd")
            held = await make(gateway, model="sd")
            assert (await gateway.client.request("DELETE", "/v1/backends/own")).status == 200
            assert (await until_over(gateway, lost["id"]))["status"] == "succeeded"
            gone = await until_over(gateway, held["id"])
            assert (gone["status"], gone["error"]["code"]) == ("failed", "model_not_found")

    run_virtual(main())


def test_a_job_that_nobody_can_take_says_so_and_is_asked_for_when_the_backends_change() -> None:
    async def main() -> None:
        away = slow("away", sequence=["not_started"], latency_seconds=0.1, models=["sd"])
        async with running(away) as gateway:
            made = await make(gateway, model="sd")
            await asyncio.sleep(30)
            record = await look(gateway, made["id"])
            assert record["status"] == "queued"
            assert "not started, as scripted" in record["waiting_for"]
            assert (await gateway.client.get("/v1/jobs?status=queued")).json()["data"][0]["id"] == made["id"]
            began = asyncio.get_running_loop().time()
            own = {"name": "own", "protocol": "scripted", "models": ["sd"], "scripted": {"latency_seconds": 1}}
            assert (await gateway.client.post("/v1/backends", own)).status == 201
            done = await until_over(gateway, made["id"])
            assert (done["status"], done["waiting_for"]) == ("succeeded", None)
            assert asyncio.get_running_loop().time() - began < 10

    run_virtual(main())


def test_a_listener_is_told_first_where_the_job_stands() -> None:
    async def main() -> None:
        async with running(slow(previews=True)) as gateway:
            made = await make(gateway, partial_images=1)
            await asyncio.sleep(7)
            frames = frames_of((await gateway.client.get(f"/v1/jobs/{made['id']}/events")).body)
            assert [frame.event for frame in frames][:2] == ["job.running", "image_generation.partial_image"]
            ids = [int(frame.id or 0) for frame in frames]
            assert ids == sorted(set(ids))
            assert frames[1].data["size"] == "64x64"

    run_virtual(main())
