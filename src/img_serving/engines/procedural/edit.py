"""Editing: carries what the words show into a picture, which keeps its lines; under a mask it is painted over instead.

A picture and the scene of the words are each taken apart into broad light and what lies on top of it (edges, texture). Their
light is mixed first, so the scene's hour and colours come over the picture, then as much of both tops as the strength says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from img_serving.engines.procedural.canvas import Pause
from img_serving.engines.procedural.fields import Array, averaged, smooth
from img_serving.engines.procedural.start import Start, resized

DEFAULT_STRENGTH = 0.75

_LIGHT_CELLS = 14
"""Broad light has so many cells on the shorter side."""

_FLAT_CELLS = 72
"""How busy a place is, is known in so many cells on the shorter side."""

_BAND = 64


@dataclass(frozen=True, slots=True)
class _Shares:
    """How much of what: the scene's light (0 to 1), the picture's own top, and the scene's."""

    light: float
    own: float
    scene: float


def shares(strength: float, *, masked: bool) -> _Shares:
    """Without a mask the picture's lines stay up to high strengths; under one, little is left of what is painted over."""
    left = 1.0 - strength
    if masked:
        return _Shares(1.0 - left * left, left * left, 1.0 - left * left)
    return _Shares(strength, 1.0 - strength * strength * strength, strength * strength)


def edited(start: Start, scene: Array, strength: float, pause: Pause) -> Array:
    """The picture with the scene in it: uint8 [height, width, 3]. Strength 0 is the picture, 1 is the scene.

    `scene` has the picture's size. What the mask keeps is the first picture's, to the last bit, whatever the strength.
    """
    if strength <= 0.0 or (start.area is not None and not start.area.any()):
        return start.ground
    share = shares(strength, masked=start.area is not None)
    ground = _with_further(start, strength)
    own_light, light = _light(ground), _light(scene)
    pause()
    calm = _calm(ground, own_light)
    soft = None if start.area is None else _inward(start.area)
    picture = np.empty_like(start.ground)
    for first in range(0, len(picture), _BAND):
        pause()
        rows = slice(first, first + _BAND)
        kept = None if start.cover is None else start.cover[rows].astype(np.float32) * np.float32(1 / 255)
        # on a busy place the scene's lines would be one too many, on a calm one (a sky, a wall) they are what is new
        scene_top = np.float32(share.scene) * (calm[rows] + (np.float32(1.0) - calm[rows]) * np.float32(share.scene))
        light_share = np.full_like(scene_top, share.light)
        own_top = np.full_like(scene_top, share.own)
        if kept is not None:
            light_share *= np.float32(1.0) - kept * np.float32(0.6)
            scene_top *= np.float32(1.0) - kept * np.float32(0.8)
            own_top += kept * (np.float32(0.9) - own_top) * np.float32(share.own < 0.9)
        band = _mixed(ground[rows], own_light[rows], scene[rows], light[rows], (light_share, own_top, scene_top))
        if soft is not None:
            base = start.ground[rows].astype(np.float32)
            band = base + (band - base) * soft[rows][:, :, None]
        np.copyto(picture[rows], np.clip(band + np.float32(0.5), 0.0, 255.0), casting="unsafe")
    if start.area is not None:
        np.copyto(picture, start.ground, where=(start.area == 0)[:, :, None])
    return picture


def _mixed(own: Array, own_light: Array, scene: Array, light: Array, by: tuple[Array, Array, Array]) -> Array:
    light_share, own_top, scene_top = (one[:, :, None] for one in by)
    below = own_light.astype(np.float32)
    above = light.astype(np.float32)
    mixed: Array = below + (above - below) * light_share
    mixed += (own.astype(np.float32) - below) * own_top
    mixed += (scene.astype(np.float32) - above) * scene_top
    return mixed


def _with_further(start: Start, strength: float) -> Array:
    """The ground with the further pictures on it, which fade in with the strength: at half of it they are there."""
    if start.further is None or start.cover is None:
        return start.ground
    ground = start.ground.astype(np.float32)
    seen = start.cover.astype(np.float32) * np.float32(min(1.0, 2.0 * strength) / 255)
    ground += (start.further.astype(np.float32) - ground) * seen[:, :, None]
    return (ground + np.float32(0.5)).astype(np.uint8)


def _cells(shape: tuple[int, ...], count: int) -> tuple[int, int]:
    """Columns and rows of a grid with `count` cells on the shorter side."""
    height, width = shape[:2]
    scale = min(1.0, count / min(width, height))
    return max(2, round(width * scale)), max(2, round(height * scale))


def _light(pixels: Array) -> Array:
    """Broad light: what is left of a picture that is shrunk to a few cells and widened again."""
    height, width = pixels.shape[:2]
    return resized(resized(pixels, *_cells(pixels.shape, _LIGHT_CELLS), coarsely=True), width, height)


def _calm(pixels: Array, light: Array) -> Array:
    """How calm each place is, float32 [height, width]: 1 where nothing lies on the broad light, towards 0 where much does."""
    height, width = pixels.shape[:2]
    # in green alone, which is most of what an eye sees of brightness
    busy = np.abs(pixels[:, :, 1].astype(np.int16) - light[:, :, 1]).astype(np.uint8)
    spread = resized(resized(busy, *_cells(pixels.shape, _FLAT_CELLS), coarsely=True), width, height)
    return np.float32(1.0) - smooth(4.0, 30.0, spread.astype(np.float32))


def _inward(area: Array) -> Array:
    """The mask, 0 to 1, rising softly from its edge: what is painted must not look cut out. It never grows.

    It begins at a half, or what is thinner than the edge is soft would vanish.
    """
    height, width = area.shape
    inside = averaged((area > 0).astype(np.float32), max(1, min(height, width) // 100))
    soft = np.maximum(smooth(0.0, 1.0, inside), np.float32(0.5))
    soft *= area.astype(np.float32) * np.float32(1 / 255)
    return soft
