"""Sun, moon and planet: where their discs stand, and how each is filled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from img_serving.engines.procedural.chance import chance
from img_serving.engines.procedural.fields import Array, blend, stretch
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.noise import tile
from img_serving.engines.procedural.space import Planet


@dataclass(frozen=True, slots=True)
class _Disc:
    """A round body: its middle and radius in shorter sides, and how many radii its surroundings reach."""

    kind: str
    x: float
    y: float
    radius: float
    around: float = 1.05


class Bodies:
    """The discs of one picture, drawn where they reach into a band."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._discs = _discs(frame)
        self._planet = Planet(frame) if frame.scene.planet else None

    def show(self, planes: Array, first: int, last: int) -> None:
        """Draw what of them is in rows `first` to `last`."""
        frame = self._frame
        for disc in self._discs:
            reach = disc.radius * disc.around + 2 / frame.side
            top, bottom = np.searchsorted(frame.y[first:last], [disc.y - reach, disc.y + reach])
            left, right = np.searchsorted(frame.x, [disc.x - reach, disc.x + reach])
            if bottom <= top or right <= left:
                continue
            dx = (frame.x[left:right] - np.float32(disc.x))[None, :] / np.float32(disc.radius)
            dy = (frame.y[first + top : first + bottom] - np.float32(disc.y))[:, None] / np.float32(disc.radius)
            far = np.sqrt(dx * dx + dy * dy)
            pixels = np.float32(disc.radius * frame.side)
            mask = np.clip((1.0 - far) * pixels + np.float32(0.5), 0.0, 1.0)
            area = planes[:, top:bottom, left:right]
            if disc.kind == "moon":
                _moon(frame, area, dx, dy, mask * _lit(frame, dx, dy, pixels))
            elif self._planet is not None and disc.kind == "planet":
                self._planet.show(area, dx, dy, mask)
            else:
                _sun(frame, area, dy, mask)


def _discs(frame: Frame) -> list[_Disc]:
    scene = frame.scene
    if scene.place == "abstract" and frame.open:
        return []
    discs: list[_Disc] = []
    if scene.sun or scene.moon:
        kind = "sun" if scene.sun else "moon"
        big = "minimal" in scene.styles or "neon" in scene.styles
        radius = {("sun", True): 0.105, ("sun", False): 0.036, ("moon", True): 0.085, ("moon", False): 0.058}[kind, big]
        discs.append(_Disc(kind, scene.light[0], (scene.light[1] - 0.5) * frame.height / frame.side, radius))
    if scene.planet:
        side = -1.0 if scene.light[0] > 0 else 1.0
        x, y = side * 0.24 + scene.drift[0] * 0.2, scene.drift[1] * 0.2 - 0.02
        discs.append(_Disc("planet", x, y, 0.21, around=2.1 if frame.ringed else 1.25))
    return discs


def _sun(frame: Frame, area: Array, dy: Array, mask: Array) -> None:
    """A plain disc; striped in the neon style."""
    colours = frame.scene.colours
    if "neon" not in frame.scene.styles:
        for plane, channel in zip(area, colours["sun"], strict=True):
            blend(plane, np.float32(channel), mask)
        return
    stripe = dy * np.float32(5.0)
    mask = mask * np.clip((stripe - np.floor(stripe) - np.clip(dy * np.float32(0.55), 0.0, 0.6)) * 12, 0.0, 1.0)
    fade = np.clip(dy * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
    for plane, upper, lower in zip(area, colours["glow"], colours["low"], strict=True):
        blend(plane, np.float32(upper) + fade * np.float32(lower - upper), mask)


def _moon(frame: Frame, area: Array, dx: Array, dy: Array, mask: Array) -> None:
    """A disc with its seas; a crescent where its shadow lies on it."""
    seas = tile(f"{frame.scene.key}:maria", 64, frame.detail, gain=0.5)
    marks = stretch(seas, dx[0] * np.float32(0.21), dy[:, 0] * np.float32(0.21))
    marks = np.clip(marks * np.float32(0.16) + np.float32(0.93), 0.72, 1.0)
    for plane, channel in zip(area, frame.scene.colours["moon"], strict=True):
        blend(plane, marks * np.float32(channel), mask)


def _lit(frame: Frame, dx: Array, dy: Array, pixels: np.float32) -> Array | np.float32:
    """How much of the moon's disc is lit: all of it, or a crescent; `pixels` is its radius."""
    if chance("crescent", frame.scene.key) >= 0.4:
        return np.float32(1.0)
    bite = np.sqrt((dx - np.float32(0.42)) ** 2 + (dy + np.float32(0.16)) ** 2)
    lit: Array = np.clip((bite - np.float32(0.95)) * pixels * np.float32(0.7), 0.0, 1.0)
    return lit
