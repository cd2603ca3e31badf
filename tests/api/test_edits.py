"""`/v1/images/edits`: forms and JSON, what is believed of them, and what an engine gets."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pybase64
import pytest
from PIL import Image
from tests.support.asgi import Reply
from tests.support.fake_a1111 import FakeA1111
from tests.support.gateways import Harness, running

from img_serving.api import images as images_module
from img_serving.backends.scripted import picture
from img_serving.domain.jobs import Job
from img_serving.media.masks import white_where_painted

START = picture("start", 1, 64, 48)
OTHER = picture("other", 2, 64, 48)
MASK = picture("mask", 3, 64, 48)
Parts = list[tuple[str, bytes, str | None]]
"""(name, content, file name or None)."""


def configured(server: FakeA1111, more: str = "") -> str:
    backend = f'[[backends]]\nname = "engine"\nprotocol = "a1111"\nendpoints = ["{server.url}"]\n'
    return f"[rate_limit]\nenabled = false\n{more}\n{backend}"


def edit(act: Callable[[Harness, FakeA1111], Coroutine[Any, Any, Any]], more: str = "") -> Any:
    async def main() -> Any:
        async with FakeA1111() as server, running(configured(server, more)) as gateway:
            return await act(gateway, server)

    return asyncio.run(main())


def form(parts: Parts, boundary: str = "x-boundary") -> bytes:
    body = b""
    for name, content, file in parts:
        named = f'; filename="{file}"' if file is not None else ""
        kind = "Content-Type: application/octet-stream\r\n" if file is not None else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n{kind}\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


async def send(gateway: Harness, parts: Parts, raw: bytes | None = None) -> Reply:
    headers = {"content-type": "multipart/form-data; boundary=x-boundary"}
    body = form(parts) if raw is None else raw
    return await gateway.client.request("POST", "/v1/images/edits", raw=body, headers=headers)


async def send_json(gateway: Harness, **body: Any) -> Reply:
    return await gateway.client.post("/v1/images/edits", {"prompt": "a fox", **body})


def url_of(data: bytes) -> str:
    return "data:image/png;base64," + pybase64.b64encode(data).decode()


def sent_images(server: FakeA1111) -> list[bytes]:
    (post,) = server.posts
    assert post.path == "/sdapi/v1/img2img"
    return [pybase64.b64decode(text) for text in post.json["init_images"]]


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_a_form_as_the_official_clients_send_it_reaches_the_engine(name: str) -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        parts: Parts = [
            ("prompt", "여우 한 마리".encode(), None),
            ("n", b"2", None),
            ("seed", b"7", None),
            ("strength", b"0.4", None),
            ("response_format", b"b64_json", None),
            ("extra[thing]", b"1", None),
            (name, START, "upload"),
            ("mask", MASK, "mask.png"),
        ]
        reply = await send(gateway, parts)
        assert reply.status == 200, reply.body
        assert [one["seed"] for one in reply.json()["data"]] == [7, 8]
        assert reply.json()["size"] == "64x48"
        assert sent_images(server) == [START]
        body = server.posts[0].json
        assert (body["prompt"], body["denoising_strength"], body["batch_size"]) == ("여우 한 마리", 0.4, 2)
        assert pybase64.b64decode(body["mask"]) == white_where_painted(MASK)

    edit(act)


@pytest.mark.parametrize(
    "body",
    [
        {"images": [{"image_url": url_of(START)}]},
        {"image": url_of(START)},
        {"image": [pybase64.b64encode(START).decode()]},
    ],
)
def test_a_picture_in_json_reaches_the_engine(body: dict[str, Any]) -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        reply = await send_json(gateway, **body, mask={"image_url": url_of(MASK)}, denoise=0.3)
        assert reply.status == 200, reply.body
        assert sent_images(server) == [START]
        assert server.posts[0].json["denoising_strength"] == 0.3

    edit(act)


def test_the_size_is_that_of_the_picture_unless_another_is_asked_for() -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        assert (await send_json(gateway, image=url_of(START))).json()["size"] == "64x48"
        assert (await send_json(gateway, image=url_of(START), size="96x96")).json()["size"] == "96x96"
        large = picture("large", 1, 4000, 2000)
        assert (await send_json(gateway, image=url_of(large))).json()["size"] == "1448x720"

    edit(act)


def test_a_picture_that_cannot_keep_its_size_is_said_to_have_lost_it() -> None:
    odd = picture("odd", 4, 100, 70)

    async def act(gateway: Harness, server: FakeA1111) -> None:
        reply = await send(gateway, [("prompt", b"a", None), ("image", odd, "a.png")])
        assert (reply.status, reply.json()["size"]) == (200, "96x64")
        assert reply.headers["x-img-serving-ignored"] == "size"
        reply = await send(gateway, [("prompt", b"a", None), ("image", odd, "a.png"), ("strict", b"true", None)])
        assert reply.status == 400
        assert reply.json()["error"]["message"].endswith("96x64 would do)")
        kept = [("prompt", b"a", None), ("image", START, "a.png"), ("strict", b"true", None)]
        reply = await send(gateway, kept)
        assert (reply.status, reply.headers.get("x-img-serving-ignored")) == (200, None)

    edit(act)


def test_fields_of_a_form_that_nobody_knows_are_named() -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        reply = await send(gateway, [("prompt", b"a", None), ("image", START, "a.png"), ("stps", b"3", None)])
        assert (reply.status, reply.headers["x-img-serving-ignored"]) == (200, "stps")

    edit(act)


def test_the_official_client_edits() -> None:
    """Its own form, over its own transport: openai-python against the application."""
    import httpx2 as httpx
    import openai

    async def act(gateway: Harness, server: FakeA1111) -> None:
        transport = httpx.ASGITransport(app=gateway.gateway.app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(api_key="sk-admin-key", base_url="http://gateway.test/v1", http_client=http)
            one = await client.images.edit(
                image=START, mask=MASK, prompt="a fox", model="tiny-a", response_format="b64_json"
            )
            assert one.data is not None
            assert one.data[0].b64_json
            listed = await client.images.edit(image=[START], prompt="a fox", model="tiny-a")
            assert listed.data
        assert len(server.posts) == 2

    edit(act)


@pytest.mark.parametrize(
    ("parts", "param", "words"),
    [
        ([("prompt", b"x", None)], "image", "image is required"),
        ([("image", START, "a.png")], "prompt", "prompt is required"),
        ([("prompt", b"x", None), ("image", b"no picture", "a.png")], "image", "not a picture"),
        ([("prompt", b"x", None), ("image", START[:-20], "a.png")], "image", "cut short"),
        ([("prompt", b"x", None), ("image", b"text", None)], "image", "must be a file"),
        ([("prompt", b"x", None), *[("image[]", START, "a.png")] * 17], "image", "at most 16"),
        (
            [("prompt", b"x", None), ("image", START, "a"), ("mask", picture("m", 1, 8, 8), "m")],
            "mask",
            "must be alike",
        ),
        ([("prompt", b"x", None), ("image", START, "a"), ("mask", MASK, "m"), ("mask", MASK, "m")], "mask", "one mask"),
        ([("prompt", b"x", None), ("image", START, "a"), ("notes", b"?", "n.txt")], "notes", "takes image and mask"),
        ([("prompt", b"x", None), ("image", START, "a"), ("n", b"many", None)], "n", "n: "),
        ([("prompt", b"x", None), ("image", START, "a"), ("strength", b"2", None)], "strength", "strength: "),
        ([("prompt", b"\xff\xfe", None), ("image", START, "a")], "prompt", "not UTF-8"),
        ([("prompt", b"x" * 1_100_000, None), ("image", START, "a")], "prompt", "over 1048576 bytes"),
        ([("prompt", b"x", None), *[("image[]", START, "a")] * 2], "image", "at most 1 input image"),
    ],
)
def test_a_form_that_cannot_be_is_refused_by_the_name_of_its_field(parts: Parts, param: str, words: str) -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        await gateway.adapter("engine").check(5.0)
        reply = await send(gateway, parts)
        assert (reply.status, reply.error["param"]) == (400, param)
        assert words in reply.error["message"]
        assert not server.posts

    edit(act)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "malformed"),
        (b"--x-boundary", "malformed"),
        (b"--x-boundary--", "prompt is required"),
        (b"no form", "malformed"),
        (form([("prompt", b"x", None)])[:-10], "cut short"),
        (b"--x-boundary\r\n\r\nno name\r\n--x-boundary--", "no usable name"),
        (b'--x-boundary\r\nContent-Disposition: form-data; name="\x00"\r\n\r\nx\r\n--x-boundary--', "no usable name"),
        (b"--x-boundary\r\n" + b"A: " + b"b" * 10_000 + b"\r\n\r\nx\r\n--x-boundary--", "no end of its head"),
        (form([(f"f{index}", b"x", None) for index in range(65)]), "more than 64 parts"),
    ],
)
def test_what_is_no_form_is_refused(raw: bytes, words: str) -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        reply = await send(gateway, [], raw)
        assert reply.status == 400
        assert words in reply.error["message"]

    edit(act)


def test_what_only_looks_like_a_boundary_is_content() -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        words = "a fox\r\n--x-boundaryX\r\n--x-boundar\r\n --x-boundary--"
        body = b"a preamble\r\n" + form(
            [("prompt", words.encode(), None), ("user", b"", None), ("image", START, "a.png")]
        )
        assert (await send(gateway, [], body + b"\r\nan epilogue")).status == 200
        assert server.posts[0].json["prompt"] == words
        assert sent_images(server) == [START]

    edit(act)


def test_a_strict_form_refuses_what_nobody_knows() -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        parts: Parts = [("prompt", b"x", None), ("strict", b"true", None), ("num_inferrence_steps", b"3", None)]
        reply = await send(gateway, [*parts, ("image", START, "a.png")])
        assert (reply.status, reply.error["param"]) == (400, "num_inferrence_steps")

    edit(act)


def test_what_was_edited_is_let_go_of_when_it_is_done() -> None:
    """A job and its tasks refer to each other: they live until the collector looks, and uploads are large."""

    async def act(gateway: Harness, server: FakeA1111) -> None:
        kept: list[Job] = []
        run = gateway.gateway.dispatcher.run

        async def watched(job: Job) -> None:
            kept.append(job)
            await run(job)

        gateway.gateway.dispatcher.run = watched  # type: ignore[method-assign] # to look at the job afterwards
        assert (await send_json(gateway, image=url_of(START), mask=url_of(MASK))).status == 200
        server.follow({"sequence": ["500"]})
        assert (await send_json(gateway, image=url_of(START))).status == 502
        assert [(job.request.images, job.request.mask) for job in kept] == [((), None)] * 2

    edit(act)


def test_a_form_needs_its_boundary() -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        for kind in ("multipart/form-data", "multipart/form-data; boundary=" + "x" * 300):
            reply = await gateway.client.request(
                "POST", "/v1/images/edits", raw=form([]), headers={"content-type": kind}
            )
            assert reply.status == 400
            assert "boundary" in reply.error["message"]

    edit(act)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "image", "image is required"),
        ({"image": "https://inside.example/secret.png"}, "image", "not fetched"),
        ({"images": [{"image_url": "http://169.254.169.254/"}]}, "image", "not fetched"),
        ({"images": [{"file_id": "file-1"}]}, "image", "no stored files"),
        ({"images": [{}]}, "image", "no stored files"),
        ({"images": []}, "images", "images: "),
        ({"image": "data:image/png;base64,!!!"}, "image", "bad base64"),
        ({"image": url_of(b"no picture")}, "image", "not a picture"),
        ({"image": url_of(START), "images": [{"image_url": url_of(START)}]}, "image", "mean the same"),
        ({"image": url_of(START), "mask": "https://x"}, "mask", "not fetched"),
        ({"image": url_of(START), "strength": 0.5, "denoise": 0.6}, "denoise", "mean the same and differ"),
        ({"image": url_of(START), "strict": True, "imagee": "x"}, "imagee", "did you mean 'image'"),
    ],
)
def test_a_json_body_that_cannot_be_is_refused_by_the_name_of_its_field(
    body: dict[str, Any], param: str, words: str
) -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        reply = await send_json(gateway, **body)
        assert (reply.status, reply.error["param"]) == (400, param)
        assert words in reply.error["message"]
        assert not server.posts

    edit(act)


def test_a_picture_that_only_claims_to_be_huge_is_refused_by_its_head() -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        bomb = io.BytesIO()
        Image.new("1", (6000, 6000)).save(bomb, "PNG")
        assert len(bomb.getvalue()) < 10_000
        reply = await send(gateway, [("prompt", b"x", None), ("image", bomb.getvalue(), "a.png")])
        assert (reply.status, reply.error["param"]) == (400, "image")
        assert "36000000 pixels; at most 16777216" in reply.error["message"]

    edit(act)


def test_a_backend_that_cannot_edit_says_so() -> None:
    async def main() -> None:
        async with running('[[backends]]\nname = "sketch"\nprotocol = "scripted"\n') as gateway:
            reply = await send_json(gateway, image=url_of(START))
            assert reply.status == 400
            assert "sketch: it cannot do the operation 'edit'" in reply.error["message"]

    asyncio.run(main())


def test_max_upload_bytes_bounds_an_edit() -> None:
    async def act(gateway: Harness, server: FakeA1111) -> None:
        reply = await send(gateway, [("prompt", b"x", None), ("image", START + bytes(3000), "a.png")])
        assert reply.status == 413

    edit(act, "[server]\nmax_upload_bytes = 2000\n")


def test_uploads_in_memory_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "HELD_UPLOADS", 2)

    async def act(gateway: Harness, server: FakeA1111) -> None:
        await gateway.adapter("engine").check(5.0)
        server.gate = asyncio.Event()
        body = json.dumps({"prompt": "x", "image": url_of(START), "user": "u" * 1000}).encode()

        async def one() -> Reply:
            return await gateway.client.request(
                "POST", "/v1/images/edits", raw=body, headers={"content-type": "application/json"}
            )

        waiting = [asyncio.create_task(one()) for _ in range(3)]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        (refused,) = done
        assert (refused.result().status, refused.result().error["code"]) == (503, "queue_full")
        server.gate.set()
        assert [task.result().status for task in (await asyncio.wait(waiting))[0]].count(200) == 2
        assert (await one()).status == 200  # the room is free again

    edit(act, "[server]\nmax_upload_bytes = 1700\n")
