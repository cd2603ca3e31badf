"""The A1111 adapter: what is sent, and how replies of the real engines are read."""

from __future__ import annotations

import asyncio
import json

import pybase64
import pytest
from msgspec.structs import replace

from img_serving.backends.a1111 import A1111Backend
from img_serving.backends.a1111.wire import request_body
from img_serving.backends.scripted import picture
from img_serving.backends.scripted_server import ScriptedServer
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Call, ImageRequest, Item
from img_serving.media.payload import raw_bytes
from img_serving.ports import UpstreamReply
from img_serving.transport.http import HttpTransport


class OneReply:
    """A transport that answers each path in its own way."""

    def __init__(self, replies: dict[str, UpstreamReply]) -> None:
        self.replies = replies
        self.headers: list[dict[str, str]] = []

    async def request(
        self, method, path, *, headers=(), body=None, timeout_seconds, max_body_bytes, on_event_bytes=None
    ) -> UpstreamReply:
        self.headers.append(dict(headers))
        return self.replies.get(path, UpstreamReply(404))

    async def close(self) -> None:
        pass


def call_of(*seeds: int, model: str | None = None, **request) -> Call:
    asked = ImageRequest("a fox", seed=seeds[0], n=len(seeds), **request)
    return Call(asked, model, 64, 48, tuple(Item("a fox", asked.negative_prompt, seed) for seed in seeds), 5.0)


def b64(seed: int) -> str:
    return pybase64.b64encode(picture("a fox", seed, 64, 48)).decode()


def answer(images, info) -> dict[str, UpstreamReply]:
    body = {"images": images, "parameters": {"images": ["x"]}, "info": info}
    return {"/sdapi/v1/txt2img": UpstreamReply(200, {}, json.dumps(body).encode())}


def draw(backend: A1111Backend, call: Call):
    return asyncio.run(backend.generate(call, lambda progress: None))


def test_what_the_client_did_not_say_is_left_to_the_server():
    assert request_body(call_of(7, 8), (64, 48)) == {
        "prompt": "a fox", "negative_prompt": "", "seed": 7, "width": 64, "height": 48, "batch_size": 2, "n_iter": 1,
        "send_images": True, "save_images": False,
    }  # fmt: skip


def test_every_parameter_that_is_honoured_arrives_under_this_protocols_name():
    call = call_of(
        7,
        negative_prompt="blur",
        steps=12,
        guidance_scale=4.5,
        sampler="Euler a",
        scheduler="karras",
        clip_skip=2,
        model="sd",
    )
    body = request_body(call, (64, 48), sampler="Euler a", schedule="karras", clip_skip=2, restore=True)
    assert {"negative_prompt": "blur", "steps": 12, "cfg_scale": 4.5, "sampler_name": "Euler a"}.items() <= body.items()
    assert body["scheduler"] == "karras"
    assert body["override_settings"] == {"CLIP_stop_at_last_layers": 2}
    assert body["override_settings_restore_afterwards"] is True
    assert body["clip_skip"] == 2  # where other programs look for it


def test_a_model_that_was_loaded_for_a_call_stays_for_the_next():
    body = request_body(call_of(7), (64, 48), checkpoint="sd")
    assert body["override_settings"] == {"sd_model_checkpoint": "sd"}
    assert body["override_settings_restore_afterwards"] is False


def test_seeds_are_those_that_the_server_tells():
    (one, two) = draw(
        A1111Backend(OneReply(answer([b64(1), b64(2)], json.dumps({"all_seeds": [40, 41]})))), call_of(7, 8)
    )
    assert (one.seed, two.seed) == (40, 41)


@pytest.mark.parametrize(
    "info",
    [
        None,
        "",
        "no json",
        "[]",
        json.dumps({"all_seeds": [1]}),
        json.dumps({"all_seeds": [-1, -1]}),
        {"all_seeds": "x"},
        5,
    ],
)
def test_a_note_that_cannot_be_read_costs_no_picture(info):
    (one, two) = draw(A1111Backend(OneReply(answer([b64(1), b64(2)], info))), call_of(7, 8))
    assert (one.seed, two.seed) == (7, 8)


def test_a_grid_before_and_helper_pictures_behind_are_dropped():
    images = [b64(99), b64(7), b64(8), b64(77)]
    info = json.dumps({"all_seeds": [7, 8], "index_of_first_image": 1})
    results = draw(A1111Backend(OneReply(answer(images, info))), call_of(7, 8))
    assert [raw_bytes(one) for one in results] == [picture("a fox", seed, 64, 48) for seed in (7, 8)]


