"""Models, backends, stored images, health and the API's own description."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.gateways import running, scripted
from tests.support.virtual_time import run_virtual

from img_serving.state.memory import MemoryState
from img_serving.state.sqlite import StateError
from img_serving.storage.local_disk import LocalDiskStore
from img_serving.storage.memory import MemoryStore

ONE = scripted("one", backend__default_size="16x16", backend__models=["org/model", "plain"])


def test_models_are_listed_and_found_also_with_slashes() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            listed = (await gateway.client.get("/v1/models")).json()
            assert listed["object"] == "list"
            assert [one["id"] for one in listed["data"]] == ["org/model", "plain"]
            for path in ("/v1/models/org/model", "/v1/models/org%2Fmodel", "/models/org/model"):
                model = (await gateway.client.get(path)).json()
                assert model["id"] == "org/model"
                assert model["object"] == "model"
                assert isinstance(model["created"], int)
                assert model["owned_by"] == "one"
            missing = await gateway.client.get("/v1/models/nope")
            assert missing.status == 404
            assert missing.error["code"] == "model_not_found"

    run_virtual(main())


def test_discovered_models_and_aliases_are_listed() -> None:
    async def main() -> None:
        toml = '[routing.aliases]\n"dall-e-3" = "found"\n"broken" = "nowhere"\n' + scripted("one", models=["found"])
        async with running(toml) as gateway:
            await asyncio.sleep(0.1)
            assert [one["id"] for one in (await gateway.client.get("/v1/models")).json()["data"]] == [
                "found",
                "dall-e-3",
            ]

    run_virtual(main())


def test_the_built_in_backend_is_there_exactly_while_none_is_configured() -> None:
    async def main() -> None:
        async with running("") as gateway:
            (record,) = (await gateway.client.get("/v1/backends")).json()["data"]
            assert record["name"] == "procedural"
            assert record["protocol"] == "builtin"
            assert record["models"] == ["procedural"]
            added = await gateway.client.post("/v1/backends", {"name": "two", "protocol": "scripted"})
            assert added.status == 201
            names = [one["name"] for one in (await gateway.client.get("/v1/backends")).json()["data"]]
            assert names == ["procedural", "two"]
            assert (await gateway.client.request("DELETE", "/v1/backends/procedural")).status == 409
        async with running(ONE) as gateway:
            names = [one["name"] for one in (await gateway.client.get("/v1/backends")).json()["data"]]
            assert names == ["one"]

    asyncio.run(main())


def test_backends_are_added_used_and_removed_at_once() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            body = {
                "name": "two", "protocol": "scripted", "models": ["m2"], "default_size": "16x16", "weight": 2,
                "scripted": {"latency_seconds": 0.1},
            }  # fmt: skip
            added = await gateway.client.post("/v1/backends", body)
            assert added.status == 201
            record = added.json()
            assert record["name"] == "two"
            assert record["weight"] == 2
            assert record["enabled"] is True
            assert record["models"] == ["m2"]
            assert (await gateway.client.get("/v1/backends/two")).json()["name"] == "two"
            assert (await gateway.client.draw(model="m2")).headers["x-backend"] == "two"
            again = await gateway.client.post("/v1/backends", body)
            assert again.status == 409
            assert again.error["param"] == "name"
            removed = await gateway.client.request("DELETE", "/v1/backends/two")
            assert removed.status == 200
            assert removed.json()["deleted"] is True
            assert (await gateway.client.get("/v1/backends/two")).status == 404
            assert (await gateway.client.request("DELETE", "/v1/backends/two")).status == 404
            assert (await gateway.client.draw(model="m2")).status == 404

    run_virtual(main())


def test_work_in_flight_on_a_removed_backend_finishes() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            body = {
                "name": "two", "protocol": "scripted", "models": ["m2"], "default_size": "16x16",
                "scripted": {"latency_seconds": 5, "max_concurrency": 1, "batch": "single"},
            }  # fmt: skip
            await gateway.client.post("/v1/backends", body)
            asking = [asyncio.create_task(gateway.client.draw(model="m2")) for _ in range(2)]
            await asyncio.sleep(1)
            await gateway.client.request("DELETE", "/v1/backends/two")
            replies = await asyncio.gather(*asking)
            assert replies[0].status == 200
            assert replies[1].status == 503
            assert gateway.gateway.dispatcher.scheduler.snapshot(0).running == 0
            await asyncio.sleep(0.1)
            assert len(gateway.gateway.registry._by_id) == 1

    run_virtual(main())


def test_backends_added_over_the_api_survive_a_restart_and_the_file_wins() -> None:
    async def main() -> None:
        state = MemoryState()
        async with running(ONE, state=state) as gateway:
            body = {"name": "two", "protocol": "scripted", "weight": 3}
            assert (await gateway.client.post("/v1/backends", body)).status == 201
            await gateway.client.post("/v1/backends", {"name": "three", "protocol": "scripted"})
            await gateway.client.request("DELETE", "/v1/backends/three")
        state._closed = False  # the same store, opened again
        async with running(ONE + scripted("one-more"), state=state) as gateway:
            records = {one["name"]: one for one in (await gateway.client.get("/v1/backends")).json()["data"]}
            assert list(records) == ["one", "one-more", "two"]
            assert records["two"]["weight"] == 3
            assert records["two"]["origin"] == "api"
            assert (await gateway.client.request("DELETE", "/v1/backends/one")).status == 409
        state._closed = False
        async with running(scripted("two", backend__weight=9), state=state) as gateway:
            records = {one["name"]: one for one in (await gateway.client.get("/v1/backends")).json()["data"]}
            assert records["two"]["weight"] == 9
            assert records["two"]["origin"] == "file"
            refused = await gateway.client.request("DELETE", "/v1/backends/two")
            assert refused.status == 409
            assert "test.toml" in refused.error["message"]

    run_virtual(main())


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"name": "x", "protocol": "openai", "endpoints": ["ftp://h"]}, "endpoints[0]", "http"),
        ({"name": "x", "protocol": "openai", "endpoints": ["not a url"]}, "endpoints[0]", ""),
        ({"name": "x", "protocol": "openai", "endpoints": []}, "endpoints", ""),
        ({"name": "x", "protocol": "telepathy", "endpoints": ["http://h"]}, "protocol", ""),
        ({"name": "x", "protocol": "kserve", "endpoints": ["http://h/path"]}, "endpoints[0]", "path"),
        ({"name": "x", "protocol": "openai", "endpoints": ["http://h"], "timeout": 5}, "timeout", "timeout_ms"),
        ({"name": "x", "protocol": "openai", "endpoints": ["http://h"], "timeout_ms": 0}, "timeout_ms", ""),
        ({"name": "x", "protocol": "openai", "endpoints": ["http://h"], "weight": "heavy"}, "weight", ""),
        ({"name": "../x", "protocol": "scripted"}, "name", ""),
        ({"protocol": "scripted"}, "name", ""),
        ({"name": "x", "protocol": "scripted", "scripted": {"latency": 1}}, "scripted", "latency_seconds"),
    ],
)
def test_a_bad_backend_is_400_naming_the_key(body: dict[str, Any], param: str, says: str) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.post("/v1/backends", body)
            assert reply.status == 400, reply.body
            assert reply.error["param"] == param
            assert says in reply.error["message"]
            assert len((await gateway.client.get("/v1/backends")).json()["data"]) == 1

    run_virtual(main())


def test_no_secret_of_a_backend_is_ever_shown() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            body = {
                "name": "paid", "protocol": "openai", "endpoints": ["http://127.0.0.1:9"], "api_key": "sk-upstream-secret",
                "headers": {"X-Token": "header-secret"},
            }  # fmt: skip
            added = await gateway.client.post("/v1/backends", body)
            assert added.status == 201
            await asyncio.sleep(0.1)
            texts = [
                added.body,
                (await gateway.client.get("/v1/backends")).body,
                (await gateway.nobody.get("/metrics")).body,
            ]
            texts.append((await gateway.client.draw(backend="paid", model="x")).body)
            texts.append(repr(gateway.gateway.registry.snapshots()).encode())
            for text in texts:
                assert b"secret" not in text

    asyncio.run(main())


def test_a_disabled_backend_is_no_candidate_and_is_not_counted() -> None:
    async def main() -> None:
        async with running(ONE + scripted("off", backend__enabled=False, backend__models=["off-model"])) as gateway:
            assert (await gateway.client.draw(model="off-model")).status == 404
            assert (await gateway.client.draw(backend="off")).status == 503
            health = (await gateway.nobody.get("/health")).json()
            assert health["backends"] == {"total": 1, "healthy": 1, "unhealthy": 0}
            ids = [one["id"] for one in (await gateway.client.get("/v1/models")).json()["data"]]
            assert "off-model" not in ids

    run_virtual(main())


def test_health_tells_how_many_backends_are_usable() -> None:
    async def main() -> None:
        async with running(ONE + scripted("two", healthy=False)) as gateway:
            await asyncio.sleep(5)
            health = await gateway.nobody.get("/health")
            assert health.status == 200
            assert health.json()["status"] == "degraded"
            assert health.json()["backends"] == {"total": 2, "healthy": 1, "unhealthy": 1}
            gateway.adapter("two").healthy = True
            await asyncio.sleep(60)
            assert (await gateway.nobody.get("/health")).json()["status"] == "healthy"
            assert (await gateway.nobody.get("/readyz")).status == 200

    run_virtual(main())


def test_a_recovering_endpoint_is_used_again() -> None:
    async def main() -> None:
        toml = scripted("a", backend__models=["m"], healthy=False) + scripted("b", backend__models=["m"])
        async with running(toml) as gateway:
            await asyncio.sleep(3)
            used = {(await gateway.client.draw(model="m", size="16x16")).headers["x-backend"] for _ in range(6)}
            assert used == {"b"}
            gateway.adapter("a").healthy = True
            await asyncio.sleep(40)
            used = {(await gateway.client.draw(model="m", size="16x16")).headers["x-backend"] for _ in range(6)}
            assert used == {"a", "b"}

    run_virtual(main())


async def link_of(gateway: Any, **fields: Any) -> str:
    reply = await gateway.client.draw(**fields)
    return str(reply.json()["data"][0]["url"]).removeprefix("http://gateway.test")


def test_stored_images_have_etag_ranges_and_immutable_caching() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            path = await link_of(gateway)
            whole = await gateway.nobody.get(path)
            size = len(whole.body)
            assert whole.headers["accept-ranges"] == "bytes"
            assert "immutable" in whole.headers["cache-control"]
            etag = whole.headers["etag"]
            for value in (etag, f'"x", {etag}', "*", f"W/{etag}"):
                cached = await gateway.nobody.get(path, headers={"If-None-Match": value})
                assert cached.status == 304
                assert cached.body == b""
            head = await gateway.nobody.request("HEAD", path)
            assert head.headers["content-length"] == str(size)
            for asked, start, stop in (
                ("bytes=0-9", 0, 10),
                ("bytes=5-", 5, size),
                ("bytes=-7", size - 7, size),
                (f"bytes=0-{size * 2}", 0, size),
            ):
                part = await gateway.nobody.get(path, headers={"Range": asked})
                assert part.status == 206
                assert part.body == whole.body[start:stop]
                assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
            for asked in (f"bytes={size}-", "bytes=-0"):
                reply = await gateway.nobody.get(path, headers={"Range": asked})
                assert reply.status == 416
                assert reply.error["code"] == "range_not_satisfiable"
            for asked in ("bytes=0-1,3-4", "lines=1-2", "bytes=9-1", "bytes=x-", "bytes=-"):
                assert (await gateway.nobody.get(path, headers={"Range": asked})).status == 200
            fresh = await gateway.nobody.get(path, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
            assert fresh.status == 200

    run_virtual(main())


@pytest.mark.parametrize(
    "name",
    [
        "0" * 32 + ".png",
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%00.png",
        "x.png",
        ".png",
        "가나다.png",
        "a" * 5000,
        "0" * 32 + ".png/x",
        "0" * 32 + ".exe",
    ],
)
def test_unknown_and_hostile_names_are_404(name: str, tmp_path: Path) -> None:
    async def main() -> None:
        store = LocalDiskStore(tmp_path, ttl_seconds=None, max_bytes=0)
        async with running(ONE, store=store) as gateway:
            reply = await gateway.nobody.get(f"/images/{name}")
            assert reply.status == 404
            assert reply.error["code"] == "image_not_found"

    asyncio.run(main())


def test_an_expired_image_is_404() -> None:
    async def main() -> None:
        now = [1000.0]
        async with running(ONE, store=MemoryStore(ttl_seconds=60, clock=lambda: now[0])) as gateway:
            path = await link_of(gateway)
            assert (await gateway.nobody.get(path)).status == 200
            now[0] += 61
            assert (await gateway.nobody.get(path)).status == 404

    run_virtual(main())


@pytest.mark.parametrize(
    ("server", "headers", "base"),
    [
        ("", {"Host": "api.example:9000"}, "http://api.example:9000"),
        ("", {"Host": "[::1]:9000"}, "http://[::1]:9000"),
        ("", {"Host": "evil.example/x?"}, "http://127.0.0.1:8080"),
        ("", {"Host": "a b"}, "http://127.0.0.1:8080"),
        ("", {"X-Forwarded-Host": "api.example", "X-Forwarded-Proto": "https"}, "http://gateway.test"),
        (
            'trusted_proxies = ["127.0.0.0/8"]',
            {"X-Forwarded-Host": "api.example", "X-Forwarded-Proto": "https"},
            "https://api.example",
        ),
        (
            'trusted_proxies = ["127.0.0.1"]',
            {"X-Forwarded-Host": "api.example", "X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/pictures/"},
            "https://api.example/pictures",
        ),
        (
            'trusted_proxies = ["127.0.0.1"]',
            {"X-Forwarded-Host": "api.example", "X-Forwarded-Proto": "javascript", "X-Forwarded-Port": "8443"},
            "http://api.example:8443",
        ),
        ('public_url = "https://pictures.example/x/"', {"Host": "other"}, "https://pictures.example/x"),
    ],
)
def test_urls_are_absolute_and_as_the_client_reached_us(server: str, headers: dict[str, str], base: str) -> None:
    async def main() -> None:
        async with running(f"[server]\n{server}\n" + ONE) as gateway:
            reply = await gateway.client.post("/v1/images/generations", {"prompt": "x"}, headers=headers)
            assert reply.json()["data"][0]["url"].rpartition("/images/")[0] == base

    run_virtual(main())


def test_a_disk_that_fails_breaks_urls_with_a_clear_error_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        store = LocalDiskStore(tmp_path, ttl_seconds=None, max_bytes=0)
        async with running(ONE, store=store) as gateway:

            def full(*_: Any) -> int:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr("img_serving.storage.local_disk.os.write", full)
            reply = await gateway.client.draw(response_format="url")
            monkeypatch.undo()
            assert reply.status >= 500
            assert reply.error["code"] == "storage_failed"
            assert "b64_json" in reply.error["message"]
            assert reply.headers["x-should-retry"] == "false"
            assert (await gateway.client.draw(response_format="b64_json")).status == 200
            assert "img_serving_storage_failures_total 1" in (await gateway.nobody.get("/metrics")).body.decode()
            assert list(tmp_path.iterdir()) == []

    asyncio.run(main())


def test_the_openapi_document_is_valid_and_made_of_the_types_that_validate() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            document = (await gateway.nobody.get("/openapi.json")).json()
            assert document["openapi"].startswith("3.1")
            body = document["components"]["schemas"]["GenerationBody"]
            assert body["required"] == ["prompt"]
            for field in (
                "negative_prompt",
                "seed",
                "guidance_scale",
                "num_inference_steps",
                "width",
                "backend",
                "steps",
            ):
                assert field in body["properties"]
            references = str(document).count("#/components/schemas/")
            assert references > 10
            for path in document["paths"]:
                concrete = path.replace("{id}", "plain").replace("{name}", "one")
                for method in document["paths"][path]:
                    if method == "get":
                        assert (await gateway.client.get(concrete)).status in {200, 404}, path

    run_virtual(main())


def test_metrics_are_prometheus_text_with_what_matters() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            await gateway.client.draw()
            text = (await gateway.nobody.get("/metrics")).body.decode()
            for name in (
                'img_serving_requests_total{route="/images/generations",method="POST",status="200"} 1',
                'img_serving_stage_seconds_count{stage="queue"} 1',
                'img_serving_stage_seconds_count{stage="attempt"} 1',
                'img_serving_stage_seconds_count{stage="deliver"} 1',
                'img_serving_stage_seconds_count{stage="total"} 1',
                "img_serving_queue_depth 0",
                'img_serving_slots{backend="one",endpoint="scripted:"} 32',
                'img_serving_breaker_state{backend="one",endpoint="scripted:"} 0',
                "img_serving_response_bytes_total",
                'img_serving_artifacts_total{event="stored"} 1',
            ):
                assert name in text, name

    run_virtual(main())


def test_endpoints_of_a_backend_that_is_switched_off_are_no_endpoints_that_are_down() -> None:
    async def main() -> None:
        async with running(ONE + scripted("off", backend__enabled=False)) as gateway:
            text = (await gateway.nobody.get("/metrics")).body.decode()
            assert 'img_serving_endpoint_usable{backend="one",endpoint="scripted:"} 1' in text
            assert 'endpoint_usable{backend="off"' not in text
            assert 'slots{backend="off"' not in text

    run_virtual(main())


def test_requests_for_a_backend_that_could_not_be_stored_are_answered() -> None:
    class Broken(MemoryState):
        async def put_backend(self, name: str, record: bytes) -> None:
            await asyncio.sleep(2)
            raise StateError("the state file is locked")

    async def main() -> None:
        async with running(ONE, state=Broken()) as gateway:
            body = {
                "name": "two", "protocol": "scripted", "models": ["m2"], "default_size": "16x16",
                "scripted": {"sequence": ["hang"], "max_concurrency": 1, "batch": "single"},
            }  # fmt: skip
            adding = asyncio.create_task(gateway.client.post("/v1/backends", body))
            await asyncio.sleep(1)
            asking = [asyncio.create_task(gateway.client.draw(model="m2")) for _ in range(3)]
            added = await adding
            assert added.status == 503
            assert added.error["code"] == "state_failed"
            await asyncio.sleep(0.1)
            assert [one.result().status for one in asking[1:]] == [503, 503]
            asking[0].cancel()
            await asyncio.gather(asking[0], return_exceptions=True)

    run_virtual(main())


@pytest.mark.parametrize(
    "change",
    [{"ca_file": "/nowhere/ca.pem"}, {"endpoints": ["http://a'b<c>:80"]}, {"headers": {"Expect": "x"}}, {"name": ".."}],
)
def test_what_only_shows_when_the_adapter_is_made_is_400_too(change: dict[str, Any]) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            body = {"name": "two", "protocol": "openai", "endpoints": ["https://127.0.0.1:1"], **change}
            reply = await gateway.client.post("/v1/backends", body)
            assert reply.status == 400, reply.body

    asyncio.run(main())


@pytest.mark.parametrize(
    "fields", [{"size": "99999x1"}, {"width": int("9" * 4000), "height": int("9" * 4000)}, {"n": int("9" * 4000)}]
)
def test_absurd_numbers_are_400(fields: dict[str, object]) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            raw = (
                '{"prompt": "x", ' + ", ".join(f'"{key}": {_json(value)}' for key, value in fields.items()) + "}"
            ).encode()
            reply = await gateway.client.post(
                "/v1/images/generations", raw=raw, headers={"content-type": "application/json"}
            )
            assert reply.status == 400

    def _json(value: object) -> str:
        return f'"{value}"' if isinstance(value, str) else "9" * 4000

    run_virtual(main())
