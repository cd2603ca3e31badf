"""Noise: lattices, fractal tiles that wrap around, and outlines of hills, all from named streams of random numbers."""

from __future__ import annotations

import numpy as np

from img_serving.engines.procedural.chance import key_of
from img_serving.engines.procedural.fields import Array


def draws(key: bytes, count: int) -> Array:
    """Random numbers, float32 [count] in [0, 1): 16 bits each of the raw PCG64 stream, which numpy promises to keep."""
    raw = np.random.PCG64(int.from_bytes(key, "little")).random_raw((count + 3) // 4)
    return np.asarray(raw, "<u8").view("<u2")[:count] * np.float32(1 / 65536)


def lattice(key: bytes, size: int) -> Array:
    """White noise, [size, size] in [-1, 1)."""
    grid = draws(key, size * size).reshape(size, size)
    grid *= 2.0
    grid -= 1.0
    return grid


def _double(grid: Array) -> Array:
    """Twice the size by the quadratic B-spline (weights 3/4 and 1/4), wrapping around."""
    for axis in (0, 1):
        shape = list(grid.shape)
        shape[axis] *= 2
        out = np.empty(shape, np.float32)
        own = grid * np.float32(0.75)
        grid = grid * np.float32(0.25)
        even, odd = (out[0::2], out[1::2]) if axis == 0 else (out[:, 0::2], out[:, 1::2])
        np.add(own, np.roll(grid, 1, axis), out=even)
        np.add(own, np.roll(grid, -1, axis), out=odd)
        grid = out
    return grid


def tile(key: str, size: int, detail: float, *, gain: float = 0.55, coarsest: int = 4) -> Array:
    """Fractal noise that wraps around, [size, size], about -1 to 1.

    Each octave has a stream of its own: a larger tile is the same noise with more detail. `detail` (0 to 1) says how many
    octaves are there yet.
    """
    grid = lattice(key_of(key, coarsest), coarsest)
    amplitude, octave = 1.0, 0
    while grid.shape[0] < size:
        grid = _double(grid)
        amplitude *= gain
        octave += 1
        weight = min(1.0, max(0.0, detail * 8.0 + 1.0 - octave))
        if weight:
            noise = lattice(key_of(key, grid.shape[0]), grid.shape[0])
            noise *= amplitude * weight
            grid += noise
    grid *= 1.15
    return grid


def profile(key: str, x: Array, detail: float, *, octaves: int = 7, ridged: bool = False, gain: float = 0.5) -> Array:
    """A line of hills over x [w], about -1 to 1 (ridged: 0 to 1, with sharp tops). One unit of x is one large hill."""
    total = np.zeros_like(x)
    weight: Array | float = 1.0
    amplitude = 1.0
    for octave in range(octaves):
        share = min(1.0, max(0.0, detail * octaves + 1.0 - octave))
        if not share:
            break
        lattice = draws(key_of(key, octave), 256)
        at = x * np.float32(2**octave) + np.float32(17.3 * octave + 64.0)
        low = np.floor(at)
        part = at - low
        if not ridged:
            part = part * part * (3.0 - 2.0 * part)
        index = low.astype(np.intp) & 255
        first = lattice.take(index)
        value = first + (lattice.take((index + 1) & 255) - first) * part
        value = value * 2.0 - 1.0
        if ridged:
            value = 1.0 - np.abs(value)
            value *= value * weight
            weight = np.minimum(value * 1.6, 1.0)
        total += value * np.float32(amplitude * share)
        amplitude *= gain
    return total * np.float32(0.6)
