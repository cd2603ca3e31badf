"""The adapter to servers of the Open Inference Protocol, against ones that behave as Triton and kserve were seen to."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from PIL import Image
from tests.support.fake_kserve import TXT2IMG_INPUTS, FakeKServe, FakeModel, In, Out
from tests.support.programs import free_port

from img_serving.backends.kserve import KServeBackend
from img_serving.backends.kserve import adapter as adapter_module
from img_serving.backends.kserve.pictures import pictures_in
from img_serving.backends.rpc import Line
from img_serving.backends.scripted import picture
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Artifact, Call, ImageRequest, InputImage, Item, ItemFailure, Progress
from img_serving.media.payload import raw_bytes
from img_serving.ports import HealthReport

Result = TypeVar("Result")

TENSOR = FakeModel(
    inputs=(
        In("prompt", "BYTES", (-1,), False),
        In("seed", "INT64", (-1,)),
        In("width", "INT32"),
        In("height", "INT32"),
    ),
    outputs=(Out("images", "UINT8", (-1, -1, -1, 3)),),
    max_batch_size=0,
)
STREAM = FakeModel(
    inputs=(In("PROMPT", "BYTES", (1,), False), In("STEPS", "INT32"), In("SEED", "INT64")),
    outputs=(Out("IMAGE", "BYTES"), Out("STEP", "INT32")),
    max_batch_size=0,
    decoupled=True,
)
EDITOR = FakeModel(
    inputs=(
        In("PROMPT", "BYTES", (1,), False), In("IMAGE", "BYTES", (1,), False), In("MASK", "BYTES"),
        In("STRENGTH", "FP32", (1,), False), In("SEED", "INT64"),
    ),
    outputs=(Out("IMAGE", "BYTES"),),
)  # fmt: skip


def quiet(_: Progress) -> None:
    pass


def with_server(
    server: FakeKServe, act: Callable[[KServeBackend], Awaitable[Result]], *, is_asked: bool = True, **told: Any
) -> Result:
    """Run `act` with an adapter that has looked at the server."""

    async def main() -> Result:
        async with server:
            backend = KServeBackend(Line(server.url), **told)
            try:
                if is_asked:
                    await backend.check(2.0)
                return await act(backend)
            finally:
                await backend.close()

    return asyncio.run(main())


def call_of(*seeds: int, model: str | None = "txt2img", prompts: tuple[str, ...] = (), **request: Any) -> Call:
    size: tuple[int, int] = request.pop("size", (64, 64))
    images = request.get("images", ())
    negatives = request.pop("negatives", (request.get("negative_prompt"),) * len(seeds))
    patience, previews = request.pop("timeout_seconds", 5.0), request.pop("previews", False)
    asked = ImageRequest("a fox", n=len(seeds), seed=seeds[0], **request)
    items = tuple(
        Item((prompts or ("a fox",) * len(seeds))[index], negatives[index], seed, images, request.get("mask"))
        for index, seed in enumerate(seeds)
    )
    return Call(asked, model, size[0], size[1], items, patience, request_id="req-1", previews=previews)


def drawing(call: Call, told: Callable[[Progress], None] = quiet) -> Callable[[KServeBackend], Awaitable[list[bytes]]]:
    async def act(backend: KServeBackend) -> list[bytes]:
        return [raw_bytes(one) for one in await backend.generate(call, told) if isinstance(one, Artifact)]

    return act


def checking(backend: KServeBackend) -> Awaitable[HealthReport]:
    return backend.check(2.0)


def refused(server: FakeKServe, call: Call, **told: Any) -> BackendRefusal | AttemptError:
    try:
        with_server(server, drawing(call), **told)
    except (BackendRefusal, AttemptError) as error:
        return error
    pytest.fail("it drew")


async def until(happened: Callable[[], bool]) -> None:
    """Another task's doing, that nothing announces."""
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


def sent(server: FakeKServe) -> list[dict[str, list[Any]]]:
    return [one.values for one in server.seen]


# what is sent


