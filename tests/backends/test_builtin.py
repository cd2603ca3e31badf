"""The built-in adapter: an engine in threads, loaded when it is needed, stopped when it is not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from img_serving.backends.builtin import CAPABILITIES, BuiltinBackend
from img_serving.backends.scripted import picture
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Call, ImageRequest, Item, Progress
from img_serving.engines.engine import GenerationCancelled


class Engine:
    """Does what the test says, and remembers what it was asked for."""

    def __init__(self, draw=None, load=None) -> None:
        self._draw = draw or (lambda batch, on_step: [picture("x", one.seed, 16, 16) for one in batch.items])
        self._load = load or (lambda: None)
        self.steps: list[int | None] = []

    def load(self) -> None:
        self._load()

    def capabilities(self) -> Capabilities:
        return Capabilities()

    def generate(self, batch, on_step):
        self.steps.append(batch.request.steps)
        return self._draw(batch, on_step)


def call_of(*seeds: int, **request) -> Call:
    items = tuple(Item("x", None, seed) for seed in seeds or (1,))
    return Call(ImageRequest("x", **request), None, 16, 16, items, 5.0)


def run(engine_or_factory, act, **options):
    async def main():
        factory = engine_or_factory if callable(engine_or_factory) else lambda: engine_or_factory
        backend = BuiltinBackend(factory, **options)
        try:
            return await act(backend)
        finally:
            await backend.close()

    return asyncio.run(main())


def raising(error):
    def draw(*_):
        raise error

    return draw


def test_start_up_imports_and_loads_nothing():
    code = "import sys, img_serving.backends.builtin; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    async def act(backend):
        report = await backend.check(1.0)
        return report.healthy, report.models, repr(backend)

    healthy, models, shown = run(lambda: pytest.fail("loaded"), act)
    assert (healthy, models) == (True, ("procedural",))
    assert "not loaded" in shown


def test_the_engine_is_loaded_once_however_many_calls_want_it():
    loads = []

    def load():
        time.sleep(0.01)
        loads.append(1)

    async def act(backend):
        await asyncio.gather(*(backend.generate(call_of(seed), lambda progress: None) for seed in range(8)))

    run(lambda: Engine(load=load), act, threads=4)
    assert len(loads) == 1


def test_a_load_that_fails_is_told_and_tried_again():
    tries = []

    def load():
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("no weights")

    async def act(backend):
        with pytest.raises(AttemptError, match="no weights"):
            await backend.generate(call_of(), lambda progress: None)
        report = await backend.check(1.0)
        assert (report.healthy, report.models) == (False, ("procedural",))
        await backend.generate(call_of(), lambda progress: None)
        return (await backend.check(1.0)).healthy

    assert run(lambda: Engine(load=load), act)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (raising(RuntimeError("the prompt was: x")), "RuntimeError"),
        (raising(MemoryError()), "memory"),
        (raising(GenerationCancelled()), "nobody asked"),
        (lambda *_: [], "0 of 1"),
        (lambda *_: [b"junk"], "not a picture"),
        (lambda *_: [picture("x", 1, 16, 16)[:-3]], "cut short"),
    ],
)
def test_an_engine_that_breaks_is_a_definite_failure(draw, words):
    async def act(backend):
        with pytest.raises(AttemptError, match=words) as caught:
            await backend.generate(call_of(), lambda progress: None)
        return caught.value

    error = run(Engine(draw), act)
    assert error.outcome is Outcome.FAILED
    assert "the prompt" not in error.message


def test_what_the_engine_cannot_draw_is_the_requests_fault():
    async def act(backend):
        with pytest.raises(BackendRefusal, match="odd size"):
            await backend.generate(call_of(), lambda progress: None)

    run(Engine(raising(ValueError("odd size"))), act)


def test_progress_arrives_in_the_loops_own_thread():
    def draw(batch, on_step):
        for done in range(1, 4):
            on_step(done, 3)
        return [picture("x", 1, 16, 16)]

    reports = []

    async def act(backend):
        await backend.generate(call_of(), lambda one: reports.append((one, threading.current_thread())))
        await asyncio.sleep(0)

    run(Engine(draw), act)
    assert [one for one, _ in reports] == [Progress(1, 3), Progress(2, 3), Progress(3, 3)]
    assert {thread for _, thread in reports} == {threading.main_thread()}


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_an_unwanted_picture_stops_at_the_next_step(how):
    started, stopped = threading.Event(), threading.Event()

    def draw(batch, on_step):
        started.set()
        try:
            while True:
                time.sleep(0.001)
                on_step(1, 2)
        except GenerationCancelled:
            stopped.set()
            raise

    async def act(backend):
        drawing = asyncio.create_task(backend.generate(call_of(), lambda progress: None))
        await asyncio.to_thread(started.wait, 5)
        if how == "cancel":
            drawing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await drawing
        else:
            await backend.close()
            with pytest.raises(AttemptError):
                await drawing
        return await asyncio.to_thread(stopped.wait, 0.1)

    assert run(Engine(draw), act)


def test_threads_bound_how_many_run_at_once():
    running, most = [0], [0]
    lock = threading.Lock()

    def draw(batch, on_step):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.005)
        with lock:
            running[0] -= 1
        return [picture("x", 1, 16, 16)]

    async def act(backend):
        await asyncio.gather(*(backend.generate(call_of(), lambda progress: None) for _ in range(6)))
        return backend.capabilities.max_concurrency

    assert run(Engine(draw), act, threads=2) == 2
    assert most[0] == 2


def test_the_procedural_engine_draws_through_it_and_can_do_what_is_declared():
    procedural = pytest.importorskip("img_serving.engines.procedural")
    own = procedural.ProceduralEngine().capabilities()
    assert CAPABILITIES.honours == own.honours
    assert (CAPABILITIES.sizes, CAPABILITIES.formats) == (own.sizes, own.formats)

    async def act(backend):
        alone = await backend.generate(call_of(3, steps=2), lambda progress: None)
        together = await backend.generate(call_of(2, 3, steps=2), lambda progress: None)
        return alone[0].data == together[1].data, alone[0].seed

    assert run(procedural.ProceduralEngine, act) == (True, 3)
