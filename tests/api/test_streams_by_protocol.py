"""A stream is made of whatever the backend shows: steps of the painter or a worker, ComfyUI's and A1111's previews, events."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.support.fake_a1111 import FakeA1111
from tests.support.fake_comfyui import FakeComfyUI
from tests.support.fake_openai import FakeOpenAI
from tests.support.frames import Frame, frames_of
from tests.support.gateways import Harness, running
from tests.support.workers import working

from img_serving.backends.scripted import picture
from img_serving.media.sniff import check_picture, sniff

PICTURE = "data:image/png;base64," + base64.b64encode(picture("input", 1, 64, 64)).decode()


def backend(url: str, protocol: str, more: str = "") -> str:
    return f'[[backends]]\nname = "one"\nprotocol = "{protocol}"\nendpoints = ["{url}"]\n{more}\n'


@asynccontextmanager
async def gateway_of(kind: str) -> AsyncIterator[Harness]:
    """A gateway in front of one backend of that kind, which takes twelve steps of some hundredths of a second."""
    if kind == "builtin":
        async with running() as gateway:
            yield gateway
    elif kind == "grpc":
        with working("--engine", "procedural") as worker:
            async with running(backend(f"grpc://127.0.0.1:{worker.port}", "grpc")) as gateway:
                yield await _known(gateway)
    elif kind == "comfyui":
        async with FakeComfyUI() as comfyui, running(backend(comfyui.url, "comfyui")) as gateway:
            comfyui.step_seconds = 0.02
            yield await _known(gateway)
    elif kind == "a1111":
        async with FakeA1111(step_seconds=0.25) as forge, running(backend(forge.url, "a1111")) as gateway:
            yield await _known(gateway)
    else:
        async with (
            FakeOpenAI("openai") as hosted,
            running(
                backend(hosted.url, "openai", 'models = ["gpt-image-1"]\n[backends.openai]\npreset = "openai"')
            ) as gateway,
        ):
            yield await _known(gateway)


async def _known(gateway: Harness) -> Harness:
    async with asyncio.timeout(10):
        while not all(gateway.gateway.registry.snapshot("one").found):  # noqa: ASYNC110 - the prober's doing
            await asyncio.sleep(0.01)
    return gateway


def _size(kind: str) -> dict[str, Any]:
    return {"size": "1024x1024", "model": "gpt-image-1"} if kind == "openai" else {"size": "128x128", "steps": 12}


def _check(frames: list[Frame], wanted: int, prefix: str) -> None:
    assert [frame.event for frame in frames] == [f"{prefix}.partial_image"] * wanted + [f"{prefix}.completed"]
    assert [frame.data["partial_image_index"] for frame in frames[:-1]] == list(range(wanted))
    for frame in frames:
        data = base64.b64decode(frame.data["b64_json"], validate=True)
        assert sniff(data) == f"image/{frame.data['output_format']}"
    check_picture(data)


@pytest.mark.parametrize("wanted", [0, 1, 3])
@pytest.mark.parametrize("kind", ["builtin", "grpc", "comfyui", "a1111", "openai"])
def test_a_generation_shows_as_many_pictures_as_were_asked_for(kind: str, wanted: int) -> None:
    async def main() -> bytes:
        async with gateway_of(kind) as gateway:
            reply = await gateway.client.draw(stream=True, partial_images=wanted, **_size(kind))
            assert reply.status == 200, reply.body
            return reply.body

    _check(frames_of(asyncio.run(main())), wanted, "image_generation")


@pytest.mark.parametrize("kind", ["builtin", "grpc", "comfyui", "a1111", "openai"])
def test_an_edit_is_streamed_under_its_own_names(kind: str) -> None:
    async def main() -> bytes:
        async with gateway_of(kind) as gateway:
            body = {"prompt": "a fox", "image": PICTURE, "stream": True, "partial_images": 2, **_size(kind)}
            reply = await gateway.client.post("/v1/images/edits", body)
            assert reply.status == 200, reply.body
            return reply.body

    _check(frames_of(asyncio.run(main())), 2, "image_edit")


@pytest.mark.parametrize("kind", ["builtin", "grpc", "comfyui"])
def test_each_picture_of_several_shows_its_own(kind: str) -> None:
    async def main() -> bytes:
        async with gateway_of(kind) as gateway:
            reply = await gateway.client.draw(stream=True, partial_images=2, n=3, **_size(kind))
            assert reply.status == 200, reply.body
            return reply.body

    frames = frames_of(asyncio.run(main()))
    for index in range(3):
        _check([frame for frame in frames if frame.data["image_index"] == index], 2, "image_generation")
