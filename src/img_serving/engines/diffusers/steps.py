"""The progress of one call, which may be drawn in several parts: one count of steps for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from img_serving.domain.images import Preview
from img_serving.engines.engine import OnStep


class Steps:
    """Counts the steps of all parts. `done` never goes back; `total` grows where a part had to be drawn again."""

    __slots__ = ("_before", "_done", "_on_step", "_parts")

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step
        self._before = self._done = 0
        self._parts = 1

    def begin(self, parts: int) -> None:
        """A part begins: with it, `parts` are left to draw."""
        self._before, self._parts = self._done, max(1, parts)

    def stepped(self, step: int, steps: int, previews: Sequence[Preview] = ()) -> None:
        """`step` of `steps` steps of this part are done.

        Raises:
            GenerationCancelled: nobody wants the pictures any more.
        """
        self._done = self._before + step
        self._on_step(self._done, self._before + steps * self._parts, previews)

    def check(self) -> None:
        """Ask without telling.

        Raises:
            GenerationCancelled: nobody wants the pictures any more.
        """
        self._on_step.check()
