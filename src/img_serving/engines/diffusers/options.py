"""What the operator of a diffusers worker chooses: one frozen record, checked as it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

DType = Literal["auto", "float32", "float16", "bfloat16"]
CpuOffload = Literal["none", "model", "sequential"]

MAX_BATCH: Final = 64
_DEVICE: Final = re.compile(r"auto|cpu|mps|xpu(:\d+)?|cuda(:\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersOptions:
    """What is drawn with, and how. Impossible values raise ValueError, which names the option and what would be right.

    Attributes:
        model: a folder with a `model_index.json`, one `.safetensors` file, or an id of the Hugging Face hub (`owner/name`).
        device: `auto` (CUDA, else Apple's MPS, else the CPU), `cpu`, `mps`, `cuda`, `cuda:1`, `xpu` …
        dtype: of weights and arithmetic; `auto` is bfloat16 on a GPU that has it, float16 on other GPUs, float32 on a CPU.
        offline: no network: everything has to be on disk or in the hub's cache already.
        revision: a branch, tag or commit of a model of the hub.
        variant: which of several sets of weights a model has, such as `fp16`.
        config: for a single file: the folder or hub id that has its configuration and tokenizers; None: found by its weights.
        lora_dir: the folder whose `*.safetensors` may be named in prompts (`<lora:name:0.8>`); None: no LoRA.
        max_loras: adapters that stay loaded; the one used longest ago goes first.
        max_batch_size: pictures in one call; None: the largest bucket.
        buckets: the batch sizes that are really drawn, ascending. One bucket only: a seed's bytes never depend on its company.
        padding: fill a batch up to its bucket. Without, batches are drawn as they come, up to `max_batch_size`.
        allow_pickle: also read weights that are Python pickles (`.bin`, `.ckpt`), which can run any code as they load.
        safety_checker: keep the safety checker of models that have one; what it withholds is refused.
        vae_slicing: decode a batch's pictures one by one: less memory at the end, the same picture.
        vae_tiling: decode in tiles: much less memory for large pictures, and slightly other ones.
        cpu_offload: keep what is not in use in main memory: `model` (whole networks), `sequential` (layers: slow).
        max_pixels: of a picture, width x height.
        max_steps: inference steps at most.
        default_steps: where a request says none; None: the pipeline's own. Distilled models need it (FLUX.1-schnell: 4).
        default_guidance_scale: likewise (SDXL-Turbo: 0).
        true_cfg_scale: for guidance-distilled models (Flux): above 1, negative prompts act, and a step takes twice as long.
    """

    model: str
    device: str = "auto"
    dtype: DType = "auto"
    offline: bool = False
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    lora_dir: Path | None = None
    max_loras: int = 8
    max_batch_size: int | None = None
    buckets: tuple[int, ...] = (1, 2, 4, 8)
    padding: bool = True
    allow_pickle: bool = False
    safety_checker: bool = False
    vae_slicing: bool = True
    vae_tiling: bool = False
    cpu_offload: CpuOffload = "none"
    max_pixels: int = 2048 * 2048
    max_steps: int = 200
    default_steps: int | None = None
    default_guidance_scale: float | None = None
    true_cfg_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError("model: name a folder, a .safetensors file or a hub id such as owner/name")
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device: auto, cpu, mps, xpu, cuda or cuda:N, not {self.device!r}")
        if self.dtype not in get_args(DType):
            raise ValueError(f"dtype: one of {', '.join(get_args(DType))}, not {self.dtype!r}")
        if self.cpu_offload not in get_args(CpuOffload):
            raise ValueError(f"cpu_offload: one of {', '.join(get_args(CpuOffload))}, not {self.cpu_offload!r}")
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)) or self.buckets[0] < 1:
            raise ValueError(f"buckets: ascending batch sizes such as 1,2,4,8, not {self.buckets}")
        for name, value, most in (
            ("buckets", self.buckets[-1], MAX_BATCH),
            ("max_batch_size", self.max_batch_size, MAX_BATCH),
            ("max_loras", self.max_loras, 1000),
            ("max_pixels", self.max_pixels, 2**26),
            ("max_steps", self.max_steps, 1000),
            ("default_steps", self.default_steps, self.max_steps),
        ):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name}: from 1 to {most}, not {value}")
        for name, scale in (
            ("default_guidance_scale", self.default_guidance_scale),
            ("true_cfg_scale", self.true_cfg_scale),
        ):
            if scale is not None and not 0.0 <= scale <= 100.0:
                raise ValueError(f"{name}: from 0 to 100, not {scale}")
        if self.max_batch_size is not None and self.padding and self.max_batch_size < self.buckets[0]:
            raise ValueError(
                f"max_batch_size: {self.max_batch_size} is under the smallest bucket ({self.buckets[0]}); "
                "use a smaller bucket, or no padding"
            )

    @property
    def most(self) -> int:
        """Pictures in one call at most."""
        return self.buckets[-1] if self.max_batch_size is None else self.max_batch_size

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes that are filled up to; () where batches are drawn as they come."""
        return tuple(size for size in self.buckets if size <= self.most) if self.padding else ()
