"""What an adapter can do: routing and batching obey it, and what it cannot honour is reported to the client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from img_serving.domain.images import Operation, OutputFormat
from img_serving.domain.vocabulary import Vocabulary

BatchShape = Literal["single", "request", "seeds", "items"]
"""What may share one call.

`single`: one picture a call. `request`: pictures of one request without a seed of the client's (a hosted API's `n`).
`seeds`: pictures of one prompt with consecutive seeds (A1111's `batch_size`). `items`: each picture has its own prompt,
negative prompt and seed.
"""

PARAMETERS = frozenset(
    {
        "negative_prompt",
        "seed",
        "num_inference_steps",
        "guidance_scale",
        "size",
        "strength",
        "quality",
        "style",
        "background",
        "moderation",
        "sampler",
        "scheduler",
        "clip_skip",
        "output_format",
        "output_compression",
        "user",
    }
)
"""The optional parameters that a backend may honour or not, by their names in the API."""

Rounding = Literal["down", "up", "nearest"]


@dataclass(frozen=True, slots=True)
class SizeRule:
    """Which sizes an engine draws; sides in pixels. Left at its defaults it allows everything.

    Engines round a size that does not fit in silence, each in its own direction: so it is rounded here, the same way, and
    said. What cannot be rounded (a side out of range, a size that is none of `choices`) is refused.

    Attributes:
        multiple: both sides are multiples of this.
        rounding: the direction of the engine's own rounding.
        min_side: the shortest side, inclusive.
        max_side: the longest side, inclusive; None: unknown.
        max_pixels: width x height, inclusive; None: unknown.
        max_ratio: the longer side over the shorter one, inclusive; None: any.
        choices: the only sizes there are; () where any is drawn.
    """

    multiple: int = 1
    rounding: Rounding = "down"
    min_side: int = 1
    max_side: int | None = None
    max_pixels: int | None = None
    max_ratio: float | None = None
    choices: tuple[tuple[int, int], ...] = ()

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """The size that is drawn where this one is asked for: the same, or rounded to multiples."""
        if self.multiple <= 1:
            return width, height
        return self._rounded(width), self._rounded(height)

    def refusal(self, width: int, height: int) -> str | None:
        """Why this size cannot be drawn, not even rounded; None if it can."""
        if self.choices and (width, height) not in self.choices:
            known = ", ".join(f"{wide}x{high}" for wide, high in self.choices)
            return f"{width}x{height} is none of its sizes ({known})"
        if min(width, height) < self.min_side:
            return f"a side must be at least {self.min_side} pixels"
        wide, high = self.fit(width, height)
        if self.max_side is not None and max(wide, high) > self.max_side:
            return f"a side may be at most {self.max_side} pixels"
        if self.max_pixels is not None and wide * high > self.max_pixels:
            return f"{width}x{height} is over its {self.max_pixels} pixels"
        if self.max_ratio is not None and max(wide, high) > self.max_ratio * min(wide, high):
            return f"the longer side may be at most {self.max_ratio:g} times the shorter one"
        return None

    def _rounded(self, side: int) -> int:
        step = self.multiple
        if self.rounding == "up":
            side = -(-side // step) * step
        elif self.rounding == "nearest":
            side = (side + step // 2) // step * step
        else:
            side = side // step * step
        return max(side, step, -(-self.min_side // step) * step)


ANY_SIZE = SizeRule()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one backend can do. `None` and empty collections mean "unknown": then anything is tried.

    Attributes:
        operations: of `domain.images.Operation`.
        batch: what may share one call.
        max_batch_size: pictures in one call.
        max_concurrency: calls in flight on one endpoint, where the operator says nothing.
        honours: the names of `PARAMETERS` that reach the engine.
        honours_in_edits: the same for edits, where that differs; None: it does not.
        honours_in_variations: the same for variations, where that differs from edits; None: it does not.
        sizes: the sizes that it draws.
        default_size: what it draws where nobody says a size (pixels); None: nobody knows.
        max_steps: inference steps at most.
        max_images: input images that one edit may have.
        masks: whether an edit may have a mask.
        samplers: the samplers that it knows.
        schedulers: the noise schedules that it knows.
        formats: what pictures come in, the usual one first.
        progress: whether it tells how far it is while it draws.
        previews: whether it can show unfinished pictures.
        cancels: whether cancelling stops the engine, not only our waiting.
        switches_models: it holds one model at a time, and another one takes seconds to load.
        any_model: a model of any name is served, whatever is listed.
        variants: models that can do something else than this record says.
    """

    operations: frozenset[str] = frozenset({"generation"})
    batch: BatchShape = "single"
    max_batch_size: int = 1
    max_concurrency: int = 32
    honours: frozenset[str] = field(default_factory=frozenset)
    honours_in_edits: frozenset[str] | None = None
    honours_in_variations: frozenset[str] | None = None
    sizes: SizeRule = ANY_SIZE
    default_size: tuple[int, int] | None = None
    max_steps: int | None = None
    max_images: int = 1
    masks: bool = False
    samplers: Vocabulary | None = None
    schedulers: Vocabulary | None = None
    formats: tuple[OutputFormat, ...] = ()
    progress: bool = False
    previews: bool = False
    cancels: bool = False
    switches_models: bool = False
    any_model: bool = False
    variants: Mapping[str, Capabilities] = field(default_factory=dict)

    def honoured(self, operation: Operation) -> frozenset[str]:
        """The names of `PARAMETERS` that reach the engine when it does this."""
        if operation == "variation" and self.honours_in_variations is not None:
            return self.honours_in_variations
        edits = self.honours_in_edits
        return self.honours if operation == "generation" or edits is None else edits

    def of(self, model: str | None) -> Capabilities:
        """What it can do with this model."""
        return self.variants.get(model, self) if model is not None and self.variants else self
