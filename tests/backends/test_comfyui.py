"""The ComfyUI adapter, over real sockets, to a server that behaves as the real one was seen to."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pybase64
import pytest
from PIL import Image
from tests.support.fake_comfyui import JPEG, FakeComfyUI, Job

from img_serving.backends.comfyui import ComfyUIBackend
from img_serving.backends.comfyui.prompt import Pace
from img_serving.backends.scripted import picture
from img_serving.backends.stub_server import Answer
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Artifact, Call, ImageRequest, InputImage, Item, Progress
from img_serving.media.payload import raw_bytes
from img_serving.media.png import strip_metadata
from img_serving.media.sniff import check_picture
from img_serving.transport.http import HttpTransport

FAST = Pace(
    poll=0.02,
    first_poll=0.004,
    over_poll=0.001,
    queue=0.04,
    unreachable=0.06,
    open=0.5,
    post=0.3,
    stop=1.0,
    reconnect=(0.002, 0.01),
)
KEY, HEADER = "sk-very-secret-key", "header-secret-value"
KOREAN = "고요한 항구의 등대"
SAVING: dict[str, Any] = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny-a.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "my prompt", "clip": ["1", 1]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "my negative", "clip": ["1", 1]}},
    "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "5": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 5, "steps": 4, "cfg": 3.0, "sampler_name": "heun", "scheduler": "karras", "denoise": 1.0,
            "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0],
        },
    },
    "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "mine/pic ture"}},
}  # fmt: skip


class Rig:
    """The adapter, the server, and what was told of the call."""

    def __init__(self, server: FakeComfyUI, backend: ComfyUIBackend) -> None:
        self.server = server
        self.backend = backend
        self.told: list[Progress] = []

    async def draw(self, call: Call) -> Artifact:
        (artifact,) = await self.backend.generate(call, self.told.append)
        assert isinstance(artifact, Artifact)
        return artifact

    async def failing(self, call: Call) -> AttemptError:
        with pytest.raises(AttemptError) as caught:
            await self.draw(call)
        return caught.value

    async def refused(self, call: Call) -> Any:
        with pytest.raises(BackendRefusal) as caught:
            await self.draw(call)
        return caught.value.error

    async def cancelled(self, call: Call, when: Callable[[], Any]) -> float:
        """Cancel a call as soon as something is so; how many seconds until the caller has it back."""
        drawing = asyncio.create_task(self.backend.generate(call, self.told.append))
        await until(when)
        at = time.monotonic()
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        return time.monotonic() - at


async def until(happened: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110 - another task's doing, that nothing announces
            await asyncio.sleep(0.001)


@asynccontextmanager
async def rigged(*, websocket: bool = True, **options: Any) -> AsyncIterator[Rig]:
    async with FakeComfyUI() as server:
        url = f"ws{server.url.removeprefix('http')}/ws" if websocket else None
        backend = ComfyUIBackend(HttpTransport(server.url), websocket_url=url, **{"pace": FAST, **options})
        try:
            yield Rig(server, backend)
        finally:
            await backend.close()


def run(act: Callable[[Rig], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with rigged(**options) as rig:
            found = await act(rig)
            # nothing of ours is left, whatever happened
            current = asyncio.current_task()
            left = [task for task in asyncio.all_tasks() if task is not current and "comfyui/socket.py" in repr(task)]
            assert not left
            return found

    return asyncio.run(main())


def call_of(seed: int = 7, prompt: str = "a quiet harbour", **more: Any) -> Call:
    model = more.pop("model", "tiny-a")
    width, height = more.pop("width", 64), more.pop("height", 64)
    timeout, previews = more.pop("timeout_seconds", 5.0), more.pop("previews", False)
    more.setdefault("steps", 3)
    more["given"] = frozenset(more.get("given", ()))
    asked = ImageRequest(prompt, seed=seed, model=model, **more)
    items = (Item(prompt, asked.negative_prompt, seed),)
    return Call(asked, model, width, height, items, timeout, request_id="req-1", previews=previews)


def input_image(size: tuple[int, int] = (32, 24), colour: str = "red") -> InputImage:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return InputImage(out.getvalue(), *check_picture(out.getvalue()))


def mask_image(size: tuple[int, int] = (32, 24)) -> InputImage:
    """Transparent on the left."""
    out = io.BytesIO()
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    mask.save(out, "PNG")
    return InputImage(out.getvalue(), *check_picture(out.getvalue()))


def sent(rig: Rig, index: int = -1) -> dict[str, Any]:
    """The inputs of the graph that came in, by class."""
    graph = rig.server.posts[index].json["prompt"]
    return {node["class_type"]: node["inputs"] for node in graph.values()}


def workflow(graph: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"workflows": {"mine": {"graph": graph if graph is not None else SAVING, **more}}}


# drawing


def test_a_plain_server_with_one_checkpoint_needs_no_table() -> None:
    async def act(rig: Rig) -> None:
        artifact = await rig.draw(call_of(7, negative_prompt="blur", guidance_scale=4.5, width=100, height=70))
        assert strip_metadata(raw_bytes(artifact)) == picture("a quiet harbour", 7, 96, 64)
        assert (artifact.width, artifact.height, artifact.seed, artifact.ignored) == (96, 64, 7, ())
        inputs = sent(rig)
        assert inputs["CheckpointLoaderSimple"] == {"ckpt_name": "tiny-a.safetensors"}
        sampler = inputs["KSampler"]
        assert (sampler["seed"], sampler["steps"], sampler["cfg"], sampler["denoise"]) == (7, 3, 4.5, 1.0)
        assert (sampler["sampler_name"], sampler["scheduler"]) == ("euler", "normal")
        assert inputs["EmptyLatentImage"] == {"width": 96, "height": 64, "batch_size": 1}
        texts = [node["inputs"].get("text") for node in rig.server.posts[0].json["prompt"].values()]
        assert {"a quiet harbour", "blur"} <= set(texts)
        assert {place for place, _, _ in rig.server.files} == {"temp"}

    run(act)


def test_a_request_that_names_no_model_draws_with_the_first() -> None:
    async def act(rig: Rig) -> None:
        await rig.draw(call_of(model=None))
        assert rig.server.loads == ["sub/tiny-b.safetensors"]

    run(act)


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("sub/tiny-b", "sub\\tiny-b.safetensors"),
        ("sub/tiny-b.safetensors", "sub\\tiny-b.safetensors"),
        ("two.ckpt", "two.ckpt"),
    ],
)
def test_a_model_id_is_mapped_back_to_its_file_exactly(model: str, file: str) -> None:
    async def act(rig: Rig) -> None:
        rig.server.checkpoints = ["sub\\tiny-b.safetensors", "two.ckpt", "two.safetensors"]
        await rig.draw(call_of(model=model))
        assert rig.server.loads == [file]

    run(act)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_korean_prompt_arrives_unchanged(form: Any) -> None:
    prompt = unicodedata.normalize(form, KOREAN)

    async def act(rig: Rig) -> None:
        artifact = await rig.draw(call_of(prompt=prompt))
        assert strip_metadata(raw_bytes(artifact)) == picture(prompt, 7, 64, 64)

    run(act)


def test_a_large_picture_comes_whole() -> None:
    large = picture("large", 1, 4096, 4096) + bytes(12 * 1024 * 1024)

    async def act(rig: Rig) -> None:
        rig.server.file = large
        artifact = await rig.draw(call_of())
        assert (artifact.width, artifact.height) == (4096, 4096)
        assert artifact.data == large

    run(act)


def test_a_picture_over_the_limit_is_a_failure() -> None:
    async def act(rig: Rig) -> None:
        rig.server.file = picture("large", 1, 64, 64) + bytes(64 * 1024)
        assert (await rig.failing(call_of())).outcome is Outcome.FAILED

    run(act, max_reply_bytes=32 * 1024)


def test_the_same_graph_again_is_the_same_picture_and_draws_nothing() -> None:
    async def act(rig: Rig) -> None:
        first, second = await rig.draw(call_of()), await rig.draw(call_of())
        assert first.data == second.data
        assert len(rig.server.drawn) == 1

    run(act)


def test_a_cached_answer_whose_file_is_gone_is_saved_again_but_not_drawn_again() -> None:
    async def act(rig: Rig) -> None:
        first = await rig.draw(call_of())
        rig.server.files.clear()
        second = await rig.draw(call_of())
        assert strip_metadata(raw_bytes(first)) == strip_metadata(raw_bytes(second))
        assert (len(rig.server.posts), len(rig.server.drawn), rig.server.frees) == (3, 1, 0)

    run(act)


def test_a_file_that_is_gone_twice_is_a_failure() -> None:
    async def act(rig: Rig) -> None:
        rig.server.spoil["/view"] = Answer(404, b"")
        error = await rig.failing(call_of())
        assert error.outcome is Outcome.FAILED
        assert "404" in error.message
        assert len(rig.server.posts) == 2

    run(act)


def test_the_request_can_be_followed_upstream_and_the_credentials_go_everywhere() -> None:
    async def act(rig: Rig) -> None:
        await rig.draw(call_of())
        assert rig.server.posts[0].headers["x-request-id"] == "req-1"
        asked = {(one.headers["authorization"], one.headers["x-access"]) for one in rig.server.exchanges}
        assert asked == {(f"Bearer {KEY}", HEADER)}
        assert any(one.path.startswith("/ws") for one in rig.server.exchanges)
        assert not any("origin" in one.headers for one in rig.server.exchanges)

    run(act, api_key=KEY, headers=(("X-Access", HEADER),))


def test_a_password_travels_as_basic() -> None:
    async def act(rig: Rig) -> None:
        await rig.draw(call_of())
        scheme, _, token = rig.server.posts[0].headers["authorization"].partition(" ")
        assert (scheme, pybase64.b64decode(token).decode()) == ("Basic", "me:pw:é")
        assert "pw:é" not in repr(rig.backend)

    run(act, username="me", password="pw:é")


# names


@pytest.mark.parametrize(
    ("sampler", "scheduler", "sent_sampler", "sent_scheduler"),
    [
        ("Euler a", None, "euler_ancestral", "normal"),
        ("euler_ancestral", "Karras", "euler_ancestral", "karras"),
        ("DPM++ 2M Karras", None, "dpmpp_2m", "karras"),
        ("DPM++ 2M Karras", "exponential", "dpmpp_2m", "exponential"),
        ("DPM++ 2M SDE", "SGM Uniform", "dpmpp_2m_sde", "sgm_uniform"),
        ("DPM++ 2M SDE Exponential", None, "dpmpp_2m_sde", "exponential"),
        ("UniPC", "Automatic", "uni_pc", "normal"),
        ("k_lms", None, "lms", "normal"),
    ],
)
def test_samplers_and_schedules_are_found_by_the_names_that_clients_know(
    sampler: str, scheduler: str | None, sent_sampler: str, sent_scheduler: str
) -> None:
    async def act(rig: Rig) -> None:
        await rig.draw(call_of(sampler=sampler, scheduler=scheduler))
        inputs = sent(rig)["KSampler"]
        assert (inputs["sampler_name"], inputs["scheduler"]) == (sent_sampler, sent_scheduler)
        known = rig.backend.capabilities.samplers
        assert known is not None
        assert known.find(sampler) == sent_sampler

    run(act)


@pytest.mark.parametrize("name", ["sampler", "scheduler"])
def test_an_unknown_name_is_refused_with_the_nearest(name: str) -> None:
    async def act(rig: Rig) -> None:
        error = await rig.refused(
            call_of(7, "a quiet harbour", **{name: {"sampler": "eulr", "scheduler": "karas"}[name]})
        )
        assert error.param == name
        assert f"the nearest it has: {'euler' if name == 'sampler' else 'karras'}" in error.message
        assert not rig.server.posts

    run(act)


def test_an_unknown_checkpoint_may_be_elsewhere_and_the_list_is_asked_for_again() -> None:
    async def act(rig: Rig) -> None:
        await rig.backend.check(2.0)
        error = await rig.failing(call_of(model="nope"))
        assert error.outcome is Outcome.NOT_STARTED
        assert "tiny-a" in error.message
        rig.backend._server.forget_files()
        rig.server.checkpoints.append("nope.safetensors")
        await rig.draw(call_of(model="nope"))

    run(act)


def test_a_checkpoint_that_is_gone_meanwhile_may_be_elsewhere() -> None:
    async def act(rig: Rig) -> None:
        await rig.backend.check(2.0)
        rig.server.checkpoints.remove("tiny-a.safetensors")
        error = await rig.failing(call_of())
        assert error.outcome is Outcome.NOT_STARTED
        assert "lacks the checkpoint" in error.message

    run(act)


# progress and previews


@pytest.mark.parametrize("websocket", ["ok", "refuse", "mute", "redirect"])
def test_a_server_whose_websocket_does_not_work_still_works(websocket: str) -> None:
    async def act(rig: Rig) -> None:
        rig.server.websocket = websocket
        await rig.draw(call_of())

    run(act)


def test_a_websocket_that_hangs_delays_only_the_first_call() -> None:
    async def act(rig: Rig) -> float:
        rig.server.websocket = "hang"
        await rig.draw(call_of(1))
        before = time.monotonic()
        await rig.draw(call_of(2))
        return time.monotonic() - before

    assert run(act, pace=Pace(poll=0.02, first_poll=0.004, over_poll=0.001, open=0.3)) < 0.25


def test_no_websocket_at_all_is_fine() -> None:
    async def act(rig: Rig) -> None:
        await rig.draw(call_of())
        assert not rig.server.clients

    run(act, websocket=False)


def test_progress_counts_every_step_and_never_goes_back() -> None:
    async def act(rig: Rig) -> None:
        await rig.draw(call_of(steps=5))
        counts = [(one.done, one.total) for one in rig.told]
        assert list(dict.fromkeys(counts)) == [(done, 5) for done in range(6)]
        assert counts == sorted(counts)
        assert not any(one.preview for one in rig.told)

    run(act)


@pytest.mark.parametrize("wants_metadata", [True, False])
def test_previews_are_handed_on_as_they_come(wants_metadata: bool) -> None:
    async def act(rig: Rig) -> None:
        rig.server.previews = False  # it shows them because it was asked
        if not wants_metadata:
            rig.server._send_preview = lambda job, node: rig.server._send_frame(  # type: ignore[method-assign]
                b"\0\0\0\1\0\0\0\1" + JPEG, job.client_id
            )
        await rig.draw(call_of(previews=True))
        shown = [one.preview for one in rig.told if one.preview]
        assert [(one.data, one.media_type, one.index) for one in shown] == [(JPEG, "image/jpeg", 0)] * 3
        shares = [one.share for one in shown if one.share is not None]
        assert len(shares) == 3
        assert shares == sorted(shares)
        assert rig.server.posts[0].json["extra_data"] == {"preview_method": "auto"}
        assert rig.server.flags[0] == {"type": "feature_flags", "data": {"supports_preview_metadata": True}}

    run(act)


def test_somebody_elses_progress_and_previews_are_not_ours() -> None:
    async def act(rig: Rig) -> None:
        # without a client id its events go to everybody, and the previews name no prompt
        rig.server.step_seconds = 0.005
        rig.server.submit(other_graph())
        await until(lambda: rig.server.drawn)
        drawing = asyncio.create_task(rig.draw(call_of(previews=True)))
        await until(lambda: rig.server.queue)
        assert not rig.told
        await drawing
        assert len([one for one in rig.told if one.preview]) == 3
        assert {one.total for one in rig.told} == {3}

    run(act)


def other_graph(steps: int = 8) -> dict[str, Any]:
    graph = msgspec.json.decode(msgspec.json.encode(SAVING))
    graph["5"]["inputs"] |= {"steps": steps, "seed": 1234}
    return dict(graph)


@pytest.mark.parametrize("frames", range(1, 16, 2))
def test_a_websocket_that_is_cut_anywhere_costs_nothing(frames: int) -> None:
    async def act(rig: Rig) -> None:
        rig.server.cut_after = frames
        await rig.draw(call_of())
        assert len(rig.server.drawn) == 1

    run(act)


def test_a_cut_websocket_comes_back_under_the_same_name() -> None:
    async def act(rig: Rig) -> None:
        rig.server.hangs = True
        drawing = asyncio.create_task(rig.draw(call_of()))
        await until(lambda: rig.server.drawn)
        rig.server.cut()
        await until(lambda: len(rig.server.clients) > 1)
        rig.server.hangs = False
        await drawing
        assert len(set(rig.server.clients)) == 1
        assert rig.told[-1].done == 3

    run(act)


def test_every_call_has_a_prompt_and_a_client_of_its_own() -> None:
    async def act(rig: Rig) -> None:
        await asyncio.gather(*(rig.draw(call_of(seed)) for seed in range(4)))
        bodies = [one.json for one in rig.server.posts]
        assert len({one["prompt_id"] for one in bodies}) == len({one["client_id"] for one in bodies}) == 4
        assert set(rig.server.clients) == {one["client_id"] for one in bodies}

    run(act)


# what goes wrong


def test_a_node_that_fails_is_a_definite_failure_without_prompt_or_traceback() -> None:
    async def act(rig: Rig) -> None:
        rig.server.node_error = f"CUDA out of memory while drawing 'a quiet harbour' with {KEY}"
        error = await rig.failing(call_of())
        assert error.outcome is Outcome.FAILED
        assert error.message.startswith("KSampler failed: OutOfMemoryError: CUDA out of memory")
        assert not any(secret in f"{error!r}" for secret in ("harbour", KEY, "place.py"))

    run(act, api_key=KEY)


def test_a_prompt_that_somebody_interrupts_has_failed() -> None:
    async def act(rig: Rig) -> None:
        rig.server.hangs = True
        drawing = asyncio.create_task(rig.failing(call_of()))
        await until(lambda: rig.server.drawn)
        rig.server._interrupt = True
        error = await drawing
        assert (error.outcome, error.message) == (Outcome.FAILED, "interrupted at the server")

    run(act)


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"steps": 0}, "num_inference_steps", "KSampler.steps: Value 0 smaller than min of 1"),
        ({"guidance_scale": 1000.0}, "guidance_scale", "KSampler.cfg"),
    ],
)
def test_a_value_that_a_node_refuses_is_the_requests_fault(more: dict[str, Any], param: str, says: str) -> None:
    async def act(rig: Rig) -> None:
        error = await rig.refused(call_of(**more))
        assert (error.status, error.param) == (400, param)
        assert says in error.message

    run(act)


def test_a_node_that_the_server_lacks_is_not_the_requests_fault() -> None:
    graph = {**SAVING, "6": {"class_type": "Upscaler9000", "inputs": {"samples": ["5", 0]}}}

    async def act(rig: Rig) -> None:
        error = await rig.failing(call_of(model="mine"))
        assert error.outcome is Outcome.NOT_STARTED
        assert "Upscaler9000" in error.message

    run(act, options=workflow(graph))


def test_a_file_that_a_workflow_names_and_the_server_lacks_is_not_the_requests_fault() -> None:
    graph = {**SAVING, "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "gone.safetensors"}}}

    async def act(rig: Rig) -> None:
        error = await rig.failing(call_of(model="mine"))
        assert error.outcome is Outcome.NOT_STARTED
        report = await rig.backend.check(2.0)
        assert (report.healthy, report.models) == (True, ())
        reason = "1.ckpt_name is gone.safetensors, which the server does not have (it has: "
        assert report.faults[0].startswith(f"it cannot run the workflow mine: {reason}")
        assert report.faults[0] in report.detail

    run(act, options=workflow(graph, inputs={"checkpoint": []}))


@pytest.mark.parametrize("told", [True, False])
def test_a_value_that_the_request_left_to_the_graph_is_not_the_requests_fault(told: bool) -> None:
    sampler = {**SAVING["5"], "inputs": {**SAVING["5"]["inputs"], "sampler_name": "nosampler"}}

    async def act(rig: Rig) -> None:
        if told:
            assert (await rig.backend.check(2.0)).models == ()
        error = await rig.failing(call_of(model="mine"))
        assert (error.outcome, error.is_blameless) == (Outcome.NOT_STARTED, True)
        assert "sampler_name" in error.message
        await rig.draw(call_of(model="mine", sampler="euler", given=frozenset({"sampler"})))

    run(act, options=workflow({**SAVING, "5": sampler}))


def test_a_checkpoint_may_be_configured_by_the_name_that_its_model_has_here() -> None:
    async def act(rig: Rig) -> None:
        assert (await rig.backend.check(2.0)).models == ("mine",)
        await rig.draw(call_of(model="mine"))
        assert rig.server.posts[-1].json["prompt"]["1"]["inputs"]["ckpt_name"] == "sub/tiny-b.safetensors"
        rig.server.checkpoints.remove("sub/tiny-b.safetensors")
        rig.backend._server.forget_files()
        report = await rig.backend.check(2.0)
        assert (report.models, report.faults) == (
            (),
            ("it cannot run the workflow mine: it lacks the checkpoint sub/tiny-b",),
        )
        error = await rig.failing(call_of(model="mine"))
        assert (error.outcome, error.is_blameless) == (Outcome.NOT_STARTED, True)

    run(act, options=workflow(SAVING, checkpoint="sub/tiny-b"))


def test_a_complaint_never_quotes_the_prompt() -> None:
    message = "text: 'a quiet harbour' is no good"
    document = {
        "error": {"type": "prompt_outputs_failed_validation", "message": "…", "details": "", "extra_info": {}},
        "node_errors": {
            "6": {
                "class_type": "CLIPTextEncode",
                "errors": [{"type": "x", "message": message, "details": message, "extra_info": {"input_name": "text"}}],
            }
        },
    }

    async def act(rig: Rig) -> None:
        rig.server.spoil["/prompt"] = Answer(400, msgspec.json.encode(document))
        error = await rig.refused(call_of())
        assert error.param == "prompt"
        assert "harbour" not in error.message

    run(act)


@pytest.mark.parametrize(
    ("body", "path"),
    [(b"<html>", "/prompt"), (b'{"prompt_id": 5}', "/prompt"), (b"[]", "/upload/image")],
)
def test_a_reply_of_another_shape_is_a_failure(body: bytes, path: str) -> None:
    async def act(rig: Rig) -> None:
        rig.server.spoil[path] = Answer(200, body)
        images = (input_image(),) if "upload" in path else ()
        error = await rig.failing(call_of(images=images))
        assert error.outcome is Outcome.FAILED
        assert path in error.message

    run(act)


@pytest.mark.parametrize("manner", ["cut_body", "close", "long_length"])
def test_a_prompt_whose_reply_is_cut_is_followed_all_the_same(manner: str) -> None:
    async def act(rig: Rig) -> None:
        take = rig.server._prompt
        rig.server._prompt = lambda body: Answer(200, take(body).body, manner=manner)  # type: ignore[method-assign]
        rig.server.step_seconds = 0.01
        await rig.draw(call_of())
        assert len(rig.server.posts) == 1

    run(act)


def test_a_prompt_whose_reply_is_cut_and_that_is_not_there_is_unknown() -> None:
    async def act(rig: Rig) -> None:
        rig.server.spoil["/prompt"] = Answer(200, b"", manner="close")
        assert (await rig.failing(call_of())).outcome is Outcome.UNKNOWN

    run(act)


@pytest.mark.parametrize("websocket", [True, False])
def test_a_server_that_was_restarted_has_lost_the_prompt(websocket: bool) -> None:
    async def act(rig: Rig) -> None:
        rig.server.hangs = True
        drawing = asyncio.create_task(rig.failing(call_of()))
        await until(lambda: rig.server.drawn)
        await rig.server.restart()
        error = await drawing
        assert error.outcome is Outcome.FAILED
        assert "does not know the prompt any more" in error.message

    run(act, websocket=websocket)


@pytest.mark.parametrize("websocket", [True, False])
def test_a_queue_that_somebody_clears_has_lost_the_prompt(websocket: bool) -> None:
    async def act(rig: Rig) -> None:
        rig.server.hangs = True
        rig.server.submit(other_graph())
        await until(lambda: rig.server.drawn)
        drawing = asyncio.create_task(rig.failing(call_of()))
        await until(lambda: rig.server.queue)
        rig.server._delete(rig.server.queue[0].id)
        assert (await drawing).outcome is Outcome.FAILED

    run(act, websocket=websocket)


def test_a_server_that_goes_for_good_while_it_draws_is_unknown() -> None:
    async def act(rig: Rig) -> None:
        rig.server.hangs = True
        drawing = asyncio.create_task(rig.failing(call_of()))
        await until(lambda: rig.server.drawn)
        await rig.server.stop()
        error = await drawing
        assert error.outcome is Outcome.UNKNOWN
        assert "out of reach" in error.message

    run(act)


def test_a_server_that_is_away_for_a_moment_is_waited_for() -> None:
    async def act(rig: Rig) -> None:
        rig.server.hangs = True
        drawing = asyncio.create_task(rig.draw(call_of()))
        await until(lambda: rig.server.drawn)
        rig.server.spoil["/queue"] = Answer(502, b"")
        rig.server.spoil[f"/history/{rig.server.running.id if rig.server.running else ''}"] = Answer(502, b"")
        await asyncio.sleep(0.02)
        rig.server.spoil.clear()
        rig.server.hangs = False
        await drawing

    run(act)


def test_a_refused_connection_is_not_started() -> None:
    async def act(rig: Rig) -> None:
        await rig.server.stop()
        assert (await rig.failing(call_of())).outcome is Outcome.NOT_STARTED
        report = await rig.backend.check(1.0)
        assert not report.healthy
        assert report.detail

    run(act)


def test_silence_for_too_long_is_unknown_and_the_work_is_stopped() -> None:
    async def act(rig: Rig) -> None:
        rig.server.hangs = True
        error = await rig.failing(call_of(timeout_seconds=0.1))
        assert error.outcome is Outcome.UNKNOWN
        await until(lambda: rig.server.stopped)

    run(act)


def test_progress_renews_the_time_out() -> None:
    async def act(rig: Rig) -> None:
        rig.server.step_seconds = 0.02
        await rig.draw(call_of(steps=30, timeout_seconds=0.3))

    run(act)


def test_a_prompt_that_moves_up_in_the_queue_is_not_silent() -> None:
    async def act(rig: Rig) -> None:
        rig.server.step_seconds = 0.01
        for seed in range(6):
            graph = other_graph(steps=8)
            graph["5"]["inputs"]["seed"] = seed
            rig.server.submit(graph, "somebody")
        told: list[Progress] = []
        await rig.backend.generate(call_of(timeout_seconds=0.3), told.append)
        assert [one for one in told if one.done == 0]  # whoever bounds the attempt from outside hears of it too

    run(act)


@pytest.mark.parametrize("prompt_id", ["x y", "../../free", "a/b?c", ""])
def test_an_id_that_could_not_be_asked_after_is_no_answer_of_comfyui(prompt_id: str) -> None:
    async def act(rig: Rig) -> None:
        rig.server.spoil["/prompt"] = Answer(200, json.dumps({"prompt_id": prompt_id, "number": 1}).encode())
        assert (await rig.failing(call_of())).outcome is Outcome.FAILED
        assert not [one.path for one in rig.server.exchanges if ".." in one.path or "x y" in one.path]

    run(act)


def test_a_schedule_in_a_samplers_name_that_has_no_place_is_told() -> None:
    graph = {**SAVING, "3": {**SAVING["3"], "inputs": {**SAVING["3"]["inputs"]}}}

    async def act(rig: Rig) -> None:
        call = call_of(model="mine", sampler="DPM++ 2M Karras", given=("sampler",))
        assert (await rig.draw(call)).ignored == ("sampler",)
        plain = call_of(model="mine", sampler="DPM++ 2M", given=("sampler",))
        assert (await rig.draw(plain)).ignored == ()

    run(act, options=workflow(graph, inputs={"scheduler": []}))


def test_the_picture_of_an_edit_that_is_too_long_is_refused_and_not_sent() -> None:
    async def act(rig: Rig) -> None:
        call = call_of(operation="edit", images=(input_image(),), width=30_000, height=16)
        with pytest.raises(BackendRefusal) as caught:
            await rig.draw(call)
        assert caught.value.error.param == "image"
        assert not rig.server.drawn

    run(act)


@pytest.mark.parametrize(("manner", "outcome"), [("cut_body", Outcome.UNKNOWN), ("close", Outcome.UNKNOWN)])
def test_a_picture_that_cannot_be_fetched_is_unknown(manner: str, outcome: Outcome) -> None:
    async def act(rig: Rig) -> None:
        rig.server.view_manner = manner
        assert (await rig.failing(call_of())).outcome is outcome
        assert len(rig.server.asked("/view")) >= 3  # the transport itself asks again where a kept connection was closed

    run(act)


def test_a_picture_that_is_cut_once_is_fetched_again() -> None:
    async def act(rig: Rig) -> None:
        rig.server.view_manner = "cut_body"
        drawing = asyncio.create_task(rig.draw(call_of()))
        await until(lambda: rig.server.asked("/view"))
        rig.server.view_manner = ""
        await drawing

    run(act)


@pytest.mark.parametrize("file", [b"", b"GIF89a, or so they say", picture("x", 1, 64, 64)[:-20]])
def test_a_file_that_is_no_whole_picture_is_a_failure(file: bytes) -> None:
    async def act(rig: Rig) -> None:
        rig.server.file = file
        error = await rig.failing(call_of())
        assert error.outcome is Outcome.FAILED
        assert "no use" in error.message

    run(act)


def test_an_output_without_a_picture_is_a_failure() -> None:
    async def act(rig: Rig) -> None:
        rig.server.gives_nothing = True
        error = await rig.failing(call_of())
        assert (error.outcome, error.message) == (Outcome.FAILED, "node 9 (PreviewImage) gave no picture")

    run(act)


# cancelling


@pytest.mark.parametrize("has_jobs", [True, False])
def test_a_cancelled_drawing_stops_at_once(has_jobs: bool) -> None:
    async def act(rig: Rig) -> float:
        rig.server.hangs = True
        rig.server.has_jobs = has_jobs
        took = await rig.cancelled(call_of(), lambda: rig.told and rig.server.drawn)
        await until(lambda: rig.server.stopped)
        await until(lambda: not rig.server.sockets and not rig.server.in_flight)
        return took

    # a busy test machine may be late now and then, an adapter that waits for something is late always
    assert any(run(act) < 0.1 for _ in range(3))


@pytest.mark.parametrize("has_jobs", [True, False])
def test_cancelling_what_waits_leaves_what_runs_alone(has_jobs: bool) -> None:
    async def act(rig: Rig) -> None:
        rig.server.has_jobs = has_jobs
        rig.server.hangs = True
        rig.server.submit(other_graph())
        await until(lambda: rig.server.drawn)
        await rig.cancelled(call_of(), lambda: rig.server.queue)
        assert not rig.server.queue
        assert rig.server.running is not None
        rig.server.hangs = False
        await until(lambda: rig.server.running is None)
        assert not rig.server.stopped
        (record,) = rig.server.history.values()
        assert record["status"]["completed"]

    run(act)


@pytest.mark.parametrize("has_jobs", [True, False])
def test_a_drawing_that_is_over_interrupts_nobody(has_jobs: bool) -> None:
    """The client leaves while the picture is fetched, and somebody else's prompt is next."""

    async def act(rig: Rig) -> None:
        rig.server.has_jobs = has_jobs
        rig.server.view_manner = "hang"

        def next_runs() -> bool:
            if not rig.server.asked("/view"):
                return False
            if rig.server.running is None:
                rig.server.hangs = True
                rig.server.submit(other_graph())
            return len(rig.server.drawn) > 1

        await rig.cancelled(call_of(), next_runs)
        assert rig.server.running is not None
        rig.server.hangs = False
        await until(lambda: rig.server.running is None)
        assert not rig.server.stopped

    run(act)


