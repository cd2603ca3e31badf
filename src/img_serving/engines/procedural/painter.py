"""Painting: refines a scene, an edit or a variation step by step, shows previews, and draws it at full size at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from img_serving.domain.images import VARIATION_STRENGTH
from img_serving.engines.engine import GenerationCancelled, IsCancelled
from img_serving.engines.procedural import edit, variation
from img_serving.engines.procedural.canvas import Pause, draw
from img_serving.engines.procedural.fields import Array
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.limits import DEFAULT_GUIDANCE, DEFAULT_STEPS, check, check_strength
from img_serving.engines.procedural.scene import compose
from img_serving.engines.procedural.start import Start
from img_serving.engines.procedural.steps import Latent

Stepped = Callable[[int, int], None]
"""Told (done, total) after every step."""

Look = Callable[[Latent, int, int, Pause], Array]
"""Draws (the stage, width, height, pause): uint8 [height, width, 3]."""

Preview = Callable[[int, Array], None]
"""Given the number of steps done and a small uint8 picture [h, w, 3] of how it looks by then."""


class Watch(NamedTuple):
    """Who looks on while a picture is drawn, as `paint` says."""

    on_step: Stepped | None = None
    is_cancelled: IsCancelled | None = None
    preview: Preview | None = None


NOBODY: Final = Watch()

MOST_PREVIEWS: Final = 12
"""Of one picture, spread evenly: a client sees three at most, at quarters, thirds or the half, and each takes its time."""

_PREVIEW_SIDE = 256
"""Pixels: enough to see what it will be, at a few hundredths of a second each."""


def is_shown(done: int, steps: int) -> bool:
    """Whether a picture is shown after so many of its steps."""
    return done * MOST_PREVIEWS // steps > (done - 1) * MOST_PREVIEWS // steps


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
        preview: given (done, small picture) after each of at most twelve steps; only then previews are drawn (longer side 256
            pixels).

    Raises:
        GenerationCancelled: `is_cancelled()` was true.
        ValueError: size, seed, guidance or steps out of range.
    """
    steps = DEFAULT_STEPS if steps is None else steps
    guidance = DEFAULT_GUIDANCE if guidance is None else guidance
    check(seed, guidance, steps, width, height)
    scene = compose(prompt, negative_prompt, seed, guidance)

    def look(latent: Latent, width: int, height: int, pause: Pause) -> Array:
        return draw(Frame(scene, latent, width, height), pause)

    return refine(scene.key, steps, (width, height), look, Watch(on_step, is_cancelled, preview))


def retouch(
    start: Start,
    prompt: str,
    negative_prompt: str | None = None,
    *,
    seed: int,
    guidance: float | None = None,
    steps: int | None = None,
    strength: float | None = None,
    watch: Watch = NOBODY,
) -> Array:
    """Edit: carry the words into a picture; see `paint` for what is not said here, and for what is raised.

    The picture has the size of `start`. `strength` is how much may change: 0 nothing, 1 everything; None means 0.75. The
    change grows with the steps, from the picture itself.
    """
    height, width = start.ground.shape[:2]
    steps = DEFAULT_STEPS if steps is None else steps
    guidance = DEFAULT_GUIDANCE if guidance is None else guidance
    strength = edit.DEFAULT_STRENGTH if strength is None else strength
    check(seed, guidance, steps, width, height)
    check_strength(strength)
    scene = compose(prompt, negative_prompt, seed, guidance)

    def look(latent: Latent, width: int, height: int, pause: Pause) -> Array:
        here = _at(start, width, height)
        grown = strength * latent.done / steps
        shown = draw(Frame(scene, latent, width, height), pause) if grown else here.ground
        return edit.edited(here, shown, grown, pause)

    return refine(scene.key, steps, (width, height), look, watch)


def vary(
    start: Start, *, seed: int, steps: int | None = None, strength: float | None = None, watch: Watch = NOBODY
) -> Array:
    """A variation of a picture, of the size of `start`; `strength` as in `retouch`, None means 0.5. The rest as in `paint`."""
    height, width = start.ground.shape[:2]
    steps = DEFAULT_STEPS if steps is None else steps
    strength = VARIATION_STRENGTH if strength is None else strength
    check(seed, DEFAULT_GUIDANCE, steps, width, height)
    check_strength(strength)

    def look(latent: Latent, width: int, height: int, pause: Pause) -> Array:
        return variation.varied(_at(start, width, height), latent, f"{seed}", strength, pause)

    return refine(f"{seed}", steps, (width, height), look, watch)


def refine(key: str, steps: int, size: tuple[int, int], look: Look, watch: Watch) -> Array:
    """Go through the steps, and look at the end: at full size (width, height), and at every step at a small one, if wanted."""
    latent, pause = Latent(key, steps), partial(_stop_if, watch.is_cancelled)
    width, height = size
    shrink = min(1.0, _PREVIEW_SIDE / max(width, height))
    small = (max(16, round(width * shrink)), max(16, round(height * shrink)))
    for done in range(1, steps + 1):
        pause()
        latent.advance()
        if watch.preview is not None and is_shown(done, steps):
            watch.preview(done, look(latent, *small, pause))
        if done == steps:  # the last step is done when the picture is there
            pause()
            picture = look(latent, width, height, pause)
        if watch.on_step is not None:
            watch.on_step(done, steps)
    return picture


def _at(start: Start, width: int, height: int) -> Start:
    """The start at the size that is looked at."""
    return start if start.ground.shape[:2] == (height, width) else start.shrunk(width, height)


def _stop_if(is_cancelled: IsCancelled | None) -> None:
    if is_cancelled is not None and is_cancelled():
        raise GenerationCancelled("cancelled while it was drawn")
