"""What the port `Backend` promises, on every adapter that is shipped: over real sockets where one speaks HTTP."""

from __future__ import annotations

import asyncio
import json
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
from tests.support.fake_a1111 import FakeA1111, Flavour
from tests.support.fake_comfyui import FakeComfyUI
from tests.support.fake_kserve import FakeKServe
from tests.support.fake_kserve import Flavour as KServeFlavour
from tests.support.fake_worker import FakeWorker

from img_serving.backends.a1111 import A1111Backend
from img_serving.backends.builtin import BuiltinBackend
from img_serving.backends.comfyui import ComfyUIBackend
from img_serving.backends.comfyui.prompt import Pace
from img_serving.backends.detection import DetectingBackend
from img_serving.backends.grpc import GrpcBackend
from img_serving.backends.kserve import KServeBackend
from img_serving.backends.openai import OpenAIBackend
from img_serving.backends.rpc import Line
from img_serving.backends.scripted import ScriptedBackend, picture
from img_serving.backends.scripted_server import HUGE_BYTES, STEPS, ScriptedServer
from img_serving.backends.stub_server import Answer
from img_serving.domain.capabilities import PARAMETERS, Capabilities
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Artifact, Call, ImageRequest, InputImage, Item, ItemFailure, Progress
from img_serving.engines.engine import GenerationCancelled
from img_serving.media.payload import raw_bytes
from img_serving.ports import Backend
from img_serving.transport.http import HttpTransport

KEY, PASSWORD, HEADER = "sk-very-secret-key", "hunter2-hunter2", "header-secret-value"
HEADERS = (("X-Access", HEADER),)
NOTHING_TO_TELL: Callable[..., None] = lambda progress: None  # noqa: E731 - a name for what is not looked at


@dataclass
class FakeEngine:
    """Draws as `scripted` does; what goes wrong is the test's to say."""

    mishap: str = ""
    loads: int = 0
    stopped: list[float] = field(default_factory=list)

    def load(self) -> None:
        self.loads += 1
        if self.mishap == "load":
            raise RuntimeError("no weights")

    def capabilities(self) -> Capabilities:
        return Capabilities()

    def generate(self, batch, on_step) -> list[bytes]:
        errors = {"fail": RuntimeError("CUDA"), "memory": MemoryError(), "refuse": ValueError("the size is odd")}
        if self.mishap in errors:
            raise errors[self.mishap]
        if self.mishap == "stop":
            raise GenerationCancelled
        if self.mishap == "hang":
            while not on_step.is_cancelled():
                time.sleep(0.001)
            self.stopped.append(time.monotonic())
            raise GenerationCancelled
        on_step(1, 2)
        on_step(2, 2)
        if self.mishap == "junk":
            return [b"junk"] * len(batch.items)
        pictures = [picture(item.prompt, item.seed, batch.width, batch.height) for item in batch.items]
        return pictures[:-1] if self.mishap == "few" else pictures


@dataclass
class Rig:
    """An adapter, and what stands behind it for the test to look at."""

    backend: Backend
    server: ScriptedServer | FakeComfyUI | FakeWorker | FakeKServe | None = None
    engine: FakeEngine | None = None

    def is_working(self) -> bool:
        """Whether the upstream has been asked for a picture."""
        if isinstance(self.server, FakeComfyUI):
            return bool(self.server.drawn)
        if isinstance(self.server, FakeKServe):
            return bool(self.server.seen)
        if isinstance(self.server, ScriptedServer):
            return bool(self.server.posts)
        if isinstance(self.server, FakeWorker):
            return bool(self.server.requests)
        if self.engine is not None:
            return self.engine.loads > 0
        return isinstance(self.backend, ScriptedBackend) and self.backend.in_flight > 0

    def has_stopped(self) -> bool:
        """Whether the upstream knows that nobody wants the picture any more."""
        if isinstance(self.server, FakeComfyUI):
            return bool(self.server.stopped) and self.server.in_flight == 0
        if isinstance(self.server, FakeKServe):
            return self.server.cancelled > 0 and self.server.in_flight == 0
        if isinstance(self.server, ScriptedServer):
            return self.server.posts[0].disconnected_at is not None and self.server.in_flight == 0
        if isinstance(self.server, FakeWorker):
            return self.server.cancelled > 0
        if self.engine is not None:
            return bool(self.engine.stopped)
        return isinstance(self.backend, ScriptedBackend) and self.backend.cancelled > 0


