"""Runs an engine in threads beside an event loop: loads it once, draws, tells progress, stops what nobody wants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, Outcome
from img_serving.domain.images import Artifact, Call, ItemFailure, Preview, Progress
from img_serving.engines.engine import CannotDraw, Engine, GenerationCancelled, OnStep, load_fully
from img_serving.engines.pictures import artifact_of

OnLoad = Callable[[float, str], None]
"""Told (share done from 0 to 1, what comes next), in the thread that loads."""

_MESSAGE_LIMIT = 300
Told = TypeVar("Told")


class EngineRunner:
    """One engine and its threads. What draws lets go of the interpreter while it computes, or the loop hears nothing."""

    def __init__(self, engine_factory: Callable[[], Engine], *, threads: int) -> None:
        """`threads` calls are drawn at the same time; further ones wait in the order in which they came.

        Nothing is imported and nothing loaded before `load` or the first call.
        """
        self._engine_factory = engine_factory
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="engine")
        self._loading = threading.Lock()
        self._wanted: set[threading.Event] = set()
        self.engine: Engine | None = None
        """The engine, once it is loaded."""
        self.load_error = ""
        """Why the last try to load failed; the next call tries again."""

    @property
    def in_flight(self) -> int:
        """Calls that are drawn or wait for a thread."""
        return len(self._wanted)

    async def draw(
        self,
        call: Call,
        on_progress: Callable[[Progress], None],
        on_start: Callable[[], None] | None = None,
    ) -> list[Artifact | ItemFailure]:
        """Draw in a thread, loading first if need be. Cancelling returns at once; the engine stops at its next step.

        `on_start` is told, on the loop, when a thread has taken the call.

        Raises:
            AttemptError: `FAILED`: the engine broke, or could not be loaded. The cause is what it raised.
            BackendRefusal: the engine cannot draw what is asked for.
        """
        loop = asyncio.get_running_loop()
        unwanted = threading.Event()

        def report(done: int, total: int, previews: Sequence[Preview]) -> None:
            for preview in previews or (None,):
                loop.call_soon_threadsafe(on_progress, Progress(done, total, preview))

        # in a cell of its own: a call that was cancelled in the queue stays there for as long as the threads are busy, and must
        # not hold its input images meanwhile
        cell = [call]
        del call

        def work() -> list[Artifact | ItemFailure]:
            if unwanted.is_set() or not cell:
                raise GenerationCancelled
            if on_start is not None:
                loop.call_soon_threadsafe(on_start)
            with _engine_faults():
                return _drawn(self.load(), cell.pop(), OnStep(report, unwanted.is_set))

        self._wanted.add(unwanted)
        try:
            return await loop.run_in_executor(self._executor, work)
        except GenerationCancelled:
            raise AttemptError(Outcome.FAILED, "the engine stopped although nobody asked it to") from None
        finally:
            cell.clear()
            unwanted.set()
            self._wanted.discard(unwanted)

    async def loaded(self, on_load: OnLoad | None = None) -> Engine:
        """The engine, loaded in one of its own threads.

        Raises:
            AttemptError: it could not be loaded, and why.
        """
        return await self._in_a_thread(lambda: self.load(on_load))

    async def capabilities(self) -> Capabilities:
        """What the loaded engine says that it can do, asked in one of its own threads.

        Raises:
            AttemptError: it does not say.
        """
        return await self._in_a_thread(lambda: self.load().capabilities())

    async def _in_a_thread(self, ask: Callable[[], Told]) -> Told:
        def work() -> Told:
            with _engine_faults():
                return ask()

        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def load(self, on_load: OnLoad | None = None) -> Engine:
        """The engine, loaded if it is not yet. Blocks: for a thread.

        Raises:
            AttemptError: it could not be loaded, and why.
        """
        with self._loading:
            if self.engine is None:
                try:
                    engine = self._engine_factory()
                    load_fully(engine, on_load)
                except BaseException as error:  # one that calls sys.exit() must not end the program in silence
                    self.load_error = f"the engine could not be loaded: {words_of(error) or type(error).__name__}"
                    raise AttemptError(Outcome.FAILED, self.load_error) from error
                self.engine, self.load_error = engine, ""
            return self.engine

    def close(self) -> None:
        """Stop what still draws at its next step, and end the threads."""
        for unwanted in self._wanted:
            unwanted.set()
        self._executor.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _engine_faults() -> Iterator[None]:
    """Whatever an engine raises is an `AttemptError` afterwards, its cause what was raised.

    Also what is no Exception: `sys.exit()` in a thread would end the program in silence, and a CancelledError or StopIteration
    would be taken by asyncio for something else, and leave the call without an end.
    """
    try:
        yield
    except (AttemptError, BackendRefusal, GenerationCancelled):
        raise
    except MemoryError as error:
        raise AttemptError(Outcome.FAILED, "there is not enough memory for the picture") from error
    except BaseException as error:
        # Its message may quote anything, a prompt included: the log of the engine has it, the client does not.
        raise AttemptError(Outcome.FAILED, f"the engine failed ({type(error).__name__})") from error


def words_of(error: BaseException) -> str:
    """What an error says, in a bounded number of characters that any encoding has."""
    try:
        text = str(error)
    except Exception:
        return ""
    return text[:_MESSAGE_LIMIT].encode("utf-8", "replace").decode()


def _drawn(engine: Engine, call: Call, on_step: OnStep) -> list[Artifact | ItemFailure]:
    """In a thread: draw, and prove that pictures came out."""
    on_step.check()
    try:
        pictures = engine.generate(call, on_step)
    except ValueError as error:
        # the engine's word for "not what I can draw"; any other mistake of its own has another type
        param = error.param if isinstance(error, CannotDraw) else None
        raise BackendRefusal(InvalidRequest(words_of(error) or "the engine cannot draw this", param=param)) from error
    if len(pictures) != len(call.items):
        raise AttemptError(Outcome.FAILED, f"the engine drew {len(pictures)} of {len(call.items)} pictures")
    try:
        return [artifact_of(one, item.seed) for one, item in zip(pictures, call.items, strict=True)]
    except ValueError as error:
        raise AttemptError(Outcome.FAILED, f"the engine's picture is no use: {error}") from None
