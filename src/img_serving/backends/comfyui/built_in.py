"""What the ComfyUI adapter draws with where nobody gave it a workflow, and the names that its samplers have elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import PureWindowsPath
from typing import Any, Final

from img_serving.backends.comfyui.graph import Slot
from img_serving.backends.comfyui.workflow import Template
from img_serving.backends.samplers import samplers_with_schedules
from img_serving.domain.vocabulary import Vocabulary

DEFAULTS: Final = {"steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
EDIT_STRENGTH: Final = 0.75
MAX_STEPS: Final = 10_000

_OUTPUT: Final = "9"

_SAMPLERS: Final = {
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_ancestral",
    "DPM fast": "dpm_fast",
    "DPM adaptive": "dpm_adaptive",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM++ SDE": "dpmpp_sde",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2M SDE Heun": "dpmpp_2m_sde_heun",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "UniPC": "uni_pc",
    "LCM": "lcm",
    "Euler": "euler",
}
"""A1111's names (also with `k_` or `K ` before them), which most clients know, and ComfyUI's."""

_SCHEDULERS: Final = {
    "Automatic": "normal",
    "Uniform": "normal",
    "Karras": "karras",
    "Exponential": "exponential",
    "SGM Uniform": "sgm_uniform",
    "Simple": "simple",
    "Normal": "normal",
    "DDIM": "ddim_uniform",
    "DDIM Uniform": "ddim_uniform",
    "Beta": "beta",
    "KL Optimal": "kl_optimal",
}


def samplers(names: Iterable[str], schedules: Vocabulary | None) -> Vocabulary:
    """ComfyUI's samplers, found by A1111's names too, also by older ones with a schedule at their end."""
    known = list(names)
    aliases = {}
    for alias, name in _SAMPLERS.items():
        if name in known:
            aliases[alias] = aliases[f"k {alias}"] = name
    return samplers_with_schedules(known, aliases, schedules)


def schedulers(names: Iterable[str]) -> Vocabulary:
    """ComfyUI's noise schedules, found by A1111's names too."""
    known = list(names)
    return Vocabulary(known, {alias: name for alias, name in _SCHEDULERS.items() if name in known})


def model_ids(files: Iterable[str]) -> dict[str, str]:
    """Model id → checkpoint file: its name without the extension, with slashes. Where two would be one, both keep it."""
    shown = {file: file.replace("\\", "/") for file in files}
    short = {file: _without_extension(name) for file, name in shown.items()}
    counts: dict[str, int] = {}
    for name in short.values():
        counts[name] = counts.get(name, 0) + 1
    return {short[file] if counts[short[file]] == 1 else shown[file]: file for file in shown}


def _without_extension(name: str) -> str:
    suffix = PureWindowsPath(name).suffix
    return name.removesuffix(suffix) if len(suffix) > 1 else name


@lru_cache(maxsize=8)
def built_in(*, edit: bool = False, mask: bool = False, clip_skip: bool = False) -> Template:
    """The usual graph for a checkpoint that holds everything: SD 1.x, SD 2.x, SDXL and whatever else loads so.

    The picture is shown, not saved: it goes to ComfyUI's folder for temporary files, which is emptied at its start.
    """
    clip: list[Any] = ["15", 0] if clip_skip else ["4", 1]
    graph: dict[str, dict[str, Any]] = {
        "3": _node(
            "KSampler",
            seed=0,
            **DEFAULTS,
            denoise=EDIT_STRENGTH if edit else 1.0,
            model=["4", 0],
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["5", 0],
        ),
        "4": _node("CheckpointLoaderSimple", ckpt_name=""),
        "6": _node("CLIPTextEncode", text="", clip=clip),
        "7": _node("CLIPTextEncode", text="", clip=clip),
        "8": _node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        _OUTPUT: _node("PreviewImage", images=["8", 0]),
    }
    slots = {
        "prompt": Slot("6", "text"),
        "negative_prompt": Slot("7", "text"),
        "seed": Slot("3", "seed"),
        "steps": Slot("3", "steps"),
        "guidance_scale": Slot("3", "cfg"),
        "sampler": Slot("3", "sampler_name"),
        "scheduler": Slot("3", "scheduler"),
        "checkpoint": Slot("4", "ckpt_name"),
    }
    if edit:
        graph |= {
            "10": _node("LoadImage", image=""),
            "11": _node(
                "ImageScale", image=["10", 0], upscale_method="lanczos", width=512, height=512, crop="disabled"
            ),
            "5": _node("VAEEncode", pixels=["11", 0], vae=["4", 2]),
        }
        slots |= {"image": Slot("10", "image"), "strength": Slot("3", "denoise")}
    else:
        graph["5"] = _node("EmptyLatentImage", width=512, height=512, batch_size=1)
    sized = "11" if edit else "5"
    slots |= {"width": Slot(sized, "width"), "height": Slot(sized, "height")}
    if mask:
        graph |= {
            "12": _node("LoadImageMask", image="", channel="alpha"),
            "13": _node("SetLatentNoiseMask", samples=["5", 0], mask=["12", 0]),
        }
        graph["3"]["inputs"]["latent_image"] = ["13", 0]
        slots["mask"] = Slot("12", "image")
    if clip_skip:
        graph["15"] = _node("CLIPSetLastLayer", stop_at_clip_layer=-1, clip=["4", 1])
        slots["clip_skip"] = Slot("15", "stop_at_clip_layer")
    return Template(graph, {name: (slot,) for name, slot in slots.items()}, _OUTPUT)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
