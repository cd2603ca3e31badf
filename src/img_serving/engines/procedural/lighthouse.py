"""The lighthouse: a banded tower on a dark headland before the sea, its lantern, and its beams when it is dark."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from img_serving.engines.procedural.chance import chance
from img_serving.engines.procedural.colours import BLACK, Colour, mix
from img_serving.engines.procedural.fields import Array, blend, screen
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.noise import profile
from img_serving.engines.procedural.ranges import Range, range_at

_SHINE = {"day": 0.15, "dawn": 0.5, "sunset": 0.65, "dusk": 1.0, "night": 1.0}
"""How strongly the lantern shines; the beams show only where it is 1."""

# heights above the rock and half widths, in heights of the tower
_GALLERY, _LAMP, _ROOF, _TOP = 0.80, 0.825, 0.915, 1.0
_FOOT_WIDE, _NECK_WIDE = 0.105, 0.066


def _stand(frame: Frame) -> tuple[float, float, float]:
    """Where the tower stands, in shorter sides: x (away from the sun), y of its foot, and its height."""
    scene = frame.scene
    across = (0.17 + 0.11 * chance("lighthouse", scene.key)) * min(1.7, frame.width / frame.side)
    foot = scene.horizon + 0.13 + 0.04 * chance("headland", scene.key)
    tall = 0.42 + 0.08 * chance("tower", scene.key)
    tall *= min(1.5, 1.0 + 0.45 * (frame.height / frame.side - 1.0))  # an upright picture has more sky to fill
    return (-across if scene.light[0] > 0 else across, (foot - 0.5) * frame.height / frame.side, tall)


def headland(frame: Frame) -> list[Range]:
    """The rock under the tower: it comes from one side of the picture and falls into the water on the other."""
    scene = frame.scene
    x, y, _ = _stand(frame)
    away = (frame.x - np.float32(x)) * np.float32(1.0 if x > 0 else -1.0)
    rough = profile(f"{scene.key}:rock", frame.x * np.float32(3.0), frame.detail, octaves=7, gain=0.55)
    crags = profile(f"{scene.key}:crags", frame.x * np.float32(6.0), frame.detail, octaves=5, ridged=True, gain=0.6)
    into = np.maximum(np.float32(-0.06) - away, np.float32(0.0))
    down = into * (into * np.float32(2.2) + np.float32(0.42))
    down += np.maximum(away - np.float32(0.10), np.float32(0.0)) * np.float32(0.12)
    broken = np.clip((np.abs(away) - np.float32(0.04)) * np.float32(7.0), 0.08, 1.0)  # even where the tower stands
    down -= (rough * np.float32(0.030) + crags * np.float32(0.045) - np.float32(0.012)) * broken
    crest = np.float32(y * frame.side / frame.height + 0.5) + down * np.float32(frame.side / frame.height)
    np.maximum(crest, np.float32(scene.horizon + 0.02), out=crest)
    rock = range_at(frame, crest, 0.94, span=0.30, relief=0.0 if "minimal" in scene.styles else 0.28)
    return [replace(rock, top=mix(rock.top, BLACK, 0.2), foot=mix(scene.colours["near"], BLACK, 0.4))]


class Lighthouse:
    """The tower of one picture, drawn where it reaches into a band."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._x, self._y, self._tall = _stand(frame)
        self._lamp_y = self._y - self._tall * (_LAMP + _ROOF) / 2
        self._shine = _SHINE.get(frame.scene.time, 0.5)

    def beam(self, planes: Array, first: int, last: int) -> None:
        """Two soft beams over the sky of rows `first` to `last`."""
        if self._shine < 1.0:
            return
        frame, lamp = self._frame, self._frame.scene.colours["lamp"]
        dx = (frame.x - np.float32(self._x))[None, :]
        dy = (frame.y[first:last] - np.float32(self._lamp_y))[:, None]
        lean = 0.10 + 0.16 * chance("beam", frame.scene.key)
        for side, slope in ((1.0, -lean), (-1.0, lean * 0.4 - 0.1)):
            long = math.sqrt(1.0 + slope * slope)
            along = dx * np.float32(side / long) + dy * np.float32(slope / long)
            np.maximum(along, np.float32(0.0), out=along)
            across = dy * np.float32(1.0 / long) - dx * np.float32(side * slope / long)
            across /= along * np.float32(0.10) + np.float32(0.010)
            light = 1.0 - across * across
            np.clip(light, 0.0, 1.0, out=light)
            light *= light
            light *= np.minimum(along * np.float32(60.0), np.float32(0.62)) / (
                along * np.float32(2.2) + np.float32(1.0)
            )
            for plane, channel in zip(planes, lamp, strict=True):
                screen(plane, light * np.float32(channel))

    def show(self, planes: Array, first: int, last: int) -> None:
        """Draw what of the tower, and of the glow around its lantern, is in rows `first` to `last`."""
        frame = self._frame
        reach = 0.42 * self._tall
        top, bottom = np.searchsorted(frame.y[first:last], [self._lamp_y - 1.2 * reach, self._y + 0.1])
        left, right = np.searchsorted(frame.x, [self._x - reach, self._x + reach])
        if bottom <= top or right <= left:
            return
        area = planes[:, top:bottom, left:right]
        x = (frame.x[left:right] - np.float32(self._x))[None, :] / np.float32(self._tall)
        up = (np.float32(self._y) - frame.y[first + top : first + bottom])[:, None] / np.float32(self._tall)
        self._tower(area, x, up)
        self._glow(area, x, up)

    def _tower(self, area: Array, x: Array, up: Array) -> None:
        colours, pixels = self._frame.scene.colours, np.float32(self._tall * self._frame.side)
        out = np.abs(x)

        def within(low: float, high: float, wide: Array | float) -> Array:
            """How much of each pixel lies between two heights and within a half width."""
            rows = np.minimum((up - np.float32(low)) * pixels, (np.float32(high) - up) * pixels)
            columns = (wide - out) * pixels
            inside: Array = np.clip(rows + np.float32(0.5), 0.0, 1.0) * np.clip(columns + np.float32(0.5), 0.0, 1.0)
            return inside

        rise = np.clip(up * np.float32(1.0 / _GALLERY), 0.0, 1.0)
        wide = np.float32(_FOOT_WIDE) - rise * np.float32(_FOOT_WIDE - _NECK_WIDE)
        lit = -1.0 if self._x > 0 else 1.0  # the side that faces the sun or the moon
        tone = np.clip(np.float32(0.80) + x / wide * np.float32(0.22 * lit), 0.5, 1.05)
        dark = mix(colours["near"], BLACK, 0.25)
        lamp = mix(colours["shade"], colours["lamp"], 0.35 + 0.65 * self._shine)
        pane = colours["lamp"] if self._shine >= 1.0 else dark
        bands = sum(within(low, low + 0.13, wide) for low in (0.14, 0.38, 0.62))
        parts: list[tuple[Colour, Array | None, Array]] = [
            (colours["tower"], tone, within(-0.2, _GALLERY, wide)),
            (colours["band"], tone, np.asarray(bands)),
            (pane, None, within(0.30, 0.345, 0.014) + within(0.545, 0.585, 0.012)),
            (dark, None, within(-0.2, 0.085, 0.030)),
            (dark, None, within(_GALLERY - 0.022, _GALLERY, 0.088)),
            (dark, None, within(_GALLERY, _LAMP, 0.106)),
            (lamp, None, within(_LAMP, _ROOF, 0.050)),
            (dark, None, within(_LAMP, _ROOF, 0.004) + within(_LAMP, _ROOF, 0.052) - within(_LAMP, _ROOF, 0.043)),
            (dark, None, within(_ROOF - 0.008, _TOP - 0.02, (np.float32(_TOP - 0.02) - up) * np.float32(0.85))),
            (dark, None, within(_ROOF, _TOP + 0.02, 0.005)),
        ]
        for rail in range(-4, 5):
            post = np.clip(
                (np.float32(0.0035) - np.abs(x - np.float32(rail * 0.024))) * pixels + np.float32(0.5), 0.0, 1.0
            )
            parts.append((dark, None, post * within(_LAMP, _LAMP + 0.03, 0.106)))
        parts.append((dark, None, within(_LAMP + 0.028, _LAMP + 0.035, 0.102)))
        for colour, shade, share in parts:
            for plane, channel in zip(area, colour, strict=True):
                blend(plane, np.float32(channel) if shade is None else shade * np.float32(channel), share)

    def _glow(self, area: Array, x: Array, up: Array) -> None:
        dy = up - np.float32((_LAMP + _ROOF) / 2)
        far = x * x + dy * dy
        light = np.clip(1.0 - far * np.float32(1.0 / 0.17), 0.0, 1.0)
        light *= light
        light *= np.float32(0.006) / (far + np.float32(0.006)) + np.float32(0.12)
        light *= np.float32(0.85 * self._shine)
        for plane, channel in zip(area, self._frame.scene.colours["lamp"], strict=True):
            screen(plane, light * np.float32(channel))