def test_a_batch_is_one_request_with_a_row_a_picture():
    server = FakeKServe()
    call = call_of(
        7, 9, prompts=("a fox", "a hen"), steps=5, guidance_scale=7.5, negatives=("rain", "snow"), size=(96, 64)
    )
    drawn = with_server(server, drawing(call))
    assert drawn == [picture("a fox", 7, 96, 64), picture("a hen", 9, 96, 64)]
    assert sent(server) == [
        {
            "PROMPT": [b"a fox", b"a hen"], "NEGATIVE_PROMPT": [b"rain", b"snow"], "SEED": [7, 9], "STEPS": [5, 5],
            "GUIDANCE": [7.5, 7.5], "WIDTH": [96, 96], "HEIGHT": [64, 64],
        }
    ]  # fmt: skip
    message = server.seen[0].message
    assert {tuple(one.shape) for one in message.inputs} == {(2, 1)}
    assert [one.name for one in message.outputs] == ["IMAGE"]
    assert message.id == "req-1"


def test_what_the_request_leaves_out_is_the_models_own():
    server = FakeKServe()
    with_server(server, drawing(call_of(7)))
    assert sent(server)[0].keys() == {"PROMPT", "SEED", "WIDTH", "HEIGHT"}


def test_a_picture_of_a_batch_is_the_one_drawn_alone():
    alone = [with_server(FakeKServe(), drawing(call_of(seed)))[0] for seed in (7, 8, 9)]
    assert with_server(FakeKServe(), drawing(call_of(7, 8, 9))) == alone


def test_more_than_the_model_takes_are_several_requests():
    server = FakeKServe()
    drawn = with_server(server, drawing(call_of(*range(9))))
    assert drawn == [picture("a fox", seed, 64, 64) for seed in range(9)]
    assert [len(one["SEED"]) for one in sent(server)] == [4, 4, 1]


def test_with_and_without_a_negative_prompt_do_not_mix():
    server = FakeKServe()
    drawn = with_server(server, drawing(call_of(1, 2, 3, negatives=(None, "rain", None))))
    assert drawn == [picture("a fox", seed, 64, 64) for seed in (1, 2, 3)]
    assert sorted(len(one.get("NEGATIVE_PROMPT", [])) for one in sent(server)) == [0, 1]


def test_pixels_of_a_list_are_pictures():
    server = FakeKServe(models={"pixels": TENSOR})
    drawn = with_server(server, drawing(call_of(7, 8, model="pixels", size=(16, 8))))
    colours = [np.asarray(Image.open(io.BytesIO(one))) for one in drawn]
    assert [one.shape for one in colours] == [(8, 16, 3)] * 2
    assert [one[0, 0].tolist() for one in colours] == [[7, 128, 255], [8, 128, 255]]
    assert [list(one.shape) for one in server.seen[0].message.inputs] == [[2], [2], [1], [1]]


@pytest.mark.parametrize("datatype", ["UINT8", "FP32", "FP16"])
def test_pixels_are_encoded_beside_the_loop(datatype, monkeypatch):
    threads = []

    def seen(*told: Any) -> list[Artifact | ItemFailure]:
        threads.append(threading.current_thread())
        return pictures_in(*told)

    monkeypatch.setattr(adapter_module, "pictures_in", seen)
    model = replace(TENSOR, outputs=(Out("images", datatype, (-1, 3, -1, -1)),))
    (drawn,) = with_server(FakeKServe(models={"pixels": model}), drawing(call_of(7, model="pixels")))
    assert np.asarray(Image.open(io.BytesIO(drawn)))[0, 0].tolist() == [7, 128, 255]
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("typed", [False, True])
def test_typed_contents_are_as_good_as_raw_ones(typed):
    assert with_server(FakeKServe(typed=typed), drawing(call_of(7, 8))) == [
        picture("a fox", seed, 64, 64) for seed in (7, 8)
    ]


def test_a_model_that_needs_more_than_requests_say_gets_what_is_usual():
    needy = tuple(replace(one, optional=False) for one in TXT2IMG_INPUTS)
    server = FakeKServe(models={"txt2img": FakeModel(inputs=needy)})
    with_server(server, drawing(call_of(7)))
    assert sent(server)[0] == {
        "PROMPT": [b"a fox"], "NEGATIVE_PROMPT": [b""], "SEED": [7], "STEPS": [20], "GUIDANCE": [7.5], "WIDTH": [64],
        "HEIGHT": [64],
    }  # fmt: skip


