"""The adapter to an engine in this process: threads of its own, loaded when the first picture is wanted."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, Outcome
from img_serving.domain.images import Artifact, Call, ItemFailure, Preview, Progress
from img_serving.engines.engine import Engine, GenerationCancelled, OnStep, load_fully
from img_serving.engines.pictures import artifact_of
from img_serving.ports import HealthReport, OnProgress

MAX_THREADS: Final = 4

CAPABILITIES: Final = Capabilities(
    batch="items",
    max_batch_size=4,
    honours=frozenset({"negative_prompt", "seed", "num_inference_steps", "guidance_scale", "size", "quality"}),
    sizes=SizeRule(min_side=16, max_side=4096, max_pixels=2048 * 2048),
    formats=("png",),
    progress=True,
    previews=True,
    cancels=True,
)
"""Those of the procedural engine, written down here so that nothing has to be imported to know them."""


class BuiltinBackend:
    """Draws in threads beside the event loop; numpy lets go of the interpreter while it computes.

    Start-up costs nothing: `engine_factory` is called, and the engine loaded, in a thread at the first call.
    """

    def __init__(
        self,
        engine_factory: Callable[[], Engine],
        *,
        threads: int | None = None,
        models: tuple[str, ...] = ("procedural",),
        capabilities: Capabilities = CAPABILITIES,
    ) -> None:
        """`threads` calls can run at once; None means one a processor, `MAX_THREADS` at most."""
        threads = threads or min(MAX_THREADS, os.cpu_count() or 1)
        self._engine_factory = engine_factory
        self._models = models
        self._capabilities = replace(capabilities, max_concurrency=threads)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="engine")
        self._loading = threading.Lock()
        self._engine: Engine | None = None
        self._load_error = ""
        self._running: set[threading.Event] = set()

    def __repr__(self) -> str:
        state = "loaded" if self._engine else self._load_error or "not loaded yet"
        return f"<BuiltinBackend {', '.join(self._models)}: {len(self._running)} running, {state}>"

    @property
    def protocol(self) -> str:
        """Always `builtin`."""
        return "builtin"

    @property
    def capabilities(self) -> Capabilities:
        """Each picture of a batch has its own prompt, negative prompt and seed."""
        return self._capabilities

    async def generate(self, call: Call, on_progress: OnProgress) -> Sequence[Artifact | ItemFailure]:
        """Draw in a thread. Cancelling returns at once; the engine stops at its next step.

        Raises:
            AttemptError: `FAILED`: the engine broke, or could not be loaded.
            BackendRefusal: the engine cannot draw what is asked for.
        """
        loop = asyncio.get_running_loop()
        cancelled = threading.Event()

        def report(done: int, total: int, previews: Sequence[Preview]) -> None:
            for preview in previews or (None,):
                loop.call_soon_threadsafe(on_progress, Progress(done, total, preview))

        self._running.add(cancelled)
        try:
            return await loop.run_in_executor(self._executor, self._draw, call, OnStep(report, cancelled.is_set))
        except GenerationCancelled:
            raise AttemptError(Outcome.FAILED, "the engine stopped although nobody asked it to") from None
        except (AttemptError, BackendRefusal):
            raise
        except MemoryError:
            raise AttemptError(Outcome.FAILED, "there is not enough memory for the picture") from None
        except Exception as error:
            # Its message may quote anything, a prompt included: the log of the engine has it, the client does not.
            raise AttemptError(Outcome.FAILED, f"the engine failed ({type(error).__name__})") from error
        finally:
            cancelled.set()
            self._running.discard(cancelled)

    async def check(self, timeout_seconds: float) -> HealthReport:  # noqa: ARG002 - nobody has to be asked
        """Healthy unless the last try to load the engine failed; the next call tries again."""
        if self._load_error:
            return HealthReport(healthy=False, detail=self._load_error, models=self._models)
        detail = "loaded" if self._engine is not None else "loads at the first picture"
        return HealthReport(healthy=True, detail=detail, models=self._models)

    async def close(self) -> None:
        """Stop what still draws at its next step, and end the threads."""
        for cancelled in self._running:
            cancelled.set()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _draw(self, call: Call, on_step: OnStep) -> list[Artifact | ItemFailure]:
        """In a thread: load if need be, draw, and prove that pictures came out."""
        engine = self._loaded()
        on_step.check()
        try:
            pictures = engine.generate(call, on_step)
        except ValueError as error:
            # the engine's word for "not what I can draw"; any other mistake of its own has another type
            raise BackendRefusal(InvalidRequest(str(error)[:300])) from error
        if len(pictures) != len(call.items):
            raise AttemptError(Outcome.FAILED, f"the engine drew {len(pictures)} of {len(call.items)} pictures")
        try:
            return [artifact_of(one, item.seed) for one, item in zip(pictures, call.items, strict=True)]
        except ValueError as error:
            raise AttemptError(Outcome.FAILED, f"the engine's picture is no use: {error}") from None

    def _loaded(self) -> Engine:
        with self._loading:
            if self._engine is None:
                try:
                    engine = self._engine_factory()
                    load_fully(engine)
                except Exception as error:
                    self._load_error = f"the engine could not be loaded: {str(error) or type(error).__name__}"[:300]
                    raise AttemptError(Outcome.FAILED, self._load_error) from error
                self._engine, self._load_error = engine, ""
            return self._engine
