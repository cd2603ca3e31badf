"""The painter as an engine: batches of pictures in, PNG files out."""

from __future__ import annotations

from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.images import Call, Preview
from img_serving.engines.engine import OnStep
from img_serving.engines.procedural.fields import Array
from img_serving.engines.procedural.limits import DEFAULT_STEPS, MAX_PIXELS, MAX_SIDE, MIN_SIDE, STEPS_OF_QUALITY
from img_serving.engines.procedural.painter import paint
from img_serving.media.png import encode_png


class ProceduralEngine:
    """The painter as an engine: needs no model, no GPU and no network."""

    def load(self) -> None:
        """Import the encoder and draw one small picture, so that the first real one is not the slow one."""
        encode_png(paint("warm up", None, 0, None, 1, 64, 64))

    def capabilities(self) -> Capabilities:
        """Each picture of a batch has its own words and seed; sizes as `paint` takes them."""
        return Capabilities(
            batch="items",
            max_batch_size=8,
            max_concurrency=2,
            honours=frozenset({"negative_prompt", "seed", "num_inference_steps", "guidance_scale", "size", "quality"}),
            sizes=SizeRule(min_side=MIN_SIDE, max_side=MAX_SIDE, max_pixels=MAX_PIXELS),
            formats=("png",),
            progress=True,
            previews=True,
        )

    def generate(self, batch: Call, on_step: OnStep) -> list[bytes]:
        """Draw `batch.items` one after the other: PNG bytes, in order. Progress counts the steps of all of them.

        Raises:
            GenerationCancelled: at a step, or while a picture was drawn at full size.
            ValueError: size, seed, guidance or steps out of range.
        """
        request = batch.request
        steps = request.steps
        if steps is None:
            steps = STEPS_OF_QUALITY.get(request.quality or "", DEFAULT_STEPS)
        total = steps * len(batch.items)
        pictures: list[bytes] = []
        for number, item in enumerate(batch.items):
            progress = _Progress(number, steps, total, on_step)
            pixels = paint(
                item.prompt,
                item.negative_prompt,
                item.seed,
                request.guidance_scale,
                steps,
                batch.width,
                batch.height,
                on_step=progress.stepped,
                is_cancelled=on_step.is_cancelled,
                preview=progress.show if batch.previews else None,
            )
            pictures.append(encode_png(pixels))
        return pictures


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
