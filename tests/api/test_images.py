"""`POST /v1/images/generations`, in process, over scripted backends."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from PIL import Image
from tests.support.asgi import Client
from tests.support.gateways import ADMIN, running, scripted
from tests.support.virtual_time import run_virtual

from img_serving.api.asked import TRACEPARENT
from img_serving.api.generation import CHOICES, GenerationBody
from img_serving.storage.local_disk import LocalDiskStore

ONE = scripted("one")


def picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_the_default_is_a_url_that_serves_the_picture() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.draw(size="64x48", seed=5)
            assert reply.status == 200
            body = reply.json()
            assert body["size"] == "64x48"
            assert body["output_format"] == "png"
            assert body["quality"] in {"low", "medium", "high"}
            assert body["background"] == "opaque"
            assert isinstance(body["created"], int)
            (item,) = body["data"]
            assert item["seed"] == 5
            assert "b64_json" not in item
            assert item["url"].startswith("http://gateway.test/images/")
            assert item["url"].endswith(".png")
            served = await gateway.nobody.get(item["url"].removeprefix("http://gateway.test"))
            assert served.headers["content-type"] == "image/png"
            assert picture(served.body).size == (64, 48)

    run_virtual(main())


def test_base64_is_the_same_picture_as_the_url() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            inline = await gateway.client.draw(size="64x64", seed=5, response_format="b64_json")
            alias = await gateway.client.draw(size="64x64", seed=5, response_format="base64")
            linked = await gateway.client.draw(size="64x64", seed=5, response_format="url")
            data = base64.b64decode(inline.json()["data"][0]["b64_json"], validate=True)
            assert "url" not in inline.json()["data"][0]
            assert alias.json()["data"] == inline.json()["data"]
            path = linked.json()["data"][0]["url"].removeprefix("http://gateway.test")
            assert (await gateway.nobody.get(path)).body == data

    run_virtual(main())


def test_replies_tell_the_job_the_backend_and_the_attempts() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.draw(size="16x16", headers={"X-Request-Id": "mine-1"})
            del reply
            reply = await gateway.client.post(
                "/v1/images/generations", {"prompt": "x", "size": "16x16"}, headers={"X-Request-Id": "mine-1"}
            )
            assert reply.headers["x-request-id"] == "mine-1"
            assert reply.headers["x-job-id"].startswith("job_")
            assert reply.headers["x-backend"] == "one"
            assert reply.headers["x-attempts"] == "1"
            assert int(reply.headers["x-queue-ms"]) >= 0
            other = await gateway.client.post(
                "/v1/images/generations", {"prompt": "x", "size": "16x16"}, headers={"X-Request-Id": "bad\x01id"}
            )
            assert other.headers["x-request-id"].startswith("req_")

    run_virtual(main())


def test_picture_i_gets_seed_plus_i() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            three = (await gateway.client.draw(size="32x32", seed=5, n=3, response_format="b64_json")).json()["data"]
            alone = (await gateway.client.draw(size="32x32", seed=7, response_format="b64_json")).json()["data"]
            assert [one["seed"] for one in three] == [5, 6, 7]
            assert three[2] == alone[0]
            assert three[0]["b64_json"] != three[1]["b64_json"]

    run_virtual(main())


def test_without_a_seed_one_is_drawn_and_told() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            for field in ({}, {"seed": None}, {"seed": -1}):
                first = (await gateway.client.draw(size="32x32", **field)).json()["data"][0]["seed"]
                second = (await gateway.client.draw(size="32x32", **field)).json()["data"][0]["seed"]
                assert first != second

    run_virtual(main())


NULLS = [
    "model", "n", "size", "quality", "style", "background", "moderation", "response_format", "output_format",
    "output_compression", "stream", "partial_images", "user", "negative_prompt", "seed", "guidance_scale",
    "num_inference_steps", "width", "height", "backend", "steps", "cfg_scale", "sampler", "scheduler", "strict",
]  # fmt: skip


def test_null_means_default_for_every_field() -> None:
    async def main() -> None:
        async with running(scripted("one", backend__default_size="16x16")) as gateway:
            reply = await gateway.client.draw(**dict.fromkeys(NULLS))
            assert reply.status == 200
            assert reply.json()["size"] == "16x16"

    run_virtual(main())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tomato": 1, "safety_identifier": "x"}, "safety_identifier, tomato"),
        ({"stps": 3, "a\r\nx-evil: 1": 1, "한글": {"deep": []}, "x" * 41: 1}, "stps"),
        ({f"f{index}": index for index in range(20)}, "f0, f1, f10, f11, f12, f13, f14, f15"),
        ({}, None),
    ],
)
def test_unknown_fields_are_ignored_and_named(fields: dict[str, Any], named: str | None) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.draw(size="16x16", **fields)
            assert reply.status == 200
            assert reply.headers.get("x-img-serving-ignored") == named

    run_virtual(main())


def test_the_painter_says_when_it_stands_in_for_a_model() -> None:
    async def main() -> None:
        async with running("") as gateway:
            for model, ignored in ((None, None), ("procedural", None), ("dall-e-3", "model")):
                reply = await gateway.client.draw(size="16x16", model=model)
                assert (reply.status, reply.headers.get("x-img-serving-ignored")) == (200, ignored)
            reply = await gateway.client.draw(size="16x16", model="dall-e-3", strict=True)
            assert reply.status == 404
            assert reply.json()["error"]["code"] == "model_not_found"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "two"}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"size": "9x"}, "size"),
        ({"size": "0x512"}, "size"),
        ({"size": "-1x512"}, "size"),
        ({"size": "99999x99999"}, "size"),
        ({"size": "５１２x５１２"}, "size"),
        ({"size": 512}, "size"),
        ({"size": "512x512", "width": 256, "height": 256}, "size"),
        ({"width": 512}, "height"),
        ({"height": 512}, "width"),
        ({"width": 0, "height": 512}, "width"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  \n"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 32001}, "prompt"),
        ({"negative_prompt": "x" * 32001}, "negative_prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"steps": 201}, "steps"),
        ({"steps": 10, "num_inference_steps": 20}, "steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"cfg_scale": 101}, "cfg_scale"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"response_format": "png"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"output_compression": -1}, "output_compression"),
        ({"quality": "best"}, "quality"),
        ({"style": "gothic"}, "style"),
        ({"background": "transparent", "output_format": "jpeg"}, "background"),
        ({"partial_images": 4}, "partial_images"),
    ],
)
def test_an_impossible_value_is_refused_with_its_field(fields: dict[str, object], param: str) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.draw(**fields)
            assert reply.status == 400
            assert reply.error["type"] == "invalid_request_error"
            assert reply.error["param"] == param
            assert gateway.adapter("one").count == 0

    run_virtual(main())


def test_a_missing_prompt_is_named() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.post("/v1/images/generations", {"n": 1})
            assert reply.status == 400
            assert reply.error["param"] == "prompt"
            assert reply.error["code"] == "missing_required_parameter"

    run_virtual(main())


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"x"', b"nul", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100000]
)
def test_a_body_that_is_no_json_object_is_400(raw: bytes) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.post(
                "/v1/images/generations", raw=raw, headers={"content-type": "application/json"}
            )
            assert reply.status == 400
            assert reply.error["type"] == "invalid_request_error"

    run_virtual(main())


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"steps": 7}, "steps"),
        ({"step": 7}, "steps"),
        ({"sample_steps": 7}, "steps"),
        ({"num_inference_steps": 7}, "steps"),
        ({"steps": 7, "num_inference_steps": 7}, "steps"),
        ({"cfg_scale": 7.0}, "guidance_scale"),
        ({"cfg": 7.0}, "guidance_scale"),
        ({"guidance": 7}, "guidance_scale"),
        ({"sampler_name": 7}, None),
    ],
)
def test_aliases_mean_the_canonical_parameter(fields: dict[str, object], name: str | None) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.draw(size="16x16", **fields)
            if name is None:
                assert reply.status == 400
                return
            assert reply.status == 200
            assert getattr(gateway.adapter("one").calls[-1].request, name) == 7

    run_virtual(main())


@pytest.mark.parametrize("model", ["gpt-image-1", "gpt-image-2.6-flare", "chatgpt-image-latest"])
def test_models_whose_clients_expect_base64_get_it(model: str) -> None:
    async def main() -> None:
        async with running("") as gateway:
            inline = await gateway.client.draw(model=model, size="32x32", steps=1)
            assert "b64_json" in inline.json()["data"][0]
            linked = await gateway.client.draw(model=model, size="32x32", steps=1, response_format="url")
            assert "url" in linked.json()["data"][0]
            classic = await gateway.client.draw(model="dall-e-3", size="32x32", steps=1)
            assert "url" in classic.json()["data"][0]

    asyncio.run(main())


def test_default_format_decides_when_nobody_says() -> None:
    async def main() -> None:
        async with running('[response]\ndefault_format = "b64_json"\n' + ONE) as gateway:
            assert "b64_json" in (await gateway.client.draw(size="16x16")).json()["data"][0]

    run_virtual(main())


def test_file_is_refused_unless_the_operator_allows_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.draw(size="16x16", response_format="file")
            assert reply.status == 400
            assert reply.error["param"] == "response_format"
            assert gateway.adapter("one").count == 0
        store = LocalDiskStore(tmp_path, ttl_seconds=None, max_bytes=0)
        async with running("[response]\nallow_file = true\n" + ONE, store=store) as gateway:
            reply = await gateway.client.draw(size="16x16", response_format="file")
            assert reply.status == 200
            path = Path(reply.json()["data"][0]["file_path"])
            assert path.parent == tmp_path
            assert picture(path.read_bytes()).size == (16, 16)

    asyncio.run(main())


@pytest.mark.parametrize(("wanted", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("jpg", "JPEG")])
def test_output_format_is_what_comes_whatever_the_backend_made(wanted: str, kind: str) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.draw(
                size="64x64", output_format=wanted, output_compression=60, response_format="b64_json"
            )
            body = reply.json()
            image = picture(base64.b64decode(body["data"][0]["b64_json"]))
            assert image.format == kind
            assert image.size == (64, 64)
            assert body["output_format"] == kind.lower()
            linked = (await gateway.client.draw(size="64x64", output_format=wanted)).json()["data"][0]["url"]
            served = await gateway.nobody.get(linked.removeprefix("http://gateway.test"))
            assert served.headers["content-type"] == f"image/{kind.lower()}"

    asyncio.run(main())


def test_output_compression_makes_a_smaller_file() -> None:
    async def main() -> None:
        async with running("") as gateway:
            sizes = []
            for compression in (5, 95):
                reply = await gateway.client.draw(
                    size="128x128", seed=1, steps=2, output_format="jpeg", output_compression=compression,
                    response_format="b64_json",
                )  # fmt: skip
                sizes.append(len(reply.json()["data"][0]["b64_json"]))
            assert sizes[0] * 2 < sizes[1]

    asyncio.run(main())


def test_a_png_that_only_passes_through_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr("PIL.Image.open", refuse)

    async def main() -> None:
        async with running(ONE) as gateway:
            for response_format in ("url", "b64_json"):
                reply = await gateway.client.draw(size="16x16", response_format=response_format, output_format="png")
                assert reply.status == 200

    run_virtual(main())


def test_what_a_backend_cannot_honour_is_named_or_refused_with_strict() -> None:
    async def main() -> None:
        async with running("") as gateway:
            reply = await gateway.client.draw(size="32x32", steps=1, style="vivid", sampler="Euler a")
            assert reply.status == 200
            assert reply.headers["x-img-serving-ignored"] == "sampler, style"
            strict = await gateway.client.draw(size="32x32", steps=1, style="vivid", strict=True)
            assert strict.status == 400
            assert strict.error["param"] == "style"
            plain = await gateway.client.draw(size="32x32", steps=1)
            assert "x-img-serving-ignored" not in plain.headers

    asyncio.run(main())


def test_a_size_over_what_any_backend_can_is_refused_with_each_ones_reason() -> None:
    async def main() -> None:
        async with running("") as gateway:
            reply = await gateway.client.draw(size="4096x4096")
            assert reply.status == 400
            assert reply.error["param"] == "size"
            assert "procedural" in reply.error["message"]

    asyncio.run(main())


def test_another_size_than_asked_for_is_delivered_told_and_counted() -> None:
    async def main() -> None:
        async with running(scripted("one", sequence=["bad_size"])) as gateway:
            reply = await gateway.client.draw(size="64x64")
            assert reply.status == 200
            assert reply.json()["size"] == "32x32"
            assert reply.headers["x-img-serving-ignored"] == "size"
            strict = await gateway.client.draw(size="64x64", strict=True)
            assert (strict.status, strict.error["param"]) == (400, "size")
            assert "one could not honour size" in strict.error["message"]
            metrics = (await gateway.nobody.get("/metrics")).body.decode()
            assert 'img_serving_wrong_size_total{backend="one"} 1' in metrics

    run_virtual(main())


def test_unprefixed_paths_serve_too_and_unknown_query_is_ignored() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            body = {"prompt": "x", "size": "16x16"}
            assert (await gateway.client.post("/images/generations", body)).status == 200
            assert (await gateway.client.post("/v1/images/generations?api-version=2024", body)).status == 200
            assert (await gateway.client.post("/v1/images/generations/", body)).status == 200

    run_virtual(main())


def test_failover_goes_to_an_endpoint_not_tried_and_is_told() -> None:
    async def main() -> None:
        toml = scripted("bad", sequence=["fail"], models=["m"]) + scripted("good", models=["m"])
        async with running(toml) as gateway:
            reply = await gateway.client.draw(model="m", size="16x16")
            assert reply.status == 200
            assert reply.headers["x-backend"] == "good"
            assert reply.headers["x-attempts"] == "2"
            assert gateway.adapter("bad").count == 1

    run_virtual(main())


def test_all_attempts_failed_is_502_and_says_not_to_retry() -> None:
    async def main() -> None:
        toml = "".join(scripted(name, sequence=["fail"], models=["m"]) for name in ("a", "b", "c", "d"))
        async with running(toml) as gateway:
            reply = await gateway.client.draw(model="m", size="16x16")
            assert reply.status == 502
            assert reply.headers["x-should-retry"] == "false"
            assert reply.headers["x-attempts"] == "3"
            assert sum(gateway.adapter(name).count for name in "abcd") == 3

    run_virtual(main())


def test_max_attempts_bounds_the_calls() -> None:
    async def main() -> None:
        toml = "[retry]\nmax_attempts = 2\n" + "".join(
            scripted(name, sequence=["fail"], models=["m"]) for name in ("a", "b", "c")
        )
        async with running(toml) as gateway:
            await gateway.client.draw(model="m", size="16x16")
            assert sum(gateway.adapter(name).count for name in "abc") == 2

    run_virtual(main())


def test_a_refused_prompt_returns_at_once_and_is_not_tried_elsewhere() -> None:
    async def main() -> None:
        toml = scripted("a", sequence=["refuse_content"], models=["m"]) + scripted("b", models=["m"])
        async with running(toml) as gateway:
            reply = await gateway.client.draw(model="m", size="16x16")
            assert reply.status == 400
            assert reply.error["code"] == "moderation_blocked"
            assert gateway.adapter("b").count == 0
            assert gateway.endpoint("a").breaker.state(0).value == "closed"

    run_virtual(main())


def test_an_unknown_outcome_is_not_repeated_where_somebody_pays() -> None:
    async def main() -> None:
        toml = scripted("a", sequence=["unknown"], models=["m"], backend__retry_unknown=False)
        async with running(toml + scripted("b", models=["m"])) as gateway:
            reply = await gateway.client.draw(model="m", size="16x16")
            assert reply.status == 502
            assert gateway.adapter("b").count == 0
        toml = scripted("a", sequence=["unknown"], models=["m"]) + scripted("b", models=["m"])
        async with running(toml) as gateway:
            assert (await gateway.client.draw(model="m", size="16x16")).status == 200

    run_virtual(main())


def test_an_attempt_without_an_answer_times_out_and_goes_elsewhere() -> None:
    async def main() -> None:
        toml = scripted("a", sequence=["hang"], models=["m"], backend__timeout_ms=2000) + scripted("b", models=["m"])
        async with running(toml) as gateway:
            loop = asyncio.get_running_loop()
            before = loop.time()
            reply = await gateway.client.draw(model="m", size="16x16")
            assert reply.status == 200
            assert reply.headers["x-backend"] == "b"
            assert 2 <= loop.time() - before < 2.5
            assert gateway.adapter("a").in_flight == 0

    run_virtual(main())


def test_the_deadline_is_504_and_frees_the_slot() -> None:
    async def main() -> None:
        toml = "[queue]\nrequest_timeout_seconds = 3\n" + scripted("a", sequence=["hang"])
        async with running(toml) as gateway:
            reply = await gateway.client.draw(size="16x16")
            assert reply.status == 504
            await asyncio.sleep(0.3)
            assert gateway.adapter("a").in_flight == 0
            assert gateway.endpoint("a").in_flight == 0

    run_virtual(main())


def test_waiting_longer_than_allowed_is_504() -> None:
    async def main() -> None:
        toml = "[queue]\nmax_wait_seconds = 1\n" + scripted("a", latency_seconds=5, max_concurrency=1, batch="single")
        async with running(toml) as gateway:
            first, second = await asyncio.gather(gateway.client.draw(size="16x16"), gateway.client.draw(size="16x16"))
            assert sorted([first.status, second.status]) == [200, 504]

    run_virtual(main())


def test_a_full_queue_is_503_with_retry_after() -> None:
    async def main() -> None:
        toml = "[queue]\nmax_tasks = 2\n" + scripted("a", latency_seconds=5, max_concurrency=1, batch="single")
        async with running(toml) as gateway:
            replies = await asyncio.gather(*(gateway.client.draw(size="16x16") for _ in range(5)))
            refused = [one for one in replies if one.status == 503]
            assert len(refused) == 2
            for one in refused:
                assert one.error["code"] == "queue_full"
                assert 1 <= int(one.headers["retry-after"]) <= 59
                assert int(one.headers["retry-after-ms"]) >= 1
                assert float(one.headers["x-queue-eta-seconds"]) > 0

    run_virtual(main())


def test_a_client_that_leaves_cancels_its_call_within_a_second() -> None:
    async def main() -> None:
        async with running(scripted("a", sequence=["hang"])) as gateway:
            leave = asyncio.Event()
            asking = asyncio.create_task(
                gateway.client.post("/v1/images/generations", {"prompt": "x", "size": "16x16"}, leave=leave)
            )
            await asyncio.sleep(1)
            assert gateway.adapter("a").in_flight == 1
            leave.set()
            await asyncio.sleep(0.1)
            assert gateway.adapter("a").in_flight == 0
            assert gateway.endpoint("a").in_flight == 0
            assert (await asking).status == 0
            assert "img_serving_client_disconnects_total 1" in (await gateway.nobody.get("/metrics")).body.decode()
            assert gateway.endpoint("a").breaker.state(0).value == "closed"

    run_virtual(main())


def test_cancel_on_disconnect_can_be_turned_off() -> None:
    async def main() -> None:
        toml = "[jobs]\ncancel_on_disconnect = false\n" + scripted("a", latency_seconds=5)
        async with running(toml) as gateway:
            leave = asyncio.Event()
            asking = asyncio.create_task(
                gateway.client.post("/v1/images/generations", {"prompt": "x", "size": "16x16"}, leave=leave)
            )
            await asyncio.sleep(1)
            leave.set()
            await asyncio.sleep(1)
            assert gateway.adapter("a").in_flight == 1
            await asking
            assert gateway.adapter("a").cancelled == 0

    run_virtual(main())


def test_a_waiting_request_of_a_client_that_left_is_never_sent() -> None:
    async def main() -> None:
        async with running(scripted("a", latency_seconds=5, max_concurrency=1, batch="single")) as gateway:
            leave = asyncio.Event()
            first = asyncio.create_task(gateway.client.draw(size="16x16"))
            await asyncio.sleep(1)
            second = asyncio.create_task(
                gateway.client.post("/v1/images/generations", {"prompt": "x", "size": "16x16"}, leave=leave)
            )
            await asyncio.sleep(1)
            leave.set()
            await asyncio.gather(first, second)
            await asyncio.sleep(10)
            assert gateway.adapter("a").count == 1

    run_virtual(main())


def test_draining_finishes_what_runs_and_answers_the_rest_with_503() -> None:
    async def main() -> None:
        toml = scripted("a", latency_seconds=5, max_concurrency=1, batch="single")
        async with running(toml) as gateway:
            asking = [asyncio.create_task(gateway.client.draw(size="16x16")) for _ in range(3)]
            await asyncio.sleep(1)
            draining = asyncio.create_task(gateway.gateway.drain(6))
            await asyncio.sleep(0.1)
            assert (await gateway.nobody.get("/readyz")).status == 503
            assert (await gateway.client.draw(size="16x16")).status == 503
            replies = await asyncio.gather(*asking)
            await draining
            assert [one.status for one in replies] == [200, 503, 503]
            for one in replies[1:]:
                assert one.error["code"] == "draining"
                assert "retry-after" in one.headers

    run_virtual(main())


def test_the_log_line_has_the_stages_and_no_secret_and_no_prompt() -> None:
    async def main() -> None:
        async with running(scripted("a", latency_seconds=0.5)) as gateway:
            await gateway.client.draw(prompt="하늘을 나는 고래", size="16x16")
            (line,) = gateway.log_lines()
            assert line["status"] == 200
            assert line["tenant"] == "admin"
            assert line["backend"] == "a"
            assert line["outcome"] == "succeeded"
            assert line["run_ms"] >= 500
            assert line["queue_ms"] >= 0
            assert line["request_id"]
            text = str(line)
            assert ADMIN not in text
            assert "고래" not in text
        async with running("[logging]\nprompts = true\n" + ONE) as gateway:
            await gateway.client.draw(prompt="하늘을 나는 고래", size="16x16")
            assert gateway.log_lines()[0]["prompt"] == "하늘을 나는 고래"

    run_virtual(main())


def test_an_explicit_backend_is_used_and_an_unknown_one_is_refused() -> None:
    async def main() -> None:
        async with running(scripted("a") + scripted("b")) as gateway:
            assert (await gateway.client.draw(size="16x16", backend="b")).headers["x-backend"] == "b"
            assert (await gateway.client.draw(size="16x16")).headers["x-backend"] == "a"
            reply = await gateway.client.draw(size="16x16", backend="zzz")
            assert reply.status in {400, 404}
            assert reply.error["param"] == "backend"

    run_virtual(main())


def test_an_unknown_model_is_404_or_goes_to_the_default_as_configured() -> None:
    async def main() -> None:
        two = scripted("a", models=["m1"]) + scripted("b", models=["m2"])
        async with running(two) as gateway:
            await asyncio.sleep(0.1)
            reply = await gateway.client.draw(size="16x16", model="zzz")
            assert reply.status == 404
            assert reply.error["code"] == "model_not_found"
            assert reply.error["param"] == "model"
            assert (await gateway.client.draw(size="16x16", model="m2")).headers["x-backend"] == "b"
        routing = '[routing]\nunknown_model = "default"\ndefault_backend = "b"\n[routing.aliases]\n"dall-e-3" = "m1"\n'
        async with running(routing + two) as gateway:
            await asyncio.sleep(0.1)
            assert (await gateway.client.draw(size="16x16", model="zzz")).headers["x-backend"] == "b"
            assert (await gateway.client.draw(size="16x16", model="dall-e-3")).headers["x-backend"] == "a"
            assert (await gateway.client.draw(size="16x16")).headers["x-backend"] == "b"

    run_virtual(main())


def test_a_lower_tier_serves_until_it_is_unusable() -> None:
    async def main() -> None:
        toml = scripted("own", models=["m"], sequence=["not_started"]) + scripted(
            "rented", models=["m"], backend__tier=1
        )
        async with running(toml) as gateway:
            for _ in range(8):
                assert (await gateway.client.draw(size="16x16", model="m")).headers["x-backend"] == "rented"
            # five refusals opened its breaker: after that it is not even asked
            assert gateway.adapter("own").count == 5

    run_virtual(main())


def test_all_endpoints_down_is_503_with_retry_after_and_each_is_tried_once() -> None:
    async def main() -> None:
        toml = scripted("a", models=["m"], sequence=["not_started"], healthy=False)
        toml += scripted("b", models=["m"], sequence=["not_started"], healthy=False)
        async with running(toml) as gateway:
            await asyncio.sleep(5)
            reply = await gateway.client.draw(size="16x16", model="m")
            assert reply.status == 503
            assert 1 <= int(reply.headers["retry-after"]) <= 59
            assert gateway.adapter("a").count == 1
            assert gateway.adapter("b").count == 1
            assert (await gateway.nobody.get("/health")).json()["status"] == "unhealthy"

    run_virtual(main())


def test_a_key_may_be_bound_to_models_and_backends() -> None:
    async def main() -> None:
        toml = """