@pytest.mark.parametrize("has_jobs", [True, False])
@pytest.mark.parametrize("after", [0.0, 0.001, 0.002, 0.004, 0.008])
def test_a_call_cancelled_on_its_way_leaves_nothing(has_jobs: bool, after: float) -> None:
    async def act(rig: Rig) -> None:
        rig.server.has_jobs = has_jobs
        rig.server.hangs = True
        rig.server.starting_seconds = 0.005
        started = time.monotonic()
        await rig.cancelled(call_of(), lambda: time.monotonic() - started >= after)
        await until(lambda: rig.server.running is None and not rig.server.queue)

    run(act)


def test_a_prompt_whose_reply_is_late_is_stopped_when_it_comes() -> None:
    async def act(rig: Rig) -> None:
        rig.server.hangs = True
        answer = rig.server.answer

        async def late(exchange: Any) -> Answer:
            if exchange.path == "/prompt":
                await asyncio.sleep(0.03)
            return await answer(exchange)

        rig.server.answer = late  # type: ignore[method-assign]
        await rig.cancelled(call_of(), lambda: rig.server.posts)
        await until(lambda: rig.server.running is None and not rig.server.queue)
        assert len(rig.server.asked("/prompt")) == 1

    run(act)


def test_an_interrupt_that_came_too_early_is_repeated() -> None:
    """The server forgets interrupts at the start of a prompt: between taking it and starting it, one is lost."""

    async def act(rig: Rig) -> None:
        rig.server.hangs = True
        rig.server.starting_seconds = 0.03
        await rig.cancelled(call_of(), lambda: rig.server.running)
        await until(lambda: rig.server.stopped)

    run(act)


