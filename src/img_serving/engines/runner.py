"""Runs an engine in threads beside an event loop: loads it once, draws, tells progress, stops what nobody wants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, Outcome
from img_serving.domain.images import Artifact, Call, ItemFailure, Preview, Progress
from img_serving.engines.engine import Engine, GenerationCancelled, OnStep, load_fully
from img_serving.engines.pictures import artifact_of

OnLoad = Callable[[float, str], None]
"""Told (share done from 0 to 1, what comes next), in the thread that loads."""

_MESSAGE_LIMIT = 300


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

        def work() -> list[Artifact | ItemFailure]:
            if on_start is not None and not unwanted.is_set():
                loop.call_soon_threadsafe(on_start)
            return _drawn(self.load(), call, OnStep(report, unwanted.is_set))

        self._wanted.add(unwanted)
        try:
            return await loop.run_in_executor(self._executor, work)
        except GenerationCancelled:
            raise AttemptError(Outcome.FAILED, "the engine stopped although nobody asked it to") from None
        except (AttemptError, BackendRefusal):
            raise
        except MemoryError as error:
            raise AttemptError(Outcome.FAILED, "there is not enough memory for the picture") from error
        except Exception as error:
            # Its message may quote anything, a prompt included: the log of the engine has it, the client does not.
            raise AttemptError(Outcome.FAILED, f"the engine failed ({type(error).__name__})") from error
        finally:
            unwanted.set()
            self._wanted.discard(unwanted)

    async def loaded(self, on_load: OnLoad | None = None) -> Engine:
        """The engine, loaded in one of its own threads.

        Raises:
            AttemptError: it could not be loaded, and why.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, self.load, on_load)

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
                except Exception as error:
                    message = f"the engine could not be loaded: {str(error) or type(error).__name__}"
                    self.load_error = message[:_MESSAGE_LIMIT]
                    raise AttemptError(Outcome.FAILED, self.load_error) from error
                self.engine, self.load_error = engine, ""
            return self.engine

    def close(self) -> None:
        """Stop what still draws at its next step, and end the threads."""
        for unwanted in self._wanted:
            unwanted.set()
        self._executor.shutdown(wait=False, cancel_futures=True)


def _drawn(engine: Engine, call: Call, on_step: OnStep) -> list[Artifact | ItemFailure]:
    """In a thread: draw, and prove that pictures came out."""
    on_step.check()
    try:
        pictures = engine.generate(call, on_step)
    except ValueError as error:
        # the engine's word for "not what I can draw"; any other mistake of its own has another type
        raise BackendRefusal(InvalidRequest(str(error)[:_MESSAGE_LIMIT])) from error
    if len(pictures) != len(call.items):
        raise AttemptError(Outcome.FAILED, f"the engine drew {len(pictures)} of {len(call.items)} pictures")
    try:
        return [artifact_of(one, item.seed) for one, item in zip(pictures, call.items, strict=True)]
    except ValueError as error:
        raise AttemptError(Outcome.FAILED, f"the engine's picture is no use: {error}") from None
