"""The adapter to an engine in this process: threads of its own, loaded when the first picture is wanted."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.images import Artifact, Call, ItemFailure
from img_serving.engines.engine import Engine
from img_serving.engines.runner import EngineRunner
from img_serving.ports import HealthReport, OnProgress

MAX_THREADS: Final = 4

_HONOURS: Final = frozenset({"negative_prompt", "seed", "num_inference_steps", "guidance_scale", "size", "quality"})

CAPABILITIES: Final = Capabilities(
    operations=frozenset({"generation", "edit", "variation"}),
    batch="items",
    max_batch_size=4,
    honours=_HONOURS,
    honours_in_edits=_HONOURS | {"strength"},
    sizes=SizeRule(min_side=16, max_side=4096, max_pixels=2048 * 2048),
    max_images=16,
    masks=True,
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
        self._models = models
        self._capabilities = replace(capabilities, max_concurrency=threads)
        self._runner = EngineRunner(engine_factory, threads=threads)

    def __repr__(self) -> str:
        runner = self._runner
        state = "loaded" if runner.engine else runner.load_error or "not loaded yet"
        return f"<BuiltinBackend {', '.join(self._models)}: {runner.in_flight} running, {state}>"

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
        return await self._runner.draw(call, on_progress)

    async def check(self, timeout_seconds: float) -> HealthReport:  # noqa: ARG002 - nobody has to be asked
        """Healthy unless the last try to load the engine failed; the next call tries again."""
        if self._runner.load_error:
            return HealthReport(healthy=False, detail=self._runner.load_error, models=self._models)
        detail = "loaded" if self._runner.engine is not None else "loads at the first picture"
        return HealthReport(healthy=True, detail=detail, models=self._models)

    async def close(self) -> None:
        """Stop what still draws at its next step, and end the threads."""
        self._runner.close()
