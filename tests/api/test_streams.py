"""`stream: true`: events as OpenAI's clients read them, made of whatever the backend shows."""

from __future__ import annotations

import asyncio
import base64
from typing import Any
from weakref import ref

import pytest
from tests.support.asgi import Reply
from tests.support.frames import Frame, comments_of, frames_of
from tests.support.gateways import running, scripted
from tests.support.virtual_time import run_virtual

from img_serving.backends.scripted import picture
from img_serving.gateway.live import PictureNews
from img_serving.media.payload import artifact_from_bytes
from img_serving.media.sniff import check_picture

PARTIAL_FIELDS = {
    "type", "b64_json", "created_at", "size", "quality", "background", "output_format", "partial_image_index", "image_index",
}  # fmt: skip
COMPLETED_FIELDS = {
    "type", "b64_json", "created_at", "size", "quality", "background", "output_format", "usage", "image_index", "seed",
}  # fmt: skip


def shows(name: str = "one", **more: Any) -> str:
    return scripted(name, **{"latency_seconds": 8, "steps": 8, "previews": True, **more})


def streamed(toml: str, **fields: Any) -> tuple[Reply, list[Frame]]:
    async def main() -> Reply:
        async with running(toml) as gateway:
            return await gateway.client.draw(stream=True, size="64x64", **fields)

    reply: Reply = run_virtual(main())
    return reply, frames_of(reply.body) if reply.status == 200 else []


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_exactly_as_many_partials_as_asked_then_one_completed(wanted: int) -> None:
    reply, frames = streamed(shows(), partial_images=wanted)
    assert reply.headers["content-type"] == "text/event-stream"
    assert "content-length" not in reply.headers
    assert reply.headers["cache-control"].startswith("no-cache")
    assert [frame.event for frame in frames] == ["image_generation.partial_image"] * wanted + [
        "image_generation.completed"
    ]
    assert [frame.data["partial_image_index"] for frame in frames[:-1]] == list(range(wanted))


def test_every_frame_has_what_the_api_promises() -> None:
    _, frames = streamed(shows(), partial_images=1, quality="high", seed=7)
    partial, completed = (frame.data for frame in frames)
    assert partial.keys() == PARTIAL_FIELDS
    assert completed.keys() == COMPLETED_FIELDS
    assert (partial["type"], completed["type"]) == ("image_generation.partial_image", "image_generation.completed")
    for data in (partial, completed):
        assert data["quality"] == "high"
        assert data["output_format"] == "png"
        assert check_picture(base64.b64decode(data["b64_json"], validate=True))[0] == "image/png"
    assert completed["size"] == "64x64"
    assert completed["seed"] == 7
    assert completed["usage"].keys() == {"total_tokens", "input_tokens", "output_tokens", "input_tokens_details"}


def test_without_partial_images_there_are_none() -> None:
    assert [frame.event for frame in streamed(shows())[1]] == ["image_generation.completed"]


def test_a_backend_that_shows_nothing_still_ends_with_a_completed_event() -> None:
    _, frames = streamed(scripted("one", latency_seconds=1), partial_images=3)
    assert [frame.event for frame in frames] == ["image_generation.completed"]


def test_the_pictures_of_one_request_are_told_apart() -> None:
    _, frames = streamed(shows(), n=3, partial_images=2)
    assert len(frames) == 9
    for index in range(3):
        own = [frame for frame in frames if frame.data["image_index"] == index]
        assert [frame.event.rpartition(".")[2] for frame in own] == ["partial_image", "partial_image", "completed"]
        assert [frame.data.get("partial_image_index") for frame in own] == [0, 1, None]
    seeds = {frame.data["image_index"]: frame.data["seed"] for frame in frames if "seed" in frame.data}
    assert [seeds[index] - seeds[0] for index in range(3)] == [0, 1, 2]


def test_a_picture_is_told_when_it_is_done_and_not_when_all_are() -> None:
    async def main() -> None:
        toml = scripted("one", latency_seconds=10, max_batch_size=1, max_concurrency=1)
        async with running(toml) as gateway:
            live = asyncio.ensure_future(gateway.client.draw(stream=True, n=3, size="64x64"))
            await asyncio.sleep(15)
            (job,) = gateway.gateway.services.jobs._live.values()
            assert [type(one).__name__ for one in job.news] == ["PictureNews"]
            reply = await live
            assert [frame.data["image_index"] for frame in frames_of(reply.body)] == [0, 1, 2]

    run_virtual(main())


def test_a_long_silence_is_filled_with_comments() -> None:
    reply, frames = streamed(scripted("one", latency_seconds=50))
    assert comments_of(reply.body) == 1 + 3  # with the head, and then every 15 s
    assert [frame.event for frame in frames] == ["image_generation.completed"]


def test_who_has_heads_go_out_early_hears_more_often() -> None:
    reply, _ = streamed(scripted("one", latency_seconds=50) + "[server]\nkeepalive_after_seconds = 4\n")
    assert comments_of(reply.body) == 1 + 11


