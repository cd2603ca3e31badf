"""Real engines behind a whole gateway: what they would do in silence is done right, said, or refused."""

from __future__ import annotations

import asyncio
import logging
import unicodedata
from collections.abc import Callable
from typing import Any, Literal

import pybase64
import pytest
from tests.support.fake_a1111 import FakeA1111
from tests.support.gateways import Harness, running

from img_serving.backends.scripted import picture
from img_serving.backends.scripted_server import ScriptedServer


def backend(name: str, *servers: Any, protocol: str = "a1111", **more: Any) -> str:
    endpoints = ", ".join(f'"{server.url}"' for server in servers)
    lines = [f'[[backends]]\nname = "{name}"\nprotocol = "{protocol}"\nendpoints = [{endpoints}]']
    lines += [f"{key} = {value}" for key, value in more.items()]
    return "\n".join(lines) + "\n"


async def known(gateway: Harness, name: str, count: int = 1) -> None:
    """Until every endpoint was asked what it is."""
    async with asyncio.timeout(5):
        while not all(gateway.gateway.registry.snapshot(name).found[:count]):  # noqa: ASYNC110 - the prober's doing
            await asyncio.sleep(0.002)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110 - the other side's doing
            await asyncio.sleep(0.001)


def test_a_size_that_the_engine_would_round_is_rounded_and_said() -> None:
    async def main() -> None:
        async with FakeA1111() as server, running(backend("forge", server)) as gateway:
            await known(gateway, "forge")
            reply = await gateway.client.draw(size="100x70")
            assert (reply.status, reply.json()["size"]) == (200, "96x64")
            assert reply.headers["x-img-serving-ignored"] == "size"
            strict = await gateway.client.draw(size="100x70", strict=True)
            assert (strict.status, strict.error["param"]) == (400, "size")
            assert "forge: it draws multiples of 8 pixels: 96x64 would do" in strict.error["message"]
            exact = await gateway.client.draw(size="96x64", strict=True)
            assert exact.status == 200
            assert "x-img-serving-ignored" not in exact.headers

    asyncio.run(main())


def test_a_name_that_no_engine_knows_is_refused_with_the_reason_of_each() -> None:
    async def main() -> None:
        async with (
            FakeA1111() as forge,
            FakeA1111(flavour="sdcpp") as small,
            running(backend("forge", forge, models='["m"]') + backend("small", small, models='["m"]')) as gateway,
        ):
            await known(gateway, "forge")
            await known(gateway, "small")
            reply = await gateway.client.draw(model="m", sampler="dpm++ 3m")
            assert (reply.status, reply.error["param"]) == (400, "sampler")
            assert "forge: it has no sampler 'dpm++ 3m' (the nearest it has: DPM++ 2M" in reply.error["message"]
            assert "small: it has no sampler" in reply.error["message"]
            assert forge.posts == small.posts == []

    asyncio.run(main())


def test_work_goes_to_the_endpoints_that_have_its_model() -> None:
    async def main() -> None:
        async with FakeA1111() as one, FakeA1111() as two:
            one.checkpoints = {"tiny-a": "tiny-a.safetensors"}
            two.checkpoints = {"tiny-a": "tiny-a.safetensors", "rare": "rare.safetensors"}
            async with running(backend("pool", one, two)) as gateway:
                await known(gateway, "pool", 2)
                replies = await asyncio.gather(
                    *(gateway.client.draw(model="rare", size="64x64", seed=seed) for seed in range(0, 40, 10))
                )
                assert [reply.status for reply in replies] == [200] * 4
                assert not one.posts
                assert {drawn["model"] for drawn in two.drawn} == {"rare"}

    asyncio.run(main())


