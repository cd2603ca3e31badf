"""The painter as an engine: batches of pictures in, PNG files out."""

from __future__ import annotations

from typing import Final

from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.images import Call, Item, Preview
from img_serving.engines.engine import OnStep
from img_serving.engines.procedural.canvas import Pause
from img_serving.engines.procedural.fields import Array
from img_serving.engines.procedural.limits import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    MAX_IMAGES,
    MAX_PIXELS,
    MAX_SIDE,
    MIN_SIDE,
    STEPS_OF_QUALITY,
    check,
)
from img_serving.engines.procedural.painter import Watch, paint, retouch, vary
from img_serving.engines.procedural.start import Start, start_of
from img_serving.media.png import encode_png

HONOURS: Final = frozenset({"negative_prompt", "seed", "num_inference_steps", "guidance_scale", "size", "quality"})


class ProceduralEngine:
    """The painter as an engine: needs no model, no GPU and no network."""

    def load(self) -> None:
        """Import the encoder and draw one small picture, so that the first real one is not the slow one."""
        encode_png(paint("warm up", None, 0, None, 1, 64, 64))

    def capabilities(self) -> Capabilities:
        """Each picture of a batch has its own words, seed and input pictures; sizes as `paint` takes them."""
        return Capabilities(
            operations=frozenset({"generation", "edit", "variation"}),
            batch="items",
            max_batch_size=8,
            max_concurrency=2,
            honours=HONOURS,
            honours_in_edits=HONOURS | {"strength"},
            sizes=SizeRule(min_side=MIN_SIDE, max_side=MAX_SIDE, max_pixels=MAX_PIXELS),
            max_images=MAX_IMAGES,
            masks=True,
            formats=("png",),
            progress=True,
            previews=True,
        )

    def generate(self, batch: Call, on_step: OnStep) -> list[bytes]:
        """Draw, edit or vary `batch.items` one after the other: PNG bytes, in order. Progress counts the steps of all of them.

        Raises:
            GenerationCancelled: at a step, or while a picture was drawn at full size.
            ValueError: size, seed, guidance, steps or strength out of range, or an input picture that cannot be decoded.
        """
        request = batch.request
        steps = request.steps
        if steps is None:
            steps = STEPS_OF_QUALITY.get(request.quality or "", DEFAULT_STEPS)
        total = steps * len(batch.items)
        pictures: list[bytes] = []
        starts = _Starts(batch, on_step.check)
        for number, item in enumerate(batch.items):
            progress = _Progress(number, steps, total, on_step)
            watch = Watch(progress.stepped, on_step.is_cancelled, progress.show if batch.previews else None)
            pictures.append(encode_png(_drawn(batch, item, steps, starts, watch)))
        return pictures


def _drawn(batch: Call, item: Item, steps: int, starts: _Starts, watch: Watch) -> Array:
    request, prompt, negative, seed = batch.request, item.prompt, item.negative_prompt, item.seed
    guidance = request.guidance_scale
    if request.operation == "generation":
        return paint(prompt, negative, seed, guidance, steps, batch.width, batch.height, *watch)
    check(seed, DEFAULT_GUIDANCE, steps, batch.width, batch.height)  # before a picture is decoded to an absurd size
    start, strength = starts.of(item), request.strength
    if request.operation == "variation":
        return vary(start, seed=seed, steps=steps, strength=strength, watch=watch)
    return retouch(start, prompt, negative, seed=seed, guidance=guidance, steps=steps, strength=strength, watch=watch)


class _Starts:
    """Decodes what the items of a batch begin with, once where they begin with the same, as those of one request do."""

    def __init__(self, batch: Call, pause: Pause) -> None:
        self._pause = pause
        self._width, self._height = batch.width, batch.height
        self._last: tuple[Item, Start] | None = None

    def of(self, item: Item) -> Start:
        """Decoded. Raises ValueError."""
        if self._last is not None:
            before, start = self._last
            if before.images is item.images and before.mask is item.mask:
                return start
        self._last = None  # two at once would be twice the memory
        start = start_of(item.images, item.mask, self._width, self._height, self._pause)
        self._last = (item, start)
        return start


class _Progress:
    """One picture's steps, told as steps of its batch, with what it looked like."""

    def __init__(self, index: int, steps: int, total: int, on_step: OnStep) -> None:
        self._index, self._steps, self._total, self._on_step = index, steps, total, on_step
        self._previews: tuple[Preview, ...] = ()

    def show(self, done: int, pixels: Array) -> None:
        """How it looks; told with the step that comes next."""
        self._previews = (Preview(encode_png(pixels), "image/png", self._index, done / self._steps),)

    def stepped(self, done: int, _: int) -> None:
        """One step of this picture is done."""
        previews, self._previews = self._previews, ()
        self._on_step(self._index * self._steps + done, self._total, previews)
