"""What one part tells while it is drawn: steps, previews, how long a step takes; and where it may be stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from img_serving.domain.images import Call, Preview
from img_serving.engines.diffusers.device import Pace
from img_serving.engines.diffusers.previews import Previewer
from img_serving.engines.diffusers.steps import Steps


class Watch:
    """The callbacks of one part, which its pipeline calls after every step."""

    def __init__(
        self,
        pipe: Any,
        batch: Call,
        indices: Sequence[int],
        *,
        steps: Steps,
        previewer: Previewer | None,
        pace: Pace,
        clock: Callable[[], float],
    ) -> None:
        """`indices` are the pictures of the call that the first of the part are; the rest are fillers."""
        self._pipe, self._batch, self._indices = pipe, batch, indices
        self._steps, self._previewer, self._pace, self._clock = steps, previewer, pace, clock
        self._first: float | None = None
        self._last = 0.0
        self._count = 0

    def arguments(self, takes: frozenset[str]) -> dict[str, Any]:
        """The pipeline's callbacks."""
        if "callback_on_step_end" in takes:
            return {"callback_on_step_end": self._ended, "callback_on_step_end_tensor_inputs": ["latents"]}
        if "callback" in takes:
            return {"callback": lambda step, _, latents: self._ended(None, step, None, {"latents": latents})}
        return {}

    def seconds_per_step(self) -> float | None:
        """The mean from the end of the first step to that of the last; None of a single one."""
        return None if self._first is None or self._count < 2 else (self._last - self._first) / (self._count - 1)

    def _ended(self, _: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._pace.step()
        self._count += 1
        self._last = self._clock()
        if self._first is None:
            self._first = self._last
        total = getattr(self._pipe, "_num_timesteps", None) or max(self._batch.request.steps or 1, step + 1)
        previews: Sequence[Preview] = ()
        if self._previewer is not None and step + 1 < total and tensors.get("latents") is not None:
            batch = self._batch
            previews = self._previewer.show(
                tensors["latents"], batch.width, batch.height, self._indices, step=step + 1, steps=total
            )
        self._steps.stepped(min(step + 1, total), total, previews)
        return {}
