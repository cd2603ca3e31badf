"""The stars: a list from the seed, in order of rows, and the small soft points they make in a band."""

from __future__ import annotations

import math

import numpy as np

from img_serving.engines.procedural.chance import key_of
from img_serving.engines.procedural.fields import Array
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.noise import draws

MOST = 6000


class Stars:
    """Row, column, brightness and warmth of each star."""

    def __init__(self, frame: Frame) -> None:
        scene = frame.scene
        self._width = frame.width
        self._unit = max(1.0, frame.side / 1000)
        self._power = np.float32(min(1.0, 0.5 + frame.side / 1024))
        wide = frame.width * frame.height / frame.side**2
        count = min(MOST, int((1500 if scene.time == "space" else 900) * scene.stars * wide))
        drawn = draws(key_of(scene.key, "stars"), 4 * MOST).reshape(MOST, 4)[:count]
        down = drawn[:, 0] * np.float32(1.0 if frame.open else scene.horizon)
        order = np.argsort(down, kind="stable")
        drawn, down = drawn[order], down[order]
        bright = drawn[:, 2] * drawn[:, 2]
        bright = bright * bright * np.float32(1.1) + np.float32(0.13)
        if not frame.open:
            bright *= np.clip(np.float32(1.15) - down / np.float32(scene.horizon), 0.1, 1.0)
        self._rows, self._columns = down * np.float32(frame.height), drawn[:, 1] * np.float32(frame.width)
        self._bright, self._warm = bright, drawn[:, 3]

    def shine(self, planes: Array, first: int, last: int) -> None:
        """Draw those that reach into rows `first` to `last`."""
        reach = math.ceil(2.2 * self._unit - 0.5)
        low, high = np.searchsorted(self._rows, [first - reach, last + reach])
        if high <= low:
            return
        y, x = self._rows[low:high], self._columns[low:high]
        bright, warm = self._bright[low:high], self._warm[low:high]
        row, column = np.floor(y), np.floor(x)
        dy, dx = row + np.float32(0.5) - y, column + np.float32(0.5) - x
        row, column = row.astype(np.intp) - first, column.astype(np.intp)
        size = (bright * np.float32(1.5) + np.float32(0.35)) * np.float32(self._unit * self._unit)
        power = np.minimum(bright * self._power, np.float32(1.3))
        tints = (
            power * (np.float32(0.80) + warm * np.float32(0.2)),
            power * np.float32(0.9),
            power * (np.float32(1.05) - warm * np.float32(0.3)),
        )
        for j in range(-reach, reach + 1):
            for i in range(-reach, reach + 1):
                distance = (dy + np.float32(j)) ** 2 + (dx + np.float32(i)) ** 2
                shine = np.clip(1.0 - distance / (size * np.float32(2.4)), 0.0, 1.0)
                shine *= shine
                down, across = row + j, column + i
                inside = (down >= 0) & (down < last - first) & (across >= 0) & (across < self._width) & (shine > 0)
                if not inside.any():
                    continue
                where = (down[inside], across[inside])
                for plane, tint in zip(planes, tints, strict=True):
                    plane[where] += tint[inside] * shine[inside]