async def until(happened: Callable[[], bool]) -> None:
    """Another task's or thread's doing, that nothing announces."""
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


@asynccontextmanager
async def over_http(step: str, make: Callable[[HttpTransport], Backend]) -> AsyncIterator[Rig]:
    async with ScriptedServer({"sequence": [step]}) as server:
        backend = make(HttpTransport(server.url))
        try:
            yield Rig(backend, server)
        finally:
            await backend.close()


def openai_rig(step: str) -> AbstractAsyncContextManager[Rig]:
    return over_http(step, lambda transport: OpenAIBackend(transport, api_key=KEY, headers=HEADERS))


def a1111_rig(step: str) -> AbstractAsyncContextManager[Rig]:
    return over_http(step, lambda transport: A1111Backend(transport, username="me", password=PASSWORD, headers=HEADERS))


def detecting_rig(step: str) -> AbstractAsyncContextManager[Rig]:
    return over_http(
        step,
        lambda transport: DetectingBackend(
            {
                "openai": OpenAIBackend(transport, api_key=KEY, headers=HEADERS),
                "a1111": A1111Backend(transport, username="me", password=PASSWORD, headers=HEADERS),
            },
            transport,
            headers=HEADERS,
        ),
    )


@asynccontextmanager
async def a1111_at(flavour: Flavour, step: str) -> AsyncIterator[Rig]:
    """The adapter to a server that behaves as the real program was seen to, its last step spoiled."""
    async with FakeA1111({"sequence": [step]}, flavour=flavour) as server:
        backend = A1111Backend(HttpTransport(server.url), username="me", password=PASSWORD, headers=HEADERS)
        try:
            yield Rig(backend, server)
        finally:
            await backend.close()


