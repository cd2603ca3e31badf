"""Variations: the same picture in another mood and a little elsewhere; the seed says which mood and where to."""

from __future__ import annotations

import math

import numpy as np

from img_serving.engines.procedural.canvas import Pause
from img_serving.engines.procedural.chance import chance
from img_serving.engines.procedural.fields import Array, averaged, lerp, stretch
from img_serving.engines.procedural.noise import tile
from img_serving.engines.procedural.start import Start
from img_serving.engines.procedural.steps import Latent

_REACH = 0.06
"""How far a point wanders at full strength, in shorter sides (root of the mean square)."""

_SWEEP = 5
"""Of the flow's 64 points: what turns within so few is smoothed away."""

_BAND = 64
_LUMA = (0.299, 0.587, 0.114)


def varied(start: Start, latent: Latent, key: str, strength: float, pause: Pause) -> Array:
    """A variation: uint8 [height, width, 3]. The latent's flow carries its points; colours and light turn a little.

    `key` is the seed's; strength 0 is the picture itself. What a mask keeps stays, to the last bit.
    """
    ground = start.ground
    if strength <= 0.0:
        return ground
    height, width = ground.shape[:2]
    matrix, lift = _mood(key, strength)
    light = tile(f"{key}:light", 64, 0.4, gain=0.4, coarsest=4)
    x, y = _paths(latent, width, height, strength)
    flat = ground.reshape(-1, 3)
    picture = np.empty_like(ground)
    for first in range(0, height, _BAND):
        pause()
        last = min(height, first + _BAND)
        across = np.arange(width, dtype=np.float32) + _rows(x, first, last, height)
        down = np.arange(first, last, dtype=np.float32)[:, None] + _rows(y, first, last, height)
        moved = _sampled(flat, width, _mirrored(across, width), _mirrored(down, height))
        band = _recoloured(moved, matrix, lift)
        band *= 1.0 + _lit(light, first, last, width, height)[:, :, None] * np.float32(0.34 * strength)
        np.copyto(picture[first:last], np.clip(band + np.float32(0.5), 0.0, 255.0), casting="unsafe")
    if start.area is not None:
        np.copyto(picture, ground, where=(start.area == 0)[:, :, None])
    return picture


def _paths(latent: Latent, width: int, height: int, strength: float) -> tuple[Array, Array]:
    """How far each point is carried, in pixels: two fields on the latent's own rows, [rows, width]."""
    side = min(width, height)
    # only the flow's broad sweeps: things are to bend, and not to fray
    broad = [averaged(one, _SWEEP, wraps=True) for one in latent.warp]
    speeds = [averaged(one, _SWEEP, wraps=True).reshape(-1).tolist() for one in latent.velocity]
    spread = math.sqrt(math.fsum(one * one for one in (*speeds[0], *speeds[1])) / (2 * latent.SIZE**2))
    # the flow's whole way, after its last step, is about this long
    reach = _REACH * strength * side / max(1e-6, spread * latent.stride * latent.steps)
    columns = (np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2)) * np.float32(0.5 / side)
    at = (columns + np.float32(0.5)) * np.float32(latent.SIZE)
    across, down = (lerp(warp, at, 1) * np.float32(reach) for warp in broad)
    return across, down


def _rows(field: Array, first: int, last: int, height: int) -> Array:
    """A band of a field that is known on the latent's rows."""
    side = min(height, field.shape[1])
    rows = (np.arange(first, last, dtype=np.float32) + np.float32(0.5 - height / 2)) * np.float32(0.5 / side)
    return lerp(field, (rows + np.float32(0.5)) * np.float32(field.shape[0]), 0)


def _sampled(flat: Array, width: int, x: Array, y: Array) -> Array:
    """The picture at points inside it, bilinear: float32 [rows, width, 3]. The points are used up."""
    height = len(flat) // width
    left, top = np.floor(x), np.floor(y)
    x -= left
    y -= top
    column, row = left.astype(np.intp), top.astype(np.intp)
    beside, below = np.minimum(column + 1, width - 1), np.minimum(row + 1, height - 1) * width
    row *= width
    x, y = x[:, :, None], y[:, :, None]
    upper = flat.take(row + column, 0).astype(np.float32)
    upper += (flat.take(row + beside, 0) - upper) * x
    lower = flat.take(below + column, 0).astype(np.float32)
    lower += (flat.take(below + beside, 0) - lower) * x
    upper += (lower - upper) * y
    return upper


def _mirrored(at: Array, count: int) -> Array:
    """Points between 0 and `count - 1`: what lies beyond a border is mirrored at it."""
    last = np.float32(count - 1)
    folded = np.abs(at)
    folded = last - np.abs(last - folded)
    return np.clip(folded, 0.0, last)


Rows = tuple[tuple[float, float, float], ...]


def _recoloured(pixels: Array, matrix: Rows, lift: float) -> Array:
    """Each new channel a sum of the old ones: by hand, for a library's matrix product rounds as the processor likes."""
    out = np.empty_like(pixels)
    for channel, weights in enumerate(matrix):
        new = out[:, :, channel]
        np.multiply(pixels[:, :, 0], np.float32(weights[0]), out=new)
        new += pixels[:, :, 1] * np.float32(weights[1])
        new += pixels[:, :, 2] * np.float32(weights[2])
        new += np.float32(lift)
    return out


def _mood(key: str, strength: float) -> tuple[Rows, float]:
    """How colours change: what each new channel takes of the old ones, and what is added."""

    def draw(name: str) -> float:
        return (2.0 * chance(key, "mood", name) - 1.0) * strength

    hue = _turned(0.34 * draw("hue"))
    saturation = 1.0 + 0.5 * draw("saturation")
    contrast = 1.0 + 0.3 * draw("contrast")
    warmth, exposure = 0.16 * draw("warmth"), 1.0 + 0.12 * draw("exposure")
    gains = (1.0 + warmth, 1.0 + 0.25 * warmth, 1.0 - warmth)
    rows = []
    for channel, gain in enumerate(gains):
        row = [
            weight * saturation + luma * (1.0 - saturation) for weight, luma in zip(hue[channel], _LUMA, strict=True)
        ]
        scale = gain * exposure * contrast
        rows.append((row[0] * scale, row[1] * scale, row[2] * scale))
    return tuple(rows), 127.5 * (1.0 - contrast)


def _turned(half: float) -> Rows:
    """Hues turned about the grey axis, by the angle whose half has this tangent (so neither sine nor cosine is needed)."""
    square = half * half
    cosine, sine = (1.0 - square) / (1.0 + square), 2.0 * half / (1.0 + square)
    third, root = (1.0 - cosine) / 3.0, sine * math.sqrt(1.0 / 3.0)
    same, plus, minus = cosine + third, third + root, third - root
    return ((same, minus, plus), (plus, same, minus), (minus, plus, same))


def _lit(light: Array, first: int, last: int, width: int, height: int) -> Array:
    """Broad light and shade over a band, about -1 to 1: [rows, width]."""
    side = np.float32(0.25 / min(width, height))
    u = (np.arange(width, dtype=np.float32) + np.float32(0.5)) * side
    v = (np.arange(first, last, dtype=np.float32) + np.float32(0.5)) * side
    return stretch(light, u, v)