def test_a_seed_wraps_into_a_smaller_tensor():
    inputs = (In("PROMPT", "BYTES", (1,), False), In("SEED", "UINT32"))
    server = FakeKServe(models={"txt2img": FakeModel(inputs=inputs)})

    async def act(backend: KServeBackend) -> int | None:
        (drawn,) = await backend.generate(call_of(2**32 + 5), quiet)
        assert isinstance(drawn, Artifact)
        return drawn.seed

    assert with_server(server, act) == 2**32 + 5
    assert sent(server)[0]["SEED"] == [5]


def test_a_seed_that_goes_nowhere_is_not_claimed():
    server = FakeKServe(models={"txt2img": FakeModel(inputs=TXT2IMG_INPUTS[:1])})

    async def act(backend: KServeBackend) -> int | None:
        (drawn,) = await backend.generate(call_of(7), quiet)
        assert isinstance(drawn, Artifact)
        return drawn.seed

    assert with_server(server, act) is None


# the options


def values_with(
    table: dict[str, Any], server: FakeKServe | None = None, call: Call | None = None
) -> dict[str, list[Any]]:
    """What a model gets with these options."""
    server = server if server is not None else FakeKServe()
    assert with_server(server, drawing(call or call_of(7, steps=5)), options=table)
    return server.seen[-1].values


def test_inputs_and_output_say_where_things_go():
    odd = FakeModel(
        inputs=(In("P", "BYTES", (1,), False), In("S", "INT64"), In("N", "INT32")),
        outputs=(Out("X", "BYTES"), Out("Y", "BYTES")),
    )
    server = FakeKServe(models={"txt2img": odd})
    table = {"inputs": {"prompt": "P", "seed": "S", "steps": "N"}, "output": "Y"}
    assert values_with(table, server) == {"P": [b"a fox"], "S": [7], "N": [5]}
    assert [one.name for one in server.seen[0].message.outputs] == ["Y"]


def test_an_input_that_is_nowhere_is_not_sent_and_not_honoured():
    table = {"inputs": {"steps": "", "width": ""}}
    assert values_with(table).keys() == {"PROMPT", "SEED", "HEIGHT"}

    async def act(backend: KServeBackend) -> frozenset[str]:
        return backend.capabilities.honours

    honours = with_server(FakeKServe(), act, options=table)
    assert honours == {"seed", "negative_prompt", "guidance_scale"}


def test_an_input_may_have_a_type_and_a_shape():
    server = FakeKServe("kserve")
    values_with({"inputs": {"steps": {"name": "N", "type": "FP32", "shape": [1, 1, 1]}}}, server)
    (steps,) = [one for one in server.seen[0].message.inputs if one.name == "N"]
    assert (steps.datatype, list(steps.shape)) == ("FP32", [1, 1, 1])
    assert server.seen[0].values["N"] == [5.0]


def test_tensors_are_sent_with_every_call_unless_it_says_something_else():
    server = FakeKServe("kserve")
    table = {"tensors": {"STEPS": 30, "SCHEDULER": "euler"}, "max_batch_size": 2}
    call = call_of(7, 8)
    assert values_with(table, server, call)["SCHEDULER"] == [b"euler", b"euler"]
    assert values_with(table, server, call)["STEPS"] == [30, 30]
    assert values_with(table, server, call_of(7, steps=5))["STEPS"] == [5]


def test_parameters_go_with_the_request():
    server = FakeKServe()
    values_with({"parameters": {"a": 1, "b": "x", "c": True}}, server)
    parameters = server.seen[0].message.parameters
    assert (parameters["a"].int64_param, parameters["b"].string_param, parameters["c"].bool_param) == (1, "x", True)


def test_version_chooses_one_of_a_model():
    server = FakeKServe()
    values_with({"version": "3"}, server)
    assert server.seen[0].message.model_version == "3"


def test_size_multiple_rounds_what_is_sent():
    values = values_with({"size_multiple": 16}, call=call_of(7, size=(100, 70)))
    assert (values["WIDTH"], values["HEIGHT"]) == ([96], [64])


def test_batch_dimension_and_max_batch_size_shape_the_calls_of_a_silent_server():
    server = FakeKServe("kserve")
    for table, shapes in (
        ({}, [(1, 1), (1, 1)]),
        ({"max_batch_size": 2}, [(2, 1)]),
        ({"batch_dimension": False}, [(1,), (1,)]),
    ):
        server.seen.clear()
        values_with(table, server, call_of(7, 8))
        assert [tuple(one.message.inputs[0].shape) for one in server.seen] == shapes