@asynccontextmanager
async def comfyui_rig(step: str) -> AsyncIterator[Rig]:
    """The adapter to a server that behaves as the real one was seen to; error replies may be those of a proxy before it."""
    async with FakeComfyUI() as server:
        server.writes_metadata = False
        server.hangs = step == "hang"
        server.gives_nothing = step == "no_pictures"
        server.node_error = "CUDA out of memory" if step == "oom" else None
        server.view_manner = step if step in {"cut_body", "long_length", "close", "drip"} else ""
        good = picture("a quiet harbour", 7, 64, 64)
        files = {
            "not_picture": b"GIF89a, or so they say",
            "truncated_base64": good[: len(good) // 2],
            "huge": good + bytes(HUGE_BYTES),
            "wrong_size": picture("a quiet harbour", 7, 32, 32),
        }
        server.file = files.get(step)
        replies = {
            "refuse": comfyui_refusal("5", "EmptyLatentImage", "width"),
            "not_json": Answer(200, b"<html>welcome</html>"),
            "wrong_shape": Answer(200, b'{"prompt_id": 5}'),
            "not_http": Answer(200, b"", manner="not_http"),
        }
        reply = replies.get(step) or (error_reply(step) if step != "oom" else None)
        if reply is not None:
            server.spoil["/prompt"] = reply
        backend = ComfyUIBackend(
            HttpTransport(server.url),
            websocket_url=f"ws{server.url.removeprefix('http')}/ws",
            username="me",
            password=PASSWORD,
            headers=HEADERS,
            pace=Pace(first_poll=0.002, over_poll=0.001),
        )
        try:
            yield Rig(backend, server)
        finally:
            await backend.close()


@asynccontextmanager
async def inference_at(flavour: KServeFlavour, step: str) -> AsyncIterator[Rig]:
    """The adapter to a server that behaves as the real program was seen to, its answer to a drawing spoiled."""
    async with FakeKServe(flavour, step=step) as server:
        line = Line(server.url, api_key=KEY, headers=HEADERS)
        backend = KServeBackend(line, models=("txt2img",) if flavour == "kserve" else (), max_batch_size=4)
        try:
            yield Rig(backend, server)
        finally:
            await backend.close()


def kserve_rig(step: str) -> AbstractAsyncContextManager[Rig]:
    return inference_at("kserve", step)


def triton_rig(step: str) -> AbstractAsyncContextManager[Rig]:
    return inference_at("triton", step)


def error_reply(step: str, echo: str = "") -> Answer | None:
    """What the scripted server says at this step, where that is an error."""
    return ScriptedServer({"sequence": [step] if step in STEPS else ["ok"], "echo": echo})._error(step)


def comfyui_refusal(node: str, kind: str, name: str) -> Answer:
    error = {"type": "value_smaller_than_min", "message": "Value smaller than min", "details": name}
    errors = [{**error, "extra_info": {"input_name": name}}]
    document = {
        "error": {"type": "prompt_outputs_failed_validation", "message": "…", "details": "", "extra_info": {}},
        "node_errors": {node: {"class_type": kind, "dependent_outputs": ["9"], "errors": errors}},
    }
    return Answer(400, msgspec.json.encode(document))


STEPS_OF_A_WORKER = {
    "not_picture": "junk",
    "truncated_picture": "truncated",
    "truncated": "short",
    "wrong_shape": "long",
    "negative_shape": "boast",
    "no_outputs": "few",
    "few_contents": "no_done",
    "not_ready": "draining",
    "503": "unavailable",
    "late": "deadline",
    "invalid": "refuse",
    "cut": "hang",
}
"""What a worker can do that comes to the same as an inference server's mishap."""


@asynccontextmanager
async def grpc_rig(step: str) -> AsyncIterator[Rig]:
    async with FakeWorker(STEPS_OF_A_WORKER.get(step, step)) as worker:
        backend = GrpcBackend(worker.url, api_key=KEY, headers=HEADERS)
        try:
            yield Rig(backend, worker)
        finally:
            await backend.close()


def forge_rig(step: str) -> AbstractAsyncContextManager[Rig]:
    return a1111_at("forge", step)


def sdcpp_rig(step: str) -> AbstractAsyncContextManager[Rig]:
    return a1111_at("sdcpp", step)


@asynccontextmanager
async def builtin_rig(step: str) -> AsyncIterator[Rig]:
    engine = FakeEngine({"ok": "", "refuse": "refuse", "500": "fail", "few": "few", "hang": "hang"}[step])
    backend = BuiltinBackend(lambda: engine, threads=2)
    try:
        yield Rig(backend, engine=engine)
    finally:
        await backend.close()


@asynccontextmanager
async def scripted_rig(step: str) -> AsyncIterator[Rig]:
    operations = ["generation", "edit", "variation"]
    yield Rig(ScriptedBackend({"sequence": [{"500": "fail"}.get(step, step)], "operations": operations}))


RIGS = {
    "openai": openai_rig,
    "a1111": a1111_rig,
    "forge": forge_rig,
    "sdcpp": sdcpp_rig,
    "comfyui": comfyui_rig,
    "grpc": grpc_rig,
    "http": detecting_rig,
    "kserve": kserve_rig,
    "triton": triton_rig,
    "builtin": builtin_rig,
    "scripted": scripted_rig,
}
EVERY = pytest.mark.parametrize("rig_of", RIGS.values(), ids=RIGS.keys())
PICTURE = picture("a start", 1, 64, 64)
START = InputImage(PICTURE, "image/png", 64, 64)

OVER_HTTP = pytest.mark.parametrize(
    "rig_of",
    [openai_rig, a1111_rig, forge_rig, sdcpp_rig, comfyui_rig, detecting_rig],
    ids=["openai", "a1111", "forge", "sdcpp", "comfyui", "http"],
)
OVER_GRPC = pytest.mark.parametrize("rig_of", [grpc_rig, kserve_rig, triton_rig], ids=["grpc", "kserve", "triton"])
OVER_A_WIRE = pytest.mark.parametrize(
    "rig_of", [*OVER_HTTP.args[1], *OVER_GRPC.args[1]], ids=[*OVER_HTTP.kwargs["ids"], *OVER_GRPC.kwargs["ids"]]
)
PICTURES_IN_JSON = pytest.mark.parametrize(
    "rig_of",
    [openai_rig, a1111_rig, forge_rig, sdcpp_rig, detecting_rig],
    ids=["openai", "a1111", "forge", "sdcpp", "http"],
)


def call_of(*seeds: int, prompt: str = "a quiet harbour", timeout_seconds: float = 5.0, **request) -> Call:
    request = {"seed": seeds[0], "n": len(seeds), **request}
    return Call(
        request=ImageRequest(prompt, **request),
        model=None,
        width=64,
        height=64,
        items=tuple(Item(prompt, request.get("negative_prompt"), seed) for seed in seeds),
        timeout_seconds=timeout_seconds,
        request_id="req-1",
    )


def run(rig: AbstractAsyncContextManager[Rig], act):
    async def main():
        async with rig as ready:
            return await act(ready)

    return asyncio.run(main())


async def draw(rig: Rig, call: Call) -> Sequence[Artifact | ItemFailure]:
    return await rig.backend.generate(call, NOTHING_TO_TELL)


async def failing(rig: Rig, call: Call) -> AttemptError:
    with pytest.raises(AttemptError) as caught:
        await draw(rig, call)
    return caught.value


@EVERY
def test_each_item_gets_one_picture_in_order(rig_of):
    artifacts = run(rig_of("ok"), lambda rig: draw(rig, call_of(7, 8)))
    assert [raw_bytes(one) for one in artifacts] == [
        raw_bytes(one) for one in run(rig_of("ok"), lambda rig: draw(rig, call_of(7, 8)))
    ]
    assert len({raw_bytes(one) for one in artifacts}) == 2
    assert {(one.media_type, one.width, one.height) for one in artifacts} == {("image/png", 64, 64)}


@EVERY
def test_a_given_seed_is_drawn_and_told(rig_of):
    call = call_of(7, seed_given=True, given=frozenset({"seed"}))
    (artifact,) = run(rig_of("ok"), lambda rig: draw(rig, call))
    assert artifact.seed == 7
    assert raw_bytes(artifact) == picture("a quiet harbour", 7, 64, 64)


@EVERY
@pytest.mark.parametrize("operation", ["edit", "variation"])
def test_what_it_offers_to_do_with_a_picture_it_does_and_else_refuses(rig_of, operation):
    call = call_of(
        7, prompt="" if operation == "variation" else "a quiet harbour", operation=operation, images=(START,)
    )
    item = msgspec.structs.replace(call.items[0], images=(START,))
    call = msgspec.structs.replace(call, items=(item,))

    async def act(rig):
        if rig.backend.protocol in {"grpc", "openai", "http"}:
            await rig.backend.check(5.0)  # before it was asked, it may be anything
        if operation not in rig.backend.capabilities.operations:
            with pytest.raises(BackendRefusal) as caught:
                await draw(rig, call)
            return caught.value.error
        return await draw(rig, call)

    result = run(rig_of("ok"), act)
    if isinstance(result, list | tuple):
        (artifact,) = result
        assert isinstance(artifact, Artifact)
        assert (artifact.width, artifact.height) == (64, 64)
    else:
        assert result.status == 400
        assert result.message


@EVERY
def test_an_artifact_holds_its_picture_once(rig_of):
    for artifact in run(rig_of("ok"), lambda rig: draw(rig, call_of(7, 8))):
        assert (artifact.data is None) != (artifact.encoded is None)


@EVERY
def test_a_refusal_is_the_requests_fault_and_safe_to_show(rig_of):
    async def act(rig):
        with pytest.raises(BackendRefusal) as caught:
            await draw(rig, call_of(7))
        return caught.value.error

    error = run(rig_of("refuse"), act)
    assert error.status == 400
    assert error.message


@EVERY
def test_a_broken_engine_is_a_definite_failure(rig_of):
    error = run(rig_of("500"), lambda rig: failing(rig, call_of(7)))
    assert error.outcome is Outcome.FAILED
    assert "harbour" not in error.message


async def seconds_until_gone(rig: Rig) -> float:
    """Cancel a call that hangs; how long until the caller and the upstream both know."""
    drawing = asyncio.create_task(draw(rig, call_of(7)))
    await until(rig.is_working)
    cancelled_at = time.monotonic()
    drawing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drawing
    await until(rig.has_stopped)
    return time.monotonic() - cancelled_at


@EVERY
def test_cancelling_ends_the_call_and_the_work_within_a_tenth_of_a_second(rig_of):
    # a busy test machine may be late now and then, an adapter that waits for something is late always
    assert any(run(rig_of("hang"), seconds_until_gone) < 0.1 for _ in range(3))


@EVERY
def test_capabilities_are_known_before_anything_runs(rig_of):
    async def act(rig):
        return rig.backend.capabilities, rig.backend.protocol

    capabilities, protocol = run(rig_of("ok"), act)
    assert capabilities.honours <= PARAMETERS
    assert {"seed", "size", "negative_prompt"} <= capabilities.honours
    assert capabilities.max_batch_size >= 1
    assert RIGS[protocol] is rig_of or rig_of in {forge_rig, sdcpp_rig, triton_rig}


@EVERY
def test_a_check_finds_a_live_endpoint_healthy_and_names_its_models(rig_of):
    report = run(rig_of("ok"), lambda rig: rig.backend.check(2.0))
    assert report.healthy, report.detail
    assert report.models


@EVERY
def test_calls_run_at_the_same_time(rig_of):
    async def act(rig):
        return await asyncio.gather(*(draw(rig, call_of(seed)) for seed in range(6)))

    assert len(run(rig_of("ok"), act)) == 6


@EVERY
def test_closing_twice_is_harmless(rig_of):
    async def act(rig):
        await rig.backend.close()
        await rig.backend.close()

    run(rig_of("ok"), act)


# over HTTP


@OVER_HTTP
@pytest.mark.parametrize("step", ["truncated_base64", "not_picture", "not_json", "wrong_shape", "no_pictures"])
def test_a_complete_reply_without_a_good_picture_is_failed(rig_of, step):
    assert run(rig_of(step), lambda rig: failing(rig, call_of(7))).outcome is Outcome.FAILED


@PICTURES_IN_JSON
def test_text_that_is_no_base64_is_failed(rig_of):
    assert run(rig_of("bad_base64"), lambda rig: failing(rig, call_of(7))).outcome is Outcome.FAILED


@OVER_HTTP
@pytest.mark.parametrize("step", ["cut_body", "long_length", "close"])
def test_a_reply_cut_short_is_unknown(rig_of, step):
    assert run(rig_of(step), lambda rig: failing(rig, call_of(7))).outcome is Outcome.UNKNOWN


@OVER_A_WIRE
def test_no_reply_in_time_is_unknown_and_the_connection_is_closed(rig_of):
    async def act(rig):
        if isinstance(rig.backend, DetectingBackend):
            await rig.backend.check(2.0)
        error = await failing(rig, call_of(7, timeout_seconds=0.05))
        await asyncio.sleep(0.02)
        return error.outcome, rig.server.in_flight

    assert run(rig_of("hang"), act) == (Outcome.UNKNOWN, 0)


@OVER_HTTP
@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        ("401", Outcome.FAILED), ("403", Outcome.FAILED), ("404", Outcome.FAILED), ("408", Outcome.FAILED),
        ("409", Outcome.FAILED), ("500", Outcome.FAILED), ("502", Outcome.FAILED), ("html", Outcome.FAILED),
        ("redirect", Outcome.FAILED), ("quota", Outcome.FAILED), ("oom", Outcome.FAILED), ("not_http", Outcome.FAILED),
        ("429", Outcome.NOT_STARTED), ("503", Outcome.NOT_STARTED), ("504", Outcome.UNKNOWN), ("524", Outcome.UNKNOWN),
    ],
)  # fmt: skip
def test_an_error_reply_has_one_outcome(rig_of, step, outcome):
    assert run(rig_of(step), lambda rig: failing(rig, call_of(7))).outcome is outcome