def test_a_failure_before_the_head_has_its_own_status() -> None:
    reply, _ = streamed(shows(sequence=["fail"], latency_seconds=1))
    assert reply.status == 502
    assert reply.error["code"] == "backend_failed"
    assert reply.headers["x-should-retry"] == "false"
    reply, _ = streamed(shows(), model="nobody's")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    reply, _ = streamed(shows(), n=0)
    assert (reply.status, reply.error["param"]) == (400, "n")


def test_a_failure_after_a_partial_is_a_nested_error_and_the_last_frame() -> None:
    reply, frames = streamed(shows(sequence=["fail_midway"]), partial_images=3)
    assert reply.status == 200
    assert [frame.event for frame in frames] == ["image_generation.partial_image"] * 2 + ["error"]
    data = frames[-1].data
    assert data.keys() == {"type", "error"}
    assert data["type"] == "error"
    assert data["error"].keys() == {"message", "type", "param", "code"}


def test_a_second_try_elsewhere_shows_no_partial_twice() -> None:
    toml = shows("one", sequence=["fail_midway"]) + shows("two")
    _, frames = streamed(toml, partial_images=3, model="scripted")
    assert [frame.data.get("partial_image_index") for frame in frames] == [0, 1, 2, None]
    assert frames[-1].event == "image_generation.completed"


def test_the_picture_is_in_the_format_that_was_asked_for() -> None:
    # codecs run in threads, so in real time
    async def main() -> list[Frame]:
        async with running(scripted("one")) as gateway:
            reply = await gateway.client.draw(stream=True, size="64x64", output_format="webp")
            return frames_of(reply.body)

    (frame,) = asyncio.run(main())
    assert frame.data["output_format"] == "webp"
    assert check_picture(base64.b64decode(frame.data["b64_json"]))[0] == "image/webp"


@pytest.mark.parametrize("retries", [False, True])
def test_a_client_that_leaves_takes_its_job_along(retries: bool) -> None:
    async def main() -> None:
        async with running(shows(latency_seconds=100)) as gateway:
            gone = asyncio.Event()
            headers = {"x-stainless-retry-count": "0"} if retries else {}
            asking = asyncio.ensure_future(
                gateway.client.post(
                    "/v1/images/generations", {"prompt": "x", "stream": True}, leave=gone, headers=headers
                )
            )
            await asyncio.sleep(30)
            gone.set()
            await asyncio.sleep(1)
            assert gateway.adapter("one").cancelled == (0 if retries else 1)
            await asyncio.sleep(2)
            assert gateway.adapter("one").cancelled == 1
            await asking
            assert repr(gateway.gateway.services.jobs) == "<Jobs 0 live>"

    run_virtual(main())


def test_a_retry_joins_the_stream_that_was_left_and_hears_all_of_it() -> None:
    async def main() -> None:
        async with running(shows(latency_seconds=80)) as gateway:
            gone = asyncio.Event()
            body = {"prompt": "x", "stream": True, "partial_images": 2}
            headers = {"x-stainless-retry-count": "0"}
            first = asyncio.ensure_future(
                gateway.client.post("/v1/images/generations", body, leave=gone, headers=headers)
            )
            await asyncio.sleep(40)
            gone.set()
            await first
            await asyncio.sleep(1)
            reply = await gateway.client.post("/v1/images/generations", body, headers={"x-stainless-retry-count": "1"})
            events = [frame.event.rpartition(".")[2] for frame in frames_of(reply.body)]
            assert events == ["partial_image", "partial_image", "completed"]
            assert gateway.adapter("one").count == 1

    run_virtual(main())


def test_what_many_are_told_of_is_encoded_once_and_forgotten_after_the_last() -> None:
    news = PictureNews(0, artifact_from_bytes(picture("x", 1, 64, 64), 1))
    first, second = news.encoded(), news.encoded()
    assert first is second
    text = bytes(first.text)
    held = ref(first)
    del first, second
    assert held() is None
    assert bytes(news.encoded().text) == text


def test_a_strict_request_shows_nothing_finished_that_was_not_honoured() -> None:
    async def main() -> Reply:
        async with running(scripted("one", latency_seconds=10, sequence=["bad_size"])) as gateway:
            return await gateway.client.draw(stream=True, size="64x64", strict=True)

    frames = frames_of(run_virtual(main()).body)
    assert [frame.event for frame in frames] == ["error"]
    assert frames[0].data["error"]["param"] == "size"


def test_a_strict_request_that_was_honoured_is_told_at_the_end() -> None:
    _, frames = streamed(scripted("one", latency_seconds=10), strict=True, n=2)
    assert [frame.data["image_index"] for frame in frames] == [0, 1]


def test_a_partial_picture_says_the_size_of_the_picture_that_it_will_be() -> None:
    async def main() -> Reply:
        async with running(shows()) as gateway:
            return await gateway.client.draw(stream=True, partial_images=1)

    partial, completed = frames_of(run_virtual(main()).body)
    assert partial.data["size"] == completed.data["size"] == "1024x1024"
