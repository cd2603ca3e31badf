"""Space: the nebula that fills it, and the planet that hangs in it."""

from __future__ import annotations

import numpy as np

from img_serving.engines.procedural.chance import chance
from img_serving.engines.procedural.colours import mix
from img_serving.engines.procedural.fields import Array, add, blend, gradient, sample, screen, smooth, stretch
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.noise import profile, tile


def nebula(frame: Frame, rows: int) -> Array:
    """Two gases and the dust before them: the first `rows` rows of the backdrop, [3, rows, columns]."""
    scene, colours = frame.scene, frame.scene.colours
    stops = [(0.0, colours["top"]), (0.5, colours["mid"]), (1.0, colours["low"])]
    planes = np.repeat(gradient(frame.gv[:rows], stops), frame.columns, axis=2)
    warp_x, warp_y = frame.warped(rows, 2.6)
    u = warp_x + frame.gx[None, :] * np.float32(0.55) + np.float32(scene.drift[0])
    v = warp_y + frame.gy[:rows, None] * np.float32(0.55) + np.float32(scene.drift[1])
    gas = frame.tile("gas", gain=0.58, coarsest=2)
    first = sample(gas, u, v)
    v += first * np.float32(0.08)
    second = sample(gas, v + np.float32(0.37), u * np.float32(1.2))
    folds = 1.0 - np.abs(second + first * np.float32(0.3)) * np.float32(1.5)
    np.clip(folds, 0.0, 1.0, out=folds)
    folds *= folds
    lean = np.float32(chance("lean", scene.key) - 0.5) * 2
    across = frame.gx[None, :] * lean + frame.gy[:rows, None] + first * np.float32(0.25)
    band = np.float32(0.16) / (across * across + np.float32(0.16))
    body = smooth(-0.55, 1.0, first)
    body *= band
    filaments = folds * band
    core = body * body * body
    dust = 1.0 - np.clip(second * np.float32(1.3) - np.float32(0.25), 0.0, 0.85)
    for plane, light, shade, hot in zip(planes, colours["lit"], colours["shade"], (1.0, 0.92, 0.85), strict=True):
        shine = body * np.float32(shade * 1.15)
        shine += filaments * np.float32(light * 0.55)
        shine *= dust
        shine += core * np.float32(hot * 0.9)
        screen(plane, shine)
    return planes


class Planet:
    """A banded sphere, lit from the side, with air at its rim and perhaps a ring."""

    def __init__(self, frame: Frame) -> None:
        key = frame.scene.key
        self._ringed = frame.ringed
        self._colour = frame.scene.colours["planet"]
        self._side = np.float32(0.75 if frame.scene.light[0] > 0 else -0.75)
        lines = np.linspace(-4.0, 4.0, 1024, dtype=np.float32)
        self._belts = profile(f"{key}:belts", lines, frame.detail, octaves=5, gain=0.7)
        self._swirl = tile(f"{key}:swirl", 128, frame.detail)

    def show(self, area: Array, dx: Array, dy: Array, mask: Array) -> None:
        """Draw it into `area` [3, h, w]: (dx, dy) from its middle in radii, `mask` how much of a pixel its disc fills."""
        square = dx * dx + dy * dy
        tone = self._tone(dx, dy, square)
        rim = np.clip(np.float32(1.22) - np.sqrt(square), 0.0, 0.22) * np.float32(1 / 0.22)
        rim *= rim
        lit = np.clip(dx * self._side - dy * np.float32(0.35) + np.float32(0.45), 0.0, 1.0)
        rim *= (1.0 - mask) * lit * np.float32(0.5)
        ring = self._ring(dx, dy, mask) if self._ringed else None
        air, pale = mix(self._colour, (0.6, 0.8, 1.0), 0.6), mix(self._colour, (1.0, 0.95, 0.86), 0.55)
        for plane, own, blue, dusty in zip(area, self._colour, air, pale, strict=True):
            blend(plane, tone * np.float32(own), mask)
            add(plane, rim * np.float32(blue))
            if ring is not None:
                blend(plane, np.float32(dusty * 0.9), ring)

    def _tone(self, dx: Array, dy: Array, square: Array) -> Array:
        """The brightness of the sphere: belts, stirred a little, in the light."""
        depth = np.sqrt(np.maximum(1.0 - square, 0.0))
        light = dx * self._side - dy * np.float32(0.35) + depth * np.float32(0.5)
        np.clip(light * np.float32(1.25), 0.02, 1.0, out=light)
        belts = dy + dx * np.float32(0.25)
        swirl = stretch(self._swirl, dx[0] * np.float32(0.2), dy[:, 0] * np.float32(0.6))
        at = ((belts + swirl * np.float32(0.06)) * np.float32(300.0) + np.float32(512.0)).astype(np.intp)
        tone = self._belts.take(at, mode="clip")
        tone *= np.float32(0.38)
        tone += np.float32(0.80)
        tone *= light
        return tone

    def _ring(self, dx: Array, dy: Array, mask: Array) -> Array:
        """How much of each pixel the ring fills; behind the sphere nothing."""
        tilt = dy * np.float32(4.2) + dx * np.float32(1.25)
        far = np.sqrt(dx * dx + tilt * tilt)
        index = (far * np.float32(420.0)).astype(np.intp) & 1023
        grooves = self._belts.take(index) * np.float32(0.5) + np.float32(0.65)
        ring: Array = np.clip((far - np.float32(1.28)) * 14, 0.0, 1.0)
        ring = ring * np.clip((np.float32(2.05) - far) * 14, 0.0, 1.0)
        ring *= np.clip(grooves, 0.1, 1.0)
        ring *= 1.0 - mask * (tilt < 0)
        ring *= np.float32(0.75)
        return ring