def test_a_server_too_old_for_jobs_is_asked_once() -> None:
    async def act(rig: Rig) -> None:
        rig.server.has_jobs = False
        rig.server.hangs = True
        for seed in (1, 2):
            rig.told.clear()
            await rig.cancelled(call_of(seed), lambda: rig.told and rig.server.running)
            await until(lambda: rig.server.running is None)
        assert len([one for one in rig.server.exchanges if one.path.startswith("/api/jobs")]) == 1

    run(act)


@pytest.mark.parametrize(
    ("version", "shared", "stops"),
    [
        ("0.3.64", True, True),
        ("0.3.40", True, False),
        (None, True, False),
        ("0.3.40", False, True),
        (None, False, True),
    ],
)
def test_a_server_that_stops_whatever_runs_is_not_asked_to_where_others_use_it(
    version: str | None, shared: bool, stops: bool
) -> None:
    async def act(rig: Rig) -> None:
        rig.server.version, rig.server.has_jobs = version, False
        rig.server.hangs = True
        await rig.cancelled(call_of(), lambda: rig.told and rig.server.drawn)
        assert bool(rig.server.asked("/interrupt")) is stops

    run(act, shared=shared)


@pytest.mark.parametrize("websocket", [True, False])
def test_a_server_that_gives_prompts_its_own_ids_works_too(websocket: bool) -> None:
    async def act(rig: Rig) -> None:
        rig.server.takes_prompt_id = rig.server.has_jobs = rig.server.heeds_interrupted_id = False
        await rig.draw(call_of(1))
        rig.server.hangs = True
        await rig.cancelled(call_of(2), lambda: len(rig.server.drawn) > 1)
        await until(lambda: rig.server.stopped)

    run(act, websocket=websocket)


