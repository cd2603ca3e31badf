"""The backdrop: whatever has no hard edges, drawn at reduced resolution and widened to the picture band by band."""

from __future__ import annotations

import math

import numpy as np

from img_serving.engines.procedural.abstract import silk
from img_serving.engines.procedural.fields import Array, add
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.sky import sky
from img_serving.engines.procedural.space import nebula


class Backdrop:
    """The sky, or all of an open picture."""

    def __init__(self, frame: Frame) -> None:
        planes = _drawn(frame)
        left, share = _between(frame.width, frame.columns, frame.columns)
        self._wide = planes.take(left, 2, mode="clip")  # at full width already, for every row would need it
        for wide, narrow in zip(self._wide, planes, strict=True):
            beside = narrow.take(left + 1, 1, mode="clip")
            beside -= wide
            beside *= share
            add(wide, beside)
        self._row, down = _between(frame.height, frame.rows, planes.shape[1])
        self._share = down[:, None]

    def fill(self, planes: Array, first: int, last: int) -> None:
        """Draw rows `first` to `last` into [3, rows, width]."""
        row, share = self._row[first:last], self._share[first:last]
        for plane, source in zip(planes, self._wide, strict=True):
            upper = source.take(row, 0, mode="clip")
            np.subtract(source.take(row + 1, 0, mode="clip"), upper, out=plane)
            np.multiply(plane, share, out=plane)
            np.add(plane, upper, out=plane)


def _drawn(frame: Frame) -> Array:
    """The backdrop on its own grid: [3, rows that show, columns]."""
    scene = frame.scene
    if scene.place == "abstract" and frame.open:
        return silk(frame)
    share = 1.0 if frame.open else scene.horizon + (0.0 if scene.water else 0.10)  # hills may dip below the horizon
    rows = min(frame.rows, math.ceil(frame.rows * share) + 2)
    return nebula(frame, rows) if scene.time == "space" else sky(frame, rows)


def _between(count: int, cells: int, there: int) -> tuple[Array, Array]:
    """For `count` points over `cells` cells, of which `there` exist: the cell before each, and how far it is behind it."""
    at = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / count) - np.float32(0.5)
    np.clip(at, 0.0, there - 1.0, out=at)
    before = np.minimum(at.astype(np.intp), there - 2)
    return before, at - before.astype(np.float32)
