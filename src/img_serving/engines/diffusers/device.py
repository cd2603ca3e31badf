"""The processor that draws: which one, its number format, its memory, and keeping pace with it."""

from __future__ import annotations

import contextlib
import gc
import os
from typing import Any, Final

from img_serving.domain.errors import StartError

_MARKS: Final = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What the messages of RuntimeErrors have in common that are a lack of memory: CUDA's, MPS', the CPU's, cuBLAS' and cuDNN's."""


def choose_device(wanted: str) -> str:
    """`auto` resolved; anything else proven to be there.

    Raises:
        StartError: there is no such device.
    """
    import torch

    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    kind, _, number = wanted.partition(":")
    if not has[kind]:
        raise StartError(f"device: torch {torch.__version__} finds no {kind} device here; use auto or cpu")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise StartError(f"device: there is no {wanted}, only cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return wanted


def choose_dtype(wanted: str, device: str) -> Any:
    """The torch dtype: `auto` is bfloat16 where a GPU has it, float16 on other GPUs, float32 on a CPU."""
    import torch

    if wanted != "auto":
        return getattr(torch, wanted)
    if device == "cpu":
        return torch.float32
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device == "mps" else torch.bfloat16


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a failure is a lack of memory."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(mark in str(error).lower() for mark in _MARKS)


def free(device: str) -> None:
    """Give back what nothing refers to any more."""
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def memory_bytes(device: str) -> tuple[int, int]:
    """(used, total) of the device, in bytes; of the CPU what this process uses. Zeros where nobody knows."""
    import torch

    if device.startswith("cuda"):
        left, total = torch.cuda.mem_get_info(device)
        return int(total - left), int(total)
    if device == "mps":
        return int(torch.mps.current_allocated_memory()), int(torch.mps.recommended_max_memory())
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        with open("/proc/self/statm", encoding="ascii") as pages:  # noqa: PTH123 - a file of the kernel's
            return int(pages.read().split()[1]) * page, total
    return 0, 0


class Pace:
    """Holds Python one step behind a GPU that is handed its work ahead: so progress and cancelling mean what is drawn.

    The GPU always has one step to do while the next is handed to it, so that it never waits for this.
    """

    __slots__ = ("_device", "_last")

    def __init__(self, device: str) -> None:
        self._device = device
        self._last: Any = None

    def step(self) -> None:
        """A step was handed over: wait until the one before it is done."""
        if not self._device.startswith("cuda"):
            return
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        if self._last is not None:
            self._last.synchronize()
        self._last = event