@OVER_HTTP
@pytest.mark.parametrize(("step", "seconds"), [("busy", 7.0), ("busy_date", 9.0), ("busy_ms", 0.25), ("429", 1.0)])
def test_a_busy_endpoint_says_for_how_long(rig_of, step, seconds):
    assert run(rig_of(step), lambda rig: failing(rig, call_of(7))).busy_seconds == seconds


@OVER_HTTP
@pytest.mark.parametrize("step", ["drip", "huge"])
def test_a_slow_or_large_picture_is_good(rig_of, step):
    call = call_of(7, seed_given=True, given=frozenset({"seed"}))
    (artifact,) = run(rig_of(step), lambda rig: draw(rig, call))
    assert raw_bytes(artifact).startswith(picture("a quiet harbour", 7, 64, 64))


@PICTURES_IN_JSON
@pytest.mark.parametrize("step", ["escaped", "spaced", "wrapped", "data_url", "many"])
def test_an_odd_but_good_reply_is_good(rig_of, step):
    call = call_of(7, seed_given=True, given=frozenset({"seed"}))
    (artifact,) = run(rig_of(step), lambda rig: draw(rig, call))
    assert raw_bytes(artifact).startswith(picture("a quiet harbour", 7, 64, 64))


@OVER_A_WIRE
def test_a_picture_of_another_size_is_delivered_as_what_it_is(rig_of):
    (artifact,) = run(rig_of("wrong_size"), lambda rig: draw(rig, call_of(7)))
    assert (artifact.width, artifact.height) == (32, 32)


