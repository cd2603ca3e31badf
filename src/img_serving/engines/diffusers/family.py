"""What a pipeline can do and how it is called, read off its own signature and configuration rather than off a list of names."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, Final

from img_serving.domain.capabilities import SizeRule

_NETWORKS: Final = ("unet", "transformer", "decoder")
MIN_SIDE: Final = 64


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One pipeline and the arguments that it takes.

    Attributes:
        pipe: the diffusers pipeline.
        takes: the names of its arguments.
        defaults: their defaults.
        guidance: the argument that a guidance scale goes to; None: it has none that acts.
        negative: whether a negative prompt acts.
        zeros: without a negative prompt it does something else than with an empty one (SDXL).
        skips: it can leave out the last layers of its text encoder.
        leaves_tensors: it hands out pictures where they were drawn, from 0 to 1. Those with a safety checker do not.
    """

    pipe: Any
    takes: frozenset[str]
    defaults: dict[str, Any]
    guidance: str | None
    negative: bool
    zeros: bool
    skips: bool
    leaves_tensors: bool

    @property
    def has_strength(self) -> bool:
        """It starts from a picture and changes it: each picture of a batch has its own. Without, pictures are references."""
        return "strength" in self.takes

    def honours(self) -> frozenset[str]:
        """Of `domain.capabilities.PARAMETERS`."""
        found = {"seed", "size"}
        if "num_inference_steps" in self.takes:
            found.add("num_inference_steps")
        if self.guidance is not None:
            found.add("guidance_scale")
        if self.negative:
            found.add("negative_prompt")
        if self.skips:
            found.add("clip_skip")
        return frozenset(found | (self.takes & {"strength"}))


def described(pipe: Any, *, true_cfg_scale: float) -> Pipeline:
    """Read a pipeline's arguments. `true_cfg_scale` above 1 makes negative prompts act on guidance-distilled models."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    takes = frozenset(parameters)
    defaults = {name: one.default for name, one in parameters.items() if one.default is not inspect.Parameter.empty}
    return Pipeline(
        pipe,
        takes,
        defaults,
        _guidance(pipe, takes, defaults),
        _negative(takes, defaults, true_cfg_scale),
        bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
        "clip_skip" in takes and _has_layers_to_skip(pipe),
        _leaves_tensors(pipe, takes),
    )


def _has_layers_to_skip(pipe: Any) -> bool:
    """Stable Diffusion 1 and 2 reach into their encoder for it, and not every version of transformers has it there."""
    return hasattr(pipe, "text_encoder_2") or hasattr(getattr(pipe, "text_encoder", None), "text_model")


def _leaves_tensors(pipe: Any, takes: frozenset[str]) -> bool:
    """Where diffusers' own processor makes pictures of what the VAE decoded, `pt` is `np` without the way to the CPU."""
    from diffusers.image_processor import VaeImageProcessor

    processor, vae, checker = (getattr(pipe, name, None) for name in ("image_processor", "vae", "safety_checker"))
    decodes = isinstance(processor, VaeImageProcessor) and vae is not None
    return "output_type" in takes and decodes and checker is None


def _is_distilled(takes: frozenset[str], defaults: dict[str, Any]) -> bool:
    """It takes the scale as an input of its network, and true guidance beside it (Flux)."""
    return "true_cfg_scale" in takes and defaults.get("guidance_scale") is not None


def _guidance(pipe: Any, takes: frozenset[str], defaults: dict[str, Any]) -> str | None:
    if _is_distilled(takes, defaults):
        network = getattr(pipe, "transformer", None)
        return "guidance_scale" if network is None or network.config.get("guidance_embeds", True) else None
    if "true_cfg_scale" in takes:
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in takes else None


def _negative(takes: frozenset[str], defaults: dict[str, Any], true_cfg_scale: float) -> bool:
    return "negative_prompt" in takes and (not _is_distilled(takes, defaults) or true_cfg_scale > 1.0)


def draws_from_words(pipe: Any) -> bool:
    """Whether it can start from nothing: networks made for inpainting or depth take more channels than latents have."""
    unet, vae = getattr(pipe, "unet", None), getattr(pipe, "vae", None)
    if unet is None or vae is None:
        return True
    return bool(unet.config.in_channels == vae.config.get("latent_channels", unet.config.in_channels))


def computes_sigmas(pipe: Any) -> bool:
    """Whether the pipeline hands its scheduler sigmas and a shift of its own (Flux and what comes from it)."""
    return hasattr(pipe, "_pack_latents")


def size_rule(pipe: Any, max_pixels: int) -> SizeRule:
    """Multiples of what the VAE shrinks times what the network joins into one patch."""
    shrinks = int(getattr(pipe, "vae_scale_factor", 8))
    multiple = shrinks
    processor = getattr(pipe, "image_processor", None)
    if processor is not None:
        multiple = math.lcm(multiple, int(processor.config.get("vae_scale_factor", 1)))
    network = getattr(pipe, "transformer", None)
    patch = network.config.get("patch_size", 1) if network is not None else 1
    if isinstance(patch, int):
        multiple = math.lcm(multiple, shrinks * patch)
    if hasattr(pipe, "_pack_latents"):
        multiple = math.lcm(multiple, shrinks * 2)
    places = network.config.get("pos_embed_max_size") if network is not None else None
    return SizeRule(
        multiple=multiple,
        min_side=-(-MIN_SIDE // multiple) * multiple,
        max_side=places * multiple if isinstance(places, int) else None,
        max_pixels=max_pixels,
    )


def default_size(pipeline: Pipeline, rule: SizeRule) -> tuple[int, int] | None:
    """What the model was trained for, in pixels; None: nothing tells."""
    pipe, shrinks = pipeline.pipe, int(getattr(pipeline.pipe, "vae_scale_factor", 8))
    width, height = pipeline.defaults.get("width"), pipeline.defaults.get("height")
    if not (isinstance(width, int) and isinstance(height, int)):
        side = getattr(pipe, "default_sample_size", None)
        for name in _NETWORKS:
            network = getattr(pipe, name, None)
            if side is None and network is not None:
                side = network.config.get("sample_size")
        high, wide = side if isinstance(side, (list, tuple)) else (side, side)
        if not (isinstance(wide, int) and isinstance(high, int)):
            return None
        width, height = wide * shrinks, high * shrinks
    fitted = rule.fit(width, height)
    return None if rule.refusal(*fitted) else fitted
