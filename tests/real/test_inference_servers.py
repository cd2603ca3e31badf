"""The kserve adapter against real servers of the Open Inference Protocol, where somebody says that one runs.

`IMG_SERVING_REAL_TRITON` and `IMG_SERVING_REAL_KSERVE` are `host:port` of their gRPC. `scripts/real-inference-servers` starts
both, with the models that these tests expect. Run with `-s` to see figures.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np
import pytest
from PIL import Image

from img_serving.backends.kserve import KServeBackend
from img_serving.config import backend_from_mapping
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Artifact, Call, ImageRequest, InputImage, Item, Progress
from img_serving.main import make_adapter
from img_serving.media.payload import raw_bytes
from img_serving.ports import HealthReport
from img_serving.wire.inference import open_inference_pb2 as wire
from img_serving.wire.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub

Result = TypeVar("Result")
Act = Callable[[KServeBackend, HealthReport], Awaitable[Result]]

VARIABLES = {"triton": "IMG_SERVING_REAL_TRITON", "kserve": "IMG_SERVING_REAL_KSERVE"}
ADDRESSES = {name: os.environ[variable] for name, variable in VARIABLES.items() if os.environ.get(variable)}
if not ADDRESSES:
    needed = " and ".join(VARIABLES.values())
    pytest.skip(f"NO REAL SERVER: run scripts/real-inference-servers, or set {needed}", allow_module_level=True)

TRITON = pytest.mark.skipif("triton" not in ADDRESSES, reason="NO REAL TRITON: set IMG_SERVING_REAL_TRITON=host:port")
KSERVE = pytest.mark.skipif("kserve" not in ADDRESSES, reason="NO REAL KSERVE: set IMG_SERVING_REAL_KSERVE=host:port")
BOTH = pytest.mark.parametrize(
    "server", [pytest.param("triton", marks=TRITON), pytest.param("kserve", marks=KSERVE)], ids=["triton", "kserve"]
)


def with_server(server: str, act: Act[Result], **more: Any) -> Result:
    async def main() -> Result:
        told = {"models": ["txt2img"], "max_batch_size": 8} if server == "kserve" else {}
        config = backend_from_mapping(
            {"name": "real", "protocol": "kserve", "endpoints": [f"grpc://{ADDRESSES[server]}"], **told, **more}
        )
        backend = make_adapter(config, config.endpoint_list()[0])
        assert isinstance(backend, KServeBackend)
        try:
            report = await backend.check(20.0)
            assert report.healthy, report.detail
            return await act(backend, report)
        finally:
            await backend.close()

    return asyncio.run(main())


def call_of(
    *seeds: int, model: str = "txt2img", prompt: str = "a fox", size: tuple[int, int] = (64, 64), **request: Any
) -> Call:
    previews = request.pop("previews", False)
    asked = ImageRequest(prompt, seed=seeds[0], n=len(seeds), seed_given=True, **request)
    items = tuple(Item(prompt, None, seed, asked.images, asked.mask) for seed in seeds)
    return Call(asked, model, size[0], size[1], items, 60.0, request_id="req-real", previews=previews)


def quiet(_: Progress) -> None:
    pass


async def draw(backend: KServeBackend, call: Call, told: Callable[[Progress], None] = quiet) -> list[Artifact]:
    drawn = await backend.generate(call, told)
    assert all(isinstance(one, Artifact) for one in drawn), drawn
    return [one for one in drawn if isinstance(one, Artifact)]


def pixels(artifact: Artifact) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(raw_bytes(artifact))).convert("RGB"))


def refusal(server: str, call: Call, **more: Any) -> BackendRefusal | AttemptError:
    async def act(backend: KServeBackend, _: HealthReport) -> BackendRefusal | AttemptError:
        try:
            await backend.generate(call, quiet)
        except (BackendRefusal, AttemptError) as error:
            return error
        pytest.fail("it drew")

    return with_server(server, act, **more)


@BOTH
def test_it_says_what_it_is(server: str) -> None:
    async def act(backend: KServeBackend, report: HealthReport) -> None:
        print(f"\n{ADDRESSES[server]}: {report.found}; models: {report.models}; faults: {report.faults}")
        assert report.found.startswith("Triton" if server == "triton" else "kserve")
        assert "txt2img" in (report.models or ())

    with_server(server, act)


@BOTH
def test_the_same_seed_is_the_same_bytes_and_another_seed_is_not(server: str) -> None:
    async def act(backend: KServeBackend, _: HealthReport) -> None:
        (one,), (again,), (other,) = [await draw(backend, call_of(seed)) for seed in (7, 7, 8)]
        assert raw_bytes(one) == raw_bytes(again) != raw_bytes(other)
        assert (one.width, one.height, one.seed) == (64, 64, 7)

    with_server(server, act)


@BOTH
def test_a_batch_equals_its_pictures_drawn_alone(server: str) -> None:
    async def act(backend: KServeBackend, _: HealthReport) -> None:
        started = time.monotonic()
        together = await draw(backend, call_of(7, 8, 9, 10))
        middle = time.monotonic()
        alone = [(await draw(backend, call_of(seed)))[0] for seed in (7, 8, 9, 10)]
        print(f"\n{server}: 4 together {middle - started:.3f} s, one by one {time.monotonic() - middle:.3f} s")
        assert [raw_bytes(one) for one in together] == [raw_bytes(one) for one in alone]
        assert backend.capabilities.of("txt2img").batch == "items"

    with_server(server, act)


@BOTH
def test_calls_at_the_same_time_all_come_back_as_they_should(server: str) -> None:
    async def act(backend: KServeBackend, _: HealthReport) -> None:
        drawn = await asyncio.gather(*(draw(backend, call_of(seed % 4)) for seed in range(24)))
        assert len({raw_bytes(one) for (one,) in drawn}) == 4

    with_server(server, act)


@BOTH
def test_an_unknown_model_is_not_found(server: str) -> None:
    error = refusal(server, call_of(7, model="nobody"))
    assert isinstance(error, BackendRefusal)
    assert (error.error.status, error.error.code) == (404, "model_not_found")


@BOTH
def test_a_configured_model_that_is_not_there_is_said_at_once(server: str) -> None:
    async def act(backend: KServeBackend, report: HealthReport) -> None:
        assert report.models == ("txt2img",)
        assert any("nobody" in one for one in report.faults)

    with_server(server, act, models=["txt2img", "nobody"])


@BOTH
def test_words_of_any_script_arrive(server: str) -> None:
    async def act(backend: KServeBackend, _: HealthReport) -> None:
        drawn = [
            await draw(backend, call_of(7, prompt=words)) for words in ("등대", "한 마리의 갈매기 🕊️", "a" * 20_000)
        ]
        assert len({raw_bytes(one) for (one,) in drawn}) == 3

    with_server(server, act)


@BOTH
def test_a_call_that_is_cancelled_returns_at_once(server: str) -> None:
    async def act(backend: KServeBackend, _: HealthReport) -> float:
        drawing = asyncio.create_task(draw(backend, call_of(*range(8))))
        await asyncio.sleep(0.005)  # both toys take longer, and have the request by then
        started = time.monotonic()
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        seconds = time.monotonic() - started
        await draw(backend, call_of(7))  # and the next call is none the worse
        return seconds

    assert with_server(server, act) < 0.1


@KSERVE
def test_kserve_breaks_without_a_word() -> None:
    """It hides what its model raised: nothing of the prompt can leak, and nothing is explained either."""
    error = refusal("kserve", call_of(7), kserve={"inputs": {"prompt": "WORDS"}})
    assert isinstance(error, AttemptError)
    assert error.outcome is Outcome.FAILED
    assert "Internal server error" in str(error)


# Triton has more to try


@TRITON
def test_what_triton_refuses_is_the_requests_fault() -> None:
    error = refusal("triton", call_of(7, prompt="FAIL"))
    assert isinstance(error, BackendRefusal)
    assert (error.error.status, str(error)) == (400, "prompt refused")


@TRITON
def test_tensors_are_found_in_the_metadata_and_what_they_lack_is_not_honoured() -> None:
    async def act(backend: KServeBackend, report: HealthReport) -> None:
        able = backend.capabilities
        assert able.of("txt2img").honours == {
            "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "size",
        }  # fmt: skip
        assert able.of("txt2img").max_batch_size == 4
        assert able.of("txt2img_tensor").honours == {"seed", "size"}
        assert able.of("txt2img_stream").honours == {"num_inference_steps"}

    with_server("triton", act)


@TRITON
def test_sizes_are_drawn_and_more_than_a_batch_are_several_calls() -> None:
    async def act(backend: KServeBackend, _: HealthReport) -> None:
        drawn = await draw(backend, call_of(*range(9), size=(96, 40)))
        assert {(one.width, one.height) for one in drawn} == {(96, 40)}
        assert len({raw_bytes(one) for one in drawn}) == 9

    with_server("triton", act)


@TRITON
def test_a_tensor_of_pixels_is_a_picture() -> None:
    async def act(backend: KServeBackend, _: HealthReport) -> None:
        together = await draw(backend, call_of(7, 8, model="txt2img_tensor", size=(96, 40)))
        alone = [(await draw(backend, call_of(seed, model="txt2img_tensor", size=(96, 40))))[0] for seed in (7, 8)]
        assert [raw_bytes(one) for one in together] == [raw_bytes(one) for one in alone]
        assert {(one.media_type, one.width, one.height) for one in together} == {("image/png", 96, 40)}

    with_server("triton", act)


@TRITON
def test_a_large_picture_is_past_grpcs_own_limit() -> None:
    async def act(backend: KServeBackend, _: HealthReport) -> None:
        started = time.monotonic()
        (drawn,) = await draw(backend, call_of(7, model="txt2img_tensor", size=(2048, 2048)))
        print(
            f"\n2048x2048 as 12 MiB of pixels, to a PNG of {len(raw_bytes(drawn))} bytes: {time.monotonic() - started:.2f} s"
        )
        assert (drawn.width, drawn.height) == (2048, 2048)

    with_server("triton", act)


@TRITON
def test_a_decoupled_model_is_streamed_with_unfinished_pictures() -> None:
    async def act(backend: KServeBackend, _: HealthReport) -> None:
        told: list[Progress] = []
        assert backend.capabilities.of("txt2img_stream").progress
        (drawn,) = await draw(backend, call_of(7, model="txt2img_stream", steps=4, previews=True), told.append)
        assert [(one.done, one.total) for one in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        shown = [one.preview.data for one in told if one.preview is not None]
        assert len(shown) == 3
        assert raw_bytes(drawn) not in shown

    with_server("triton", act)


@TRITON
def test_a_stream_that_is_cancelled_stops_the_model() -> None:
    """The toy takes 0.1 s a step: a new call finds it free long before 50 steps are over."""

    async def act(backend: KServeBackend, _: HealthReport) -> float:
        told: list[Progress] = []
        drawing = asyncio.create_task(draw(backend, call_of(7, model="txt2img_stream", steps=50), told.append))
        async with asyncio.timeout(10):
            while not told:  # noqa: ASYNC110 - another task's doing
                await asyncio.sleep(0.005)
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        started = time.monotonic()
        await draw(backend, call_of(7, model="txt2img_stream", steps=1))
        return time.monotonic() - started

    seconds = with_server("triton", act)
    print(f"\nfree again {seconds:.2f} s after the cancellation, of 5 s that were left")
    assert seconds < 2


@TRITON
def test_a_model_that_insists_on_everything_gets_it() -> None:
    """It needs steps and guidance that the request does not say, a count, and a scheduler that only the operator can say."""

    async def without(_: KServeBackend, report: HealthReport) -> None:
        assert "floats" not in (report.models or ())
        assert any("needs the tensor SCHEDULER" in one for one in report.faults)

    async def act(backend: KServeBackend, _: HealthReport) -> None:
        drawn = await draw(backend, call_of(7, 8, 9, model="floats"))
        assert [pixels(one)[0, 0].tolist() for one in drawn] == [[seed, 20, 255] for seed in (7, 8, 9)]
        (drawn_in_five,) = await draw(backend, call_of(7, model="floats", steps=5))
        assert pixels(drawn_in_five).shape == (8, 16, 3)
        assert pixels(drawn_in_five)[0, 0].tolist() == [7, 5, 255]

    with_server("triton", without)
    table = {"models": {"floats": {"tensors": {"SCHEDULER": "euler"}, "value_range": "-1..1"}}}
    with_server("triton", act, kserve=table)
    table["models"]["floats"].pop("value_range")
    error = refusal("triton", call_of(7, model="floats"), kserve={"tensors": {}, **table})
    assert "set value_range" in str(error)


@TRITON
def test_an_edit_brings_its_picture_and_its_mask() -> None:
    def file(colour: tuple[int, ...], mode: str) -> InputImage:
        out = io.BytesIO()
        Image.new(mode, (40, 24), colour).save(out, "PNG")
        return InputImage(out.getvalue(), "image/png", 40, 24)

    async def act(backend: KServeBackend, _: HealthReport) -> None:
        able = backend.capabilities.of("editor")
        assert able.operations == {"edit", "variation"}
        assert able.masks
        picture, mask = file((10, 20, 30), "RGB"), file((0, 0, 0, 0), "RGBA")
        (same,) = await draw(backend, call_of(7, model="editor", operation="edit", images=(picture,), size=(40, 24)))
        assert pixels(same)[5, 5].tolist() == [10, 20, 30]
        call = call_of(7, model="editor", operation="edit", images=(picture,), mask=mask, size=(40, 24))
        assert pixels((await draw(backend, call))[0])[5, 5].tolist() == [255, 255, 255]

    with_server("triton", act)


@TRITON
def test_a_prompt_that_a_model_quotes_does_not_come_back() -> None:
    error = refusal("triton", call_of(7, model="quoter", prompt="a very private fox"))
    print(f"\n{error}")
    assert isinstance(error, AttemptError)
    assert error.outcome is Outcome.FAILED
    assert "cannot draw" in str(error)
    assert "private" not in str(error)
    assert "model.py" not in str(error)


@TRITON
def test_the_wire_is_as_the_adapter_takes_it_to_be() -> None:
    """What real servers do with a request that no adapter of ours sends."""

    async def main() -> None:
        async with grpc.aio.insecure_channel(ADDRESSES["triton"]) as channel:
            stub = GRPCInferenceServiceStub(channel)
            config = await stub.ModelConfig(wire.ModelConfigRequest(name="txt2img"))
            assert config.config.max_batch_size == 4
            assert [one.name for one in config.config.input if not one.optional] == ["PROMPT"]
            decoupled = await stub.ModelConfig(wire.ModelConfigRequest(name="txt2img_stream"))
            assert decoupled.config.model_transaction_policy.decoupled
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(wire.ModelInferRequest(model_name="txt2img_stream"))
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(main())