@OVER_HTTP
@pytest.mark.parametrize(
    ("step", "status", "code", "param"),
    [
        ("refuse", 400, "invalid_value", "size"),
        ("refuse_fastapi", 400, "invalid_value", "steps"),
        ("refuse_text", 400, "invalid_value", None),
        ("moderation", 400, "moderation_blocked", None),
        ("model_not_found", 404, "model_not_found", "model"),
        ("413", 413, "payload_too_large", None),
    ],
)
def test_a_refusal_keeps_its_meaning(rig_of, step, status, code, param):
    async def act(rig):
        with pytest.raises(BackendRefusal) as caught:
            await draw(rig, call_of(7))
        return caught.value.error

    error = run(rig_of(step), act)
    assert (error.status, error.code, error.param) == (status, code, param)


@OVER_HTTP
@pytest.mark.parametrize("step", ["echo_secret", "500", "503", "401", "oom", "refuse_fastapi"])
def test_secrets_and_prompts_never_come_back_in_errors(rig_of, step):
    known = {"a quiet harbour", HEADER, KEY if rig_of is openai_rig else PASSWORD}

    async def act(rig):
        echo = " and ".join(known)
        if isinstance(rig.server, FakeComfyUI):
            rig.server.node_error = echo
            reply = error_reply(step, echo) if step != "oom" else None
            rig.server.spoil = {"/prompt": reply} if reply is not None else {}
        else:
            rig.server.script = msgspec.structs.replace(rig.server.script, echo=echo)
        with pytest.raises((AttemptError, BackendRefusal)) as caught:
            await draw(rig, call_of(7))
        return f"{caught.value} {caught.value!r} {rig.backend!r}"

    shown = run(rig_of(step), act)
    assert not [secret for secret in known if secret in shown]