def test_a_server_that_answers_nothing_does_not_hold_a_cancelled_call() -> None:
    async def act(rig: Rig) -> float:
        rig.server.hangs = True
        drawing = asyncio.create_task(rig.draw(call_of()))
        await until(lambda: rig.server.drawn)

        async def hang(exchange: Any) -> Answer:
            return Answer(200, b"", manner="hang")

        rig.server.answer = hang  # type: ignore[method-assign]
        at = time.monotonic()
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        return time.monotonic() - at

    assert run(act, pace=Pace(stop=0.1)) < 0.5


# edits


def test_an_edit_uploads_its_picture_under_the_name_of_its_content() -> None:
    image = input_image()

    async def act(rig: Rig) -> None:
        artifact = await rig.draw(call_of(operation="edit", images=(image,), width=40, height=30))
        ((place, subfolder, name),) = [one for one in rig.server.files if one[1]]
        assert (place, subfolder) == ("temp", "img-serving")
        assert rig.server.files[place, subfolder, name] == image.data
        inputs = sent(rig)
        assert inputs["LoadImage"]["image"] == f"img-serving/{name} [temp]"
        assert (inputs["ImageScale"]["width"], inputs["ImageScale"]["height"]) == (40, 24)
        assert inputs["KSampler"]["denoise"] == 0.75
        assert (artifact.width, artifact.height) == (40, 24)
        await rig.draw(call_of(8, operation="edit", images=(image,), strength=0.4))
        assert sent(rig)["KSampler"]["denoise"] == 0.4
        assert len([one for one in rig.server.files if one[1]]) == 1

    run(act)


