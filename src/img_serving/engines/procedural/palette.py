"""The palette: the colour of every role in a scene, from the time of day, the words, what is unwanted, and guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from colorsys import hsv_to_rgb

from img_serving.engines.procedural.chance import chance
from img_serving.engines.procedural.colours import BLACK, Colour, distance, light_of, mix, rgb, tint, turn
from img_serving.engines.procedural.lexicon import HUES, STOP_WORDS
from img_serving.engines.procedural.words import Reading

_ROLES = ("top", "mid", "low", "horizon", "glow", "lit", "shade", "far", "near", "water")
_TIME_COLOURS: dict[str, tuple[str, ...]] = {
    # in the order of _ROLES: the sky from its top to the horizon, light, cloud in light and shade, land far and near, water
    "day": ("2263b5", "5b9bdb", "a9d0ee", "e6f1f2", "fff4d8", "ffffff", "9fb4d0", "8fb0c4", "1f4238", "2a6f8f"),
    "dawn": ("3a5fa8", "8f93d6", "f7a9a8", "ffdca8", "ffedc2", "ffd3bd", "8b7fc0", "a58cc0", "232a52", "5f83b8"),
    "sunset": ("2b2359", "8d3b74", "f0744f", "ffc46b", "ffd98f", "ff9a6b", "6a3569", "9a5072", "1b0f2a", "5a3a63"),
    "dusk": ("131a47", "3d3b82", "a3659b", "f2a58c", "ffc9a3", "c184a8", "2f2d66", "5c5590", "0f1230", "333a70"),
    "night": ("050a1f", "0d1c42", "1c3763", "35598a", "dfeaff", "5b79a6", "142446", "274468", "050b18", "10284a"),
    "neon": ("0b0224", "2c0750", "a3137f", "ff4f9a", "ffb03b", "ff5fc4", "35105f", "4d1d86", "070114", "2b0a55"),
    "space": ("03030c", "070718", "0a0a22", "0d0d2b", "fff1dc", "7d6bd0", "17103a", "2c2352", "06050f", "10103a"),
}
_EXTRA_COLOURS = {
    "flower": "ef5f8a",
    "flower2": "ffd166",
    "aurora": "3df0a2",
    "aurora2": "9a5cff",
    "moon": "f6f1de",
    "sun": "fff3cf",
    "window": "ffd58a",
    "window2": "9fd8ff",
    "sand": "e8b878",
    "snow": "f3f7ff",
    "leaf": "2f6b3a",
    "planet": "d99a6c",
    "tower": "f4efe4",
    "band": "c2352c",
    "lamp": "ffdf95",
}
_TARGETS = {
    # which colour roles a colour word reaches when it stands before one of these nouns
    "lighthouse": ("band",),
    "sky": ("top", "mid", "low", "lit"),
    "sea": ("water",),
    "lake": ("water",),
    "mountain": ("far", "near"),
    "hills": ("far", "near", "leaf"),
    "forest": ("far", "near", "leaf"),
    "city": ("window", "window2", "near"),
    "desert": ("sand", "far", "near"),
    "flower": ("flower", "flower2"),
    "moon": ("moon", "glow"),
    "sun": ("sun", "glow", "horizon"),
    "stars": ("glow",),
    "aurora": ("aurora", "aurora2"),
    "clouds": ("lit", "shade"),
    "planet": ("planet",),
    "space": ("lit", "shade", "mid"),
    "sunset": ("low", "horizon", "glow", "lit"),
    "dawn": ("low", "horizon", "glow", "lit"),
    "night": ("top", "mid"),
}

_PAINTED = (
    "mid",
    "low",
    "far",
    "lit",
    "horizon",
    "near",
    "top",
    "glow",
    "water",
    "shade",
    "flower",
    "leaf",
    "sand",
    "aurora",
)
"""The roles that colour words without a noun share, so ordered that neighbours in a picture take different colours."""
_LEANING = (("top", "mid", "water"), ("low", "glow", "lit", "horizon"), ("far", "near", "leaf", "shade"))
"""What a word outside the lexicon leans: one of these groups."""


def palette(reading: Reading, time: str, styles: frozenset[str], force: float, seed: int) -> dict[str, Colour]:
    """The colour of every role: the time's, leaned by words, turned away from what is unwanted, graded by guidance."""
    colours = _by_time(reading, time, styles, seed)
    bend = 0.05 * (chance("turn", reading.text) - 0.5) + 0.05 * (chance("turn", seed) - 0.5)
    if reading.against:
        bend += math.copysign(0.018 + 0.03 * chance("away", reading.against), chance("side", reading.against) - 0.5)
    colours = {role: turn(colour, bend) for role, colour in colours.items()}
    _lean(colours, reading, force)
    return {role: _grade(colour, reading.unwanted, styles, force) for role, colour in colours.items()}


