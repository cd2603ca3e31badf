"""The windows of a row of houses: where they are, and which of them are lit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from img_serving.engines.procedural.fields import Array
from img_serving.engines.procedural.frame import Frame

_LIT = {"night": 0.48, "dusk": 0.50, "sunset": 0.30, "dawn": 0.20}
"""The share of windows that are lit; by day few."""


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """`share` [w]: how much of a pixel is window; `number` [w]: which one; `pitch` in pixels; `draws`: one a window."""

    share: Array
    number: Array
    pitch: float
    draws: Array

    def lamps(self, frame: Frame, below: Array, first: int, last: int) -> tuple[Array, Array]:
        """Lit windows of two colours in rows `first` to `last`, which lie `below` the roofs."""
        at = np.arange(first, last, dtype=np.float32) / np.float32(self.pitch * 1.25)
        whole = np.floor(at)
        down = coverage(frame, at - whole, self.pitch / frame.side)[:, None]
        chance = self.draws.take((whole.astype(np.intp) & 255), 0).take(self.number & 255, 1)
        lit = 0.5 if "neon" in frame.scene.styles else _LIT.get(frame.scene.time, 0.12)
        pane = down * self.share
        pane *= np.clip((below - np.float32(self.pitch * 0.8)), 0.0, 1.0)
        pane *= np.clip(1.5 - below * np.float32(2.2 / frame.height), 0.25, 1.0)
        return pane * (chance < np.float32(lit * 0.75)), pane * (chance > np.float32(1.0 - lit * 0.25))


def coverage(frame: Frame, at: Array, pitch: float) -> Array:
    """How much of a pixel is window, where a window is the middle half of each pitch (in shorter sides)."""
    soft = 1.0 / max(1.0, pitch * frame.side)
    share: Array = np.clip((0.27 - np.abs(at - np.float32(0.5))) / np.float32(soft) + np.float32(0.5), 0.0, 1.0)
    return share
