"""Which of the unfinished pictures that an engine shows are passed on to a client that wants so many of them."""

from __future__ import annotations

from typing import Generic, TypeVar

Shown = TypeVar("Shown")

_SLACK = 1e-9


class Partials(Generic[Shown]):
    """Picks `wanted` of one picture's previews, spread evenly: with two, at a third and at two thirds of the way.

    An engine may show few, and at odd moments: one that was passed over is kept, and makes up for another that never came. A
    second try begins at the beginning, and adds nothing to what was shown already until it is further than that.
    """

    __slots__ = ("_kept", "_shown", "_wanted")

    def __init__(self, wanted: int) -> None:
        """`wanted` is 0 to 3 in OpenAI's API."""
        self._wanted = wanted
        self._shown = 0
        self._kept: Shown | None = None

    def __repr__(self) -> str:
        return f"<Partials {self._shown} of {self._wanted}>"

    def offer(self, share: float, preview: Shown) -> list[tuple[int, Shown]]:
        """The picture looks like `preview` when it is done to `share` (0 to 1): what is passed on now, with its number."""
        due = min(self._wanted, int(share * (self._wanted + 1) + _SLACK))
        passed_on: list[tuple[int, Shown]] = []
        if due - self._shown > 1 and self._kept is not None:
            passed_on.append(self._show(self._kept))
        if due > self._shown:
            passed_on.append(self._show(preview))
        else:
            self._kept = preview
        return passed_on

    def finish(self) -> list[tuple[int, Shown]]:
        """The picture is done: the last one that was passed over, if one is still wanted."""
        if self._shown < self._wanted and self._kept is not None:
            return [self._show(self._kept)]
        return []

    def _show(self, preview: Shown) -> tuple[int, Shown]:
        self._shown += 1
        self._kept = None
        return self._shown - 1, preview