def test_the_list_of_backends_says_what_was_found_and_what_it_can(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with FakeA1111() as server, running(backend("auto", server, protocol="http")) as gateway:
            await known(gateway, "auto")
            (record,) = (await gateway.client.get("/v1/backends")).json()["data"]
            assert (record["protocol"], record["detected_protocol"]) == ("http", "a1111")
            found = record["endpoints"][0]["found"]
            assert "Forge" in found
            assert "GET /sdapi/v1/options answered as A1111 does" in found
            assert record["models"] == ["tiny-a", "tiny-b"]
            able = record["capabilities"]
            assert able["samplers"] == ["Euler", "Euler a", "DPM++ 2M"]
            assert (able["size_multiple"], able["batch"], able["masks"]) == (8, "seeds", True)
            assert able["operations"] == ["edit", "generation", "variation"]

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert [one for one in caplog.records if one.getMessage().startswith("found Forge")]


def test_what_an_engine_writes_into_its_files_is_stripped_where_the_operator_wants_it() -> None:
    words = "a secret lighthouse"

    async def main(strip: str) -> bytes:
        async with (
            FakeA1111() as server,
            running(f"[storage]\nstrip_metadata = {strip}\n" + backend("forge", server)) as gateway,
        ):
            server.writes_notes = True
            reply = await gateway.client.draw(prompt=words, size="64x64", seed=7, response_format="b64_json")
            return pybase64.b64decode(reply.json()["data"][0]["b64_json"])

    assert words.encode() in asyncio.run(main("false"))
    assert asyncio.run(main("true")) == picture(words, 7, 64, 64)


def test_a_client_that_leaves_stops_the_engine() -> None:
    async def main() -> None:
        async with FakeA1111() as server, running(backend("forge", server)) as gateway:
            await known(gateway, "forge")
            server.gate = asyncio.Event()
            leave = asyncio.Event()
            asking = asyncio.create_task(
                gateway.client.post("/v1/images/generations", {"prompt": "x", "size": "64x64"}, leave=leave)
            )
            await until(lambda: bool(server.drawn))
            left_at = asyncio.get_running_loop().time()
            leave.set()
            await until(lambda: server.interrupts == 1)
            assert (server.stopped_at or left_at) - left_at < 0.15
            await asking

    asyncio.run(main())


def test_a_picture_that_somebody_interrupted_at_the_engine_comes_from_another_one() -> None:
    async def main() -> None:
        async with (
            FakeA1111() as one,
            FakeA1111() as two,
            running(backend("pool", one, two) + "[routing]\nstrategy = 'round_robin'\n") as gateway,
        ):
            await known(gateway, "pool", 2)
            one.gate = asyncio.Event()
            two.gate = asyncio.Event()
            asking = asyncio.create_task(gateway.client.draw(size="64x64", seed=3, response_format="b64_json"))
            await until(lambda: bool(one.drawn or two.drawn))
            first, second = (one, two) if one.drawn else (two, one)
            second.gate = None
            first.state["interrupted"] = True
            assert first.gate is not None
            first.gate.set()
            reply = await asking
            assert (reply.status, reply.headers["x-attempts"]) == (200, "2")
            assert pybase64.b64decode(reply.json()["data"][0]["b64_json"]) == picture("a lighthouse", 3, 64, 64)

    asyncio.run(main())


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_korean_words_arrive_as_they_were_written(form: Literal["NFC", "NFD"]) -> None:
    words = unicodedata.normalize(form, "눈 내리는 한옥 마을")

    async def main() -> None:
        async with (
            FakeA1111() as forge,
            ScriptedServer({"faces": ["openai"]}) as hosted,
            running(backend("forge", forge) + backend("hosted", hosted, protocol="openai")) as gateway,
        ):
            for name, server in (("forge", forge), ("hosted", hosted)):
                reply = await gateway.client.draw(prompt=words, negative_prompt=words, backend=name, size="64x64")
                assert reply.status == 200
                body = server.posts[0].json
                assert (body["prompt"], body["negative_prompt"]) == (words, words)

    asyncio.run(main())


def test_a_long_drawing_outlives_the_time_out_while_it_makes_progress() -> None:
    async def main() -> None:
        async with FakeA1111(steps=8, step_seconds=0.1) as server:
            toml = backend("forge", server, timeout_ms=400) + "[backends.a1111]\nprogress_interval_seconds = 0.05\n"
            async with running(toml) as gateway:
                await known(gateway, "forge")
                reply = await gateway.client.draw(size="64x64")
                assert (reply.status, reply.headers["x-attempts"]) == (200, "1")

    asyncio.run(main())


def test_a_configured_model_that_the_server_does_not_list_is_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    models = 'models = ["nope", "TINY-A.safetensors"]\nhealth_check_interval_secs = 1\n'

    async def main() -> None:
        async with FakeA1111() as server, running(backend("forge", server) + models) as gateway:
            await known(gateway, "forge")
            checks = len(server.exchanges)
            await until(lambda: len(server.exchanges) > checks)  # one more does not say it again

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    (told,) = [one.message for one in caplog.records if "does not list" in one.message]
    assert told == "the server does not list the configured model 'nope' (it lists: tiny-a, tiny-b)"
