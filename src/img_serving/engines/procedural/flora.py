"""What grows: woods, the dark firs that frame a lake, and the spikes that both (and grass) are made of."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from img_serving.engines.procedural.chance import key_of
from img_serving.engines.procedural.colours import BLACK, mix
from img_serving.engines.procedural.fields import Array, smooth
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.noise import draws, profile
from img_serving.engines.procedural.ranges import Range, depths, range_at

_SPIKES = 4096


def woods(frame: Frame, count: int) -> list[Range]:
    """`count` ranges of trees."""
    scene, ranges = frame.scene, []
    for i, (near, foot) in enumerate(depths(frame, count, scene.horizon + 0.02, 1.02)):
        x = frame.x * np.float32(1.1) + np.float32(scene.drift[0] + 1.9 * i)
        ground = profile(f"{scene.key}:wood{i}", x, min(0.4, frame.detail), octaves=4)
        tall = 0.07 + 0.17 * near * (0.5 if scene.water else 1.0)
        trees = spikes(frame, f"tree{i}", round(90 - 44 * near), tall, 0.17)
        crest = np.float32(foot) - ground * np.float32(0.05) - trees
        ranges.append(range_at(frame, crest, near, span=0.17 + 0.05 * near, relief=0.10 if near < 0.9 else 0.0))
    return ranges


def firs(frame: Frame) -> list[Range]:
    """Dark firs at both sides of the foreground: a frame."""
    scene = frame.scene
    out = np.abs(frame.x * np.float32(2.0 * frame.side / frame.width) + np.float32(scene.light[0] * 0.5))
    bank = smooth(0.25, 1.2, out) * np.float32(0.22)
    trees = spikes(frame, "frame", 46, 0.20, 0.16) * smooth(0.35, 0.75, out)
    rough = profile(f"{scene.key}:bank", frame.x * np.float32(2.0), frame.detail, octaves=7) * np.float32(0.02)
    crest = np.float32(1.06) - bank - trees - rough
    return [replace(range_at(frame, crest, 1.0, span=0.5), foot=mix(scene.colours["near"], BLACK, 0.4))]


def spikes(frame: Frame, name: str, count: int, tall: float, slim: float, *, serrated: bool = True) -> Array:
    """Trees (or grass) as a height over each column, in `v`: `count` to a shorter side, each at most `tall`."""
    count = max(3, round(count * frame.width / frame.side))
    drawn = draws(key_of(frame.scene.key, name), 2 * _SPIKES).reshape(2, _SPIKES)
    heights = np.zeros(frame.width, np.float32)
    for tree in range(count):
        # placed from the middle outwards, so that a wider picture has the same trees and more at its sides
        slot = (tree + 1) // 2 * (1 if tree % 2 else -1)
        jitter, size = float(drawn[0, tree % _SPIKES]), float(drawn[1, tree % _SPIKES])
        middle = frame.width / 2 + (slot + jitter * 1.6 - 0.8) / count * frame.width
        height = tall * (0.45 + 0.55 * size)
        half = height * slim * frame.height
        first, last = max(0, math.floor(middle - half)), min(frame.width, math.ceil(middle + half) + 1)
        if last <= first or half < 0.2:
            continue
        away = np.abs(np.arange(first, last, dtype=np.float32) + np.float32(0.5 - middle)) / np.float32(half)
        shape = 1.0 - away
        if serrated:
            twigs = away * np.float32(7.0) + np.float32(size)
            shape += (twigs - np.floor(twigs) - np.float32(0.5)) * np.float32(0.20 * min(1.0, frame.detail * 1.5))
        np.maximum(heights[first:last], shape * np.float32(height), out=heights[first:last])
    return heights
