"""What a call asks for: checked as a whole, read item by item, and said in a pipeline's own arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.images import SEED_LIMIT, Call, Item
from img_serving.engines.diffusers.family import Pipeline
from img_serving.engines.diffusers.loras import LoraUse, take_out
from img_serving.engines.diffusers.options import DiffusersOptions
from img_serving.engines.diffusers.pictures import painted_of, start_of

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


@dataclass(frozen=True, slots=True)
class Work:
    """One picture to draw, checked: `index` in the call; the prompt without its LoRAs."""

    index: int
    prompt: str
    negative: str
    seed: int
    loras: tuple[LoraUse, ...]
    start: PILImage | None
    painted: PILImage | None


def check(batch: Call, can: Capabilities, options: DiffusersOptions, edits: Iterable[Pipeline]) -> None:
    """Refuse what cannot be drawn. `edits` are the pipelines that edit.

    Raises:
        ValueError: what it is, and what would be right.
    """
    request, width, height = batch.request, batch.width, batch.height
    if request.operation not in can.operations:
        raise ValueError(f"the model does {' and '.join(sorted(can.operations))}, not {request.operation}")
    if not 1 <= len(batch.items) <= options.most:
        raise ValueError(f"a call has from 1 to {options.most} pictures, not {len(batch.items)}")
    if (refusal := can.sizes.refusal(width, height)) is not None:
        raise ValueError(f"the size cannot be drawn: {refusal}")
    if can.sizes.fit(width, height) != (width, height):
        raise ValueError(f"width and height must be multiples of {can.sizes.multiple}, not {width}x{height}")
    if request.steps is not None and not 1 <= request.steps <= options.max_steps:
        raise ValueError(f"the number of steps must be from 1 to {options.max_steps}, not {request.steps}")
    if request.guidance_scale is not None and not 0.0 <= request.guidance_scale <= 100.0:
        raise ValueError(f"the guidance scale must be from 0 to 100, not {request.guidance_scale}")
    if request.clip_skip is not None and not 1 <= request.clip_skip <= 12:
        raise ValueError(f"clip skip must be from 1 (none) to 12, not {request.clip_skip}")
    if request.strength is not None and not 0.0 < request.strength <= 1.0:
        raise ValueError(f"the strength must be over 0 and at most 1, not {request.strength}")
    for item in batch.items:
        if not 0 <= item.seed < SEED_LIMIT:
            raise ValueError(f"the seed must be from 0 to 2**63 - 1, not {item.seed}")
        if request.operation == "generation":
            continue
        if not item.images:
            raise ValueError("an edit needs a picture to start from")
        if len(item.images) > can.max_images:
            raise ValueError(f"an edit starts from one picture, not {len(item.images)}")
        if item.mask is not None and not can.masks:
            raise ValueError("the model edits without a mask only")
    if request.operation != "generation":
        _check_strength(batch, options, edits)


def _check_strength(batch: Call, options: DiffusersOptions, edits: Iterable[Pipeline]) -> None:
    """Enough steps for so little change."""
    for one in edits:
        if not one.has_strength:
            continue
        own = one.defaults.get("num_inference_steps")
        count = batch.request.steps or options.default_steps or (own if isinstance(own, int) else None)
        strength = batch.request.usual_strength or one.defaults.get("strength")
        if count is not None and strength is not None and int(count * strength) < 1:
            raise ValueError(
                f"{count} steps at strength {strength} are less than one: ask for more steps or a higher strength"
            )


def work_of(index: int, item: Item, batch: Call, options: DiffusersOptions) -> Work:
    """Read one item.

    Raises:
        LoraRefused: its prompt names one that cannot be had.
        ValueError: its picture or mask cannot be read.
    """
    prompt, loras = take_out(item.prompt, options.lora_dir)
    start = painted = None
    if batch.request.operation != "generation":
        start = start_of(item.images[0], batch.width, batch.height)
        if item.mask is not None:
            painted = painted_of(item.mask, batch.width, batch.height)
    return Work(index, prompt, item.negative_prompt or "", item.seed, loras, start, painted)


def arguments(batch: Call, works: Sequence[Work], pipeline: Pipeline, options: DiffusersOptions) -> dict[str, Any]:
    """What the pipeline is called with, but for its callbacks."""
    import torch

    request, takes = batch.request, pipeline.takes
    found: dict[str, Any] = {
        "prompt": [work.prompt for work in works],
        # on the CPU: the same noise whatever draws
        "generator": [torch.Generator("cpu").manual_seed(work.seed) for work in works],
        "output_type": "pt" if pipeline.leaves_tensors else "np",
    }
    count = request.steps or options.default_steps
    if count is not None and "num_inference_steps" in takes:
        found["num_inference_steps"] = count
    if {"width", "height"} <= takes:
        found |= {"width": batch.width, "height": batch.height}
    if "max_area" in takes:  # a pipeline that would choose another size of the same shape
        found |= {"max_area": batch.width * batch.height, "_auto_resize": False}
    scale = options.default_guidance_scale if request.guidance_scale is None else request.guidance_scale
    if scale is not None and pipeline.guidance is not None:
        found[pipeline.guidance] = scale
    if pipeline.negative:
        if "true_cfg_scale" in takes and pipeline.guidance != "true_cfg_scale":
            found["true_cfg_scale"] = options.true_cfg_scale
        if not (pipeline.zeros and not works[0].negative):
            found["negative_prompt"] = [work.negative or _nothing(pipeline) for work in works]
    if request.clip_skip is not None and request.clip_skip > 1 and pipeline.skips:
        found["clip_skip"] = request.clip_skip - 1  # A1111 counts from the last layer, diffusers what it skips
    if works[0].start is not None:
        found["image"] = [work.start for work in works]
        if request.usual_strength is not None and pipeline.has_strength:
            found["strength"] = request.usual_strength
    if "mask_image" in takes:
        found["mask_image"] = [work.painted or _everywhere(batch.width, batch.height) for work in works]
    return found


def _nothing(pipeline: Pipeline) -> str:
    """The negative prompt of a picture that has none: what the pipeline itself would take, or nothing."""
    own = pipeline.defaults.get("negative_prompt")
    if isinstance(own, str):
        return own
    return " " if pipeline.guidance == "true_cfg_scale" else ""


def _everywhere(width: int, height: int) -> PILImage:
    """A mask that lets all of the picture be painted."""
    from PIL import Image

    return Image.new("L", (width, height), 255)
