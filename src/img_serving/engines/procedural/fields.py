"""Arithmetic on fields (float32 arrays): interpolation on wrapped grids, soft steps, gradients and mixing in place.

It keeps to operations that IEEE 754 rounds exactly (no sine, no power), so equal inputs give equal bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from img_serving.engines.procedural.colours import Colour

Array = npt.NDArray[Any]


def centres(count: int) -> Array:
    """The middles of `count` equal cells between 0 and 1, [count]."""
    return (np.arange(count, dtype=np.float32) + np.float32(0.5)) / np.float32(count)


def sample(tile: Array, u: Array, v: Array) -> Array:
    """The tile at (u, v), any shape, in units of the tile, wrapping around; bilinear."""
    size = tile.shape[0]
    x, y = u * np.float32(size), v * np.float32(size)
    left, top = np.floor(x), np.floor(y)
    x -= left
    y -= top
    column, row = left.astype(np.intp), top.astype(np.intp)
    column &= size - 1
    row &= size - 1
    row *= size
    beside = (column + 1) & (size - 1)
    below = (row + size) & (size * size - 1)
    flat = tile.reshape(-1)
    upper, lower = flat.take(row + column, mode="clip"), flat.take(below + column, mode="clip")
    upper += (flat.take(row + beside, mode="clip") - upper) * x
    lower += (flat.take(below + beside, mode="clip") - lower) * x
    lower -= upper
    lower *= y
    upper += lower
    return upper


def stretch(tile: Array, u: Array, v: Array) -> Array:
    """The wrapped tile on a grid of columns u [w] and rows v [h]: [h, w]. Separable, so cheaper than `sample`."""
    return lerp(lerp(tile, v * np.float32(tile.shape[0]), 0), u * np.float32(tile.shape[1]), 1)


def lerp(grid: Array, at: Array, axis: int) -> Array:
    """Linear interpolation at positions `at` (in cells) along an axis, wrapping around."""
    size = grid.shape[axis]
    low = np.floor(at)
    share = (at - low).astype(np.float32)
    index = low.astype(np.intp) % size
    if axis == 0:
        share = share[:, None]
    first: Array = grid.take(index, axis, mode="clip")
    second = grid.take((index + 1) % size, axis, mode="clip")
    second -= first
    second *= share
    first += second
    return first


def averaged(field: Array, reach: int, *, wraps: bool = False) -> Array:
    """The mean over a square of `2 * reach + 1` points; beyond its border a field goes on as at its edge, or around it."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (reach + 1, reach)
        padded = np.pad(field, padding, mode="wrap" if wraps else "edge")
        sums = np.cumsum(padded, axis=axis, dtype=np.float64)
        count = field.shape[axis]
        high = np.take(sums, range(2 * reach + 1, 2 * reach + 1 + count), axis=axis)
        low = np.take(sums, range(count), axis=axis)
        field = ((high - low) / (2 * reach + 1)).astype(np.float32)
    return field


def smooth(low: float, high: float, x: Array) -> Array:
    """0 below `low`, 1 above `high`, an S between; a new array."""
    t: Array = (x - np.float32(low)) * np.float32(1.0 / (high - low))
    np.clip(t, 0.0, 1.0, out=t)
    smooth: Array = t * t * (3.0 - 2.0 * t)
    return smooth


def gradient(at: Array, stops: Sequence[tuple[float, Colour]]) -> Array:
    """Colours along `at` [n]: [3, n, 1]."""
    places = [place for place, _ in stops]
    planes = [np.interp(at, places, [colour[channel] for _, colour in stops]) for channel in range(3)]
    return np.stack(planes).astype(np.float32)[:, :, None]


def blend(plane: Array, colour: Array | np.float32, share: Array) -> None:
    """Carry a plane `share` of the way towards a colour, in place."""
    way = colour - plane
    way *= share
    plane += way


def cover(plane: Array, colour: Array, share: Array) -> None:
    """Like `blend`, but uses up `colour`, which has the plane's shape."""
    colour -= plane
    colour *= share
    plane += colour


def add(plane: Array, light: Array) -> None:
    """Add light, in place."""
    plane += light


def screen(plane: Array, light: Array) -> None:
    """Add light where it is still dark, in place: what is white already stays white."""
    plane += light * (1.0 - plane)
