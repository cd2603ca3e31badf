"""The frame: one scene at one size and stage, and the coordinates that all who draw it share.

`x` and `y` are centred and in units of the shorter side, so a scene is the same at every size; `v` is the height in the
picture, from 0 (top) to 1 (bottom). `gx`, `gy` and `gv` are the same for the backdrop's coarser grid.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from img_serving.engines.procedural.chance import chance
from img_serving.engines.procedural.fields import Array, centres, stretch
from img_serving.engines.procedural.noise import tile
from img_serving.engines.procedural.scene import Scene
from img_serving.engines.procedural.steps import Latent

BACKDROP_POINTS = 270_000
"""The backdrop has no hard edges: a quarter of a million points are enough for any size."""


class Frame:
    """Where to draw. Nothing in it changes while a picture is drawn."""

    def __init__(self, scene: Scene, latent: Latent, width: int, height: int) -> None:
        self.scene, self.latent = scene, latent
        self.width, self.height, self.side = width, height, min(width, height)
        self.detail = latent.detail
        self.x = self._axis(width, width)
        self.y = self._axis(height, height)
        self.v = centres(height)
        coarse = max(1.0, math.sqrt(width * height / BACKDROP_POINTS))
        self.columns, self.rows = max(4, round(width / coarse)), max(4, round(height / coarse))
        self.gx, self.gy = self._axis(self.columns, width), self._axis(self.rows, height)
        self.gv = centres(self.rows)
        self.tile_size = 512 if self.side > 400 else 256 if self.side > 160 else 128
        self.horizon = min(height, max(1, round(scene.horizon * height)))
        self.ringed = chance("ring", scene.key) < 0.6
        self.open = scene.place in {"space", "abstract", "sky"} and len(scene.places) == 1
        self.calm = "lake" in scene.places and "sea" not in scene.places

    def _axis(self, count: int, extent: int) -> Array:
        """Centred coordinates in units of the shorter side, for `count` points over `extent` pixels."""
        points = np.arange(count, dtype=np.float32) + np.float32(0.5 - count / 2)
        return points * np.float32(extent / count / self.side)

    def tile(self, name: str, **how: Any) -> Array:
        """Noise of the scene's own, as fine as the size and the steps allow."""
        return tile(f"{self.scene.key}:{name}", self.tile_size, self.detail, **how)

    def warped(self, rows: int, scale: float) -> tuple[Array, Array]:
        """The latent's displacement on the backdrop's grid: two of [rows, columns]."""
        u, v = self.gx * np.float32(0.5) + np.float32(0.5), self.gy[:rows] * np.float32(0.5) + np.float32(0.5)
        first, second = (stretch(warp, u, v) for warp in self.latent.warp)
        first *= np.float32(scale)
        second *= np.float32(scale)
        return first, second
