"""A worker as its callers see it, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import threading
import time
import unicodedata
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.transport.conftest import certificate as certificate  # noqa: PLC0414 - a fixture
from tests.worker.conftest import Running, ToyEngine, request_of, running

from img_serving.backends.scripted import picture
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import StartError
from img_serving.domain.images import Call, ImageRequest, InputImage, Item, ItemFailure, Operation, Preview
from img_serving.engines.engine import OnStep
from img_serving.engines.procedural import ProceduralEngine
from img_serving.wire.generation import CHUNK_BYTES, GENERATE, message_of
from img_serving.wire.pictures import _varint
from img_serving.wire.v1 import generation_pb2 as pb


def run(act: Callable[[Running], Awaitable[Any]], engine: Any = None, **options: Any) -> Any:
    async def main() -> Any:
        async with running(engine, **options) as worker:
            return await act(worker)

    return asyncio.run(main())


async def until(happened: Callable[[], bool]) -> None:
    """Another task's or thread's doing, that nothing announces."""
    async with asyncio.timeout(10):
        while not happened():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


def kinds(events: list[pb.GenerateEvent]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


# drawing


def test_a_batch_is_drawn_in_order_and_ends_with_done() -> None:
    events = run(lambda worker: worker.draw(request_of(7, 8)))
    assert [one for one in kinds(events) if one != "progress"] == ["picture", "picture", "done"]
    pictures = [event.picture for event in events if event.WhichOneof("event") == "picture"]
    assert [(one.index, one.seed, one.media_type) for one in pictures] == [(0, 7, "image/png"), (1, 8, "image/png")]
    assert [one.data for one in pictures] == [picture("a quiet harbour", seed, 64, 48) for seed in (7, 8)]
    assert [one.size_bytes for one in pictures] == [len(one.data) for one in pictures]


def test_a_large_picture_comes_in_chunks_of_a_mebibyte() -> None:
    data = picture("x", 1, 8, 8) + bytes(2 * CHUNK_BYTES + 5)
    events = run(lambda worker: worker.draw(request_of(7)), ToyEngine(result=lambda _: [data]))
    parts = [
        event.picture.data or event.chunk.data for event in events if event.WhichOneof("event") in {"picture", "chunk"}
    ]
    assert [len(part) for part in parts[:-1]] == [CHUNK_BYTES] * 2
    assert b"".join(parts) == data


def test_every_picture_is_shown_as_often_as_a_stream_may_want_however_quick_the_engine_is() -> None:
    async def act(worker: Running) -> Any:
        return await worker.draw(request_of(5, 6, steps=4, previews=True))

    events = run(act, ProceduralEngine())
    shown = [(e.preview.index, e.preview.share) for e in events if e.WhichOneof("event") == "preview"]
    assert shown == [(index, share) for index in (0, 1) for share in (0.25, 0.5, 0.75, 1.0)]


def test_the_procedural_engine_edits_and_varies_behind_a_worker_as_it_does_here() -> None:
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image")
    start = InputImage(picture("start", 3, 64, 48), "image/png", 64, 48)
    hole = image.new("RGBA", (64, 48), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (10, 10, 40, 30))
    out = io.BytesIO()
    hole.save(out, "PNG")
    mask = InputImage(out.getvalue(), "image/png", 64, 48)
    engine = ProceduralEngine()

    async def act(worker: Running) -> Any:
        drawn = {}
        both: tuple[tuple[Operation, InputImage | None], ...] = (("edit", mask), ("variation", None))
        for operation, cut in both:
            items = tuple(Item("a fox", None, seed, (start,), cut) for seed in (5, 6))
            request = ImageRequest("a fox", operation=operation, steps=3, strength=0.6, given=frozenset({"strength"}))
            call = Call(request, None, 64, 48, items, 20.0)
            events = await worker.draw(message_of(call, frozenset()))
            drawn[operation] = [e.picture.data for e in events if e.WhichOneof("event") == "picture"]
            assert drawn[operation] == engine.generate(call, OnStep())
        return drawn["edit"][0]

    edited = np.asarray(image.open(io.BytesIO(run(act, ProceduralEngine(), any_model=True))))
    before, keep = np.asarray(image.open(io.BytesIO(start.data)).convert("RGB")), np.asarray(hole)[..., 3] == 255
    assert np.array_equal(edited[keep], before[keep])
    assert not np.array_equal(edited, before)


@pytest.mark.parametrize("step", [(-1, 2), (2**40, 2), (1.5, 2)])
def test_odd_steps_do_no_harm(step: tuple[Any, Any]) -> None:
    class Odd(ToyEngine):
        def generate(self, batch: Any, on_step: Any) -> Any:
            on_step(*step, previews=[Preview(b"x", "image/png", -1)])
            return super().generate(batch, on_step)

    assert kinds(run(lambda worker: worker.draw(request_of(7)), Odd()))[-1] == "done"


def test_one_items_failure_is_an_event_of_its_own() -> None:
    def result(batch: Any) -> Any:
        return [ItemFailure("no LoRA of that name", refused=True), picture("x", 1, 64, 48)]

    events = run(lambda worker: worker.draw(request_of(7, 8)), ToyEngine(result=result))
    (error,) = [event.error for event in events if event.WhichOneof("event") == "error"]
    assert (error.index, error.message, error.refused) == (0, "no LoRA of that name", True)
    assert kinds(events)[-2:] == ["picture", "done"]


def test_arrays_and_pillow_images_are_pictures_too() -> None:
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image")
    array = np.full((48, 64, 3), 200, np.uint8)
    results = [array, image.fromarray(array)]
    events = run(lambda worker: worker.draw(request_of(7, 8)), ToyEngine(result=lambda _: results))
    first, second = (event.picture.data for event in events if event.WhichOneof("event") == "picture")
    assert first == second
    assert first.startswith(b"\x89PNG")


def test_the_procedural_engine_gives_picture_two_of_seed_five_as_picture_nought_of_seed_seven() -> None:
    async def act(worker: Running) -> Any:
        several = await worker.draw(request_of(5, 6, 7))
        one = await worker.draw(request_of(7, model="whatever"))
        return [e.picture.data for e in (*several, *one) if e.WhichOneof("event") == "picture"]

    drawn = run(act, ProceduralEngine(), any_model=True)
    assert drawn[2] == drawn[3]
    assert len(set(drawn)) == 3


def test_previews_come_when_they_are_wanted() -> None:
    async def act(worker: Running) -> Any:
        return kinds(await worker.draw(request_of(7, previews=True))), kinds(await worker.draw(request_of(7)))

    wanted, unwanted = run(act, ProceduralEngine())
    assert "preview" in wanted
    assert "preview" not in unwanted


# refusals


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"items": []}, "INVALID_ARGUMENT", "items"),
        ({"items": [pb.Item(seed=1)] * 5}, "INVALID_ARGUMENT", "items"),
        ({"width": 0}, "INVALID_ARGUMENT", "size"),
        ({"width": 4}, "INVALID_ARGUMENT", "size"),
        ({"width": 70}, "INVALID_ARGUMENT", "size"),
        ({"width": 2**31}, "INVALID_ARGUMENT", "size"),
        ({"items": [pb.Item(seed=-1)]}, "INVALID_ARGUMENT", "seed"),
        ({"steps": 0}, "INVALID_ARGUMENT", "num_inference_steps"),
        ({"steps": 51}, "INVALID_ARGUMENT", "num_inference_steps"),
        ({"sampler": "eular"}, "INVALID_ARGUMENT", "sampler"),
        ({"guidance_scale": float("nan")}, "INVALID_ARGUMENT", "guidance_scale"),
        ({"strength": 2.0}, "INVALID_ARGUMENT", "strength"),
        ({"operation": pb.OPERATION_VARIATION}, "INVALID_ARGUMENT", "image"),
        ({"operation": 77}, "INVALID_ARGUMENT", "operation"),
        ({"operation": pb.OPERATION_EDIT}, "INVALID_ARGUMENT", "image"),
        ({"items": [pb.Item(images=[pb.InputImage(data=b"GIF89a")])]}, "INVALID_ARGUMENT", "image"),
        (
            {"items": [pb.Item(images=[pb.InputImage(data=picture("x", 1, 8, 8))] * 2)]},
            "INVALID_ARGUMENT",
            "image",
        ),
        (
            {
                "items": [
                    pb.Item(
                        images=[pb.InputImage(data=picture("x", 1, 8, 8))],
                        mask=pb.InputImage(data=picture("x", 1, 16, 8)),
                    )
                ]
            },
            "INVALID_ARGUMENT",
            "mask",
        ),
        ({"items": [pb.Item()] * 1025}, "INVALID_ARGUMENT", "items"),
        ({"items": [pb.Item(prompt="x" * 1_000_001)]}, "INVALID_ARGUMENT", "prompt"),
        ({"model": "another"}, "NOT_FOUND", "model"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_with_its_parameter(fields: dict[str, Any], code: str, param: str) -> None:
    async def act(worker: Running) -> Any:
        refused = await worker.refused(request_of(7, **fields))
        assert len(await worker.draw(request_of(7))) > 1, "and the worker goes on"
        return refused

    engine = ToyEngine()
    found, words, trailers = run(act, engine)
    assert (found, trailers["img-serving-param"]) == (code, param)
    assert words
    assert len(engine.batches) == 2, "the warm-up, and the good one"


def test_an_engine_without_bounds_is_not_asked_for_any_size() -> None:
    class Boundless(ToyEngine):
        def capabilities(self) -> Any:
            return Capabilities()

    code, words, _ = run(lambda worker: worker.refused(request_of(7, width=60_000, height=60_000)), Boundless())
    assert (code, "pixels" in words) == ("INVALID_ARGUMENT", True)


@pytest.mark.parametrize(("sent", "kept"), [("req-7", "req-7"), ("a\nb", None), ("등대", None), ("x" * 129, None)])
def test_a_request_id_goes_on_only_where_a_log_may_have_it(sent: str, kept: str | None) -> None:
    async def act(worker: Running) -> Any:
        call = worker.stub.Generate(request_of(7, request_id=sent))
        told = dict(await call.initial_metadata())
        async for _ in call:
            pass
        return told.get("x-request-id"), worker.engine.batches[-1].request_id

    assert run(act) == (kept, kept or "")


def test_a_sampler_may_be_spelt_as_people_do() -> None:
    assert kinds(run(lambda worker: worker.draw(request_of(7, sampler="EULER"))))[-1] == "done"


def test_what_the_engine_refuses_is_the_requests_fault() -> None:
    engine = ToyEngine(mishap=ValueError("the width must be a multiple of 64"))
    code, words, _ = run(lambda worker: worker.refused(request_of(7)), engine, warm_up=False)
    assert (code, words) == ("INVALID_ARGUMENT", "the width must be a multiple of 64")


@pytest.mark.parametrize(
    "mishap",
    [
        RuntimeError("CUDA error: an illegal access"),
        MemoryError(),
        StopIteration(),
        asyncio.CancelledError(),
        GeneratorExit(),
        SystemExit(3),
        KeyboardInterrupt(),
        BaseException("zz"),
    ],
    ids=repr,
)
def test_whatever_an_engine_raises_is_internal_and_its_words_stay_in_the_log(
    mishap: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(worker: Running) -> Any:
        refused = await worker.refused(request_of(7), timeout=10)
        worker.engine.mishap = None
        assert kinds(await worker.draw(request_of(7), timeout=10))[-1] == "done", "and the worker goes on"
        return refused

    with caplog.at_level(logging.ERROR):
        code, words, _ = run(act, ToyEngine(mishap=mishap), warm_up=False)
    assert code == "INTERNAL"
    assert "CUDA" not in words
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert "conftest.py" in logged, "where it happened"
    assert ("CUDA error" in logged) is isinstance(mishap, RuntimeError)


@pytest.mark.parametrize(
    "words",
    [
        "cannot draw 'a quiet harbour'",
        "KeyError: HARBOUR",
        repr("등대 위의 갈매기"),
        unicodedata.normalize("NFD", "등대 위의"),
        ascii("갈매기"),
        repr("갈매기".encode()),
    ],
)
def test_words_that_may_quote_a_prompt_are_not_logged(words: str, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "a quiet harbour, 등대 위의 갈매기"
    with caplog.at_level(logging.ERROR):
        run(
            lambda worker: worker.refused(request_of(7, prompt=prompt)),
            ToyEngine(mishap=KeyError(words)),
            warm_up=False,
        )
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert "KeyError: (its words may quote a prompt)" in logged
    assert words not in logged


def test_words_that_no_encoding_has_are_words_all_the_same() -> None:
    code, words, _ = run(
        lambda worker: worker.refused(request_of(7), timeout=10), ToyEngine(mishap=ValueError("\ud800!")), warm_up=False
    )
    assert (code, words) == ("INVALID_ARGUMENT", "?!")


@pytest.mark.parametrize("result", [[], [b"junk"], [None], [object()]])
def test_an_engine_that_returns_no_picture_failed(result: list[Any]) -> None:
    engine = ToyEngine(result=lambda _: result)
    assert run(lambda worker: worker.refused(request_of(7)), engine, warm_up=False)[0] == "INTERNAL"


def test_a_small_message_that_unpacks_to_millions_is_not_unpacked() -> None:
    swarm = request_of(7).SerializeToString() + b"\x32\x00" * 2_000_000  # items, empty
    nested = b"\x22\x00" * 2_000_000  # input images, empty
    nested = request_of(7).SerializeToString() + b"\x32" + _varint(len(nested)) + nested

    async def act(worker: Running) -> Any:
        generate: Any = worker.channel.unary_stream(GENERATE, lambda raw: raw, lambda raw: raw)
        codes = []
        for raw in (swarm, nested, b"\xff\xff\xff"):
            began = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(raw).read()
            codes.append(caught.value.code().name)
            assert time.monotonic() - began < 2
        return codes

    assert run(act) == ["INVALID_ARGUMENT"] * 3


def test_too_many_images_are_refused_before_they_are_looked_at() -> None:
    images = [pb.InputImage(data=b"not even one")] * 400
    request = request_of(7, operation=pb.OPERATION_EDIT, items=[pb.Item(images=images)])
    code, words, _ = run(lambda worker: worker.refused(request))
    assert (code, words) == ("INVALID_ARGUMENT", "an item has at most 1 input image")


# company


def test_cancelling_stops_the_engine_at_its_next_step() -> None:
    engine = ToyEngine(gate=threading.Event())

    async def act(worker: Running) -> bool:
        call = worker.stub.Generate(request_of(7))
        reading = asyncio.ensure_future(call.read())
        await until(engine.drawing.is_set)
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(engine.stopped.is_set)
        assert engine.gate is not None
        engine.gate.set()
        return kinds(await worker.draw(request_of(8)))[-1] == "done"

    assert run(act, engine, warm_up=False)


def test_who_waits_is_told_so_and_who_leaves_makes_room() -> None:
    engine = ToyEngine(gate=threading.Event())

    async def act(worker: Running) -> Any:
        first = asyncio.ensure_future(worker.draw(request_of(1)))
        await until(engine.drawing.is_set)
        second = asyncio.ensure_future(worker.draw(request_of(2)))
        await waiting(worker, 1)
        full = await worker.refused(request_of(3))
        second.cancel()
        await waiting(worker, 0)
        third = asyncio.ensure_future(worker.draw(request_of(4)))
        assert engine.gate is not None
        engine.gate.set()
        await asyncio.gather(first, third)
        return full

    async def waiting(worker: Running, count: int) -> None:
        async with asyncio.timeout(10):
            while f"worker_waiting {count}\n" not in await worker.metrics():
                pass

    code, _, trailers = run(act, engine, warm_up=False, queue_size=1, metrics_port=0)
    assert code == "RESOURCE_EXHAUSTED"
    assert int(trailers["retry-after-ms"]) >= 100
    assert [batch.items[0].seed for batch in engine.batches] == [1, 4], "who left was never drawn"


def test_slots_are_calls_drawn_at_the_same_time() -> None:
    barrier = threading.Barrier(2)

    def result(batch: Any) -> Any:
        barrier.wait(5)  # passes only where two are drawn at once
        return [picture("x", 1, 64, 48)]

    async def act(worker: Running) -> Any:
        return await asyncio.gather(worker.draw(request_of(1)), worker.draw(request_of(2)))

    assert len(run(act, ToyEngine(result=result), slots=2, warm_up=False)) == 2


def test_health_and_capabilities_answer_while_it_draws() -> None:
    """Measured with the painter, which computes in earnest; the bound is the contract's, with a busy machine's grace."""

    async def act(worker: Running) -> list[float]:
        drawing = asyncio.ensure_future(worker.draw(request_of(1, width=1024, height=1024, steps=40)))
        took = []
        while not drawing.done():
            before = time.monotonic()
            assert await worker.health() == "SERVING"
            await worker.stub.Capabilities(pb.CapabilitiesRequest())
            took.append(time.monotonic() - before)
            await asyncio.sleep(0.01)
        await drawing
        return took

    took = sorted(run(act, ProceduralEngine()))
    assert len(took) >= 5
    assert took[len(took) // 2] < 0.05


# limits, names


def test_max_batch_size_limits_what_the_engine_could() -> None:
    async def act(worker: Running) -> Any:
        told = await worker.stub.Capabilities(pb.CapabilitiesRequest())
        return told.models[0].max_batch_size, await worker.refused(request_of(1, 2, 3))

    most, (code, words, _) = run(act, max_batch_size=2)
    assert most == 2
    assert (code, words) == ("INVALID_ARGUMENT", "a batch has at most 2 items, not 3")


def test_what_it_can_do_is_told() -> None:
    told = run(lambda worker: worker.stub.Capabilities(pb.CapabilitiesRequest()), slots=3, queue_size=7)
    assert (told.name, told.slots, told.queue_size, told.any_model) == ("img-serving worker", 3, 7, False)
    (model,) = told.models
    assert (model.id, model.default_width, model.default_height, model.max_steps) == ("toy", 64, 48, 50)
    assert list(model.samplers) == ["euler", "Euler plain"]


# life


def test_it_listens_while_it_loads_and_says_how_far_it_is() -> None:
    class Slow(ToyEngine):
        def load(self) -> Any:
            yield 0.25, "the text encoder"
            go.wait(10)

    go = threading.Event()

    async def act(worker: Running) -> Any:
        try:
            async with asyncio.timeout(10):
                while True:
                    told = await worker.stub.Capabilities(pb.CapabilitiesRequest())
                    if told.loading.doing == "the text encoder":
                        break
            health = await worker.health()
            refused = await worker.refused(request_of(7))
        finally:
            go.set()
        return told, health, refused

    told, health, (code, words, trailers) = run(act, Slow(), wait_until_ready=False)
    assert (told.loading.share, list(told.models)) == (0.25, [])
    assert health == "NOT_SERVING"
    assert (code, trailers["img-serving-not-started"]) == ("UNAVAILABLE", "1")
    assert "25%" in words


def test_a_cancelled_call_holds_none_of_its_images_while_others_draw() -> None:
    engine = ToyEngine(gate=threading.Event())

    async def act(worker: Running) -> int:
        first = asyncio.ensure_future(worker.draw(request_of(1)))
        await until(engine.drawing.is_set)
        second = asyncio.ensure_future(
            worker.draw(request_of(2, operation=pb.OPERATION_EDIT, items=[pb.Item(images=[pb.InputImage(data=data)])]))
        )
        async with asyncio.timeout(10):
            while "worker_waiting 1\n" not in await worker.metrics():
                pass
        second.cancel()
        async with asyncio.timeout(10):
            while "worker_waiting 0\n" not in await worker.metrics():
                pass
        gc.collect()
        held = sum(isinstance(one, InputImage) and len(one.data) == len(data) for one in gc.get_objects())
        held += sum(isinstance(one, Call) and bool(one.items[0].images) for one in gc.get_objects())
        assert engine.gate is not None
        engine.gate.set()
        await first
        return held

    data = picture("x", 1, 64, 48)
    assert run(act, engine, warm_up=False, metrics_port=0) == 0


def test_who_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img_serving.worker.service.READING_SECONDS", 0.2)
    data = picture("x", 1, 8, 8) + bytes(16 * CHUNK_BYTES)

    async def act(worker: Running) -> None:
        stuck = worker.stub.Generate(request_of(1))
        await stuck.initial_metadata()
        code = ""
        async with asyncio.timeout(10):
            while code != "ok":  # there is one seat
                try:
                    async for _ in worker.stub.Generate(request_of(2)):
                        code = "ok"
                except grpc.aio.AioRpcError as error:
                    code = error.code().name
                    assert code == "RESOURCE_EXHAUSTED"
        stuck.cancel()

    run(act, ToyEngine(result=lambda _: [data]), warm_up=False, queue_size=0)


@pytest.mark.parametrize(
    ("can", "words"),
    [
        (None, "it returned NoneType"),
        (Capabilities(max_batch_size=-1), "max_batch_size is from 1"),
        (Capabilities(max_batch_size=2**40), "max_batch_size is from 1"),
        (Capabilities(default_size=(-1, 5)), "default_size is"),
        (Capabilities(honours=frozenset({"steps"})), "did you mean 'num_inference_steps'"),
        (Capabilities(sizes=(64, 64)), "sizes is a SizeRule"),  # type: ignore[arg-type]
        (Capabilities(max_steps=0), "max_steps is"),
        (Capabilities(formats=("gif",)), "formats has 'gif'"),  # type: ignore[arg-type]
        (Capabilities(operations=frozenset({"dream"})), "operations has 'dream'"),
        (Capabilities(samplers=["euler"]), "samplers is a Vocabulary"),  # type: ignore[arg-type]
    ],
)
def test_capabilities_that_make_no_sense_end_the_worker_with_what_is_wrong(can: Any, words: str) -> None:
    class Odd(ToyEngine):
        def capabilities(self) -> Capabilities:
            return cast("Capabilities", can)

    async def nothing(_: Running) -> None:
        """It never comes so far."""

    with pytest.raises(StartError, match=words):
        run(nothing, Odd())


@pytest.mark.parametrize("where", ["load", "capabilities"])
@pytest.mark.parametrize("error", [SystemExit(0), KeyError("weights"), asyncio.CancelledError()], ids=repr)
def test_an_engine_that_gives_up_early_ends_the_worker_with_a_sentence(where: str, error: BaseException) -> None:
    class Broken(ToyEngine):
        def load(self) -> Any:
            if where == "load":
                raise error

        def capabilities(self) -> Capabilities:
            if where == "capabilities":
                raise error
            return super().capabilities()

    async def nothing(_: Running) -> None:
        """It never comes so far."""

    with pytest.raises(StartError, match="the engine"):
        run(nothing, Broken())


def test_an_engine_that_cannot_be_loaded_ends_the_worker_with_its_reason() -> None:
    class Broken(ToyEngine):
        def load(self) -> Any:
            raise FileNotFoundError("there is no folder ./weights")

    async def nothing(_: Running) -> None:
        """It never comes so far."""

    with pytest.raises(StartError, match=r"there is no folder \./weights"):
        run(nothing, Broken())


@pytest.mark.parametrize(("warm_up", "drawn"), [(True, [(64, 48)]), (False, [])])
def test_warm_up_draws_one_picture_of_the_usual_size(warm_up: bool, drawn: list[tuple[int, int]]) -> None:
    async def act(worker: Running) -> Any:
        return [(batch.width, batch.height) for batch in worker.engine.batches]

    assert run(act, warm_up=warm_up) == drawn


def test_a_failed_warm_up_does_not_keep_it_from_serving() -> None:
    engine = ToyEngine(mishap=RuntimeError("cold"))
    assert run(lambda worker: worker.health(), engine) == "SERVING"


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    engine = ToyEngine(gate=threading.Event())

    async def act(worker: Running) -> Any:
        running_call = asyncio.ensure_future(worker.draw(request_of(1)))
        await until(engine.drawing.is_set)
        worker.stop.set()
        await until(lambda: worker.serving.done() or bool(worker.lines))
        await asyncio.sleep(0)
        assert engine.gate is not None
        code = "none"
        async with asyncio.timeout(10):
            while code != "UNAVAILABLE":  # from the moment on when it has heard
                code, _, _ = await worker.refused(request_of(2)) if not running_call.done() else ("late", "", {})
        engine.gate.set()
        return kinds(await running_call)[-1]

    assert run(act, engine, warm_up=False, queue_size=0) == "done"


def test_drain_seconds_bound_how_long_that_takes() -> None:
    engine = ToyEngine(gate=threading.Event())

    async def act(worker: Running) -> Any:
        call = asyncio.ensure_future(worker.refused(request_of(1)))
        await until(engine.drawing.is_set)
        worker.stop.set()
        code, _, _ = await call
        await until(engine.stopped.is_set)
        return code

    assert run(act, engine, warm_up=False, drain_seconds=0.05) in {"UNAVAILABLE", "CANCELLED"}


def test_nobody_waits_for_those_who_only_watch() -> None:
    async def act(worker: Running) -> float:
        stub: Any = health_pb2_grpc.HealthStub(worker.channel)
        watching = stub.Watch(health_pb2.HealthCheckRequest())
        await watching.read()
        began = time.monotonic()
        worker.stop.set()
        await worker.serving
        return time.monotonic() - began

    assert run(act, drain_seconds=20) < 10


def test_a_taken_port_is_said() -> None:
    async def act(worker: Running) -> None:
        async with running(port=worker.port):
            pass

    with pytest.raises(StartError, match="the port is taken"):
        run(act)


# who may call


def test_only_who_knows_the_token_is_let_in() -> None:
    async def act(worker: Running) -> Any:
        bearer = lambda token: (("authorization", f"Bearer {token}"),)  # noqa: E731 - said three times
        assert await worker.health() == "SERVING", "health is for everybody"
        return (
            (await worker.refused(request_of(1)))[0],
            (await worker.refused(request_of(1), metadata=bearer("wrong")))[0],
            kinds(await worker.draw(request_of(1), metadata=bearer("right")))[-1],
        )

    assert run(act, token="right") == ("UNAUTHENTICATED", "UNAUTHENTICATED", "done")


def test_who_has_no_token_is_answered_before_anything_is_read() -> None:
    """A call whose message never comes would hold a place for ever."""

    async def act(worker: Running) -> Any:
        silent: Any = worker.channel.stream_stream(GENERATE, lambda raw: raw, lambda raw: raw)
        call = silent()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        return caught.value.code().name

    assert run(act, token="right") == "UNAUTHENTICATED"


def test_only_so_many_may_watch_its_health() -> None:
    async def act(worker: Running) -> Any:
        stub: Any = health_pb2_grpc.HealthStub(worker.channel)
        watching = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(16)]
        for one in watching:
            assert (await one.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(health_pb2.HealthCheckRequest()).read()
        assert await worker.health() == "SERVING", "asking is for everybody"
        for one in watching:
            one.cancel()
        return caught.value.code().name

    assert run(act, token="right", queue_size=0) == "RESOURCE_EXHAUSTED"


def test_tls_is_spoken_with_the_given_certificate(certificate: Path) -> None:
    trust = grpc.ssl_channel_credentials(certificate.read_bytes())
    pem = str(certificate)
    assert run(lambda worker: worker.health(), tls_cert=pem, tls_key=pem, credentials=trust) == "SERVING"


def test_a_certificate_that_is_not_there_is_said() -> None:
    async def nothing(_: Running) -> None:
        """It never comes so far."""

    with pytest.raises(StartError, match=r"nowhere\.pem cannot be read"):
        run(nothing, tls_cert="nowhere.pem", tls_key="nowhere.pem")


def test_an_open_door_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    async def nothing(_: Running) -> None:
        """Starting is enough."""

    run(nothing, host="0.0.0.0")
    assert "anybody who reaches" in caplog.text
    caplog.clear()
    run(nothing, host="0.0.0.0", token="a-token")
    assert "anybody who reaches" not in caplog.text


# metrics


def test_metrics_tell_of_batches_steps_and_the_queue() -> None:
    async def act(worker: Running) -> str:
        await worker.draw(request_of(1, 2))
        await worker.refused(request_of(1, steps=0))
        return await worker.metrics()

    text = run(act, metrics_port=0, warm_up=False)
    for line in (
        'worker_calls_total{outcome="ok"} 1',
        'worker_pictures_total{batch="2"} 2',
        "worker_step_seconds_count 3",
        "worker_queue_seconds_count 1",
        "worker_draw_seconds_count 1",
        "worker_ready 1",
        "worker_slots 1",
        "worker_waiting 0",
        "worker_drawing 0",
    ):
        assert f"img_serving_{line}\n" in text, line


def test_device_memory_is_told_where_the_engine_knows_it() -> None:
    class Device(ToyEngine):
        def statistics(self) -> Any:
            return type("Told", (), {"memory_used_bytes": 5, "memory_total_bytes": 9})()

    text = run(lambda worker: worker.metrics(), Device(), metrics_port=0)
    assert "img_serving_worker_device_memory_used_bytes 5\n" in text
    assert "img_serving_worker_device_memory_total_bytes 9\n" in text