@OVER_A_WIRE
def test_a_refused_connection_is_not_started(rig_of):
    async def act(rig):
        await rig.server.stop()
        report = await rig.backend.check(1.0)
        assert not report.healthy
        assert report.detail
        return await failing(rig, call_of(7))

    error = run(rig_of("ok"), act)
    assert error.outcome is Outcome.NOT_STARTED
    assert error.busy_seconds is None


@OVER_HTTP
def test_the_request_can_be_followed_upstream(rig_of):
    async def act(rig):
        await draw(rig, call_of(7))
        return rig.server.posts[0].headers

    assert run(rig_of("ok"), act)["x-request-id"] == "req-1"


@OVER_HTTP
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_words_arrive_as_they_were_written(rig_of, form):
    words = unicodedata.normalize(form, "등대 위의 갈매기 🕊️")

    async def act(rig):
        await draw(rig, call_of(7, prompt=words, negative_prompt=words, given=frozenset({"negative_prompt"})))
        posted = [one.body for one in rig.server.exchanges if one.method == "POST"]
        return [json.dumps(json.loads(body), ensure_ascii=False) for body in posted]

    sent = "\n".join(run(rig_of("ok"), act))
    assert sent.count(words) >= 2  # what to draw, and what not


@EVERY
def test_progress_grows_and_never_goes_past_its_end(rig_of):
    told: list[Progress] = []
    able = []

    async def act(rig):
        await rig.backend.generate(call_of(7), told.append)
        able.append(rig.backend.capabilities)

    run(rig_of("ok"), act)
    assert [one.done for one in told] == sorted(one.done for one in told)
    assert all(0 <= one.done <= one.total for one in told)
    assert able[0].progress or not told or rig_of is comfyui_rig