def test_a_grid_of_a_real_reply_is_dropped_too():
    async def main():
        async with ScriptedServer({"sequence": ["grid"]}) as server:
            backend = A1111Backend(HttpTransport(server.url))
            try:
                return await backend.generate(call_of(7, 8), lambda progress: None)
            finally:
                await backend.close()

    assert [one.seed for one in asyncio.run(main())] == [7, 8]


@pytest.mark.parametrize("images", [None, [], [b64(7)], [b64(7), "AAAA"], [b64(7), None], "x"])
def test_fewer_good_pictures_than_asked_for_are_a_failure_of_all(images):
    """An interrupted server answers 200 with an unfinished picture: nothing in such a reply can be trusted."""
    with pytest.raises(AttemptError) as caught:
        draw(A1111Backend(OneReply(answer(images, "{}"))), call_of(7, 8))
    assert caught.value.outcome is Outcome.FAILED


def test_only_consecutive_seeds_of_one_prompt_fit_a_call():
    call = call_of(7, 8)
    other = replace(call, items=(call.items[0], replace(call.items[1], prompt="a hen")))
    for unfit in (call_of(7, 9), other):
        with pytest.raises(AttemptError) as caught:
            draw(A1111Backend(OneReply({})), unfit)
        assert caught.value.outcome is Outcome.NOT_STARTED


def test_an_unknown_sampler_is_the_requests_fault():
    replies = {"/sdapi/v1/txt2img": UpstreamReply(404, {}, b'{"detail": "Sampler not found"}')}
    with pytest.raises(BackendRefusal) as caught:
        draw(A1111Backend(OneReply(replies)), call_of(7, sampler="nonsense"))
    assert caught.value.error.param == "sampler"
    with pytest.raises(AttemptError):
        draw(A1111Backend(OneReply(replies)), call_of(7))


def test_what_ran_out_is_said():
    body = b'{"error": "OutOfMemoryError", "detail": "", "body": "", "errors": "CUDA out of memory. Tried 2 GiB"}'
    with pytest.raises(AttemptError, match="OutOfMemoryError: CUDA out of memory"):
        draw(A1111Backend(OneReply({"/sdapi/v1/txt2img": UpstreamReply(500, {}, body)})), call_of(7))


def test_the_password_travels_as_basic():
    transport = OneReply(answer([b64(7)], "{}"))
    backend = A1111Backend(transport, username="me", password="pw:é")
    draw(backend, call_of(7))
    assert len({headers["Authorization"] for headers in transport.headers}) == 1
    scheme, _, token = transport.headers[0]["Authorization"].partition(" ")
    assert (scheme, pybase64.b64decode(token).decode()) == ("Basic", "me:pw:é")
    assert "pw:é" not in repr(backend)


MODELS, OPTIONS = "/sdapi/v1/sd-models", "/sdapi/v1/options"


@pytest.mark.parametrize(
    ("replies", "healthy", "models"),
    [
        (
            {MODELS: UpstreamReply(200, {}, b'[{"title": "a.st [1]", "model_name": "a"}, {"title": "b.st"}]')},
            True,
            ("a", "b.st"),
        ),
        ({MODELS: UpstreamReply(200, {}, b"[]")}, True, None),
        ({MODELS: UpstreamReply(200, {}, b"{}")}, False, None),
        ({OPTIONS: UpstreamReply(200, {}, b"{}")}, True, None),
        ({}, False, None),
        ({MODELS: UpstreamReply(405)}, True, None),
        ({MODELS: UpstreamReply(401)}, False, None),
        ({MODELS: UpstreamReply(500)}, False, None),
    ],
)
def test_the_checkpoints_speak_for_health(replies, healthy, models):
    report = asyncio.run(A1111Backend(OneReply(replies)).check(1.0))
    assert (report.healthy, report.models) == (healthy, models)
    assert report.detail


def test_a_configured_health_path_decides_unless_it_is_not_there():
    listed = {MODELS: UpstreamReply(200, {}, b'[{"model_name": "a"}]')}
    ok = A1111Backend(OneReply({**listed, "/ping": UpstreamReply(200)}), health_check_path="/ping")
    assert asyncio.run(ok.check(1.0)).models == ("a",)
    sick = A1111Backend(OneReply({**listed, "/ping": UpstreamReply(500)}), health_check_path="/ping")
    assert not asyncio.run(sick.check(1.0)).healthy
    report = asyncio.run(A1111Backend(OneReply(listed), health_check_path="/ping").check(1.0))
    assert report.healthy
    assert "/ping is not there" in report.detail
