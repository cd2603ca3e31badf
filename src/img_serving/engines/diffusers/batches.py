"""Who is drawn together: calls taken apart into the batch sizes that are drawn, and what each size of picture left room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One drawing: `take` pictures that are wanted, and fillers up to `size`."""

    take: int
    size: int


def plan(count: int, buckets: Sequence[int], most: int) -> list[Part]:
    """Take `count` pictures apart, `most` of them at once at most.

    With `buckets` (ascending) each part has the size of one: the smallest that holds what is left, unless more than a quarter
    of it would be fillers and a smaller one can be had full. Where not even the smallest bucket is within `most`, `most` is
    the only one. Without buckets nothing is filled.
    """
    usable = [size for size in buckets if size <= most] or ([most] if buckets else [])
    parts: list[Part] = []
    left = count
    while left > 0:
        if usable:
            size = next((size for size in usable if size >= left), usable[-1])
            full = [smaller for smaller in usable if smaller <= left]
            if full and 4 * (size - left) > size:
                size = full[-1]
        else:
            size = min(left, most)
        parts.append(Part(min(left, size), size))
        left -= parts[-1].take
    return parts


class Limits:
    """How many pictures of a size were too many for the memory. A limit never grows again: a restart forgets it."""

    __slots__ = ("_by_pixels",)

    def __init__(self) -> None:
        self._by_pixels: dict[int, int] = {}

    def most(self, pixels: int, otherwise: int) -> int:
        """Pictures of so many pixels at once: no more than there was room for of smaller or equal ones."""
        return min([otherwise, *(limit for known, limit in self._by_pixels.items() if known <= pixels)])

    def learn(self, pixels: int, failed: int) -> int:
        """`failed` pictures at once, at least 2, were too many: from now on half of that. Returns the new limit."""
        self._by_pixels[pixels] = self.most(pixels, max(1, failed // 2))
        return self._by_pixels[pixels]

    def known(self) -> Mapping[int, int]:
        """What was learned: pixels of a picture to pictures at once."""
        return dict(sorted(self._by_pixels.items()))
