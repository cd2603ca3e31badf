"""What lies on top of everything: flowers, fireflies and falling snow, as stamps for the finished picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from img_serving.engines.procedural.avoiding import kept
from img_serving.engines.procedural.chance import key_of
from img_serving.engines.procedural.colours import WHITE, Colour, mix
from img_serving.engines.procedural.fields import Array
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.noise import draws

_FIREFLIES, _FLAKES, _FLOWERS = 70, 260, 420


@dataclass(frozen=True, slots=True)
class Stamp:
    """A small shape: its middle and radius in pixels.

    From coordinates (-1 to 1) `shape` makes coverage, and perhaps a brightness.
    """

    x: float
    y: float
    radius: float
    colour: Colour
    shape: Callable[[Array, Array], tuple[Array, Array | None]]

    def press(self, frame: Frame, image: Array) -> None:
        """Mix it into uint8 [height, width, 3]."""
        x, y, radius = self.x, self.y, self.radius
        left, right = max(0, math.floor(x - radius)), min(frame.width, math.ceil(x + radius) + 1)
        top, bottom = max(0, math.floor(y - radius)), min(frame.height, math.ceil(y + radius) + 1)
        if right <= left or bottom <= top:
            return
        dx = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)) / np.float32(radius)
        dy = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y)) / np.float32(radius)
        cover, tone = self.shape(dx[None, :], dy[:, None])
        shown = kept(self.colour, frame.scene.avoided) if frame.scene.avoided else self.colour
        area = image[top:bottom, left:right]
        for channel, value in enumerate(shown):
            below = area[..., channel]
            mixed = np.float32(value * 255.0) - below if tone is None else tone * np.float32(value * 255.0) - below
            mixed *= cover
            mixed += below
            np.copyto(below, mixed, casting="unsafe")


def stamps(frame: Frame) -> Iterator[Stamp]:
    """Whatever the scene has of these, in the order in which they lie on each other."""
    scene = frame.scene
    if "flower" in scene.places:
        yield from _flowers(frame)
    if scene.fireflies:
        yield from _fireflies(frame)
    if scene.snow >= 1.0 and "minimal" not in scene.styles:
        yield from _flakes(frame)


def _flowers(frame: Frame) -> Iterator[Stamp]:
    scene, colours = frame.scene, frame.scene.colours
    start = scene.horizon + 0.07
    drawn = draws(key_of(scene.key, "flowers"), 4 * _FLOWERS).reshape(_FLOWERS, 4)
    drawn = drawn[np.argsort(drawn[:, 1], kind="stable")]
    for across, down, kind, size in drawn.tolist():
        near = down * down
        radius = (0.004 + 0.034 * near * (0.6 + 0.6 * size)) * frame.side
        if radius < 0.7:
            continue
        base = colours["flower" if kind < 0.68 else "flower2"]
        colour = mix(mix(base, WHITE, 0.30 * size), colours["horizon"], 0.35 * (1.0 - near))
        x, y = across * frame.width, (start + (1.0 - start) * near) * frame.height
        yield Stamp(x, y, radius, colour, partial(_bloom, petals=5 if kind < 0.68 else 6, turn=size))
        if radius > 5.0:  # smaller ones have no room for a heart
            heart = mix(colours["flower2"], colours["near"], 0.25)
            yield Stamp(x, y, radius * 0.30, heart, partial(_dot, core=1.0, strength=1.6))


def _fireflies(frame: Frame) -> Iterator[Stamp]:
    drawn = draws(key_of(frame.scene.key, "fireflies"), 3 * _FIREFLIES).reshape(_FIREFLIES, 3)
    for across, down, size in drawn.tolist():
        radius = max(1.5, (0.004 + 0.016 * size**3) * frame.side)
        x, y = across * frame.width, (0.45 + 0.52 * down) * frame.height
        yield Stamp(x, y, radius * 3, (1.0, 0.86, 0.45), partial(_dot, core=0.33))


def _flakes(frame: Frame) -> Iterator[Stamp]:
    drawn = draws(key_of(frame.scene.key, "flakes"), 3 * _FLAKES).reshape(_FLAKES, 3)
    for across, down, size in drawn.tolist():
        radius = max(1.0, (0.0016 + 0.0065 * size**4) * frame.side)
        soft = partial(_dot, core=1.0, strength=0.75 if size < 0.8 else 0.4)
        yield Stamp(across * frame.width, down * frame.height, radius, WHITE, soft)


def _dot(dx: Array, dy: Array, core: float, strength: float = 1.0) -> tuple[Array, None]:
    """A soft light."""
    square = dx * dx + dy * dy
    edge = np.clip(1.0 - square, 0.0, 1.0)
    edge *= edge
    edge *= np.float32(core * core * 1.25 * strength) / (square + np.float32(core * core))
    return np.minimum(edge, np.float32(1.0)), None


def _bloom(dx: Array, dy: Array, petals: int, turn: float) -> tuple[Array, Array]:
    """A flower seen a little from the side: petals follow the real part of z**n, so no sine is needed."""
    across, along = (1.0 - 2.0 * turn) * 0.5, 0.6 + 0.4 * turn
    dy = dy * np.float32(1.25)
    x, y = dx * np.float32(along) - dy * np.float32(across), dy * np.float32(along) + dx * np.float32(across)
    far = np.sqrt(x * x + y * y + np.float32(1e-6))
    x /= far
    y /= far
    real, imaginary = x * x - y * y, x * y * 2.0
    if petals == 6:  # z**6 = (z**2)**3
        x, y = real, imaginary
    real, imaginary = real * real - imaginary * imaginary, real * imaginary * 2.0
    real = real * x - imaginary * y  # z**5 = z**4 * z
    wide = math.sqrt(along * along + 0.25)
    room = real * np.float32(0.24 * wide)
    room += np.float32(0.70 * wide)
    room -= far
    room *= 6.0
    tone = np.clip(room * np.float32(0.5) + np.float32(0.55), 0.72, 1.0)  # a darker rim
    room += np.float32(0.3)
    return np.clip(room, 0.0, 1.0), tone