def test_a_variation_is_an_edit_without_words_that_leaves_half_of_it() -> None:
    async def act(rig: Rig) -> None:
        await rig.draw(call_of(operation="variation", prompt="", images=(input_image(),)))
        inputs = sent(rig)
        assert inputs["LoadImage"]["image"]
        assert inputs["CLIPTextEncode"]["text"] == ""
        assert inputs["KSampler"]["denoise"] == 0.5
        await rig.draw(call_of(operation="variation", prompt="", images=(input_image(),), strength=0.3))
        assert sent(rig)["KSampler"]["denoise"] == 0.3

    run(act)


def test_a_mask_is_transparent_where_the_edit_may_paint() -> None:
    async def act(rig: Rig) -> None:
        await rig.draw(call_of(operation="edit", images=(input_image(),), mask=mask_image()))
        inputs = sent(rig)
        assert inputs["LoadImageMask"]["channel"] == "alpha"
        with Image.open(io.BytesIO(rig.server._loaded(inputs["LoadImageMask"]["image"]) or b"")) as mask:
            assert (mask.getpixel((0, 0)), mask.getpixel((31, 0))) == ((0, 0, 0, 0), (255, 255, 255, 255))
        assert inputs["SetLatentNoiseMask"]["mask"]

    run(act)


def loading(channel: str | None, *, own: bool = False) -> dict[str, Any]:
    """A workflow that edits: with a mask of its own, or with the picture's transparency."""
    graph: dict[str, Any] = {
        **SAVING,
        "10": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "4": {"class_type": "VAEEncode", "inputs": {"pixels": ["10", 0], "vae": ["1", 2]}},
    }
    if channel is not None or own:
        graph["12"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["4", 0], "mask": ["11", 0]}}
        graph["5"] = {"class_type": "KSampler", "inputs": {**SAVING["5"]["inputs"], "latent_image": ["12", 0]}}
    if channel is not None:
        graph["11"] = {"class_type": "LoadImageMask", "inputs": {"image": "m.png", "channel": channel}}
    if own:
        graph["12"]["inputs"]["mask"] = ["10", 1]
    return graph


