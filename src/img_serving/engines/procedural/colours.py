"""Arithmetic with single colours: mixing, tinting and turning their hues."""

from __future__ import annotations

from colorsys import hsv_to_rgb, rgb_to_hsv

Colour = tuple[float, float, float]
"""Red, green and blue, each from 0 to 1."""

BLACK: Colour = (0.0, 0.0, 0.0)
WHITE: Colour = (1.0, 1.0, 1.0)


def rgb(text: str) -> Colour:
    """A colour from six hex digits."""
    return (int(text[0:2], 16) / 255, int(text[2:4], 16) / 255, int(text[4:6], 16) / 255)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` (0 to 1) of the second colour in the first."""
    return (
        first[0] + (second[0] - first[0]) * share,
        first[1] + (second[1] - first[1]) * share,
        first[2] + (second[2] - first[2]) * share,
    )


def light_of(colour: Colour) -> float:
    """Luma (Rec. 601), 0 to 1."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def tint(colour: Colour, towards: Colour, strength: float) -> Colour:
    """Towards another hue; brightness follows only halfway, so that a red night is still a night."""
    here, there = light_of(colour), max(light_of(towards), 0.02)
    wanted = 0.62 * here + 0.38 * there
    if wanted <= there:
        tinted = mix(BLACK, towards, wanted / there)
    else:
        tinted = mix(towards, WHITE, (wanted - there) / (1.0 - there + 1e-6) * 0.8)
    return mix(colour, tinted, strength)


def turn(colour: Colour, turns: float, saturation: float = 1.0) -> Colour:
    """Rotate the hue by a share of the circle and scale the saturation."""
    hue, old, value = rgb_to_hsv(*colour)
    return hsv_to_rgb((hue + turns) % 1.0, min(1.0, old * saturation), value)


def distance(first: Colour, second: Colour) -> float:
    """How far apart two hues are, as a share of the circle with its sign, -0.5 to 0.5."""
    return (rgb_to_hsv(*first)[0] - rgb_to_hsv(*second)[0] + 0.5) % 1.0 - 0.5
