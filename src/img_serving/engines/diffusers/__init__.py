"""Hugging Face diffusers pipelines as an engine: Stable Diffusion, SDXL, SD3, Flux and what else draws pictures from words.

Nothing here imports torch or diffusers before `DiffusersEngine.load`, so options can be made, checked and documented where
they are not installed. The rooms:

    options    what the operator chooses                 loading    weights from a folder, a file or the hub
    family     what a pipeline can do, read off itself   samplers   names of samplers, schedulers for them
    batches    who is drawn with whom; learned limits    loras      LoRA in prompts, adapters on the pipeline
    pictures   pixels in and out, masks                  previews   how unfinished latents look
    device     the processor, its memory and its pace    quiet      libraries that keep their words to themselves
    steps      progress over all parts of a call         watch      what a part tells while it is drawn
    asked      calls and items, checked and translated   engine     the engine itself
"""

from __future__ import annotations

from img_serving.engines.diffusers.engine import DiffusersEngine, DiffusersStatistics
from img_serving.engines.diffusers.options import DiffusersOptions

__all__ = ["DiffusersEngine", "DiffusersOptions", "DiffusersStatistics"]