@pytest.mark.parametrize(("channel", "painted", "kept"), [("alpha", (0, 0, 0, 0), (255,) * 4), ("red", 255, 0)])
@pytest.mark.parametrize("given", [True, False])
def test_a_mask_is_painted_as_the_workflow_reads_it(channel: str, painted: Any, kept: Any, given: bool) -> None:
    async def act(rig: Rig) -> None:
        mask = mask_image() if given else None
        await rig.draw(call_of(model="mine", operation="edit", images=(input_image(),), mask=mask))
        with Image.open(io.BytesIO(rig.server._loaded(sent(rig)["LoadImageMask"]["image"]) or b"")) as found:
            # without a mask everything may be painted
            assert (found.getpixel((0, 0)), found.getpixel((31, 0))) == (painted, kept if given else painted)

    run(act, options=workflow(loading(channel)))


@pytest.mark.parametrize("given", [True, False])
def test_a_workflow_that_masks_by_the_pictures_own_transparency_gets_it_so(given: bool) -> None:
    async def act(rig: Rig) -> None:
        mask = mask_image() if given else None
        await rig.draw(call_of(model="mine", operation="edit", images=(input_image(),), mask=mask))
        with Image.open(io.BytesIO(rig.server._loaded(sent(rig)["LoadImage"]["image"]) or b"")) as found:
            assert (found.getpixel((0, 0)), found.getpixel((31, 0))) == (
                (255, 0, 0, 0),
                (255, 0, 0, 255 if given else 0),
            )

    run(act, options=workflow(loading(None, own=True)))


