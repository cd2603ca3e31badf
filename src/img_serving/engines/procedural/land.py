"""The land: which ranges a scene has, and the outlines of mountains, dunes, hills, coasts and beaches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from img_serving.engines.procedural.chance import chance
from img_serving.engines.procedural.city import skyline
from img_serving.engines.procedural.colours import mix
from img_serving.engines.procedural.fields import smooth
from img_serving.engines.procedural.flora import firs, spikes, woods
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.lighthouse import headland
from img_serving.engines.procedural.noise import profile
from img_serving.engines.procedural.ranges import Range, depths, range_at


def land(frame: Frame) -> tuple[list[Range], list[Range]]:
    """The ranges from far to near, and those that stand before the water."""
    scene = frame.scene
    if frame.open and scene.place != "sky":
        return [], []
    ranges: list[Range] = []
    fronts: list[Range] = []
    flat = "minimal" in scene.styles
    if "mountain" in scene.places:
        ranges += _mountains(frame, 3 if flat else 4 if len(scene.places) > 1 else 5)
    if "desert" in scene.places:
        ranges += _dunes(frame)
    if scene.places & {"hills", "flower"}:
        ranges += _hills(frame)
    if "city" in scene.places:
        ranges += skyline(frame)
    if "forest" in scene.places:
        ranges += woods(frame, 2 if scene.water or flat else 4)
    if not ranges and (not scene.water or chance("island", scene.key) < 0.6):
        ranges += _coast(frame)
    if scene.water and scene.beach:
        fronts += _beach(frame)
    elif scene.water and scene.places & {"forest", "mountain"} and not flat and not scene.lighthouse:
        fronts += firs(frame)
    if scene.lighthouse:
        fronts += headland(frame)
    return ranges, fronts


def _mountains(frame: Frame, count: int) -> list[Range]:
    scene = frame.scene
    ranges = []
    alone = scene.places <= {"mountain", "sky"}
    last = 0.97 if alone else scene.horizon + 0.05
    for i, (near, foot) in enumerate(depths(frame, count, scene.horizon - 0.05, last)):
        x = frame.x * np.float32(1.5 + 0.5 * near) + np.float32(scene.drift[0] * (0.4 + near) + 3.1 * i)
        gain = 0.46 * min(1.15, scene.rough)
        peaks = profile(f"{scene.key}:range{i}", x, frame.detail, octaves=8, ridged=True, gain=gain)
        middle = np.float32(0.55 * (chance("peak", scene.key, i) - 0.5))
        lone = 1.0 / (1.0 + (frame.x - middle) ** 2 * np.float32(3.0))
        tall = (0.50 - 0.30 * near) * (0.80 if scene.water else 1.0) * (1.0 if alone else 0.9)
        rolls = profile(f"{scene.key}:foot{i}", x, min(0.6, frame.detail), octaves=5) * np.float32(0.022)
        crest = (
            np.float32(foot - 0.012) - rolls - peaks * (np.float32(0.45) + lone * np.float32(0.65)) * np.float32(tall)
        )
        snow = 0.62 if scene.snow >= 1.0 else 0.40 if scene.snow and near < 0.6 else 0.0
        ranges.append(
            range_at(
                frame,
                crest,
                near,
                span=0.30 - 0.08 * near,
                relief=0.0 if "minimal" in scene.styles else 0.07 + 0.07 * near,
                snow=snow * (foot - float(crest.min())) * frame.height,
            )
        )
    return ranges


def _dunes(frame: Frame) -> list[Range]:
    """Each with one face in the light and one in the shadow."""
    scene, colours, ranges = frame.scene, frame.scene.colours, []
    for i, (near, foot) in enumerate(depths(frame, 5, scene.horizon + 0.01, 0.93)):
        x = frame.x * np.float32(1.5 - 0.5 * near) + np.float32(scene.drift[0] + 5.3 * i)
        swell = profile(f"{scene.key}:dune{i}", x, min(0.3, frame.detail), octaves=2, gain=0.25)
        edge = profile(f"{scene.key}:edge{i}", x + swell * np.float32(0.25), 0.2, octaves=1, ridged=True)
        crest = np.float32(foot) - swell * np.float32(0.03) - edge * np.float32(0.11 + 0.15 * near)
        dune = range_at(frame, crest, 0.25 + 0.75 * near, span=0.16 + 0.16 * near, colour="sand", relief=0.07)
        away = np.float32(frame.side * (1.0 if scene.light[0] > 0 else -1.0))
        face = smooth(-0.05, 0.25, -(np.gradient(crest).astype(np.float32) * away))
        top = mix(mix(dune.top, colours["glow"], 0.35 * (1.0 - near)), colours["sand"], 0.6)
        shadow = mix(colours["sand"], colours["near"], 0.30 + 0.42 * near)
        ranges.append(replace(dune, top=top, foot=shadow, face=face * np.float32(0.9)))
    return ranges


def _hills(frame: Frame) -> list[Range]:
    """Soft swells, the nearer ones with grass."""
    scene, ranges = frame.scene, []
    for i, (near, foot) in enumerate(depths(frame, 5, scene.horizon, 0.86)):
        x = frame.x * np.float32(1.25 - 0.5 * near) + np.float32(scene.drift[0] + 2.7 * i)
        swell = profile(f"{scene.key}:hill{i}", x, min(0.42, frame.detail), octaves=5, gain=0.36)
        crest = np.float32(foot) - swell * np.float32(0.075)
        if i >= 3:
            crest -= spikes(frame, f"grass{i}", 700, 0.012 + 0.02 * near, 0.22, serrated=False)
        ranges.append(range_at(frame, crest, near, span=0.26, colour="leaf", relief=0.07 + 0.08 * near))
    return ranges


def _coast(frame: Frame) -> list[Range]:
    scene, ranges = frame.scene, []
    for i, (near, foot) in enumerate(depths(frame, 2, scene.horizon - 0.004, 0.95)):
        x = frame.x * np.float32(0.8) + np.float32(scene.drift[0] + 7.7 * i)
        swell = profile(f"{scene.key}:coast{i}", x, frame.detail, octaves=7, gain=0.42)
        crest = np.float32(foot + 0.015) - np.maximum(swell - np.float32(0.12), np.float32(-0.2)) * np.float32(0.10)
        ranges.append(range_at(frame, crest, 0.25 + 0.3 * near, span=0.10))
    return ranges


def _beach(frame: Frame) -> list[Range]:
    """A line of foam and the sand behind it."""
    scene, colours = frame.scene, frame.scene.colours
    curve = profile(f"{scene.key}:beach", frame.x * np.float32(0.8), min(0.4, frame.detail), octaves=4, gain=0.3)
    out = frame.x / (np.abs(frame.x) + np.float32(1.0))  # levels off at the sides of a wide picture
    lean = np.float32(0.30 if scene.light[0] < 0 else -0.30)
    crest = np.float32(0.88) - curve * np.float32(0.05) - out * lean - out * out * np.float32(0.25)
    np.maximum(crest, np.float32(scene.horizon + 0.06), out=crest)
    fringe = profile(f"{scene.key}:foam", frame.x * np.float32(9.0), frame.detail, octaves=4) * np.float32(0.005)
    foam = range_at(frame, crest - np.float32(0.007) - fringe, 0.9, span=0.02, colour="snow")
    foam = replace(foam, top=mix(foam.top, colours["horizon"], 0.5), foot=colours["sand"], rim=False)
    sand = range_at(frame, crest, 0.9, span=0.22, colour="sand", relief=0.10)
    wet, dry = mix(colours["sand"], colours["mid"], 0.35), mix(colours["sand"], colours["glow"], 0.15)
    return [foam, replace(sand, top=wet, foot=dry, rim=False)]
