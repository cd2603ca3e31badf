"""The city: three rows of houses, tall where the crowd is, with masts and windows."""

from __future__ import annotations

import numpy as np

from img_serving.engines.procedural.chance import key_of
from img_serving.engines.procedural.fields import Array
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.noise import draws
from img_serving.engines.procedural.ranges import Range, depths, range_at
from img_serving.engines.procedural.windows import Windows, coverage

_DRAWS = 4096
_MOST_BLOCKS = 400


def skyline(frame: Frame) -> list[Range]:
    """The rows of houses, from far to near; the farthest has no windows."""
    key, ranges = frame.scene.key, []
    for i, (near, foot) in enumerate(depths(frame, 3, frame.scene.horizon + 0.01, 1.0)):
        row = _Row(frame, near, foot, draws(key_of(key, "city", i), _DRAWS))
        lit = draws(key_of(key, "windows", i), 256 * 256).reshape(256, 256)
        windows = Windows(row.share, row.number, row.pitch * frame.side, lit) if i else None
        ranges.append(range_at(frame, row.crest, near, span=0.40, windows=windows))
    return ranges


class _Row:
    """One row of houses, built from the middle outwards: its outline, and its windows' shares and numbers, each [w]."""

    def __init__(self, frame: Frame, near: float, foot: float, drawn: Array) -> None:
        self.pitch = 0.0105 + 0.004 * near
        self.crest = np.full(frame.width, foot + 0.02, np.float32)
        self.share, self.number = np.zeros(frame.width, np.float32), np.zeros(frame.width, np.intp)
        self._frame, self._foot = frame, foot
        self._extent = frame.width / frame.side / 2
        for side in (1, -1):
            at, block = 0.0 if side > 0 else -0.001, 0
            while abs(at) < self._extent and block < _MOST_BLOCKS:
                first = block * 3 + 700 * (side > 0)
                wide = self.pitch * (4 + int(float(drawn[first % _DRAWS]) * (6 + 3 * near)))
                size = float(drawn[(first + 1) % _DRAWS])
                crowd = 1.0 / (1.0 + 2.2 * (at - frame.scene.light[0] * 0.5) ** 2)
                tall = (0.07 + 0.36 * size * size * crowd) * (1.0 - 0.35 * near)
                left, right = (at, at + wide * 0.94) if side > 0 else (at - wide * 0.94, at)
                self._build(left, right, tall, 37 * block + 11 * (side > 0), mast=size > 0.8)
                at += side * wide
                block += 1

    def _build(self, left: float, right: float, tall: float, number: int, *, mast: bool) -> None:
        """Put up one house between two places; its windows count from `number`."""
        frame = self._frame
        first, last = round((left + self._extent) * frame.side), round((right + self._extent) * frame.side)
        first, last = max(0, first), min(frame.width, last)
        if last <= first:
            return
        self.crest[first:last] = self._foot - tall
        if mast and last - first > 4:
            middle = (first + last) // 2
            self.crest[middle : middle + max(1, frame.side // 700)] = self._foot - tall * 1.16
        inside = (frame.x[first:last] - np.float32(left)) / np.float32(self.pitch)
        whole = np.floor(inside)
        self.share[first:last] = coverage(frame, inside - whole, self.pitch)
        self.number[first:last] = whole.astype(np.intp) + number
