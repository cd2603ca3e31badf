"""Ranges of land: outlines with colours below them, from far to near, and how they are laid over a band of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from img_serving.engines.procedural.colours import Colour, mix
from img_serving.engines.procedural.fields import Array, blend, cover, lerp
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.windows import Windows


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """One range of land, in front of what was drawn before.

    `crest` [w]: its outline, in rows. Colours run from `top` to `foot` within `span` rows below the outline. `relief` is
    how strongly the ground's light and shadow show; `snow` how far below the highest top (rows) snow lies; `rim` whether
    the outline glows. `face` [w]: how much of the ground below lies in shadow.
    """

    crest: Array
    top: Colour
    foot: Colour
    span: float
    relief: float = 0.0
    snow: float = 0.0
    rim: bool = False
    face: Array | None = None
    windows: Windows | None = None

    @property
    def uneven(self) -> bool:
        """Whether it needs the ground's light and shadow."""
        return bool(self.relief or self.snow)

    def hides(self, first: int) -> bool:
        """Whether nothing behind it shows from row `first` on."""
        return float(self.crest.max()) + 1.0 <= first


def depths(frame: Frame, count: int, first: float, last: float) -> list[tuple[float, float]]:
    """For each range from far to near: nearness (0 to 1), and the height `v` of its foot."""
    last = min(last, frame.scene.horizon + 0.004) if frame.scene.water else last
    first = min(first, last)
    return [(i / max(1, count - 1), first + (last - first) * (i / max(1, count - 1)) ** 2) for i in range(count)]


def range_at(frame: Frame, crest: Array, near: float, *, span: float, colour: str = "near", **more: Any) -> Range:
    """A range with its outline and its span in `v`; the farther, the more it takes the colour of the air."""
    scene, colours = frame.scene, frame.scene.colours
    top = mix(colours["far"], colours[colour], near)
    air = mix(colours["horizon"], colours["low"], 0.35)
    if scene.snow >= 1.0 and not more.get("windows"):
        top = mix(top, colours["snow"], 0.62)
    top = mix(top, air, 0.30 * (1.0 - near))
    foot = mix(top, air, (0.25 + 0.6 * scene.mist) * (1.0 - 0.80 * near))
    return Range(crest * np.float32(frame.height), top, foot, span * frame.height, rim="neon" in scene.styles, **more)


@dataclass(frozen=True, slots=True, eq=False)
class _Coat:
    """One more colour on a range: how much of it lies where, and how bright it is there (None: everywhere the same)."""

    colour: Colour
    share: Array
    tone: Array | None = None


class Ground:
    """What lays ranges over bands of rows."""

    def __init__(self, frame: Frame, ranges: Sequence[Range]) -> None:
        """`ranges` are all that will be laid."""
        self._frame = frame
        self._relief = _relief(frame) if any(one.uneven for one in ranges) else None

    def lay(self, planes: Array, ranges: Sequence[Range], first: int, last: int) -> None:
        """Lay ranges, the farthest first, over [3, rows, width]: rows `first` to `last`."""
        start = max((i for i, one in enumerate(ranges) if one.hides(first)), default=0)
        y = np.arange(first, last, dtype=np.float32)[:, None] + np.float32(0.5)
        for number in range(start, len(ranges)):
            if float(ranges[number].crest.min()) <= last + 1:
                self._lay_one(planes, ranges[number], y, number)

    def _lay_one(self, planes: Array, one: Range, y: Array, number: int) -> None:
        below = y - one.crest
        mask = np.clip(below + np.float32(0.5), 0.0, 1.0)
        t = below * np.float32(1.0 / one.span)
        np.clip(t, 0.0, 1.0, out=t)
        first = int(y[0, 0])
        light = self._light(first, first + len(y), number) if one.uneven else None
        face = None if one.face is None else self._face(one.face, below, t)
        coats = self._coats(one, y, below, light, number)
        for channel, (plane, top, foot) in enumerate(zip(planes, one.top, one.foot, strict=True)):
            colour = t * np.float32(foot - top)
            colour += np.float32(top)
            if face is not None:
                blend(colour, np.float32(foot * 0.8), face)
            if light is not None and one.relief:
                colour *= light * np.float32(one.relief) + 1.0
            for coat in coats:
                shown = np.float32(coat.colour[channel])
                blend(colour, shown if coat.tone is None else coat.tone * shown, coat.share)
            cover(plane, colour, mask)

    def _light(self, first: int, last: int, shift: int) -> Array | None:
        """Light and shadow of the ground in a band, for each range another stretch of it."""
        if self._relief is None:
            return None
        frame = self._frame
        at = (frame.y[first:last] + np.float32(8.0 + 0.37 * shift)) * np.float32(0.9 * frame.tile_size)
        return lerp(self._relief, at, 0)

    def _coats(self, one: Range, y: Array, below: Array, light: Array | None, number: int) -> list[_Coat]:
        """Snow, lit windows and the glowing outline, in this order."""
        frame, colours = self._frame, self._frame.scene.colours
        coats: list[_Coat] = []
        if one.snow and light is not None:
            snow = (np.float32(one.crest.min() + one.snow) - y) * np.float32(1.0 / one.snow)
            snow = snow - below * np.float32(0.9 / one.snow)
            snow = light * np.float32(0.85) + snow
            snow *= np.float32(3.0)
            np.clip(snow, 0.0, 0.95, out=snow)
            coats.append(_Coat(colours["snow"], snow, light * np.float32(0.22) + np.float32(0.80)))
        if one.windows is not None:
            first = int(y[0, 0])
            lamps = one.windows.lamps(frame, below, first, first + len(y))
            coats += [_Coat(colours["window"], lamps[0]), _Coat(colours["window2"], lamps[1])]
        if one.rim:
            rim = np.clip(1.0 - np.abs(below) * np.float32(380.0 / frame.height), 0.0, 1.0)
            coats.append(_Coat(colours["window2" if number % 2 else "window"], rim))
        return coats

    def _face(self, face: Array, below: Array, t: Array) -> Array:
        """Shadow on the ground of this band: from the outline it runs down at a slant, away from the light, and fades."""
        slant = 1.1 if self._frame.scene.light[0] > 0 else -1.1
        at = np.arange(self._frame.width, dtype=np.float32) + np.maximum(below, 0.0) * np.float32(slant)
        np.clip(at, 0.0, self._frame.width - 1.0, out=at)
        shadow = face.take(at.astype(np.intp), mode="clip")
        shadow *= 1.0 - t
        return shadow


def _relief(frame: Frame) -> Array:
    """Light and shadow of the ground, [tile, width], to be read with rows wrapping around."""
    ridges = np.abs(frame.tile("relief", gain=0.52, coarsest=8))
    step = max(1, frame.tile_size // 128)
    slope = ridges - np.roll(ridges, (step, step if frame.scene.light[0] < 0 else -step), (0, 1))
    slope *= np.float32(2.6)
    np.clip(slope, -1.0, 1.0, out=slope)
    return lerp(slope, (frame.x + np.float32(8.0)) * np.float32(0.9 * frame.tile_size), 1)
