"""The painter as an engine: batches of pictures in, PNG files out."""

from __future__ import annotations

from functools import partial

from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.images import Call
from img_serving.engines.engine import IsCancelled, OnStep
from img_serving.engines.procedural.limits import DEFAULT_STEPS, MAX_PIXELS, MAX_SIDE, MIN_SIDE
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
            honours=frozenset({"negative_prompt", "seed", "num_inference_steps", "guidance_scale", "size"}),
            sizes=SizeRule(min_side=MIN_SIDE, max_side=MAX_SIDE, max_pixels=MAX_PIXELS),
            formats=("png",),
            progress=True,
        )

    def generate(self, batch: Call, on_step: OnStep, is_cancelled: IsCancelled) -> list[bytes]:
        """Draw `batch.items` one after the other: PNG bytes, in order. Progress counts the steps of all of them.

        Raises:
            GenerationCancelled: `is_cancelled()` was true at a step, or while a picture was drawn at full size.
            ValueError: size, seed, guidance or steps out of range.
        """
        request = batch.request
        steps = DEFAULT_STEPS if request.steps is None else request.steps
        total = steps * len(batch.items)
        pictures: list[bytes] = []
        for number, item in enumerate(batch.items):
            before = number * steps
            pixels = paint(
                item.prompt,
                item.negative_prompt,
                item.seed,
                request.guidance_scale,
                steps,
                batch.width,
                batch.height,
                on_step=partial(_count_from, before, total, on_step),
                is_cancelled=is_cancelled,
            )
            pictures.append(encode_png(pixels))
        return pictures


def _count_from(before: int, total: int, on_step: OnStep, done: int, _: int) -> None:
    """Report one picture's step as a step of its batch."""
    on_step(before + done, total)
