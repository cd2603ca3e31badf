"""ComfyUI behind a whole gateway: configured, found, drawing, editing, and left in peace when a client leaves."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pybase64
import pytest
from PIL import Image
from tests.support import fake_comfyui
from tests.support.fake_comfyui import FakeComfyUI
from tests.support.gateways import Harness, running

from img_serving.backends.comfyui.built_in import built_in
from img_serving.backends.scripted import picture
from img_serving.config import toml_of
from img_serving.media.png import strip_metadata


def backend(server: FakeComfyUI, more: str = "", protocol: str = "comfyui") -> str:
    head = "[rate_limit]\nenabled = false\n"
    return f'{head}[[backends]]\nname = "comfy"\nprotocol = "{protocol}"\nendpoints = ["{server.url}"]\n{more}\n'


async def known(gateway: Harness) -> None:
    await until(lambda: all(gateway.gateway.registry.snapshot("comfy").found))


async def until(happened: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110 - the other side's doing
            await asyncio.sleep(0.001)


def drawn(reply: Any) -> list[bytes]:
    return [strip_metadata(pybase64.b64decode(one["b64_json"])) for one in reply.json()["data"]]


@pytest.mark.parametrize("protocol", ["comfyui", "http"])
def test_several_pictures_are_several_prompts_of_consecutive_seeds(protocol: str) -> None:
    async def main() -> None:
        async with FakeComfyUI() as server, running(backend(server, protocol=protocol)) as gateway:
            await known(gateway)
            reply = await gateway.client.draw(
                prompt="등대", n=2, seed=7, size="100x64", steps=3, model="tiny-a", response_format="b64_json"
            )
            assert reply.status == 200, reply.body
            assert drawn(reply) == [picture("등대", seed, 96, 64) for seed in (7, 8)]
            assert reply.headers["x-img-serving-ignored"] == "size"
            (record,) = (await gateway.client.get("/v1/backends")).json()["data"]
            assert "ComfyUI 0.33.0" in record["endpoints"][0]["found"]
            assert record["models"] == ["sub/tiny-b", "tiny-a"]
            assert record["capabilities"]["cancels"] is True

    asyncio.run(main())


def test_an_edit_with_a_mask_reaches_the_server() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (64, 48), (0, 0, 0, 0)).save(out, "PNG")
    urls = [
        "data:image/png;base64," + pybase64.b64encode(one).decode() for one in (picture("x", 1, 64, 48), out.getvalue())
    ]

    async def main() -> None:
        async with FakeComfyUI() as server, running(backend(server)) as gateway:
            await known(gateway)
            body = {
                "prompt": "a fox",
                "images": [{"image_url": urls[0]}],
                "mask": {"image_url": urls[1]},
                "strength": 0.5,
            }
            reply = await gateway.client.post(
                "/v1/images/edits", {**body, "model": "tiny-a", "response_format": "b64_json"}
            )
            assert reply.status == 200, reply.body
            graph = server.posts[0].json["prompt"]
            kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
            assert kinds["KSampler"]["denoise"] == 0.5
            assert {"LoadImage", "LoadImageMask", "SetLatentNoiseMask"} <= set(kinds)
            assert (kinds["ImageScale"]["width"], kinds["ImageScale"]["height"]) == (64, 48)

    asyncio.run(main())


def test_a_client_that_leaves_stops_its_own_prompt() -> None:
    async def main() -> None:
        async with FakeComfyUI() as server, running(backend(server)) as gateway:
            await known(gateway)
            server.hangs = True
            leave = asyncio.Event()
            body = {"prompt": "x", "size": "64x64", "model": "tiny-a"}
            asking = asyncio.create_task(gateway.client.post("/v1/images/generations", body, leave=leave))
            await until(lambda: server.drawn)
            server.submit(server.drawn[0], "somebody else")
            leave.set()
            await until(lambda: server.stopped)
            await asking
            server.hangs = False
            await until(lambda: server.running is None and not server.queue)
            assert [one["status"]["completed"] for one in server.history.values()] == [False, True]

    asyncio.run(main())


def test_workflows_in_the_configuration_are_models_and_their_faults_stop_the_start(tmp_path: Path) -> None:
    file = tmp_path / "portrait.json"
    template = built_in()
    file.write_text(
        json.dumps(template.filled({"checkpoint": "tiny-a.safetensors", "steps": 3, "width": 192, "height": 128}))
    )
    table = f'[backends.comfyui.workflows.portrait]\nfile = "{file}"\n'

    async def main() -> None:
        async with FakeComfyUI() as server:
            async with running(backend(server, table)) as gateway:
                await known(gateway)
                reply = await gateway.client.draw(prompt="p", seed=1, size="64x64", response_format="b64_json")
                assert drawn(reply) == [picture("p", 1, 64, 64)]
                assert [one["id"] for one in (await gateway.client.get("/v1/models")).json()["data"]] == ["portrait"]
                shown = (await gateway.client.get("/v1/backends")).json()["data"][0]["capabilities"]
                assert shown["default_size"] == "192x128"
                reply = await gateway.client.draw(prompt="p", seed=1, response_format="b64_json")
                assert drawn(reply) == [picture("p", 1, 192, 128)]
            default = backend(server, table).replace(
                "[backends.comfyui", 'default_size = "64x96"\n[backends.comfyui', 1
            )
            async with running(default) as gateway:
                await known(gateway)
                assert drawn(await gateway.client.draw(prompt="p", seed=1, response_format="b64_json")) == [
                    picture("p", 1, 64, 96)
                ]
            with pytest.raises(ValueError, match=r"workflows\.portrait\.inputs\.seed: there is no node '33'"):
                async with running(backend(server, table + 'inputs = { seed = "33.seed" }\n')):
                    pass

    asyncio.run(main())


def test_a_workflow_that_cannot_run_is_no_model_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = built_in().filled({"checkpoint": "tiny-a.safetensors"}), built_in().filled({"checkpoint": "gone"})
    table = "\n".join(
        f"[backends.comfyui.workflows.{name}]\ngraph = {toml_of(graph)}"
        for name, graph in (("good", good), ("bad", bad))
    )

    async def main() -> None:
        async with FakeComfyUI() as server, running(backend(server, table)) as gateway:
            await known(gateway)
            assert [one["id"] for one in (await gateway.client.get("/v1/models")).json()["data"]] == ["good"]
            assert (await gateway.client.draw(model="bad")).json()["error"]["code"] == "model_not_found"
            (record,) = (await gateway.client.get("/v1/backends")).json()["data"]
            assert "4.ckpt_name is gone" in record["endpoints"][0]["health_detail"]

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    (told,) = [one for one in caplog.records if "workflow" in one.message]
    assert told.message.startswith("it cannot run the workflow bad: 4.ckpt_name is gone")
    assert told.fields["backend"] == "comfy"  # type: ignore[attr-defined]


def test_one_workflow_that_cannot_run_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"checkpoint": "tiny-a.safetensors"}
    graphs = {"good": built_in().filled(plain), "bad": built_in(clip_skip=True).filled(plain)}
    table = "\n".join(
        f"[backends.comfyui.workflows.{name}]\ngraph = {toml_of(graph)}" for name, graph in graphs.items()
    )

    async def main() -> None:
        async with FakeComfyUI() as server, running(backend(server, table)) as gateway:
            await known(gateway)
            monkeypatch.delitem(fake_comfyui.NODES, "CLIPSetLastLayer")  # somebody has tidied up
            for _ in range(8):
                reply = await gateway.client.draw(model="bad", size="64x64")
                assert (reply.status, reply.headers["x-backend"]) == (502, "comfy")
                assert "CLIPSetLastLayer" in reply.json()["error"]["message"]
            assert (await gateway.client.draw(model="good", size="64x64")).status == 200
            (record,) = (await gateway.client.get("/v1/backends")).json()["data"]
            (endpoint,) = record["endpoints"]
            assert (endpoint["breaker"], endpoint["usable"], endpoint["failures"]) == ("closed", True, 0)
            assert "CLIPSetLastLayer" in endpoint["last_error"]

    asyncio.run(main())
