"""The adapter to workers: what goes over the wire, what comes back, and what may go wrong in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from tests.support.fake_worker import CODES, FakeWorker
from tests.support.programs import free_port
from tests.transport.conftest import certificate as certificate  # noqa: PLC0414 - a fixture

from img_serving.backends.grpc import GrpcBackend
from img_serving.backends.grpc.adapter import UNKNOWN, _preview_of
from img_serving.backends.grpc.assembly import Assembly
from img_serving.backends.scripted import picture
from img_serving.domain.capabilities import SizeRule
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Artifact, Call, ImageRequest, InputImage, Item, ItemFailure, Progress
from img_serving.ports import HealthReport
from img_serving.wire.pictures import picture_event
from img_serving.wire.v1 import generation_pb2 as pb

SECRET = "sk-very-secret-token"


def call_of(*seeds: int, prompt: str = "a quiet harbour", timeout_seconds: float = 5.0, **request: Any) -> Call:
    return Call(
        request=ImageRequest(prompt, seed=seeds[0], n=len(seeds), **request),
        model="toy",
        width=64,
        height=48,
        items=tuple(
            Item(prompt, request.get("negative_prompt"), seed, request.get("images", ()), request.get("mask"))
            for seed in seeds
        ),
        timeout_seconds=timeout_seconds,
        request_id="req-1",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


Act = Callable[[GrpcBackend, FakeWorker], Awaitable[Any]]


def run(act: Act, worker: FakeWorker | None = None, **arguments: Any) -> Any:
    async def main() -> Any:
        async with worker or FakeWorker() as ready:
            backend = GrpcBackend(arguments.pop("url", ready.url), **arguments)
            try:
                return await act(backend, ready)
            finally:
                await backend.close()

    return asyncio.run(main())


def nothing(_: Progress) -> None:
    """Nobody watches."""


async def failing(backend: GrpcBackend, call: Call) -> AttemptError:
    with pytest.raises(AttemptError) as caught:
        await backend.generate(call, nothing)
    return caught.value


# what the worker says of itself


def test_what_a_worker_can_do_is_learned_at_the_check() -> None:
    async def act(backend: GrpcBackend, worker: FakeWorker) -> tuple[HealthReport, GrpcBackend]:
        assert backend.capabilities is UNKNOWN
        return await backend.check(2.0), backend

    report, backend = run(act)
    assert report == HealthReport(True, "health: SERVING", ("toy",), "toy worker 1")
    able = backend.capabilities
    assert able.batch == "items"
    assert (able.max_batch_size, able.max_concurrency, able.max_steps, able.max_images) == (8, 2, 50, 2)
    assert able.operations == {"generation", "edit", "variation"}
    assert able.sizes == SizeRule(multiple=8, min_side=8, max_side=2048)
    assert able.default_size == (64, 48)
    assert able.masks
    assert able.previews
    assert able.samplers is not None
    assert able.samplers.find("Euler A") == "euler_a"
    assert able.schedulers is None


def test_models_that_differ_are_told_apart() -> None:
    worker = FakeWorker()
    worker.told.models.add(id="small", max_batch_size=1)

    async def act(backend: GrpcBackend, _: FakeWorker) -> Any:
        await backend.check(2.0)
        return backend.capabilities

    able = run(act, worker)
    assert (able.of("toy").max_batch_size, able.of("small").max_batch_size) == (8, 1)


@pytest.mark.parametrize(("models", "is_any"), [((), True), (("toy",), False)])
def test_any_model_is_served_unless_some_are_configured(models: tuple[str, ...], is_any: bool) -> None:
    worker = FakeWorker()
    worker.told.any_model = True

    async def act(backend: GrpcBackend, _: FakeWorker) -> bool:
        await backend.check(2.0)
        return backend.capabilities.any_model

    assert run(act, worker, models=models) is is_any


def test_words_that_we_do_not_know_are_left_out() -> None:
    worker = FakeWorker()
    worker.told.models[0].honours.append("telepathy")
    worker.told.models[0].operations.append(99)  # type: ignore[arg-type]
    worker.told.models[0].formats.append("avif")

    async def act(backend: GrpcBackend, _: FakeWorker) -> Any:
        await backend.check(2.0)
        return backend.capabilities

    able = run(act, worker)
    assert "telepathy" not in able.honours
    assert able.operations == {"generation", "edit", "variation"}
    assert able.formats == ("png",)


def test_a_worker_that_loads_is_not_healthy_and_says_how_far_it_is() -> None:
    worker = FakeWorker()
    worker.told = pb.CapabilitiesResponse(loading=pb.Loading(doing="the text encoder", share=0.4))
    report = run(lambda backend, _: backend.check(2.0), worker)
    assert (report.healthy, report.detail) == (False, "loading: 40%, the text encoder")


def test_a_worker_that_drains_is_not_healthy() -> None:
    worker = FakeWorker()
    worker.statuses = {"": 2}  # type: ignore[dict-item]
    report = run(lambda backend, _: backend.check(2.0), worker)
    assert (report.healthy, report.detail) == (False, "health: NOT_SERVING")


@pytest.mark.parametrize("has_capabilities", [True, False])
def test_a_worker_without_health_or_capabilities_works_all_the_same(has_capabilities: bool) -> None:
    worker = FakeWorker()
    worker.has_health, worker.has_capabilities = False, has_capabilities

    async def act(backend: GrpcBackend, _: FakeWorker) -> bool:
        report = await backend.check(2.0)
        await backend.generate(call_of(7), nothing)
        return report.healthy

    assert run(act, worker)


# calls


def test_a_call_arrives_whole() -> None:
    image = InputImage(picture("start", 1, 64, 48), "image/png", 64, 48)
    call = call_of(7, 9, operation="edit", steps=5, guidance_scale=2.5, strength=0.25, sampler="Euler A",
                   negative_prompt="fog", images=(image,), mask=image)  # fmt: skip

    async def act(backend: GrpcBackend, worker: FakeWorker) -> Any:
        await backend.check(2.0)
        await backend.generate(call, nothing)
        return worker.requests[0], worker.metadata[0]

    sent, metadata = run(act)
    assert (sent.request_id, sent.model, sent.operation, sent.width, sent.height) == ("req-1", "toy", 2, 64, 48)
    assert (sent.steps, sent.guidance_scale, sent.strength, sent.sampler) == (5, 2.5, 0.25, "euler_a")
    assert [(one.prompt, one.negative_prompt, one.seed) for one in sent.items] == [
        ("a quiet harbour", "fog", 7),
        ("a quiet harbour", "fog", 9),
    ]
    assert sent.items[1].images[0].data == image.data
    assert sent.items[1].mask.data == image.data
    assert metadata["x-request-id"] == "req-1"
    assert metadata["traceparent"] == call.traceparent


def test_only_what_the_worker_honours_is_sent() -> None:
    async def act(backend: GrpcBackend, worker: FakeWorker) -> Any:
        await backend.generate(call_of(7, clip_skip=2, steps=5), nothing)  # nobody knows yet
        await backend.check(2.0)
        await backend.generate(call_of(7, clip_skip=2, steps=5), nothing)
        return [(one.HasField("clip_skip"), one.HasField("steps")) for one in worker.requests]

    assert run(act) == [(True, True), (False, True)]


def test_an_edit_is_sent_what_edits_honour() -> None:
    worker = FakeWorker()
    worker.told.models[0].honours_in_edits.append("strength")
    image = InputImage(picture("start", 1, 64, 48), "image/png", 64, 48)

    async def act(backend: GrpcBackend, _: FakeWorker) -> Any:
        await backend.check(2.0)
        await backend.generate(call_of(7, operation="edit", strength=0.5, steps=5, images=(image,)), nothing)
        return worker.requests[0].HasField("strength"), worker.requests[0].HasField("steps")

    assert run(act, worker) == (True, False)


def test_what_the_worker_says_of_a_picture_is_kept() -> None:
    (drawn,) = run(lambda backend, _: backend.generate(call_of(7), nothing), FakeWorker("told"))
    assert (drawn.seed, drawn.revised_prompt, drawn.ignored) == (107, "a better one", ("guidance_scale",))


def test_one_items_failure_spares_the_others() -> None:
    worker = FakeWorker("item_error")
    worker.words = "there is no LoRA of that name"
    first, second = run(lambda backend, _: backend.generate(call_of(7, 8), nothing), worker)
    assert first == ItemFailure("there is no LoRA of that name", refused=True)
    assert isinstance(second, Artifact)


def test_previews_come_with_the_progress_they_belong_to() -> None:
    told: list[Progress] = []
    call = msgspec.structs.replace(call_of(7), previews=True)
    run(lambda backend, _: backend.generate(call, told.append))
    assert [one.done for one in told] == [0, 1, 1, 2, 2, 3]
    assert [one.preview is not None for one in told] == [True, False] * 3
    assert {one.preview.share for one in told if one.preview is not None} == {None}, "a worker need not know"


@pytest.mark.parametrize(
    ("share", "known"), [(0.25, 0.25), (0.0, 0.0), (1.0, 1.0), (1.5, None), (-1.0, None), (float("nan"), None)]
)
def test_how_far_a_picture_is_has_to_make_sense(share: float, known: float | None) -> None:
    shown = pb.Preview(index=1, data=picture("x", 1, 8, 8), media_type="image/png", share=share)
    preview = _preview_of(shown, 2)
    assert preview is not None
    assert (preview.index, preview.share) == (1, known)


def test_nobody_is_shown_what_nobody_asked_for() -> None:
    told: list[Progress] = []
    run(lambda backend, _: backend.generate(call_of(7), told.append))
    assert [(one.done, one.total, one.preview) for one in told] == [(1, 3, None), (2, 3, None), (3, 3, None)]


def test_a_picture_of_many_chunks_is_whole() -> None:
    (drawn,) = run(lambda backend, _: backend.generate(call_of(7), nothing), FakeWorker("huge"))
    assert drawn.data.startswith(picture("a quiet harbour", 7, 64, 48))


@pytest.mark.parametrize(
    "step", ["junk", "truncated", "few", "extra", "twice", "stray", "short", "long", "boast", "no_done"]
)
def test_an_answer_that_does_not_hold_is_failed(step: str) -> None:
    error = run(lambda backend, _: failing(backend, call_of(7, 8)), FakeWorker(step))
    assert error.outcome is Outcome.FAILED


# errors


@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        ("busy", Outcome.NOT_STARTED), ("busy_silent", Outcome.NOT_STARTED), ("draining", Outcome.NOT_STARTED),
        ("unavailable", Outcome.UNKNOWN), ("deadline", Outcome.UNKNOWN), ("401", Outcome.FAILED), ("403", Outcome.FAILED),
        ("500", Outcome.FAILED), ("unimplemented", Outcome.FAILED),
    ],
)  # fmt: skip
def test_a_status_has_one_outcome(step: str, outcome: Outcome) -> None:
    assert run(lambda backend, _: failing(backend, call_of(7)), FakeWorker(step)).outcome is outcome


@pytest.mark.parametrize(("step", "seconds"), [("busy", 7.0), ("busy_silent", 1.0)])
def test_a_busy_worker_says_for_how_long(step: str, seconds: float) -> None:
    assert run(lambda backend, _: failing(backend, call_of(7)), FakeWorker(step)).busy_seconds == seconds


@pytest.mark.parametrize(
    ("step", "status", "code", "param"),
    [
        ("refuse", 400, "invalid_value", "size"),
        ("moderation", 400, "moderation_blocked", None),
        ("model_not_found", 404, "model_not_found", "model"),
    ],
)
def test_a_refusal_keeps_its_meaning(step: str, status: int, code: str, param: str | None) -> None:
    async def act(backend: GrpcBackend, _: FakeWorker) -> Any:
        with pytest.raises(BackendRefusal) as caught:
            await backend.generate(call_of(7), nothing)
        return caught.value.error

    error = run(act, FakeWorker(step))
    assert (error.status, error.code, error.param) == (status, code, param)


@pytest.mark.parametrize("step", ["refuse", "500", "busy", "unavailable", "draining", "item_error"])
def test_secrets_and_prompts_never_come_back(step: str) -> None:
    worker = FakeWorker(step)
    worker.words = f"cannot draw 'a quiet harbour' for {SECRET} with header-secret"

    async def act(backend: GrpcBackend, _: FakeWorker) -> str:
        try:
            results = await backend.generate(call_of(7), nothing)
        except (AttemptError, BackendRefusal) as error:
            return f"{error} {error!r} {backend!r}"
        return repr(results)

    shown = run(act, worker, api_key=SECRET, headers=(("X-Team", "header-secret"),))
    assert not [one for one in (SECRET, "header-secret", "a quiet harbour") if one in shown]


def test_credentials_and_headers_go_along() -> None:
    async def act(backend: GrpcBackend, worker: FakeWorker) -> Any:
        await backend.generate(call_of(7), nothing)
        return worker.metadata[0]

    metadata = run(act, api_key=SECRET, headers=(("X-Team", "art"),))
    assert metadata["authorization"] == f"Bearer {SECRET}"
    assert metadata["x-team"] == "art"


# connections


def test_nobody_there_is_not_started_and_somebody_later_is_found() -> None:
    async def act(backend: GrpcBackend, worker: FakeWorker) -> Any:
        await worker.stop()
        before = await failing(backend, call_of(7))
        report = await backend.check(2.0)
        await worker.start()
        return before.outcome, report.healthy, await backend.generate(call_of(7), nothing)

    worker = FakeWorker()
    worker.port = free_port()
    outcome, healthy, drawn = run(act, worker)
    assert (outcome, healthy) == (Outcome.NOT_STARTED, False)
    assert isinstance(drawn[0], Artifact)


def test_a_call_that_was_cut_has_an_unknown_outcome() -> None:
    async def act(backend: GrpcBackend, worker: FakeWorker) -> Any:
        drawing = asyncio.create_task(failing(backend, call_of(7)))
        while not worker.in_flight:  # noqa: ASYNC110 - another task's doing
            await asyncio.sleep(0.001)
        await worker.stop()
        return await drawing

    assert run(act, FakeWorker("hang")).outcome is Outcome.UNKNOWN


def test_silence_is_an_unknown_outcome_and_ends_the_call() -> None:
    async def act(backend: GrpcBackend, worker: FakeWorker) -> Any:
        error = await failing(backend, call_of(7, timeout_seconds=0.1))
        async with asyncio.timeout(5):
            while worker.in_flight:  # noqa: ASYNC110 - another task's doing
                await asyncio.sleep(0.001)
        return error.outcome, worker.cancelled

    assert run(act, FakeWorker("hang")) == (Outcome.UNKNOWN, 1)


def test_a_connection_that_does_not_come_about_is_given_up() -> None:
    async def main() -> AttemptError:
        silent = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
        backend = GrpcBackend(
            f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}", options={"connect_timeout_ms": 100}
        )
        try:
            return await failing(backend, call_of(7))
        finally:
            await backend.close()
            silent.close()
            for writer in writers:
                writer.close()

    writers: list[asyncio.StreamWriter] = []  # it listens, and says nothing
    error = asyncio.run(main())
    assert error.outcome is Outcome.NOT_STARTED
    assert "within 0.1 s" in error.message


def secure(certificate: Path) -> FakeWorker:
    worker = FakeWorker()
    pem = certificate.read_bytes()
    worker.credentials = grpc.ssl_server_credentials([(pem, pem)])
    return worker


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_a_certificate_is_checked_against_the_named_authority(certificate: Path, scheme: str) -> None:
    async def main(**trust: Any) -> bool:
        async with secure(certificate) as worker:
            backend = GrpcBackend(f"{scheme}://localhost:{worker.port}", **trust)
            try:
                return (await backend.check(5.0)).healthy
            finally:
                await backend.close()

    assert asyncio.run(main(ca_file=str(certificate)))
    assert not asyncio.run(main())


def test_server_name_is_what_the_certificate_must_say(certificate: Path) -> None:
    async def main(name: str) -> bool:
        async with secure(certificate) as worker:
            backend = GrpcBackend(
                f"https://127.0.0.1:{worker.port}", ca_file=str(certificate), options={"server_name": name}
            )
            try:
                return (await backend.check(5.0)).healthy
            finally:
                await backend.close()

    assert asyncio.run(main("localhost"))
    assert not asyncio.run(main("elsewhere"))


def test_keepalive_asks_as_often_as_it_is_told() -> None:
    def pings(seconds: float) -> Any:
        return dict(GrpcBackend("http://a:1", options={"keepalive_seconds": seconds})._line._options).get(
            "grpc.keepalive_time_ms"
        )

    assert (pings(0), pings(45)) == (None, 45_000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"url": "http://a:1/prefix"}, "has no path"),
        ({"url": "https://a:1", "tls_verify": False}, "tls_verify"),
        ({"url": "https://a:1", "ca_file": "/nowhere/ca.pem"}, "ca_file: cannot be read"),
        ({"url": "http://a:1", "headers": (("X-Trace-bin", "x"),)}, "X-Trace-bin means something else"),
        ({"url": "http://a:1", "headers": (("grpc-timeout", "1n"),)}, "grpc-timeout means something else"),
        ({"url": "http://a:1", "options": {"keepalive": 3}}, "did you mean keepalive_seconds"),
        ({"url": "http://a:1", "options": {"keepalive_seconds": 1}}, "at least 5"),
        ({"url": "http://a:1", "options": {"connect_timeout_ms": 0}}, "connect_timeout_ms"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GrpcBackend(**arguments)


@pytest.mark.parametrize(
    ("url", "target"),
    [("http://a", "a:80"), ("https://a", "a:443"), ("grpc://[::1]:5", "[::1]:5"), ("grpcs://a:7", "a:7")],
)
def test_addresses_are_those_of_any_backend(url: str, target: str) -> None:
    assert GrpcBackend(url)._line.target == target


# workers that go away, are slow, or lie


def test_a_call_that_runs_outlives_the_check_that_finds_its_worker_going_away() -> None:
    async def act(backend: GrpcBackend, worker: FakeWorker) -> Any:
        drawing = asyncio.create_task(backend.generate(call_of(7, timeout_seconds=20), nothing))
        await until(lambda: worker.in_flight == 1)
        assert worker._server is not None
        stopping = asyncio.create_task(worker._server.stop(20))  # finishes what runs, takes nothing new
        async with asyncio.timeout(10):
            while (await backend.check(2.0)).healthy:  # noqa: ASYNC110 - the worker's doing
                await asyncio.sleep(0.01)
        later = await failing(backend, call_of(8))
        assert not drawing.done()
        worker.gate.set()
        drawn = await drawing
        await stopping
        return later.outcome, drawn

    outcome, drawn = run(act, FakeWorker("gate"))
    assert outcome is Outcome.NOT_STARTED
    assert isinstance(drawn[0], Artifact)


def test_a_connection_that_is_closed_under_a_call_leaves_its_outcome_open() -> None:
    async def act(backend: GrpcBackend, worker: FakeWorker) -> Any:
        drawing = asyncio.create_task(failing(backend, call_of(7)))
        await until(lambda: worker.in_flight == 1)
        await backend.close()
        return await drawing

    assert run(act, FakeWorker("hang")).outcome is Outcome.UNKNOWN


def test_whatever_comes_is_a_sign_of_life_for_the_gateway_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img_serving.backends.grpc.adapter.SIGN_OF_LIFE_SECONDS", 0.0)
    told: list[Progress] = []
    run(lambda backend, _: backend.generate(call_of(7), told.append), FakeWorker("huge"))
    assert [one.done for one in told[:3]] == [1, 2, 3]
    assert len(told) > 4, "the chunks of the picture, too"
    assert {(one.done, one.total) for one in told[3:]} == {(3, 3)}


def test_a_picture_may_come_byte_by_byte_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    (drawn,) = run(lambda backend, _: backend.generate(call_of(7), nothing), FakeWorker("drip"))
    assert drawn.data == picture("a quiet harbour", 7, 64, 48)
    monkeypatch.setattr("img_serving.backends.grpc.assembly.MAX_PARTS", 100)
    error = run(lambda backend, _: failing(backend, call_of(7)), FakeWorker("drip"))
    assert error.outcome is Outcome.FAILED
    assert "more than 100 parts" in error.message


def test_what_a_chunk_is_wrapped_in_is_not_held() -> None:
    assembly = Assembly([Item("x", None, 1)])
    assembly.picture(pb.Picture(size_bytes=10_000), b"")
    raw = picture_event(pb.Picture(), bytes(9000)) + b""
    view = memoryview(raw + bytes(500_000))[:1]
    assembly.chunk(0, view)
    (part,) = assembly._growing[0].parts[1:]
    assert isinstance(part, bytes)


@pytest.mark.parametrize(
    ("param", "told"),
    [("size", "size"), (f"Bearer {SECRET}", None), (SECRET, None), ("x" * 7000, None), ("a quiet harbour", None)],
)
def test_a_parameter_that_a_worker_names_is_one(param: str, told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _ = CODES["refuse"]
    monkeypatch.setitem(CODES, "refuse", (code, (("img-serving-param", param),)))

    async def act(backend: GrpcBackend, _: FakeWorker) -> Any:
        with pytest.raises(BackendRefusal) as caught:
            await backend.generate(call_of(7), nothing)
        return caught.value.error.param

    assert run(act, FakeWorker("refuse"), api_key=SECRET) == told


def test_capabilities_of_megabytes_are_not_unpacked() -> None:
    worker = FakeWorker()
    worker.told = pb.CapabilitiesResponse(name="x" * (5 << 20))
    report = run(lambda backend, _: backend.check(5.0), worker)
    assert not report.healthy
    assert "too many" in report.detail


@pytest.mark.parametrize("status", [0, 3, 99])
def test_a_health_of_any_other_kind_is_none(status: int) -> None:
    worker = FakeWorker()
    worker.statuses = {"": status}  # type: ignore[dict-item]
    report = run(lambda backend, _: backend.check(2.0), worker)
    assert not report.healthy
    assert report.detail.startswith("health: ")


def test_a_size_that_nothing_can_have_is_no_default() -> None:
    worker = FakeWorker()
    worker.told.models[0].default_width = 2**32 - 1

    async def act(backend: GrpcBackend, _: FakeWorker) -> Any:
        await backend.check(2.0)
        return backend.capabilities.default_size

    assert run(act, worker) is None


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not happened():  # noqa: ASYNC110 - another task's doing
            await asyncio.sleep(0.001)
