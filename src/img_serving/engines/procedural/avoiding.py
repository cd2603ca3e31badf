"""Avoiding: takes the hues that the negative prompt names out of pixels and out of single colours."""

from __future__ import annotations

import numpy as np

from img_serving.engines.procedural.colours import Colour
from img_serving.engines.procedural.fields import Array


def avoid(planes: Array, name: str) -> None:
    """Take a hue out of pixels [3, h, w], in place."""
    red, green, blue = planes
    zero = np.float32(0.0)
    if name in {"red", "pink"}:
        red -= np.maximum(red - np.maximum(green, blue), zero) * np.float32(0.92)
    elif name == "green":
        green -= np.maximum(green - np.maximum(red, blue), zero) * np.float32(0.92)
    elif name == "blue":
        blue -= np.maximum(blue - np.maximum(red, green), zero) * np.float32(0.92)
    elif name in {"yellow", "orange", "gold", "brown"}:
        blue += np.maximum(np.minimum(red, green) - blue, zero) * np.float32(0.85)
    elif name == "purple":
        green += np.maximum(np.minimum(red, blue) - green, zero) * np.float32(0.85)
    elif name == "cyan":
        red += np.maximum(np.minimum(green, blue) - red, zero) * np.float32(0.85)
    elif name == "white":
        planes -= np.maximum(planes - np.float32(0.62), zero) * np.float32(0.8)
    elif name == "black":
        planes += np.maximum(np.float32(0.38) - planes, zero) * np.float32(0.7)


def kept(colour: Colour, avoided: tuple[str, ...]) -> Colour:
    """A colour without what is avoided."""
    plane = np.array(colour, np.float32).reshape(3, 1, 1)
    for name in avoided:
        avoid(plane, name)
    return (float(plane[0, 0, 0]), float(plane[1, 0, 0]), float(plane[2, 0, 0]))