@OVER_A_WIRE
def test_a_size_is_sent_as_it_is_drawn(rig_of):
    async def act(rig):
        await rig.backend.check(2.0)
        call = msgspec.structs.replace(call_of(7), width=100, height=70)
        (drawn,) = await draw(rig, call)
        assert isinstance(drawn, Artifact)
        return (drawn.width, drawn.height), rig.backend.capabilities.sizes

    drawn, rule = run(rig_of("ok"), act)
    assert drawn == rule.fit(100, 70)


@EVERY
def test_every_input_is_declared_that_an_edit_needs(rig_of):
    """What says that it edits says how many pictures it takes, and what has masks edits."""

    async def act(rig):
        await rig.backend.check(2.0)
        return rig.backend.capabilities

    able = run(rig_of("ok"), act)
    for one in (able, *able.variants.values()):
        assert one.max_images >= 1
        assert "edit" in one.operations or not one.masks
        assert one.honours <= PARAMETERS


# over gRPC


@OVER_GRPC
@pytest.mark.parametrize(
    "step",
    [
        "not_picture", "truncated_picture", "truncated", "wrong_shape", "negative_shape", "no_outputs", "few_contents",
    ],
)  # fmt: skip
def test_an_answer_without_a_good_picture_is_failed(rig_of, step):
    error = run(rig_of(step), lambda rig: failing(rig, call_of(7)))
    assert error.outcome is Outcome.FAILED
    assert error.message


@OVER_GRPC
@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        ("500", Outcome.FAILED), ("unknown", Outcome.FAILED), ("401", Outcome.FAILED), ("403", Outcome.FAILED),
        ("busy", Outcome.NOT_STARTED), ("not_ready", Outcome.NOT_STARTED), ("503", Outcome.UNKNOWN), ("late", Outcome.UNKNOWN),
        ("unimplemented", Outcome.FAILED),
    ],
)  # fmt: skip
def test_a_status_has_one_outcome(rig_of, step, outcome):
    error = run(rig_of(step), lambda rig: failing(rig, call_of(7)))
    assert error.outcome is outcome
    assert (error.busy_seconds is not None) is (step == "busy")


@OVER_GRPC
def test_a_call_that_was_cut_is_unknown(rig_of):
    async def act(rig):
        drawing = asyncio.create_task(failing(rig, call_of(7)))
        await until(rig.is_working)
        await rig.server.stop()
        return await drawing

    assert run(rig_of("cut"), act).outcome is Outcome.UNKNOWN


@OVER_GRPC
def test_a_picture_of_many_megabytes_is_good(rig_of):
    (artifact,) = run(rig_of("huge"), lambda rig: draw(rig, call_of(7)))
    assert len(raw_bytes(artifact)) > 4 * 1024 * 1024
    assert raw_bytes(artifact).startswith(picture("a quiet harbour", 7, 64, 64))


@OVER_GRPC
@pytest.mark.parametrize("step", ["500", "unknown", "503", "401", "invalid"])
def test_secrets_and_prompts_never_come_back_in_statuses(rig_of, step):
    known = ("a quiet harbour", HEADER, KEY)

    async def act(rig):
        rig.server.echo = " and ".join(known)
        with pytest.raises((AttemptError, BackendRefusal)) as caught:
            await draw(rig, call_of(7))
        return f"{caught.value} {caught.value!r} {rig.backend!r}"

    shown = run(rig_of(step), act)
    assert not [secret for secret in (*known, "secret-place") if secret in shown]


@OVER_GRPC
def test_the_call_can_be_followed_upstream(rig_of):
    async def act(rig):
        await draw(rig, msgspec.structs.replace(call_of(7), traceparent="00-1-2-01"))
        return rig.server.seen[0].metadata

    metadata = run(rig_of("ok"), act)
    assert (metadata["x-request-id"], metadata["traceparent"]) == ("req-1", "00-1-2-01")
    assert (metadata["authorization"], metadata["x-access"]) == (f"Bearer {KEY}", HEADER)


@OVER_GRPC
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_words_arrive_over_grpc_as_they_were_written(rig_of, form):
    words = unicodedata.normalize(form, "등대 위의 갈매기 🕊️")

    async def act(rig):
        await draw(rig, call_of(7, prompt=words, negative_prompt=words, given=frozenset({"negative_prompt"})))
        return rig.server.texts

    assert run(rig_of("ok"), act).split("\n").count(words) == 2  # what to draw, and what not
