"""The sky over land and water: its colours, the glow of the light, the Milky Way, clouds and aurora."""

from __future__ import annotations

import numpy as np

from img_serving.engines.procedural.chance import chance
from img_serving.engines.procedural.fields import Array, add, blend, cover, gradient, sample, screen, smooth, stretch
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.noise import profile


def sky(frame: Frame, rows: int) -> Array:
    """The first `rows` rows of the backdrop: [3, rows, columns]."""
    scene, colours = frame.scene, frame.scene.colours
    t = frame.gv[:rows] / np.float32(scene.horizon)
    stops = [(0.0, colours["top"]), (0.42, colours["mid"]), (0.80, colours["low"]), (1.0, colours["horizon"])]
    planes = np.repeat(gradient(t, stops), frame.columns, axis=2)
    x, y = frame.gx[None, :], frame.gv[:rows, None]
    down = np.float32(frame.height / frame.side)
    dx, dy = x - np.float32(scene.light[0]), (y - np.float32(scene.light[1])) * down
    if scene.sun or scene.moon or scene.time in {"dawn", "sunset", "dusk"}:
        _glow(frame, planes, dx, dy)
    if scene.stars > 0.5 and scene.time == "night" and scene.clouds < 0.9:
        _milky_way(frame, planes, x, y)
    if scene.clouds > 0.05:
        _clouds(frame, planes, dx, dy)
    if scene.aurora:
        _aurora(frame, planes, y)
    return planes


def _glow(frame: Frame, planes: Array, dx: Array, dy: Array) -> None:
    """The air around the light: a wide glow and a near one."""
    scene = frame.scene
    distance = dx * dx
    distance = distance * np.float32(0.45) + dy * dy
    wide = 0.10 if not scene.moon else 0.02
    glow = np.float32(wide) / (distance + np.float32(wide))
    near = np.float32(0.0035) / (distance + np.float32(0.0035))
    power = 0.62 if scene.sun else 0.34
    glow *= glow
    glow *= np.float32(power)
    glow += near * np.float32(0.5 if scene.sun else 0.38 if scene.moon else 0.0)
    np.minimum(glow, 1.0, out=glow)
    for plane, channel in zip(planes, scene.colours["glow"], strict=True):
        blend(plane, np.float32(channel), glow)


def _milky_way(frame: Frame, planes: Array, x: Array, y: Array) -> None:
    scene = frame.scene
    lean = np.float32(0.6 + 0.6 * chance("lean", scene.key))
    rows = planes.shape[1]
    grain = stretch(frame.tile("dust", gain=0.62), frame.gx * np.float32(0.8), frame.gy[:rows] * np.float32(0.8))
    across = (x * lean + (y - np.float32(0.28)) * np.float32(1.3)) + grain * np.float32(0.10)
    band = np.float32(0.018) / (across * across + np.float32(0.018))
    band *= band
    band *= np.clip(grain * np.float32(0.55) + np.float32(0.62), 0.0, 1.2)
    for plane, channel in zip(planes, (0.30, 0.34, 0.50), strict=True):
        add(plane, band * np.float32(channel * scene.stars))


def _clouds(frame: Frame, planes: Array, dx: Array, dy: Array) -> None:
    """A deck of clouds in perspective, lit from where the light is."""
    scene, colours = frame.scene, frame.scene.colours
    rows = planes.shape[1]
    t = np.minimum(frame.gv[:rows, None] / np.float32(scene.horizon), np.float32(1.0))
    depth = 1.0 / (1.16 - t)
    warp_x, warp_y = frame.warped(rows, 0.8)
    u = frame.gx[None, :] * (depth * np.float32(0.20)) + np.float32(scene.drift[0])
    u += warp_x
    v = warp_y
    v += depth * np.float32(0.42) + np.float32(scene.drift[1])
    density = sample(frame.tile("cloud", gain=0.56), u, v)
    edge = 0.30 - 0.95 * scene.clouds
    share = smooth(edge, edge + 0.70, density)
    lit = _cloud_light(frame, density, dx, dy)
    share *= np.float32(0.90) - t * t * np.float32(0.45)
    share *= smooth(0.03, 0.24, 1.0 - t)  # they melt into the haze: at the horizon they would be mere streaks
    for plane, light, shade in zip(planes, colours["lit"], colours["shade"], strict=True):
        colour = lit * np.float32(light - shade)
        colour += np.float32(shade)
        cover(plane, colour, share)


def _cloud_light(frame: Frame, density: Array, dx: Array, dy: Array) -> Array:
    """How brightly each point of a cloud is lit, 0 to 1: its slope towards the light, its depth, the light's nearness."""
    slope_x, slope_y = np.zeros_like(density), np.zeros_like(density)
    fine = np.float32(frame.rows / 512 * 2.2)
    np.subtract(density[:, 2:], density[:, :-2], out=slope_x[:, 1:-1])
    np.subtract(density[2:], density[:-2], out=slope_y[1:-1])
    # towards the light, from each point; the square root keeps it a direction
    reach = np.sqrt(dx * dx + dy * dy) + np.float32(0.15)
    lit: Array = slope_x * dx
    lit += slope_y * dy
    lit *= fine * np.float32(1.6)
    lit /= reach
    lit += np.float32(0.56)
    lit -= density * np.float32(0.30)
    near = np.float32(0.10) / (dx * dx + dy * dy + np.float32(0.10))
    lit += near * np.float32(0.35)
    np.clip(lit, 0.0, 1.0, out=lit)
    return lit


def _aurora(frame: Frame, planes: Array, y: Array) -> None:
    """Three curtains: sharp below, fading upwards, with rays along the field lines."""
    scene, colours = frame.scene, frame.scene.colours
    for curtain in range(3):
        name = f"{scene.key}:aurora{curtain}"
        line = profile(name, frame.gx * np.float32(0.9) + np.float32(scene.drift[0]), min(0.45, frame.detail))
        rays = profile(
            name + "rays", frame.gx * np.float32(5.0) + line * np.float32(2.0), frame.detail, gain=0.75, octaves=5
        )
        low = np.float32(scene.horizon * (0.46 + 0.17 * curtain)) + line * np.float32(0.17)
        above = low[None, :] - y
        tall = np.float32(scene.horizon) * (np.float32(0.52) + rays * np.float32(0.22))
        fade = 1.0 - above / tall[None, :]
        np.clip(fade, 0.0, 1.0, out=fade)
        fade *= fade
        fade *= np.clip(above * np.float32(38.0) + np.float32(0.6), 0.0, 1.0)
        fade *= np.clip(rays * np.float32(0.75) + np.float32(0.62), 0.05, 1.3)[None, :]
        fade *= np.float32(0.95 - 0.2 * curtain)
        turn = np.clip(above * np.float32(2.6), 0.0, 1.0)
        for plane, foot, crown in zip(planes, colours["aurora"], colours["aurora2"], strict=True):
            shine = turn * np.float32(crown - foot)
            shine += np.float32(foot)
            shine *= fade
            screen(plane, shine)
