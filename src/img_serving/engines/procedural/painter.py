"""Painting: refines a scene step by step, shows previews, and draws the picture at full size at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from img_serving.engines.engine import GenerationCancelled, IsCancelled
from img_serving.engines.procedural.canvas import draw
from img_serving.engines.procedural.fields import Array
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.limits import DEFAULT_GUIDANCE, DEFAULT_STEPS, check
from img_serving.engines.procedural.scene import compose
from img_serving.engines.procedural.steps import Latent

Stepped = Callable[[int, int], None]
"""Told (done, total) after every step."""

Preview = Callable[[int, Array], None]
"""Given the number of steps done and a small uint8 picture [h, w, 3] of how it looks by then."""

_PREVIEW_SIDE = 256
"""Pixels: enough to see what it will be, at a few hundredths of a second each."""


def paint(  # noqa: PLR0917 - a picture's arguments in the order in which people name them
    prompt: str,
    negative_prompt: str | None,
    seed: int,
    guidance: float | None,
    steps: int | None,
    width: int,
    height: int,
    on_step: Stepped | None = None,
    is_cancelled: IsCancelled | None = None,
    preview: Preview | None = None,
) -> Array:
    """Draw one picture: uint8 [height, width, 3]. Equal arguments give equal pixels.

    Args:
        prompt: any text in any language; composed and decomposed Unicode are the same.
        negative_prompt: words to keep out; None and "" are the same.
        seed: from 0 to 2**63, exclusive.
        guidance: how strongly words drive and how rich colours are, 0 to 100; None means 7.
        steps: how far the picture is refined, 1 to 1000; None means 20.
        width: pixels, 16 to 4096; width x height is at most 2048 x 2048.
        height: pixels, likewise.
        on_step: told (done, total) after every step.
        is_cancelled: asked before every step, and while the picture is drawn every few milliseconds.
        preview: given (done, small picture) after every step; only then previews are drawn (longer side 256 pixels).

    Raises:
        GenerationCancelled: `is_cancelled()` was true.
        ValueError: size, seed, guidance or steps out of range.
    """
    steps = DEFAULT_STEPS if steps is None else steps
    guidance = DEFAULT_GUIDANCE if guidance is None else guidance
    check(seed, guidance, steps, width, height)
    scene = compose(prompt, negative_prompt, seed, guidance)
    latent, pause = Latent(scene, steps), partial(_stop_if, is_cancelled)
    shrink = _PREVIEW_SIDE / max(width, height)
    small = (max(16, round(width * shrink)), max(16, round(height * shrink)))
    for done in range(1, steps + 1):
        pause()
        latent.advance()
        if preview is not None:
            preview(done, draw(Frame(scene, latent, *small), pause))
        if done == steps:  # the last step is done when the picture is there
            pause()
            picture = draw(Frame(scene, latent, width, height), pause)
        if on_step is not None:
            on_step(done, steps)
    return picture


def _stop_if(is_cancelled: IsCancelled | None) -> None:
    if is_cancelled is not None and is_cancelled():
        raise GenerationCancelled("cancelled while it was drawn")