def test_the_backends_own_batch_size_is_for_models_that_do_not_say_theirs():
    for server, calls in ((FakeKServe("kserve"), 1), (FakeKServe("triton"), 2)):
        with_server(server, drawing(call_of(*range(6))), max_batch_size=6, models=("txt2img",))
        assert len(server.seen) == calls


@pytest.mark.parametrize(("value_range", "red"), [("0..1", 7), ("-1..1", 131), ("0..255", 0)])
def test_value_range_says_what_fractions_mean(value_range, red):
    model = replace(TENSOR, outputs=(Out("images", "FP32", (-1, -1, -1, 3)),))
    call = call_of(7, model="pixels", size=(8, 8))
    server = FakeKServe(models={"pixels": model})
    (drawn,) = with_server(server, drawing(call), options={"value_range": value_range})
    assert np.asarray(Image.open(io.BytesIO(drawn)))[0, 0, 0] == red


def test_layout_says_where_the_colours_are():
    model = replace(TENSOR, outputs=(Out("images", "UINT8", (-1, 3, -1, -1)),))
    call = call_of(7, model="pixels", size=(3, 3))
    for layout, pixel in ((None, [7, 7, 7]), ("chw", [7, 128, 255])):
        server = FakeKServe(models={"pixels": model})
        (drawn,) = with_server(server, drawing(call), options={"layout": layout} if layout else {})
        assert np.asarray(Image.open(io.BytesIO(drawn)))[0, 0].tolist() == pixel  # 3x3x3 could be either


def test_models_differ_in_their_own_tables():
    server = FakeKServe("kserve", models={"one": FakeModel(), "two": FakeModel()})
    table = {"inputs": {"steps": "N"}, "models": {"two": {"inputs": {"steps": "T"}}}}
    assert "N" in values_with(table, server, call_of(7, model="one", steps=5))
    assert "T" in values_with(table, server, call_of(7, model="two", steps=5))


def test_a_wrong_option_stops_the_start():
    with pytest.raises(ValueError, match=r"^inputs.sead: unknown option; did you mean seed\?$"):
        KServeBackend(Line("grpc://127.0.0.1:1"), options={"inputs": {"sead": "S"}})
    with pytest.raises(ValueError, match=r"^models\.sdxx: is none of the backend's `models`; did you mean sdxl\?$"):
        KServeBackend(Line("grpc://127.0.0.1:1"), options={"models": {"sdxx": {}}}, models=["sdxl"])
    with pytest.raises(ValueError, match=r"^tensors: the model cannot be given 2 values of A"):
        KServeBackend(Line("grpc://127.0.0.1:1"), options={"tensors": {"A": {"value": [1, 2], "shape": [3]}}})


# edits


def file_of(colour: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> InputImage:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, "PNG")
    return InputImage(out.getvalue(), "image/png", *size)


def editing(**request: Any) -> Call:
    return call_of(7, operation="edit", images=(file_of((10, 20, 30)),), **request)


def test_an_edit_sends_its_picture_and_a_mask_that_is_white_where_it_may_paint():
    server = FakeKServe(models={"txt2img": EDITOR})
    mask = file_of((0, 0, 0, 0), "RGBA")
    call = editing(mask=mask, strength=0.5)
    with_server(server, drawing(call))
    values = server.seen[0].values
    assert values["IMAGE"] == [call.request.images[0].data]
    assert values["STRENGTH"] == [0.5]
    assert Image.open(io.BytesIO(values["MASK"][0])).getextrema() == (255, 255)


def test_an_edit_without_a_mask_or_strength_sends_what_the_model_needs():
    server = FakeKServe(models={"txt2img": EDITOR})
    with_server(server, drawing(editing()))
    assert server.seen[0].values.keys() == {"PROMPT", "IMAGE", "STRENGTH", "SEED"}
    assert server.seen[0].values["STRENGTH"] == [0.75]


def test_a_variation_is_an_edit_without_words_that_leaves_half_of_it():
    server = FakeKServe(models={"txt2img": EDITOR})
    call = call_of(7, operation="variation", images=(file_of((10, 20, 30)),))
    without = msgspec.structs.replace(call, items=tuple(msgspec.structs.replace(one, prompt="") for one in call.items))
    with_server(server, drawing(without))
    values = server.seen[0].values
    assert values["IMAGE"] == [call.request.images[0].data]
    assert (values["PROMPT"], values["STRENGTH"]) == ([b""], [0.5])