[[auth.api_keys]]
name = "kim"
key = "sk-kim"
models = ["m1"]
[[auth.api_keys]]
name = "lee"
key = "sk-lee"
backends = ["b"]
"""
        async with running(toml + scripted("a", models=["m1", "m2"]) + scripted("b", models=["m1"])) as gateway:
            await asyncio.sleep(0.1)
            kim, lee = Client(gateway.gateway.app, "sk-kim"), Client(gateway.gateway.app, "sk-lee")
            assert (await kim.draw(size="16x16", model="m1")).status == 200
            assert (await kim.draw(size="16x16", model="m2")).status == 403
            for _ in range(4):
                assert (await lee.draw(size="16x16", model="m1")).headers["x-backend"] == "b"
            assert (await lee.draw(size="16x16", backend="a")).status == 403
            assert [one["id"] for one in (await kim.get("/v1/models")).json()["data"]] == ["m1"]

    run_virtual(main())


def test_the_words_in_messages_are_those_of_the_types() -> None:
    hints = get_type_hints(GenerationBody, include_extras=False)
    for name, words in CHOICES.items():
        literals = [one for one in get_args(hints[name]) if get_args(one)] or [hints[name]]
        assert tuple(get_args(literals[0])) == words, name


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"output_format": "gif"}, "one of png, jpeg, jpg, webp"),
        ({"n": "two"}, "n: must be a whole number, not a string"),
        ({"prompt": 5}, "prompt: must be a string, not a whole number"),
        ({"stream": "yes"}, "stream: must be true or false, not a string"),
    ],
)
def test_messages_say_what_would_be_right(fields: dict[str, object], says: str) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            assert says in (await gateway.client.draw(**fields)).error["message"]

    run_virtual(main())


def test_strict_refuses_fields_that_nobody_knows() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.draw(size="16x16", strict=True, sizee="1x1")
            assert reply.status == 400
            assert reply.error["param"] == "sizee"
            assert "size" in reply.error["message"]
            assert (await gateway.client.draw(size="16x16", strict=True)).status == 200

    run_virtual(main())


def test_the_background_told_is_the_one_that_was_drawn() -> None:
    async def main() -> None:
        async with running("") as gateway:
            reply = await gateway.client.draw(size="32x32", steps=1, background="transparent")
            assert reply.json()["background"] == "opaque"
            assert reply.headers["x-img-serving-ignored"] == "background"
        async with running(ONE) as gateway:
            reply = await gateway.client.draw(size="16x16", background="transparent")
            assert reply.json()["background"] == "transparent"

    asyncio.run(main())


def test_the_built_in_backend_is_the_last_resort() -> None:
    async def main() -> None:
        async with running("") as gateway:
            await gateway.client.post(
                "/v1/backends", {"name": "mine", "protocol": "scripted", "models": ["m"], "default_size": "16x16"}
            )
            assert (await gateway.client.draw()).headers["x-backend"] == "mine"
            assert (await gateway.client.draw(model="m")).headers["x-backend"] == "mine"
            other = await gateway.client.draw(model="dall-e-3", size="32x32", steps=1)
            assert other.headers["x-backend"] == "procedural"

    asyncio.run(main())


def test_a_breaker_that_opens_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running(scripted("a", sequence=["fail"])) as gateway:
            for _ in range(6):
                await gateway.client.draw(size="16x16")

    with caplog.at_level(logging.INFO, logger="img_serving.gateway.registry"):
        run_virtual(main())
    assert [one.message for one in caplog.records if "breaker" in one.message] == ["circuit breaker is open"]


@pytest.mark.parametrize(
    ("header", "passed_on"),
    [
        (b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        (b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", True),
        (b"", False),
        ("é".encode("latin-1"), False),
        (b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\tx", False),
        (b"00-AF7651916cd43dd8448eb211c80319c0-b7ad6b7169203331-01", False),
    ],
)
def test_a_trace_goes_on_only_where_it_is_one(header: bytes, passed_on: bool) -> None:
    """What is none would break the call that it travels with, and its endpoint would be blamed for it."""
    assert bool(TRACEPARENT.fullmatch(header)) is passed_on
