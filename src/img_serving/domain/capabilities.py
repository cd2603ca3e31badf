"""What an adapter can do: the batching policy obeys it, and what it cannot honour is reported to the client."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one backend can do.

    `honours` names the parameters of `PARAMETERS` that reach the engine. `max_pixels` (width x height), `min_side` and
    `max_side` in pixels bound the size; None means unknown, so anything is tried.
    """

    operations: frozenset[str] = frozenset({"generation"})
    batch: BatchShape = "single"
    max_batch_size: int = 1
    max_concurrency: int = 32
    honours: frozenset[str] = field(default_factory=frozenset)
    max_pixels: int | None = None
    min_side: int | None = None
    max_side: int | None = None
    progress: bool = False
    switches_models: bool = False
    """It holds one model at a time, and another one takes seconds to load: work goes where its model is, if it can."""
