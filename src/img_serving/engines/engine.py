"""What an engine is: something in this process that draws a batch of pictures, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.images import Call

OnStep = Callable[[int, int], None]
"""Told (done, total) after every step of a batch."""

IsCancelled = Callable[[], bool]
"""Asked at every step, and where a step is long within it: whether nobody wants the pictures any more."""


class GenerationCancelled(Exception):
    """The pictures are not wanted any more: the engine stopped at the next point where it asked."""


class Engine(Protocol):
    """Draws pictures in this process. Its methods block: the caller gives them a thread."""

    def load(self) -> None:
        """Make ready (import, read weights, warm up), once, before the first picture.

        Raises:
            Exception: whatever keeps it from drawing; the message says what is missing.
        """
        ...

    def capabilities(self) -> Capabilities:
        """What it can do; known without loading."""
        ...

    def generate(self, batch: Call, on_step: OnStep, is_cancelled: IsCancelled) -> list[bytes]:
        """Draw `batch.items`: one PNG each, in order. A picture is the same alone and in a batch.

        Raises:
            GenerationCancelled: `is_cancelled()` was true.
            ValueError: the engine cannot draw what is asked for (its size, its number of steps …).
        """
        ...