def test_encoding_says_how_files_travel():
    server = FakeKServe(models={"txt2img": EDITOR})
    with_server(server, drawing(editing()), options={"encoding": "base64"})
    assert server.seen[0].values["IMAGE"][0].startswith(b"iVBORw0KGgo")


@pytest.mark.parametrize(("dims", "shape"), [((-1, -1, 3), (1, 64, 64, 3)), ((3, 32, 32), (1, 3, 32, 32))])
def test_a_model_may_want_pixels(dims, shape):
    inputs = (In("PROMPT", "BYTES", (1,), False), In("IMAGE", "UINT8", dims, False))
    server = FakeKServe(models={"txt2img": FakeModel(inputs=inputs)})
    with_server(server, drawing(editing()))
    message = server.seen[0].message
    assert tuple(message.inputs[1].shape) == shape
    colours = np.frombuffer(message.raw_input_contents[1], np.uint8).reshape(shape)
    assert sorted(set(colours.ravel().tolist())) == [10, 20, 30]


def test_what_edits_only_does_not_draw_and_the_other_way_round():
    assert "needs a picture" in str(refused(FakeKServe(models={"txt2img": EDITOR}), call_of(7)))
    assert "takes no picture" in str(refused(FakeKServe(), editing()))


# streams


def test_a_model_that_answers_more_than_once_tells_how_far_it_is():
    told: list[Progress] = []
    server = FakeKServe(models={"slow": STREAM})
    drawn = with_server(server, drawing(call_of(7, model="slow", steps=4, previews=True), told.append))
    assert drawn == [picture("a fox", 7, 64, 64)]
    assert [(one.done, one.total) for one in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    shown = [None if one.preview is None else one.preview.data for one in told]
    assert shown == [*(picture(f"a fox unfinished {step}", 7, 64, 64) for step in (1, 2, 3)), None]
    assert [one.preview.share for one in told[:3] if one.preview is not None] == [0.25, 0.5, 0.75]


def test_unfinished_pictures_are_not_shown_to_nobody():
    told: list[Progress] = []
    server = FakeKServe(models={"slow": STREAM})
    with_server(server, drawing(call_of(7, model="slow", steps=4), told.append))
    assert [one.preview for one in told] == [None] * 4


def test_several_pictures_are_several_streams():
    told: list[Progress] = []
    server = FakeKServe(models={"slow": STREAM})
    drawn = with_server(server, drawing(call_of(7, 8, model="slow", steps=2), told.append))
    assert drawn == [picture("a fox", 7, 64, 64), picture("a fox", 8, 64, 64)]
    assert [(one.done, one.total) for one in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_that_a_model_streams_is_found_out_once_where_the_server_does_not_say():
    server = FakeKServe(models={"slow": STREAM}, tells_config=False)

    async def act(backend: KServeBackend) -> list[bool]:
        able = []
        for _ in range(2):
            able.append(backend.capabilities.of("slow").progress)
            await backend.generate(call_of(7, model="slow", steps=2), quiet)
        return able

    assert with_server(server, act) == [False, True]


def test_a_stream_without_steps_counts_its_answers():
    told: list[Progress] = []
    model = replace(STREAM, outputs=(Out("IMAGE", "BYTES"),), answers=3)
    with_server(FakeKServe(models={"slow": model}), drawing(call_of(7, model="slow"), told.append))
    assert [one.done for one in told] == [1, 2, 3]
    assert all(one.done <= one.total for one in told)


def test_step_output_names_the_tensor_that_counts():
    told: list[Progress] = []
    model = replace(STREAM, outputs=(Out("IMAGE", "BYTES"), Out("SEED", "INT64")))
    server = FakeKServe(models={"slow": model})
    with_server(server, drawing(call_of(3, model="slow"), told.append), options={"step_output": "SEED"})
    assert [one.done for one in told] == [3, 3, 3]


@pytest.mark.parametrize(
    ("step", "prompt", "kind", "says"),
    [
        ("500", "a fox", AttemptError, "the model failed: Failed to process"),
        ("ok", "FAIL", AttemptError, "the model failed: prompt refused"),
        ("no_outputs", "a fox", AttemptError, "without a picture"),
        ("not_picture", "a fox", AttemptError, "not a picture"),
        ("busy", "a fox", AttemptError, "busy"),
    ],
)
def test_a_stream_that_goes_wrong_says_so(step, prompt, kind, says):
    error = refused(FakeKServe(models={"slow": STREAM}, step=step), call_of(7, model="slow", prompts=(prompt,)))
    assert isinstance(error, kind)
    assert says in str(error)
    assert "secret-place" not in str(error)


def test_a_tensor_that_a_streaming_model_does_not_know_is_the_requests_fault():
    table = {"inputs": {"seed": {"name": "SEED", "type": "INT32"}}}
    error = refused(FakeKServe(models={"slow": STREAM}), call_of(7, model="slow"), options=table)
    assert isinstance(error, BackendRefusal)
    assert "data-type is 'INT32'" in str(error)


def test_leaving_a_stream_cancels_it():
    server = FakeKServe(models={"slow": STREAM}, step="hang")

    async def act(backend: KServeBackend) -> None:
        call = asyncio.create_task(backend.generate(call_of(7, model="slow"), quiet))
        await until(lambda: bool(server.seen))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: not server.in_flight)

    with_server(server, act)
    assert server.cancelled == 1


def test_progress_renews_the_time_out_of_a_stream():
    """Each answer comes within the time-out, and all of them together take longer."""
    server = FakeKServe(models={"slow": STREAM}, step_seconds=0.04)
    assert with_server(server, drawing(call_of(7, model="slow", steps=8, timeout_seconds=0.2)))


# what goes wrong


@pytest.mark.parametrize("is_told", [True, False])
def test_a_limit_that_only_a_refusal_tells_is_learned(is_told):
    server = FakeKServe(tells_config=is_told)

    async def act(backend: KServeBackend) -> tuple[int, int]:
        before = backend.capabilities.max_batch_size
        drawn = await backend.generate(call_of(*range(6)), quiet)
        assert [raw_bytes(one) for one in drawn if isinstance(one, Artifact)] == [
            picture("a fox", seed, 64, 64) for seed in range(6)
        ]
        return before, backend.capabilities.max_batch_size

    assert with_server(server, act, max_batch_size=6) == ((4, 4) if is_told else (6, 4))
    assert [len(one["SEED"]) for one in sent(server)] == ([4, 2] if is_told else [6, 4, 2])


def test_one_bad_picture_of_a_batch_fails_alone():
    server = FakeKServe()
    server.draw = lambda values, index: b"" if values["SEED"][index] == 8 else picture("x", values["SEED"][index], 8, 8)

    async def act(backend: KServeBackend) -> list[type]:
        return [type(one) for one in await backend.generate(call_of(7, 8, 9), quiet)]

    assert with_server(server, act) == [Artifact, ItemFailure, Artifact]


def test_a_configured_model_that_an_endpoint_lacks_is_tried_elsewhere():
    error = refused(FakeKServe("kserve"), call_of(7, model="other"), models=("other",))
    assert isinstance(error, AttemptError)
    assert (error.outcome, error.is_blameless) == (Outcome.NOT_STARTED, True)


def test_a_model_that_nobody_configured_is_not_there():
    error = refused(FakeKServe("kserve"), call_of(7, model="other"))
    assert isinstance(error, BackendRefusal)
    assert (error.error.status, error.error.code) == (404, "model_not_found")


def test_a_call_without_a_model_draws_with_the_first_there_is():
    for told, server in ((("txt2img",), FakeKServe("kserve")), ((), FakeKServe())):
        assert with_server(server, drawing(call_of(7, model=None)), models=told, is_asked=False)
    error = refused(FakeKServe("kserve"), call_of(7, model=None))
    assert isinstance(error, BackendRefusal)
    assert error.error.param == "model"


def test_a_model_that_cannot_be_drawn_with_says_why():
    needs = FakeModel(inputs=(In("PROMPT", "BYTES", (1,), False), In("LORA", "BYTES", (1,), False)))
    error = refused(FakeKServe(models={"txt2img": needs}), call_of(7))
    assert isinstance(error, AttemptError)
    assert error.is_blameless
    assert "the model txt2img needs the tensor LORA" in str(error)


def test_our_own_request_id_and_the_servers_files_are_not_in_a_message():
    table = {"inputs": {"seed": {"name": "SEED", "type": "INT32"}}}
    error = refused(FakeKServe(), call_of(7), options=table)
    assert str(error) == "inference input 'SEED' data-type is 'INT32', but model 'txt2img' expects 'INT64'"
    assert "/models/" not in str(refused(FakeKServe(step="500"), call_of(7)))


def test_what_a_refusal_makes_doubtful_is_asked_again():
    server = FakeKServe()

    async def act(backend: KServeBackend) -> list[str]:
        server.models = {"txt2img": FakeModel(inputs=TXT2IMG_INPUTS[:1])}
        with pytest.raises(BackendRefusal):
            await backend.generate(call_of(7), quiet)
        await backend.generate(call_of(7), quiet)
        return list(server.seen[-1].values)

    assert with_server(server, act) == ["PROMPT"]


def test_a_request_too_large_for_the_server_is_413():
    server = FakeKServe(models={"txt2img": EDITOR}, max_message_bytes=4096)
    big = InputImage(file_of((1, 2, 3)).data + bytes(5000), "image/png", 64, 64)
    error = refused(server, call_of(7, operation="edit", images=(big,)))
    assert isinstance(error, BackendRefusal)
    assert error.error.status == 413


def test_a_picture_too_large_for_the_server_to_send_is_a_failure_that_says_so():
    """KServe sends 8 MiB at most unless told otherwise."""
    error = refused(FakeKServe(step="huge", max_message_bytes=1024 * 1024), call_of(7))
    assert isinstance(error, AttemptError)
    assert error.outcome is Outcome.FAILED
    assert "Sent message larger than max" in str(error)


def test_the_connection_is_made_again_after_the_server_was_away():
    async def main() -> bytes:
        first = FakeKServe(port=free_port())
        await first.__aenter__()
        backend = KServeBackend(Line(first.url))
        await backend.generate(call_of(7), quiet)
        await first.stop()
        assert not (await backend.check(2.0)).healthy  # a call that noticed it first could not know what became of it
        with pytest.raises(AttemptError) as caught:
            await backend.generate(call_of(7), quiet)
        assert caught.value.outcome is Outcome.NOT_STARTED
        async with FakeKServe(port=first.port):
            (drawn,) = await backend.generate(call_of(7), quiet)
            await backend.close()
            assert isinstance(drawn, Artifact)
            return raw_bytes(drawn)

    assert asyncio.run(main()) == picture("a fox", 7, 64, 64)


# health


def test_a_check_says_what_was_found_and_lists_what_draws():
    words = FakeModel(inputs=(In("text_input", "BYTES"),), outputs=(Out("text_output", "BYTES"),))
    server = FakeKServe(models={"txt2img": FakeModel(), "pixels": TENSOR, "slow": STREAM, "llm": words})
    report = with_server(server, checking)
    assert report.healthy
    assert report.models == ("txt2img", "pixels", "slow")
    assert report.found == "Triton Inference Server 2.51.0 (ServerMetadata says so)"
    assert report.faults == ()


def test_each_model_can_do_its_own():
    server = FakeKServe(models={"txt2img": FakeModel(), "pixels": TENSOR, "slow": STREAM})

    async def act(backend: KServeBackend) -> Any:
        return backend.capabilities

    able = with_server(server, act)
    assert able.max_batch_size == 4
    assert [able.of(name).batch for name in server.models] == ["items", "items", "single"]
    assert [able.of(name).max_batch_size for name in server.models] == [4, 4, 1]
    assert [able.of(name).progress for name in server.models] == [False, False, True]
    assert able.of("pixels").honours == {"seed", "size"}
    assert able.of("pixels").formats == ("png",)


def test_a_model_that_is_not_ready_is_none():
    down = FakeModel(state="UNAVAILABLE", reason="out of memory")
    server = FakeKServe(models={"txt2img": FakeModel(), "other": down})
    assert with_server(server, checking).models == ("txt2img",)
    report = with_server(server, checking, models=("txt2img", "other"))
    assert report.healthy
    assert report.models == ("txt2img",)
    assert report.faults == ("the model other is not ready (UNAVAILABLE: out of memory)",)


@pytest.mark.parametrize("flavour", ["kserve", "triton"])
def test_a_server_without_any_configured_model_is_not_healthy(flavour):
    report = with_server(FakeKServe(flavour), checking, models=("other",))
    assert not report.healthy
    assert len(report.faults) == 1
    assert "other" in report.faults[0]


def test_a_server_that_is_not_ready_may_have_models_that_are():
    """Triton is not ready as long as any model failed to load."""
    report = with_server(FakeKServe(is_ready=False), checking)
    assert report.healthy
    assert report.detail == "it is not ready"
    assert not with_server(FakeKServe("kserve", is_ready=False), checking).healthy


def test_a_server_that_does_not_list_its_models_asks_for_their_names():
    report = with_server(FakeKServe("kserve"), checking)
    assert report.healthy
    assert report.models is None
    assert report.faults == ("the server does not list its models: name them, as `models`",)
    assert report.found == "kserve 0.21.0 (ServerMetadata says so)"


def test_a_server_that_answers_some_questions_to_others_only_still_draws():
    server = FakeKServe(restricted="pw")

    async def act(backend: KServeBackend) -> HealthReport:
        await backend.generate(call_of(7), quiet)
        return await backend.check(2.0)

    report = with_server(server, act, models=("txt2img",))
    assert report.healthy
    assert report.models == ("txt2img",)
    assert report.found == ""


def test_headers_open_what_is_restricted():
    async def main() -> HealthReport:
        async with FakeKServe(restricted="pw") as server:
            backend = KServeBackend(Line(server.url, headers=(("triton-grpc-protocol-pw", "sesame"),)))
            try:
                return await backend.check(2.0)
            finally:
                await backend.close()

    assert asyncio.run(main()).models == ("txt2img",)


def test_a_model_that_neither_answers_nor_streams_is_asked_again_the_next_time():
    server = FakeKServe("kserve", step="unimplemented")

    async def act(backend: KServeBackend) -> list[bytes]:
        with pytest.raises(AttemptError):
            await backend.generate(call_of(7), quiet)
        server.step = "ok"
        return await drawing(call_of(7))(backend)

    assert with_server(server, act) == [picture("a fox", 7, 64, 64)]


def test_a_configured_model_that_cannot_be_drawn_with_is_a_fault():
    report = with_server(FakeKServe(), checking, models=("txt2img",), options={"output": "PNG"})
    assert report.models == ()
    assert "the model txt2img has no output tensor PNG" in report.faults[0]


def test_tensors_are_asked_for_at_the_start_and_not_at_every_check():
    server = FakeKServe()

    async def act(backend: KServeBackend) -> list[str]:
        server.asked.clear()
        await backend.check(2.0)
        return list(server.asked)

    assert with_server(server, act) == ["ServerReady", "RepositoryIndex"]


def test_a_model_that_comes_later_is_found_and_one_that_goes_is_gone():
    server = FakeKServe()

    async def act(backend: KServeBackend) -> list[tuple[str, ...] | None]:
        seen = []
        for models in ({"txt2img": FakeModel(), "pixels": TENSOR}, {"pixels": TENSOR}):
            server.models = dict(models)
            seen.append((await backend.check(2.0)).models)
        assert backend.capabilities.of("txt2img").honours == {"seed", "size"}
        return seen

    assert with_server(server, act) == [("txt2img", "pixels"), ("pixels",)]


def test_what_speaks_something_else_is_not_healthy():
    async def main() -> HealthReport:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        backend = KServeBackend(Line(f"grpc://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        try:
            return await backend.check(2.0)
        finally:
            await backend.close()
            server.close()

    report = asyncio.run(main())
    assert not report.healthy
    assert report.detail


def test_a_check_of_a_silent_server_ends():
    async def main() -> HealthReport:
        writers = []
        server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
        backend = KServeBackend(Line(f"grpc://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        try:
            return await backend.check(0.1)
        finally:
            await backend.close()
            for writer in writers:
                writer.close()
            server.close()

    assert not asyncio.run(main()).healthy


def test_nothing_that_a_client_names_is_remembered_for_ever():
    server = FakeKServe("kserve")

    async def act(backend: KServeBackend) -> int:
        for number in range(20):
            with pytest.raises(BackendRefusal):
                await backend.generate(call_of(7, model=f"no-{number}"), quiet)
        return len(repr(backend))

    assert with_server(server, act) < 200


def test_an_unknown_size_is_the_gateways_to_say():
    call = msgspec.structs.replace(call_of(7), width=123, height=45)
    (drawn,) = with_server(FakeKServe(), drawing(call))
    assert drawn == picture("a fox", 7, 123, 45)
