"""What an engine is: something in this process that draws a batch of pictures, step by step.

Your own model is a class with three methods; `img-serving worker --engine my_module:MyEngine` serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.images import Call, ImageRequest, Item, ItemFailure, Preview

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL.Image import Image as PILImage

Picture: TypeAlias = "bytes | npt.NDArray[Any] | PILImage"
"""A finished picture: the bytes of a PNG, JPEG or WebP file, a uint8 array [height, width, 3], or a Pillow image."""

IsCancelled = Callable[[], bool]
"""Whether nobody wants the pictures any more."""

Report = Callable[[int, int, Sequence[Preview]], None]
"""Told (done, total, previews) after every step of a batch."""


class CannotDraw(ValueError):
    """What an engine raises where it knows which field of the request it cannot draw. A bare `ValueError` says no field."""

    def __init__(self, message: str, param: str) -> None:
        """`param` is the field's name in a request, such as `size`."""
        super().__init__(message)
        self.param = param


class GenerationCancelled(Exception):
    """The pictures are not wanted any more: the engine stopped at the next point where it asked."""


class OnStep:
    """What an engine calls after every step: so it tells how far it is, and hears whether to go on.

    `on_step(3, 20)` says that 3 of 20 steps of the batch are done; where nobody wants the pictures any more it raises
    `GenerationCancelled`, which the engine lets through. Where a step is long, `check()` asks in between.
    """

    __slots__ = ("_is_cancelled", "_report")

    def __init__(self, report: Report | None = None, is_cancelled: IsCancelled | None = None) -> None:
        """Without arguments: nobody listens and nobody cancels, as in a test of an engine."""
        self._report = report
        self._is_cancelled = is_cancelled

    def __call__(self, done: int, total: int, previews: Sequence[Preview] = ()) -> None:
        """Tell that `done` of `total` steps of the whole batch are done, and how it looks by now.

        Raises:
            GenerationCancelled: nobody wants the pictures any more.
        """
        self.check()
        if self._report is not None:
            self._report(done, total, previews)

    def check(self) -> None:
        """Ask without telling.

        Raises:
            GenerationCancelled: nobody wants the pictures any more.
        """
        if self.is_cancelled():
            raise GenerationCancelled

    def is_cancelled(self) -> bool:
        """Whether nobody wants the pictures any more."""
        return self._is_cancelled is not None and self._is_cancelled()


class Engine(Protocol):
    """Draws pictures in this process. Its methods block: the caller gives them a thread."""

    def load(self) -> Iterable[tuple[float, str]] | None:
        """Make ready (import, read weights), once, before the first picture.

        It may be a generator that yields (share done from 0 to 1, what it does next), for people who wait.

        Raises:
            Exception: whatever keeps it from drawing; the message says what is missing.
        """
        ...

    def capabilities(self) -> Capabilities:
        """What it can do; known without loading, and better known after."""
        ...

    def generate(self, batch: Call, on_step: OnStep) -> Sequence[Picture | ItemFailure]:
        """Draw `batch.items`: one picture each, in order. A picture is the same alone and in a batch.

        `batch.previews` says whether unfinished pictures are wanted. One item's failure (`ItemFailure`) spares the others.

        Raises:
            GenerationCancelled: by `on_step`.
            ValueError: the engine cannot draw what is asked for (its size, its number of steps …).
            MemoryError: there is not enough memory for the batch.
        """
        ...


def call_of(
    *prompts: str,
    negative_prompt: str | None = None,
    seed: int = 0,
    width: int = 512,
    height: int = 512,
    steps: int | None = None,
    previews: bool = False,
    **shared: Any,
) -> Call:
    """A batch as an engine is given it, for trying one without a gateway: picture i has prompt i and seed + i.

    `width` and `height` in pixels; `shared` are further fields of `ImageRequest`, such as `guidance_scale`.
    """
    items = tuple(Item(prompt, negative_prompt, seed + index) for index, prompt in enumerate(prompts))
    request = ImageRequest(
        prompts[0],
        negative_prompt=negative_prompt,
        seed=seed,
        n=len(prompts),
        width=width,
        height=height,
        steps=steps,
        **shared,
    )
    return Call(request, None, width, height, items, timeout_seconds=600.0, previews=previews)


def load_fully(engine: Engine, on_load: Callable[[float, str], None] | None = None) -> None:
    """Load to the end, told of each part before it begins.

    Raises:
        Exception: what `load` raises.
    """
    steps: Iterable[object] = engine.load() or ()
    for step in steps:
        if not (isinstance(step, tuple) and len(step) == 2 and isinstance(step[0], (int, float))):
            raise TypeError(f"load() yields (share done from 0 to 1, what comes next), not {step!r}")
        if on_load is not None:
            on_load(float(step[0]), str(step[1]))