def test_a_mask_that_is_no_picture_is_the_requests_fault() -> None:
    broken = InputImage(b"\x89PNG\r\n\x1a\n broken", "image/png", 32, 24)

    async def act(rig: Rig) -> None:
        error = await rig.refused(call_of(operation="edit", images=(input_image(),), mask=broken))
        assert error.param == "mask"

    run(act)


def test_a_picture_that_is_too_large_for_the_server_is_said_so() -> None:
    async def act(rig: Rig) -> None:
        rig.server.spoil["/upload/image"] = Answer(
            413, b"Maximum request body size exceeded", {"content-type": "text/plain"}
        )
        error = await rig.refused(call_of(operation="edit", images=(input_image(),)))
        assert error.status == 413

    run(act)


# workflows


def test_a_workflow_draws_with_what_it_says_unless_the_request_says_otherwise() -> None:
    async def act(rig: Rig) -> None:
        call = call_of(9, model="mine", steps=None)
        artifact = await rig.draw(call)
        inputs = sent(rig)
        assert artifact.seed == inputs["KSampler"]["seed"] == 9
        assert (inputs["KSampler"]["steps"], inputs["KSampler"]["sampler_name"]) == (4, "heun")
        assert [node["inputs"]["text"] for node in rig.server.drawn[0].values() if "text" in node["inputs"]] == [
            "a quiet harbour",
            "my negative",
        ]
        assert rig.server.asked("/view")[0].path.endswith("filename=pic+ture_00001_.png&subfolder=mine&type=output")
        await rig.draw(call_of(9, model="mine", steps=2, negative_prompt="", sampler="lms"))
        assert (sent(rig)["KSampler"]["steps"], sent(rig)["KSampler"]["sampler_name"]) == (2, "lms")

    run(act, options=workflow())


def test_a_seed_that_is_not_mapped_is_nobodys_and_what_else_is_not_is_named() -> None:
    options = workflow(inputs={"seed": [], "steps": [], "negative_prompt": []})

    async def act(rig: Rig) -> None:
        artifact = await rig.draw(call_of(9, model="mine", steps=2, given={"seed", "num_inference_steps"}))
        assert artifact.seed is None
        assert sent(rig)["KSampler"]["steps"] == 4
        able = rig.backend.capabilities.of("mine")
        assert not able.honours & {"seed", "num_inference_steps", "negative_prompt", "strength"}
        assert {"size", "guidance_scale", "sampler", "scheduler"} <= able.honours

    run(act, options=options)


def test_what_only_the_other_graph_honours_is_named_with_the_picture() -> None:
    options = workflow(edit_graph=loading(None))

    async def act(rig: Rig) -> None:
        assert "size" in rig.backend.capabilities.of("mine").honours
        drawn = await rig.draw(call_of(9, model="mine", given={"size", "strength"}))
        edited = await rig.draw(
            call_of(9, model="mine", operation="edit", images=(input_image(),), given={"size", "strength"})
        )
        assert (drawn.ignored, edited.ignored) == (("strength",), ("size",))

    run(act, options=options)


