"""The adapters against the real programs, where somebody says that one runs: what the fakes do has to hold here too.

`IMG_SERVING_REAL_A1111`, `IMG_SERVING_REAL_COMFYUI` and `IMG_SERVING_REAL_OPENAI` are addresses, several with commas between.
Pictures are small and take few steps, so a program without a GPU, with any weights, will do. Run with `-s` to see figures.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
import unicodedata
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from PIL import Image, ImageChops

from img_serving.config import backend_from_mapping
from img_serving.domain.errors import AttemptError, BackendRefusal
from img_serving.domain.images import Artifact, Call, ImageRequest, InputImage, Item, Progress
from img_serving.main import make_adapter
from img_serving.media.payload import raw_bytes
from img_serving.ports import Backend, HealthReport

Result = TypeVar("Result")

VARIABLES = {
    "a1111": "IMG_SERVING_REAL_A1111",
    "comfyui": "IMG_SERVING_REAL_COMFYUI",
    "openai": "IMG_SERVING_REAL_OPENAI",
}
ENGINES = [
    (protocol, url.strip())
    for protocol, variable in VARIABLES.items()
    for url in os.environ.get(variable, "").split(",")
    if url.strip()
]
pytestmark = pytest.mark.skipif(
    not ENGINES, reason=f"NO REAL ENGINE: set {', '.join(VARIABLES.values())} to prove the adapters on one"
)
EVERY = pytest.mark.parametrize("engine", ENGINES, ids=[f"{protocol} {url}" for protocol, url in ENGINES])
Engine = tuple[str, str]


def with_engine(engine: Engine, act: Callable[[Backend, HealthReport], Awaitable[Result]], **more: Any) -> Result:
    async def main() -> Result:
        protocol, url = engine
        config = backend_from_mapping({"name": "real", "protocol": protocol, "endpoints": [url], **more})
        backend = make_adapter(config, config.endpoint_list()[0])
        try:
            report = await backend.check(20.0)
            assert report.healthy, report.detail
            return await act(backend, report)
        finally:
            await backend.close()

    return asyncio.run(main())


def call_of(
    report: HealthReport, *seeds: int, size: tuple[int, int] = (64, 64), prompt: str = "a fox", **request: Any
) -> Call:
    previews = request.pop("previews", False)
    model = request.pop("model", report.models[0] if report.models else None)
    request = {"steps": 2, "seed": seeds[0], "n": len(seeds), "seed_given": True, **request}
    given = frozenset({"seed", "size", "num_inference_steps", *request.pop("given", ())})
    asked = ImageRequest(prompt, width=size[0], height=size[1], given=given, **request)
    items = tuple(Item(prompt, None, seed) for seed in seeds)
    return Call(asked, model, *size, items, 300.0, previews=previews)


SPELLINGS = (b"Sampler: Euler a", b"Sampler: euler_a", b"euler_ancestral")


def quiet(_: Progress) -> None:
    pass


async def draw(backend: Backend, call: Call, told: Callable[[Progress], None] = quiet) -> list[Artifact]:
    drawn = await backend.generate(call, told)
    assert all(isinstance(one, Artifact) for one in drawn), drawn
    return [one for one in drawn if isinstance(one, Artifact)]


def difference(one: bytes, other: bytes) -> int:
    """The most that any value differs, of 255."""
    first, second = (Image.open(io.BytesIO(data)).convert("RGB") for data in (one, other))
    assert first.size == second.size
    extrema = ImageChops.difference(first, second).getextrema()
    return max(int(most) for _, most in extrema)  # type: ignore[misc] # one pair a band


@EVERY
def test_it_says_what_it_is(engine: Engine) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        print(f"\n{engine[1]}: {report.found}; models: {report.models}")
        assert report.found
        assert report.models

    with_engine(engine, act)


@EVERY
def test_the_same_seed_is_the_same_picture_and_another_seed_is_not(engine: Engine) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        (one,), (again,), (other,) = [await draw(backend, call_of(report, seed)) for seed in (7, 7, 8)]
        assert (one.width, one.height, one.seed) == (64, 64, 7)
        assert difference(raw_bytes(one), raw_bytes(again)) <= 1
        assert difference(raw_bytes(one), raw_bytes(other)) > 1

    with_engine(engine, act)


@EVERY
def test_picture_i_of_a_batch_is_the_one_of_seed_plus_i(engine: Engine) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        if backend.capabilities.max_batch_size < 2 or backend.capabilities.batch == "request":
            pytest.skip("one picture a call")
        together = await draw(backend, call_of(report, 7, 8))
        assert [one.seed for one in together] == [7, 8]
        for one, seed in zip(together, (7, 8), strict=True):
            (alone,) = await draw(backend, call_of(report, seed))
            assert difference(raw_bytes(one), raw_bytes(alone)) <= 1

    with_engine(engine, act)


@EVERY
@pytest.mark.parametrize("seed", [2**31, 2**32 + 5])
def test_a_large_seed_is_drawn_twice_alike(engine: Engine, seed: int) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        (one,), (again,) = [await draw(backend, call_of(report, seed)) for _ in range(2)]
        assert one.seed == seed
        assert difference(raw_bytes(one), raw_bytes(again)) <= 1

    with_engine(engine, act)


@EVERY
def test_a_size_is_rounded_as_we_say(engine: Engine) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        (drawn,) = await draw(backend, call_of(report, 7, size=(100, 70)))
        rule = backend.capabilities.sizes
        assert rule.multiple == 1 or (drawn.width, drawn.height) == rule.fit(100, 70)

    with_engine(engine, act)


@EVERY
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_korean_words_are_taken(engine: Engine, form: Any) -> None:
    words = unicodedata.normalize(form, "눈 내리는 한옥 마을 🏯")
    with_engine(engine, lambda backend, report: draw(backend, call_of(report, 7, prompt=words)))


@EVERY
def test_a_sampler_is_the_one_that_was_asked_for(engine: Engine) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        known = backend.capabilities.samplers
        if known is None:
            pytest.skip("it tells of no samplers")
        asked: dict[str, Any] = {"sampler": "Euler a", "scheduler": "Karras", "given": ("sampler", "scheduler")}
        assert known.find("Euler a")
        (ancestral,) = await draw(backend, call_of(report, 7, **asked))
        assert ancestral.ignored == ()
        # with random weights samplers make no difference, but every program writes what it used into the file
        assert [one for one in SPELLINGS if one in raw_bytes(ancestral)]

    with_engine(engine, act)


@EVERY
def test_a_model_it_does_not_have_is_never_drawn_with_another(engine: Engine) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        if not backend.capabilities.switches_models:
            pytest.skip("it has one model")
        with pytest.raises((BackendRefusal, AttemptError), match=r"no checkpoint|no workflow|has no"):
            await draw(backend, call_of(report, 7, model="no-such-model"))

    with_engine(engine, act)


@EVERY
def test_models_are_switched(engine: Engine) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        if not backend.capabilities.switches_models or len(report.models or ()) < 2:
            pytest.skip("it has one model")
        first, second = (report.models or ())[:2]
        pictures = []
        for model in (first, second, second, first):
            started = time.perf_counter()
            (drawn,) = await draw(backend, call_of(report, 7, model=model))
            pictures.append(raw_bytes(drawn))
            print(f"\n{model}: {time.perf_counter() - started:.2f} s", end="")
        assert difference(pictures[0], pictures[1]) > 1
        assert difference(pictures[1], pictures[2]) <= 1
        assert difference(pictures[0], pictures[3]) <= 1

    with_engine(engine, act)


def _input(seed: int, size: tuple[int, int] = (64, 64)) -> InputImage:
    picture = Image.linear_gradient("L").resize(size).convert("RGB").rotate(90 * seed)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return InputImage(out.getvalue(), "image/png", *size)


@EVERY
def test_an_edit_paints_where_its_mask_lets_it(engine: Engine) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        if "edit" not in backend.capabilities.operations or not backend.capabilities.masks:
            pytest.skip("no edits with masks")
        start = _input(0, (128, 128))
        mask = Image.new("RGBA", (128, 128), (255, 255, 255, 255))
        mask.paste((0, 0, 0, 0), (0, 0, 32, 128))  # the left quarter
        out = io.BytesIO()
        mask.save(out, "PNG")
        area = InputImage(out.getvalue(), "image/png", 128, 128)
        edits: dict[str, Any] = {"operation": "edit", "images": (start,), "mask": area, "strength": 1.0, "steps": 4}
        edits["size"] = (128, 128)
        (one,), (other,) = [await draw(backend, call_of(report, seed, **edits)) for seed in (7, 8)]
        first, second = (Image.open(io.BytesIO(raw_bytes(drawn))).convert("RGB") for drawn in (one, other))
        changed = ImageChops.difference(first, second).convert("L")
        left, right = (_mean(changed.crop(box)) for box in ((0, 0, 24, 128), (72, 0, 128, 128)))
        print(f"\npainted {left:.1f}, kept {right:.1f} of 255", end="")
        assert left > right + 3

    with_engine(engine, act)


def _mean(picture: Image.Image) -> float:
    counts = picture.histogram()
    return sum(value * count for value, count in enumerate(counts)) / sum(counts)


@EVERY
def test_progress_grows(engine: Engine) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        if not backend.capabilities.progress:
            pytest.skip("it tells nothing while it draws")
        told: list[Progress] = []
        await draw(backend, call_of(report, 11, steps=12, size=(128, 128), previews=True), told.append)
        assert told
        assert [one.done for one in told] == sorted(one.done for one in told)
        previews = sum(one.preview is not None for one in told)
        print(f"\n{len(told)} reports, {previews} previews", end="")

    with_engine(engine, act)


@EVERY
def test_a_cancelled_call_is_gone_at_once_and_the_engine_soon_after(engine: Engine) -> None:
    async def act(backend: Backend, report: HealthReport) -> None:
        if not backend.capabilities.cancels:
            pytest.skip("it cannot be stopped")
        clock = time.perf_counter
        started = clock()
        await draw(backend, call_of(report, 21, steps=4, size=(128, 128)))
        one_step = (clock() - started) / 4
        began = asyncio.Event()
        long = call_of(report, 22, steps=150, size=(128, 128))
        drawing = asyncio.create_task(draw(backend, long, lambda _: began.set()))
        async with asyncio.timeout(120):
            await began.wait()
        cancelled = clock()
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        gone = clock() - cancelled
        await draw(backend, call_of(report, 23, steps=1, size=(64, 64)))
        free = clock() - cancelled
        print(
            f"\nours gone after {gone * 1000:.0f} ms; next picture after {free:.2f} s; a step took {one_step:.2f} s",
            end="",
        )
        # 150 steps would take far longer than the next picture had to wait
        assert free < 60 * one_step + 2

    with_engine(engine, act)
