"""Pictures of nothing: folded silk in the colours of the words."""

from __future__ import annotations

import numpy as np

from img_serving.engines.procedural.fields import Array, add, gradient, sample
from img_serving.engines.procedural.frame import Frame

_ORDER = ("top", "mid", "low", "glow", "shade", "lit", "near", "low", "water", "top")
"""The colours along the height of the cloth; the last is the first, for it goes on."""


def silk(frame: Frame) -> Array:
    """Noise displaced by noise, coloured along its height and lit from one side: [3, rows, columns]."""
    scene, colours = frame.scene, frame.scene.colours
    warp_x, warp_y = frame.warped(frame.rows, 2.4)
    scale = np.float32(0.40 * scene.rough)
    u = warp_x + frame.gx[None, :] * scale + np.float32(scene.drift[0])
    v = warp_y + frame.gy[:, None] * scale + np.float32(scene.drift[1])
    cloth = frame.tile("cloth", gain=0.40, coarsest=2)
    first = sample(cloth, u, v)
    u += first * np.float32(0.16)
    v -= first * np.float32(0.12)
    value = sample(cloth, v + np.float32(0.41), u)
    value *= np.float32(0.75)
    value += first * np.float32(0.45)
    ramp = gradient(
        np.arange(1024, dtype=np.float32) / np.float32(1024),
        [(place / (len(_ORDER) - 1), colours[role]) for place, role in enumerate(_ORDER)],
    )[:, :, 0]
    height = value * np.float32(0.95 + 0.25 * scene.force) + np.float32(scene.drift[0] + 4.0)
    index = (height * 1024).astype(np.intp) & 1023
    slope = np.zeros_like(value)
    np.subtract(value[1:, 1:], value[:-1, :-1], out=slope[1:, 1:])
    slope *= np.float32(frame.rows / 512 * 13.0)
    np.clip(slope, -0.75, 0.75, out=slope)
    shine = np.maximum(slope - np.float32(0.22), 0.0)
    shine *= shine
    slope *= np.float32(0.55)
    slope += 1.0
    planes = np.empty((3, frame.rows, frame.columns), np.float32)
    for plane, channel in zip(planes, ramp, strict=True):
        channel.take(index, out=plane, mode="clip")
        np.multiply(plane, slope, out=plane)
        add(plane, shine)
    return planes