def _by_time(reading: Reading, time: str, styles: frozenset[str], seed: int) -> dict[str, Colour]:
    """The colours of the hour, before any word has leaned them."""
    names = _TIME_COLOURS["neon" if "neon" in styles and time != "space" else time]
    colours = {role: rgb(code) for role, code in zip(_ROLES, names, strict=True)}
    colours |= {role: rgb(code) for role, code in _EXTRA_COLOURS.items()}
    if "neon" in styles:
        colours |= {"window": rgb("ff5fd2"), "window2": rgb("3df2ff"), "sand": rgb("5a1d86"), "leaf": rgb("35107a")}
    if time == "space":  # every nebula has two colours of its own
        hue = chance("nebula", seed, reading.text)
        colours["lit"] = hsv_to_rgb(hue, 0.62, 0.95)
        colours["shade"] = hsv_to_rgb((hue + 0.22 + 0.3 * chance("nebula 2", seed)) % 1.0, 0.75, 0.55)
        colours["planet"] = hsv_to_rgb((hue + 0.45) % 1.0, 0.45, 0.9)
    dim = {"night": 0.05, "dusk": 0.58, "sunset": 0.75, "dawn": 0.85, "neon": 0.4}.get(time, 1.0)
    for role in (
        "flower",
        "flower2",
        "sand",
        "snow",
        "leaf",
        "tower",
        "band",
    ):  # what is lit by the sky takes the sky's colour
        light = 0.28 + 0.72 * max(dim, 0.45 if role == "snow" else 0.0)
        lit = mix(BLACK, colours[role], light)
        colours[role] = mix(
            lit, colours["lit" if role == "snow" else "mid"], (0.55 if role == "snow" else 0.22) * (1.1 - dim)
        )
    return colours


def _lean(colours: dict[str, Colour], reading: Reading, force: float) -> None:
    """Let colour words colour what they stand beside, and unknown words turn a group of roles a little, in place."""
    strength = min(1.0, 0.85 * force)
    loose: list[str] = []
    for index, (word, found) in enumerate(reading.words):
        noun = _noun_near(reading.words, index)
        for name in (sense for sense in found if sense in HUES and sense not in reading.unwanted):
            if noun is None:
                loose.append(name)
            for role in _TARGETS[noun] if noun else ():
                colours[role] = tint(colours[role], HUES[name], strength)
        if not found and word not in STOP_WORDS:
            lean = hsv_to_rgb(chance("hue", word), 0.75, 0.85)
            share = min(0.6, 0.30 * force) / (1.0 + 0.12 * index)
            for role in _LEANING[int(chance("role", word) * len(_LEANING))]:
                colours[role] = turn(colours[role], distance(lean, colours[role]) * share, 1.0 + 0.3 * share)
    for number, role in enumerate(_PAINTED if loose else ()):  # several colours share the roles, they do not mix to mud
        name = loose[number % len(loose)]
        colours[role] = tint(colours[role], HUES[name], strength * 0.85)


def _noun_near(words: Sequence[tuple[str, tuple[str, ...]]], index: int) -> str | None:
    """What a colour word at `index` colours: the first known thing of its own or the next two words, else the one before."""
    for _, found in (*words[index : index + 3], *words[max(0, index - 1) : index]):  # "red sea", and "하늘은 빨갛게"
        for sense in found:
            if sense in _TARGETS:
                return sense
    return None


def _grade(colour: Colour, unwanted: set[str], styles: frozenset[str], force: float) -> Colour:
    """One colour after unwanted hues, styles and guidance."""
    for name in (hue for hue in HUES if hue in unwanted):  # in a fixed order: a set's varies from process to process
        if name in {"white", "black", "grey", "brown"}:
            continue
        apart = distance(colour, HUES[name])
        if abs(apart) < 0.12:
            colour = turn(colour, math.copysign(0.17 - abs(apart), apart), 0.85)
    saturation = 0.30 + 0.70 * force
    light = light_of(colour)
    if "vivid" in styles:
        saturation *= 1.3
    if "mono" in styles:
        saturation = 0.0
    colour = mix((light, light, light), colour, saturation)
    if "pastel" in styles or "watercolor" in styles:
        colour = mix(colour, mix((1.0, 0.98, 0.97), colour, 0.25), 0.52)
    if "dreamy" in styles:
        colour = mix(colour, (0.86, 0.72, 0.92), 0.16)
    if "vintage" in styles:
        light = light_of(colour)
        colour = mix(colour, (0.10 + 0.88 * light, 0.08 + 0.78 * light, 0.10 + 0.58 * light), 0.6)
    if "dark" in styles:
        colour = mix(colour, (0.01, 0.01, 0.03), 0.48)
    return (min(1.0, max(0.0, colour[0])), min(1.0, max(0.0, colour[1])), min(1.0, max(0.0, colour[2])))
