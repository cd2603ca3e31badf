"""The water: a mirror of the finished rows above it, broken by waves, with the light's path on it."""

from __future__ import annotations

import numpy as np

from img_serving.engines.procedural.fields import Array, add, blend, lerp, sample
from img_serving.engines.procedural.frame import Frame


class Water:
    """The surface from the horizon down."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._waves = _waves(frame)
        at = (np.arange(frame.width, dtype=np.float32) + np.float32(0.5)) * np.float32(frame.columns / frame.width)
        at = np.clip(at, 0, None)
        self._columns = np.minimum(at - np.float32(0.5), np.float32(frame.columns - 1))

    def reflect(self, image: Array, first: int, last: int) -> Array:
        """Rows `first` to `last`, [3, rows, width], from those of the image that are above the horizon."""
        frame, scene, colours = self._frame, self._frame.scene, self._frame.scene.colours
        rows = np.arange(first - frame.horizon, last - frame.horizon)
        depth = (rows.astype(np.float32) + np.float32(0.5)) / np.float32(frame.height)
        wave = lerp(self._waves[rows[0] : rows[-1] + 1], self._columns, 1)
        rough = (0.30 if frame.calm else 0.85) * (0.35 + depth * np.float32(2.2))
        seen = self._mirrored(image, wave, rows, rough)
        deep = np.clip(np.float32(0.16 if frame.calm else 0.26) + depth * np.float32(0.75), 0.0, 0.72)[:, None]
        crest = np.clip(wave, -0.8, 1.0)
        path = self._path(wave, depth) if scene.sun or scene.moon else None
        planes = np.empty((3, last - first, frame.width), np.float32)
        for channel, (plane, water, sky, glow) in enumerate(
            zip(planes, colours["water"], colours["low"], colours["glow"], strict=True),
        ):
            np.multiply(seen[..., channel], np.float32(0.93 / 255), out=plane)
            blend(plane, np.float32(water * 0.8), deep)
            add(plane, crest * (np.float32(0.05 + 0.10 * sky) * (rough + np.float32(0.2)))[:, None])
            if path is not None:
                blend(plane, np.float32(glow), path)
        return planes

    def _mirrored(self, image: Array, wave: Array, rows: Array, rough: Array) -> Array:
        """What is seen in the water, uint8 [rows, width, 3]."""
        frame = self._frame
        mirror = np.float32(frame.horizon - 1) - rows.astype(np.float32) * np.float32(0.97)
        source = wave * (rough * np.float32(0.075 * frame.height))[:, None]
        source += mirror[:, None]
        np.clip(source, 0.0, frame.horizon - 1, out=source)
        index = source.astype(np.intp)
        index *= frame.width
        index += np.arange(frame.width)
        return image.reshape(-1, 3).take(index, 0, mode="clip")

    def _path(self, wave: Array, depth: Array) -> Array:
        """Where the sun or the moon glitters."""
        frame, scene = self._frame, self._frame.scene
        wide = np.float32(0.035) + depth * np.float32(0.30)
        away = (frame.x[None, :] - np.float32(scene.light[0])) / wide[:, None]
        path: Array = 1.0 / (1.0 + away * away)
        path *= path
        path *= np.clip(wave * np.float32(2.6) + np.float32(0.05), 0.0, 1.0)
        path *= np.float32(0.9 if scene.sun else 0.6)
        return path


def _waves(frame: Frame) -> Array:
    """Height of the surface below the horizon, [rows below, columns of the backdrop], about -1 to 1."""
    rows = frame.height - frame.horizon
    depth = (np.arange(rows, dtype=np.float32) + np.float32(0.5)) / np.float32(frame.height)
    far = 1.0 / (depth + np.float32(0.035))
    tile = frame.tile("waves", gain=0.6 if frame.calm else 0.72, coarsest=16)
    u = frame.gx[None, :] * (far[:, None] * np.float32(0.075)) + np.float32(frame.scene.drift[0])
    v = np.broadcast_to(far[:, None] * np.float32(0.34), u.shape)
    return sample(tile, u, v + np.float32(frame.scene.drift[1]))