def test_a_workflow_that_only_edits_draws_nothing() -> None:
    async def act(rig: Rig) -> None:
        assert rig.backend.capabilities.of("mine").operations == {"edit", "variation"}
        assert (await rig.refused(call_of(model="mine"))).param == "model"

    run(act, options=workflow(loading(None)))


def test_a_workflow_that_only_draws_edits_nothing() -> None:
    async def act(rig: Rig) -> None:
        assert rig.backend.capabilities.of("mine").operations == {"generation"}
        error = await rig.refused(call_of(model="mine", operation="edit", images=(input_image(),)))
        assert error.param == "model"

    run(act, options=workflow())


def test_a_workflow_takes_another_checkpoint_where_one_is_configured() -> None:
    async def act(rig: Rig) -> None:
        await rig.draw(call_of(model="mine"))
        assert rig.server.loads == ["sub/tiny-b.safetensors"]

    run(act, options=workflow(checkpoint="sub/tiny-b.safetensors"))


def test_with_workflows_the_checkpoints_are_no_models_unless_it_is_said() -> None:
    async def act(rig: Rig) -> Any:
        models = (await rig.backend.check(2.0)).models
        error = await rig.failing(call_of(model="tiny-a")) if "tiny-a" not in (models or ()) else None
        return models, error

    models, error = run(act, options=workflow())
    assert models == ("mine",)
    assert error.outcome is Outcome.NOT_STARTED
    models, error = run(act, options={**workflow(), "built_in": True})
    assert (models, error) == (("mine", "sub/tiny-b", "tiny-a"), None)


# health


def test_a_check_says_what_it_found_and_asks_for_it_once() -> None:
    async def act(rig: Rig) -> None:
        for _ in range(3):
            report = await rig.backend.check(2.0)
            assert report.healthy
            assert report.models == ("sub/tiny-b", "tiny-a")
            assert report.found == "ComfyUI 0.33.0 (GET /system_stats says so)"
        assert len(rig.server.asked("/system_stats")) == 1
        assert len(rig.server.asked("/object_info/CheckpointLoaderSimple")) == 1
        assert len(rig.server.asked("/prompt")) == 3
        samplers = rig.backend.capabilities.samplers
        assert samplers is not None
        assert samplers.find("DPM++ 2M") == "dpmpp_2m"

    run(act)


def test_a_server_that_was_away_is_asked_again_what_it_has() -> None:
    async def act(rig: Rig) -> None:
        await rig.backend.check(2.0)
        before = rig.backend.capabilities
        await rig.server.stop()
        assert not (await rig.backend.check(2.0)).healthy
        rig.server.version, rig.server.checkpoints = "0.34.0", ["new.safetensors"]
        await rig.server.start()
        report = await rig.backend.check(2.0)
        assert (report.models, report.found) == (("new",), "ComfyUI 0.34.0 (GET /system_stats says so)")
        assert rig.backend.capabilities == before

    run(act)


def test_both_shapes_of_a_choice_are_read() -> None:
    async def act(rig: Rig) -> Any:
        rig.server.new_choices = True
        return (await rig.backend.check(2.0)).models

    assert run(act) == ("sub/tiny-b", "tiny-a")


@pytest.mark.parametrize(
    ("answer", "healthy"),
    [
        (Answer(200, b'{"hello": 1}'), False),
        (Answer(404, b""), False),
        (Answer(401, b""), False),
        (Answer(500, b""), False),
        (Answer(429, b""), True),
    ],
)
def test_only_comfyui_is_healthy(answer: Answer, healthy: bool) -> None:
    async def act(rig: Rig) -> None:
        rig.server.spoil["/prompt"] = answer
        report = await rig.backend.check(2.0)
        assert report.healthy is healthy
        assert report.detail

    run(act)


def test_a_server_that_does_not_say_what_it_has_is_healthy_all_the_same() -> None:
    async def act(rig: Rig) -> None:
        for path in ("/system_stats", "/object_info/KSampler", "/object_info/CheckpointLoaderSimple"):
            rig.server.spoil[path] = Answer(500, b"")
        report = await rig.backend.check(2.0)
        assert (report.healthy, report.models, report.found) == (True, None, "")

    run(act)


def test_a_server_without_a_checkpoint_says_what_to_do() -> None:
    async def act(rig: Rig) -> None:
        rig.server.checkpoints = []
        report = await rig.backend.check(2.0)
        assert report.healthy
        assert "models/checkpoints" in report.detail
        assert (await rig.failing(call_of(model=None))).outcome is Outcome.NOT_STARTED

    run(act)


def test_a_configured_health_path_decides_unless_it_is_not_there() -> None:
    async def act(rig: Rig) -> None:
        report = await rig.backend.check(2.0)
        assert report.healthy
        assert "/ping is not there" in report.detail
        rig.server.spoil["/ping"] = Answer(200, b"")
        assert (await rig.backend.check(2.0)).models == ("sub/tiny-b", "tiny-a")
        rig.server.spoil["/ping"] = Answer(500, b"")
        assert not (await rig.backend.check(2.0)).healthy

    run(act, health_check_path="/ping")


def test_nothing_secret_and_no_prompt_goes_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def act(rig: Rig) -> None:
        await rig.draw(call_of(previews=True))
        rig.server.hangs = True
        drawing = asyncio.create_task(rig.draw(call_of(8)))
        await until(lambda: len(rig.server.drawn) > 1)
        rig.server.spoil |= {path: Answer(500, KEY.encode()) for path in ("/queue", "/interrupt")}
        rig.server.has_jobs = False
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing

    run(act, api_key=KEY, headers=(("X-Access", HEADER),))
    assert "was not stopped" in caplog.text
    assert not any(secret in caplog.text for secret in (KEY, HEADER, "harbour"))


def test_the_fake_tells_others_what_the_queue_holds() -> None:
    """As the real one does: our own prompt's id is in it, with the client's."""

    async def act(rig: Rig) -> None:
        rig.server.hangs = True
        drawing = asyncio.create_task(rig.draw(call_of()))
        await until(lambda: rig.server.drawn)
        assert isinstance(rig.server.running, Job)
        assert rig.server.running.client_id == rig.server.clients[0]
        rig.server.hangs = False
        await drawing

    run(act)
